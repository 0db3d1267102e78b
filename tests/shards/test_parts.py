"""Parts of any chain of operations, known and unknown, against MLX on the whole; and the places of their bytes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings, strategies as st
from mlx_lm.models import base

from moectl.model.regions import Region
from moectl.shards.trace.parts import full, part
from moectl.shards.trace.places import find_rectangles
from moectl.shards.trace.traced import Stored, form_of, trace
from tests.shards.test_places import kind_of
from tests.shards.test_trace import equal, regions

Change = Callable[[Any], Any]  # of a real array and of a traced one alike


class Chain:
    """A model whose `sanitize` is a chain of operations; `mx` there is what `trace` puts into mlx-lm's files."""

    def __init__(self, changes: list[Change]) -> None:
        self._changes = changes

    def sanitize(self, weights: dict[str, Any]) -> dict[str, Any]:
        value = weights["a"]
        for change in self._changes:
            value = change(value)
        return {"a": value}


def factors(draw: st.DrawFn, size: int) -> tuple[int, ...]:
    shape = []
    for _ in range(draw(st.integers(0, 3))):
        divisor = draw(st.sampled_from([d for d in range(1, size + 1) if size % d == 0]))
        shape.append(divisor)
        size //= divisor
    return (*shape, size)


@st.composite
def change_of(draw: st.DrawFn, shape: tuple[int, ...], dtype: mx.Dtype) -> Change:
    """Draw an operation that an array of this form allows."""
    ndim, size = len(shape), math.prod(shape)
    axis = draw(st.integers(0, ndim - 1)) if ndim else 0
    other = draw(st.integers(0, ndim - 1)) if ndim else 0
    target = factors(draw, size)
    start = draw(st.integers(0, shape[axis] - 1)) if ndim else 0
    stride = draw(st.integers(1, 3))
    before = (slice(None),) * axis
    choices: list[Change] = [
        lambda x: x.reshape(target),
        lambda x: x[None],
        lambda x: x[..., None],
        lambda x: x * 3,
        lambda x: 5 - x,
        lambda x: -x,
        lambda x: x.astype(mx.float32).astype(dtype),
    ]
    if ndim:
        choices += [
            lambda x: x.swapaxes(axis, other),
            lambda x: x.moveaxis(axis, other),
            lambda x: x.T,
            lambda x: x.flatten(min(axis, other), max(axis, other)),
            lambda x: x[(*before, slice(start, None, stride))],
            lambda x: x[(*before, slice(None, start + 1))],
            lambda x: x[(*before, start)],
            lambda x: x[..., -1:],
            lambda x: x[(*before, slice(None, None, -1))],  # not known
            lambda x: x.cumsum(axis),  # not known
            lambda x: x * mx.arange(shape[-1]).astype(dtype),
            lambda x: (x + x[:1]) if x.dtype == dtype else x,
        ]
        if size < 500:
            choices += [lambda x: joined(x, axis), lambda x: stacked(x, axis)]
        if shape[axis] % 2 == 0:
            choices.append(lambda x: halves(x, axis))
        wider = {1: mx.uint16, 2: mx.uint32, 4: mx.uint64}.get(dtype.size)
        narrower = {2: mx.uint8, 4: mx.uint16, 8: mx.uint32}.get(dtype.size)
        if wider is not None and shape[-1] % 2 == 0:
            choices.append(lambda x: x.view(wider))
        if narrower is not None:
            choices.append(lambda x: x.view(narrower))
    return draw(st.sampled_from(choices))


def function(name: str) -> Callable[..., Any]:
    """Return a function of mx as a model file has it: of real arrays, and while one is traced of expressions."""
    made: Callable[..., Any] = getattr(base.mx, name)
    return made


def joined(x: Any, axis: int) -> Any:
    return function("concatenate")([x, x + 1, x], axis=axis)


def stacked(x: Any, axis: int) -> Any:
    return function("stack")([x, x * 2], axis)


def halves(x: Any, axis: int) -> Any:
    return function("split")(x, 2, axis=axis)[1]


@st.composite
def chains(draw: st.DrawFn) -> tuple[mx.array, list[Change], mx.array]:
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=3)))
    dtype = draw(st.sampled_from([mx.uint8, mx.uint16, mx.uint32, mx.int32]))
    source = (mx.arange(math.prod(shape)) * 37 % 251).astype(dtype).reshape(shape)
    changes: list[Change] = []
    value = source
    for _ in range(draw(st.integers(1, 5))):
        change = draw(change_of(tuple(value.shape), value.dtype))
        value = change(value)
        changes.append(change)
    return source, changes, value


