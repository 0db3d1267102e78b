"""Compute a region of a traced parameter from as little of the stored tensors as its operations allow.

`descend` pushes a region down through each operation that it knows to the stored tensors. What it does not know is
computed whole, one result at a time. It serves two worlds: arrays (`part`) and places in files (`places`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any, Protocol, TypeVar

import mlx.core as mx

from moectl.model.regions import Region
from moectl.shards.trace.formats import dequantise_blocks, quantise
from moectl.shards.trace.traced import Expression, Operation, Shape, Stored

Index = tuple[slice, ...]
Read = Callable[[str, mx.Dtype, Region], mx.array]  # a part of a stored tensor, its elements taken as of this type

CHUNK_BYTES = 2 << 20

T = TypeVar("T")


class World(Protocol[T]):
    """What stands for an array while a region is pushed down."""

    def load(self, node: Stored, region: Region) -> T: ...
    def transpose(self, value: T, order: Sequence[int]) -> T: ...
    def take(self, value: T, index: Index) -> T: ...
    def reshape(self, value: T, shape: Shape) -> T: ...
    def view(self, value: T, dtype: mx.Dtype) -> T: ...
    def concatenate(self, values: list[T], axis: int) -> T: ...
    def stack(self, values: list[T], axis: int) -> T: ...
    def run(self, operation: Operation, values: list[T]) -> T: ...


class Arrays:
    """Real arrays: what is read is read at once, what is computed waits to be evaluated."""

    def __init__(self, read: Read) -> None:
        self._read = read

    def load(self, node: Stored, region: Region) -> mx.array:
        return self._read(node.name, node.dtype, region)

    def transpose(self, value: mx.array, order: Sequence[int]) -> mx.array:
        return value.transpose(order)

    def take(self, value: mx.array, index: Index) -> mx.array:
        return value[index] if index else value

    def reshape(self, value: mx.array, shape: Shape) -> mx.array:
        return value.reshape(shape)

    def view(self, value: mx.array, dtype: mx.Dtype) -> mx.array:
        return value.view(dtype)

    def concatenate(self, values: list[mx.array], axis: int) -> mx.array:
        return values[0] if len(values) == 1 else mx.concatenate(values, axis)

    def stack(self, values: list[mx.array], axis: int) -> mx.array:
        return mx.stack(values, axis)

    def run(self, operation: Operation, values: list[mx.array]) -> mx.array:
        done: mx.array = operation.run(values)
        return done


def part(node: Expression, region: Region, read: Read) -> mx.array:
    """Return a region of a parameter, equal bit for bit to the same slice of the whole; not evaluated."""
    return descend(node, region, Arrays(read))


def full(shape: Shape) -> Region:
    """Return the region that covers a shape."""
    return tuple((0, n) for n in shape)


def chunks(region: Region, item_bytes: int, limit_bytes: int = CHUNK_BYTES) -> Iterator[Region]:
    """Yield regions that follow each other in memory and together are this one, each of at most about `limit_bytes`."""
    inner = item_bytes
    axis = len(region) - 1
    while axis > 0 and inner * (region[axis][1] - region[axis][0]) <= limit_bytes:
        inner *= region[axis][1] - region[axis][0]
        axis -= 1
    yield from _cut(region, axis, max(1, limit_bytes // max(1, inner))) if region else [region]


def _cut(region: Region, axis: int, step: int) -> Iterator[Region]:
    """Yield a region index by index of the axes before `axis`, and `step` by `step` along that."""
    (start, stop), *rest = region
    if axis == 0:
        yield from (((i, min(i + step, stop)), *rest) for i in range(start, stop, step))
        return
    for i in range(start, stop):
        yield from (((i, i + 1), *inner) for inner in _cut(tuple(rest), axis - 1, step))


def descend(node: Expression, region: Region, world: World[T]) -> T:
    """Return a region of an expression in a world."""
    if isinstance(node, Stored):
        return world.load(node, region)
    handle = _HANDLERS.get(node.operation.name)
    if handle is not None and (handle is _elementwise or not node.operation.constants):
        found: T | None = handle(node, region, world)
        if found is not None:
            return found
    whole = world.run(node.operation, [descend(x, full(x.shape), world) for x in node.inputs])
    return world.take(whole, _slices(region))


def _slices(region: Region) -> Index:
    return tuple(slice(*span) for span in region)


def _span_within(inner: tuple[int, int], outer: tuple[int, int]) -> slice:
    return slice(inner[0] - outer[0], inner[1] - outer[0])


def _widen(span: tuple[int, int], unit: int) -> tuple[int, int]:
    """Return the units of which elements of a span are, from the first to beyond the last."""
    return span[0] // unit, -(-span[1] // unit)


# Operations that move elements and change none.


def _stack(node: Expression, region: Region, world: World[T]) -> T | None:
    if any(x.dtype != node.dtype for x in node.inputs):
        return None
    axis = _argument(node.operation, "axis", 1, 0) % node.ndim
    rest = (*region[:axis], *region[axis + 1 :])
    return world.stack([descend(x, rest, world) for x in node.inputs[slice(*region[axis])]], axis)


def _concatenate(node: Expression, region: Region, world: World[T]) -> T | None:
    if any(x.dtype != node.dtype for x in node.inputs):
        return None
    axis = _argument(node.operation, "axis", 1, 0) % node.ndim
    parts = []
    ends = list(accumulate([0, *[x.shape[axis] for x in node.inputs]]))
    for x, (start, stop) in zip(node.inputs, pairwise(ends), strict=True):
        low, high = max(region[axis][0], start), min(region[axis][1], stop)
        if low < high:
            parts.append(descend(x, _with(region, axis, (low - start, high - start)), world))
    return world.concatenate(parts, axis)


def _split(node: Expression, region: Region, world: World[T]) -> T:
    (source,) = node.inputs
    assert node.operation.result is not None
    axis = _argument(node.operation, "axis", 2, 0) % source.ndim
    how = _argument(node.operation, "indices_or_sections", 1, None)
    count = how if isinstance(how, int) else 0
    ends = [source.shape[axis] // count * i for i in range(1, count)] if count else list(how)
    start = [0, *ends][node.operation.result]
    low, high = region[axis]
    return descend(source, _with(region, axis, (low + start, high + start)), world)


def _transpose(node: Expression, region: Region, world: World[T]) -> T:
    (source,) = node.inputs
    probe = mx.zeros(tuple(range(1, 1 + source.ndim)))  # lengths that tell the axes apart
    order = [n - 1 for n in node.operation.run([probe]).shape]
    back = tuple(region[order.index(axis)] for axis in range(source.ndim))
    return world.transpose(descend(source, back, world), order)


def _getitem(node: Expression, region: Region, world: World[T]) -> T | None:
    (source,) = node.inputs[:1]
    index = node.operation.args[1]
    index = index if isinstance(index, tuple) else (index,)
    if len(node.inputs) > 1 or not all(i is None or i is Ellipsis or type(i) in (int, slice) for i in index):
        return None
    if Ellipsis not in index:
        index = (*index, Ellipsis)
    at = index.index(Ellipsis)
    given = sum(i is not None for i in index) - 1
    index = (*index[:at], *[slice(None)] * (source.ndim - given), *index[at + 1 :])
    lengths, spans, wanted = iter(source.shape), list[tuple[int, int]](), iter(region)
    steps, shape = list[slice](), list[int]()
    for i in index:
        if i is None:
            next(wanted)
            shape.append(1)
        elif isinstance(i, int):
            start = i % next(lengths)
            spans.append((start, start + 1))
            steps.append(slice(None))
        else:
            start, _, step = i.indices(next(lengths))
            if step < 1:
                return None
            low, high = next(wanted)
            spans.append((start + low * step, start + (high - 1) * step + 1))
            steps.append(slice(None, None, step))
            shape.append(high - low)
    value = descend(source, tuple(spans), world)
    if any(s.step not in (None, 1) for s in steps):
        value = world.take(value, tuple(steps))
    return value if len(shape) == source.ndim and None not in index else world.reshape(value, tuple(shape))


def _reshape(node: Expression, region: Region, world: World[T]) -> T | None:
    """Handle all that leaves the elements in their order: reshape, flatten, squeeze and the like."""
    (source,) = node.inputs
    low: list[tuple[int, int]] = []
    shape: list[int] = []
    index: list[slice] = []
    for old, new in pair_axes(source.shape, node.shape):
        spans = region[new]
        lengths, stored = node.shape[new], source.shape[old]
        if len(stored) == 1:
            first = next((i for i, (a, b) in enumerate(spans) if b - a > 1), len(spans) - 1)
            if any(span != (0, n) for span, n in zip(spans[first + 1 :], lengths[first + 1 :], strict=True)):
                axis = new.start + first  # not one run of stored elements: index by index
                rows = [_with(region, axis, (i, i + 1)) for i in range(*region[axis])]
                return world.concatenate([descend(node, row, world) for row in rows], axis)
            inner = math.prod(lengths[first + 1 :])
            start = sum(a * math.prod(lengths[i + 1 :]) for i, (a, _) in enumerate(spans))
            low.append((start, start + (spans[first][1] - spans[first][0]) * inner if spans else stored[0]))
            shape.extend(b - a for a, b in spans)
            index.extend(slice(None) for _ in spans)
        elif len(lengths) == 1 and stored:
            inner = math.prod(stored[1:])
            outer = _widen(spans[0], inner)
            low.extend([outer, *full(stored[1:])])
            shape.append((outer[1] - outer[0]) * inner)
            index.append(_span_within(spans[0], (outer[0] * inner, 0)))
        else:
            low.extend(full(stored))
            shape.extend(lengths)
            index.extend(_slices(spans))
    value = world.reshape(descend(source, tuple(low), world), tuple(shape))
    return world.take(value, tuple(index))


def pair_axes(old: Shape, new: Shape) -> Iterator[tuple[slice, slice]]:
    """Yield the smallest groups of axes of two shapes that hold the same elements."""
    i = j = 0
    while i < len(old) or j < len(new):
        first, second = i, j
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while (a := math.prod(old[first:i])) != (b := math.prod(new[second:j])):
            if a < b:
                i += 1
            else:
                j += 1
        if i == len(old) or j == len(new):  # what is left are axes of one element
            i, j = len(old), len(new)
        yield slice(first, i), slice(second, j)


def _view(node: Expression, region: Region, world: World[T]) -> T | None:
    (source,) = node.inputs
    if not region:
        return None
    old, new = source.dtype.size, node.dtype.size
    (low, high) = region[-1]
    if new >= old:
        times = new // old
        value = descend(source, (*region[:-1], (low * times, high * times)), world)
        return world.view(value, node.dtype)
    times = old // new
    start, stop = _widen((low, high), times)
    value = world.view(descend(source, (*region[:-1], (start, stop)), world), node.dtype)
    return world.take(value, (*[slice(None)] * (len(region) - 1), _span_within((low, high), (start * times, 0))))


# Operations that compute.


def _elementwise(node: Expression, region: Region, world: World[T]) -> T:
    """Handle operations on elements whose rounding does not depend on their place: no exponentials, no sums."""
    values = [descend(x, _narrow(x.shape, region), world) for x in node.inputs]
    args = tuple(
        a[_slices(_narrow(tuple(a.shape), region))] if isinstance(a, mx.array) else a for a in node.operation.args
    )
    return world.run(replace(node.operation, args=args), values)


def _narrow(shape: Shape, region: Region) -> Region:
    """Return the region of an operand that is broadcast to a result of which `region` is wanted."""
    spans = region[len(region) - len(shape) :]
    return tuple((0, 1) if n == 1 else span for n, span in zip(shape, spans, strict=True))


def _dequantise_blocks(node: Expression, region: Region, world: World[T]) -> T:
    weight, scale = node.inputs
    *_, block, _ = node.operation.args
    rows, columns = _widen(region[-2], block[0]), _widen(region[-1], block[1])
    values = [descend(weight, region, world), descend(scale, (*region[:-2], rows, columns), world)]
    skip = region[-2][0] - rows[0] * block[0], region[-1][0] - columns[0] * block[1]
    return world.run(replace(node.operation, args=(*node.operation.args[:-1], skip)), values)


def _quantise(node: Expression, region: Region, world: World[T]) -> T | None:
    """Handle one of the results of a quantisation: rows are independent, and so are groups of a row."""
    source, groups = node.inputs[0], _groups(node.operation)
    if groups is None or len(node.inputs) > 1:
        return None
    group, bits = groups
    per_group = group * bits // 32 if node.operation.result == 0 else 1
    start, stop = _widen(region[-1], per_group)
    value = descend(source, (*region[:-1], (start * group, stop * group)), world)
    return _inner(world.run(node.operation, [value]), region, start * per_group, world)


def _dequantise(node: Expression, region: Region, world: World[T]) -> T | None:
    groups = _groups(node.operation)
    if groups is None or len(node.inputs) < 2:
        return None
    group, bits = groups
    start, stop = _widen(region[-1], group)
    words = group * bits // 32
    spans = [(start * words, stop * words), *[(start, stop)] * (len(node.inputs) - 1)]
    values = [descend(x, (*region[:-1], s), world) for x, s in zip(node.inputs, spans, strict=True)]
    return _inner(world.run(node.operation, values), region, start * group, world)


def _inner(value: T, region: Region, start: int, world: World[T]) -> T:
    """Return the part of a value whose last axis begins at `start` and holds more than the region."""
    return world.take(value, (*[slice(None)] * (len(region) - 1), _span_within(region[-1], (start, 0))))


def _groups(operation: Operation) -> tuple[int, int] | None:
    """Return group size and bits of a (de)quantisation whose arguments are all given, else None."""
    first = 3 if operation.name == "dequantize" else 1
    group, bits = _argument(operation, "group_size", first, None), _argument(operation, "bits", first + 1, None)
    # A part with an odd number of groups trips MLX's kernels of the other modes; `quantise` minds that.
    affine = operation.name == quantise.__name__ or _argument(operation, "mode", first + 2, "affine") == "affine"
    plain = affine and "global_scale" not in operation.kwargs and isinstance(group, int) and isinstance(bits, int)
    return (group, bits) if plain and group * bits % 32 == 0 else None


def _argument(operation: Operation, name: str, position: int, default: Any) -> Any:
    return operation.kwargs.get(name, operation.args[position] if len(operation.args) > position else default)


def _with(region: Region, axis: int, span: tuple[int, int]) -> Region:
    return (*region[:axis], span, *region[axis + 1 :])


_HANDLERS: dict[str, Callable[[Expression, Region, Any], Any]] = {
    **dict.fromkeys(("transpose", "swapaxes", "moveaxis"), _transpose),
    **dict.fromkeys(("reshape", "flatten", "unflatten", "squeeze", "expand_dims"), _reshape),
    **dict.fromkeys(
        (
            "astype",
            "from_fp8",
            *[
                f"__{name}__"
                for name in ("add", "radd", "iadd", "sub", "rsub", "isub", "mul", "rmul", "imul", "truediv", "neg")
            ],
        ),
        _elementwise,
    ),
    "stack": _stack,
    "concatenate": _concatenate,
    "split": _split,
    "view": _view,
    "__getitem__": _getitem,
    "dequantize": _dequantise,
    "quantize": _quantise,
    quantise.__name__: _quantise,
    dequantise_blocks.__name__: _dequantise_blocks,
}
