"""Find where the bytes of a region lie in the stored tensors, when they are there as they are.

`find_rectangles` says of a region of a traced parameter whether it is a plain copy of stored bytes, a transposed one,
or has to be computed. It reads nothing. A rectangle has what the writer's pieces need.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import mlx.core as mx

from moectl.model.regions import Region
from moectl.shards.trace.parts import Index, descend, pair_axes
from moectl.shards.trace.traced import Expression, Operation, Shape, Stored

_MOST = 4096  # a region in more pieces than this is quicker computed


@dataclass(frozen=True, slots=True)
class Rectangle:
    """Rows of a stored tensor that become consecutive elements of a region."""

    name: str  # of the stored tensor
    offset: int  # bytes from the tensor's first byte to the rectangle's
    stride: int  # bytes from one stored row to the next
    rows: int  # as stored
    cols: int  # as stored, in elements of the result's type
    transposed: bool  # stored (in, out); the result is (out, in)
    at: int  # elements of the region before it


def find_rectangles(node: Expression, region: Region) -> list[Rectangle] | None:
    """Return the rectangles of which a region consists, in its order; None when it has to be computed."""
    shape = tuple(b - a for a, b in region)
    try:
        places = descend(node, region, _Places())
        found = [r for place in places for piece in _consecutive(place, shape) for r in _rectangles(piece, shape)]
    except _Computed:
        return None
    return sorted(found, key=lambda r: r.at)


class _Computed(Exception):
    """The bytes are not stored as they are."""


@dataclass(frozen=True, slots=True)
class _Place:
    """A box of a result and where its elements lie: at offset + index · strides, in bytes."""

    name: str
    offset: int
    item: int  # bytes of an element
    strides: tuple[int, ...]
    shape: Shape
    start: tuple[int, ...]  # of the box, in the result


class _Places:
    """The world in which an array is a list of places."""

    def load(self, node: Stored, region: Region) -> list[_Place]:
        item = node.dtype.size
        strides = _strides(node.shape, item)
        offset = sum(a * s for (a, _), s in zip(region, strides, strict=True))
        return [_Place(node.name, offset, item, strides, tuple(b - a for a, b in region), (0,) * len(region))]

    def transpose(self, value: list[_Place], order: Sequence[int]) -> list[_Place]:
        def turn(numbers: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(numbers[axis] for axis in order)

        return [replace(p, strides=turn(p.strides), shape=turn(p.shape), start=turn(p.start)) for p in value]

    def take(self, value: list[_Place], index: Index) -> list[_Place]:
        return [taken for p in value if (taken := _take(p, index)) is not None]

    def reshape(self, value: list[_Place], shape: Shape) -> list[_Place]:
        (place,) = value if len(value) == 1 else _refuse()
        strides: list[int] = []
        for old, new in pair_axes(place.shape, shape):
            axes = [(n, s) for n, s in zip(place.shape[old], place.strides[old], strict=True) if n != 1]
            if any(s != n * inner for (_, s), (n, inner) in pairwise(axes)):
                raise _Computed  # these axes are no run of bytes
            strides.extend(_strides(shape[new], axes[-1][1] if axes else place.item))
        return [replace(place, strides=tuple(strides), shape=shape, start=(0,) * len(shape))]

    def view(self, value: list[_Place], dtype: mx.Dtype) -> list[_Place]:
        return [_view(place, dtype.size) for place in value]

    def concatenate(self, values: list[list[_Place]], axis: int) -> list[_Place]:
        lengths = [max(p.start[axis] + p.shape[axis] for p in value) for value in values]
        befores = accumulate([0, *lengths[:-1]])
        return [_shift(p, axis, before) for value, before in zip(values, befores, strict=True) for p in value]

    def stack(self, values: list[list[_Place]], axis: int) -> list[_Place]:
        return [_insert(p, axis, i) for i, value in enumerate(values) for p in value]

    def run(self, operation: Operation, values: list[list[_Place]]) -> list[_Place]:
        raise _Computed


def _refuse() -> list[_Place]:
    raise _Computed


def _strides(shape: Shape, item: int) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) * item for axis in range(len(shape)))


def _take(place: _Place, index: Index) -> _Place | None:
    """Return what a slice leaves of a place, None where it leaves nothing."""
    offset, strides, shape, start = place.offset, list(place.strides), list(place.shape), list(place.start)
    for axis, cut in enumerate(index):
        step, low = cut.step or 1, cut.start or 0
        high = start[axis] + shape[axis] if cut.stop is None else min(cut.stop, start[axis] + shape[axis])
        first = max(0, -(-(start[axis] - low) // step))  # the number, in the result, of the first one here
        count = -(-(high - low) // step) - first
        if count <= 0:
            return None
        offset += (low + first * step - start[axis]) * strides[axis]
        strides[axis] *= step
        shape[axis], start[axis] = count, first
    return replace(place, offset=offset, strides=tuple(strides), shape=tuple(shape), start=tuple(start))


def _view(place: _Place, item: int) -> _Place:
    """Return a place with its bytes taken as elements of another size."""
    if item == place.item:
        return place
    length, start = place.shape[-1] * place.item, place.start[-1] * place.item
    dense = place.strides[-1] == place.item or place.shape[-1] == 1
    if not dense or length % item or start % item:
        raise _Computed
    strides = (*place.strides[:-1], item)
    return replace(
        place,
        item=item,
        strides=strides,
        shape=(*place.shape[:-1], length // item),
        start=(*place.start[:-1], start // item),
    )


def _shift(place: _Place, axis: int, by: int) -> _Place:
    start = place.start
    return replace(place, start=(*start[:axis], start[axis] + by, *start[axis + 1 :]))


def _insert(place: _Place, axis: int, number: int) -> _Place:
    def put(numbers: tuple[int, ...], value: int) -> tuple[int, ...]:
        return (*numbers[:axis], value, *numbers[axis:])

    return replace(place, strides=put(place.strides, 0), shape=put(place.shape, 1), start=put(place.start, number))


def _consecutive(place: _Place, shape: Shape) -> list[_Place]:
    """Cut a place into such as fill consecutive elements of the result."""
    axis = next((i for i, n in enumerate(place.shape) if n != 1), len(shape))
    if place.shape[axis + 1 :] == shape[axis + 1 :]:
        return [place]
    return [p for row in _rows(place, axis) for p in _consecutive(row, shape)]


def _rows(place: _Place, axis: int) -> Iterator[_Place]:
    if place.shape[axis] > _MOST:
        raise _Computed
    for i in range(place.shape[axis]):
        one = replace(place, offset=place.offset + i * place.strides[axis])
        one = replace(one, shape=(*place.shape[:axis], 1, *place.shape[axis + 1 :]))
        yield _shift(one, axis, i)


def _rectangles(place: _Place, shape: Shape) -> list[Rectangle]:
    at = sum(a * n for a, n in zip(place.start, _strides(shape, 1), strict=True))
    axes: list[tuple[int, int]] = []  # (length, stride) of those that do not follow from the next
    for length, stride in zip(place.shape, place.strides, strict=True):
        if length == 1:
            continue
        if axes and axes[-1][1] == length * stride:
            axes[-1] = axes[-1][0] * length, stride
        else:
            axes.append((length, stride))
    item = place.item
    match axes:
        case []:
            return [Rectangle(place.name, place.offset, item, 1, 1, False, at)]
        case [(length, stride)] if stride == item:
            return [Rectangle(place.name, place.offset, length * item, 1, length, False, at)]
        case [(length, stride)]:
            return [Rectangle(place.name, place.offset, stride, length, 1, False, at)]
        case [(rows, stride), (cols, inner)] if inner == item:
            return [Rectangle(place.name, place.offset, stride, rows, cols, False, at)]
        case [(cols, inner), (rows, stride)] if inner == item:
            return [Rectangle(place.name, place.offset, stride, rows, cols, True, at)]
    axis = next(i for i, n in enumerate(place.shape) if n != 1)
    return [r for row in _rows(place, axis) for r in _rectangles(row, shape)]