@settings(max_examples=200, deadline=None)
@given(chain=chains(), data=st.data())
def test_any_part_of_any_chain_equals_the_slice_of_the_whole(
    chain: tuple[mx.array, list[Change], mx.array], data: st.DataObject
) -> None:
    source, changes, whole = chain

    def read(name: str, dtype: mx.Dtype, region: Region) -> mx.array:
        return source[tuple(slice(*span) for span in region)] if region else source

    stored = Stored("a", form_of(tuple(source.shape), source.dtype))
    node = trace(Chain(changes), {"a": stored})["a"]
    assert (node.shape, node.dtype) == (tuple(whole.shape), whole.dtype)
    assert equal(part(node, full(node.shape), read), whole)
    region = data.draw(regions(node.shape))
    expected = whole[tuple(slice(*span) for span in region)] if region else whole
    assert equal(part(node, region, read), expected)

    rectangles = find_rectangles(node, region)
    if rectangles is None:
        return
    stored_bytes = bytes(memoryview(source.reshape(-1).view(mx.uint8)))  # type: ignore[arg-type]  # a buffer
    found = b""
    for r in rectangles:
        assert r.at * whole.dtype.size == len(found)
        item = whole.dtype.size
        rows = [stored_bytes[r.offset + i * r.stride :][: r.cols * item] for i in range(r.rows)]
        if r.transposed:
            rows = [b"".join(row[c * item : (c + 1) * item] for row in rows) for c in range(r.cols)]
        found += b"".join(rows)
    assert found == bytes(memoryview(mx.contiguous(expected).reshape(-1).view(mx.uint8)))  # type: ignore[arg-type]


def test_what_is_not_known_is_computed_whole() -> None:
    stored = Stored("a", form_of((4, 6), mx.float32))
    node = trace(Chain([lambda x: x / mx.ones((6,)), lambda x: x.cumsum(0)]), {"a": stored})["a"]
    asked: list[Region] = []

    def read(name: str, dtype: mx.Dtype, region: Region) -> mx.array:
        asked.append(region)
        return mx.ones((4, 6))[tuple(slice(*span) for span in region)]

    assert part(node, ((3, 4), (0, 1)), read).tolist() == [[4.0]]
    assert asked == [((0, 4), (0, 6))]
    assert kind_of(node) == "computed"


def test_a_constant_that_changes_later_keeps_its_value() -> None:
    def add(x: Any) -> Any:
        ones = mx.ones((2,))
        y = x + ones
        ones += 5
        return y + ones

    stored = Stored("a", form_of((2,), mx.float32))
    node = trace(Chain([add]), {"a": stored})["a"]
    assert part(node, ((0, 2),), lambda *_: mx.zeros((2,))).tolist() == [7.0, 7.0]


@pytest.mark.parametrize("factor", [0.0, -0.0])
def test_zeros_of_both_signs_are_told_apart(factor: float) -> None:
    stored = Stored("a", form_of((1,), mx.float32))
    node = trace(Chain([lambda x: x * factor]), {"a": stored})["a"]
    assert repr(part(node, ((0, 1),), lambda *_: mx.ones((1,))).tolist()) == repr([factor])


def test_a_change_in_place_reaches_every_name_of_an_array() -> None:
    class Model:
        def sanitize(self, weights: dict[str, Any]) -> dict[str, Any]:
            made = dict(weights, b=weights["a"])
            for value in weights.values():
                value *= 3
                value += mx.ones((2,))
            return made

    stored = {"a": Stored("a", form_of((2,), mx.float32))}
    traced = trace(Model(), stored)
    for name in ("a", "b"):
        assert part(traced[name], ((0, 2),), lambda *_: mx.full((2,), 2.0)).tolist() == [7.0, 7.0]
    assert isinstance(stored["a"], Stored)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: function("concatenate")([mx.full((2, 2), 5.0), x]),
        lambda x: function("stack")([mx.full((2, 2), 5.0), x]),
        lambda x: function("concatenate")([x.astype(mx.uint8), x]),
        lambda x: function("stack")([x.astype(mx.uint8), x]),
        lambda x: function("where")(mx.array([[True, False]]), x, x + 1),
    ],
    ids=["join", "stack", "join types", "stack types", "where"],
)
def test_constants_and_types_among_the_inputs_are_heeded(change: Change) -> None:
    source = mx.array([[1.0, 2.0], [3.0, 4.0]])
    whole = change(source)
    node = trace(Chain([change]), {"a": Stored("a", form_of((2, 2), mx.float32))})["a"]
    first = tuple((0, 1) for _ in node.shape)
    got = part(node, first, lambda _, __, region: source[tuple(slice(*span) for span in region)])
    assert equal(got, whole[tuple(slice(*span) for span in first)])
