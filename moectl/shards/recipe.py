"""The recipe of a shard set: its files, their headers, and the source of each byte.

It reads no weights and writes nothing. `writer` makes the files, and `quantize` computes. The pieces of a file are
found when it is made: a large model has a million of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from moectl.errors import PlanError
from moectl.model.ownership import Holding, find_holding
from moectl.model.placement import Placement
from moectl.model.regions import Region, belongs_to_sum, find_regions
from moectl.model.structure import Quantization
from moectl.shards.blueprint import Blueprint
from moectl.shards.look.flow import names_of_rank
from moectl.shards.look.units import divisions_of
from moectl.shards.source.stored import spell
from moectl.shards.source.tensors import FLOATS, ITEM_BYTES, StoredTensor, item_bytes
from moectl.shards.trace.parts import chunks, full
from moectl.shards.trace.places import Rectangle, find_rectangles
from moectl.shards.trace.precision import source_of
from moectl.shards.trace.traced import Expression, record, sources

_RANK = {dtype: i for i, dtype in enumerate(ITEM_BYTES)}
_PARTS = ("weight", "scales", "biases")
_PIECE_BYTES = 64 << 20  # larger matrices are cut by rows, so that two threads can work on one


@dataclass(frozen=True, slots=True)
class Matrix:
    """A rectangle of a stored tensor, and the type of its result."""

    rows: int  # as stored
    cols: int  # as stored, in elements
    dtype: str  # as stored, safetensors' spelling
    transposed: bool  # stored (in, out); the result is (out, in)
    target: Quantization | str  # how to quantise, or the dtype of the result

    @property
    def is_copy(self) -> bool:
        """Whether the result is the stored bytes."""
        return self.target == self.dtype and not self.transposed

    def part_row_bytes(self, columns: int) -> tuple[int, ...]:
        """Return the bytes of `columns` elements of a result row in each part (weight, scales, biases)."""
        return part_bytes(columns, self.dtype, self.target)


@dataclass(frozen=True, slots=True)
class Computed:
    """A region of an expression that MLX has to compute, and how its result is quantised."""

    node: Expression
    region: Region
    target: Quantization | None


@dataclass(frozen=True, slots=True)
class Piece:
    """One matrix to write: where it is read, and where its parts are written."""

    file: str  # source file; of what is computed, the first one
    offset: int  # of the first byte, in the source file
    stride: int  # bytes from one stored row to the next
    work: Matrix | Computed
    to: tuple[int, ...]  # absolute offset of each part in the output file

    @property
    def is_copy(self) -> bool:
        """Whether it needs no array library."""
        return isinstance(self.work, Matrix) and self.work.is_copy


@dataclass(frozen=True, slots=True)
class _Array:
    """What a file holds of one parameter: of a quantised one, its parts together."""

    names: tuple[str, ...]
    node: Expression  # before it is quantised
    target: Quantization | None
    at: tuple[int, ...] = ()  # absolute offset of each part


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One safetensors file of a shard set."""

    path: str
    header: bytes
    tensors: Mapping[str, tuple[Region, ...]]  # name → the regions of the parameter that it holds; none: all of it
    sources: tuple[str, ...]  # files of the checkpoint that it is made of
    bytes: int
    _arrays: tuple[_Array, ...] = field(repr=False)
    stored: Mapping[str, StoredTensor] = field(repr=False)  # of the checkpoint

    @property
    def pieces(self) -> list[Piece]:
        """The pieces of which it consists, in the order in which they are read."""
        found = [piece for array in self._arrays for piece in _find_pieces(array, self.stored)]
        return sorted(found, key=lambda piece: (piece.file, piece.offset))  # disks are faster when read in order


def plan_files(blueprint: Blueprint, stored: Mapping[str, StoredTensor], placement: Placement) -> list[OutputFile]:
    """Lay out every safetensors file of a shard set, in the order in which it is written.

    It is the order of the source files, so that each is needed during one span of time only. Raises PlanError where the
    model cannot be divided so.
    """
    planner = _Planner(blueprint, stored, placement)
    files = [file for names in planner.group() for file in planner.lay_out(*names)]
    return sorted(files, key=lambda file: max(file.sources, default=""))


def part_bytes(columns: int, dtype: str, target: Quantization | str) -> tuple[int, ...]:
    """Return the bytes of `columns` elements of a row in each part of the result."""
    if isinstance(target, str):
        return (columns * item_bytes(target),)
    groups = columns // target.group_size
    packed = groups * target.group_size * target.bits // 8
    if target.mode == "affine":
        return (packed, groups * item_bytes(dtype), groups * item_bytes(dtype))
    return (packed, groups)


class _Planner:
    def __init__(self, blueprint: Blueprint, stored: Mapping[str, StoredTensor], placement: Placement) -> None:
        self._blueprint = blueprint
        self._stored = stored
        self._placement = placement
        ranks, split = range(placement.world_size), placement.split
        skeleton, flow = blueprint.skeleton, blueprint.found.flow
        divisions = {}
        if split != "layers" and placement.world_size > 1:
            divisions = divisions_of(skeleton.model, blueprint.found.parts, split)
        self._holdings = [placement.hold(divisions, rank) for rank in ranks]
        self._names = [set(blueprint.parameters) for _ in ranks]
        if flow is not None:
            for rank in ranks:
                first, last = split != "layers" or rank == 0, rank == placement.head_rank
                self._names[rank] = names_of_rank(skeleton, flow, placement.layers(rank), first=first, last=last)

    def group(self) -> Iterator[tuple[str, list[str]]]:
        """Yield file names with the parameters that belong there."""
        skeleton, flow = self._blueprint.skeleton, self._blueprint.found.flow
        paths = [f"{skeleton.paths[id(layer)]}." for layer in skeleton.layers]
        groups: dict[str, list[str]] = {"embedding": []}
        groups |= {path: [] for path in paths} | {"head": []}
        depth = paths[0].count(".")
        for name in self._blueprint.parameters:
            prefix = "".join(f"{key}." for key in name.split(".")[:depth])
            if prefix in groups:
                groups[prefix].append(name)
            else:
                is_last = flow is not None and not flow.wants(name, first=True, last=False)
                groups["head" if is_last else "embedding"].append(name)
        numbers = {path: f"layer-{number:03d}" for number, path in enumerate(paths)}
        for key, names in groups.items():
            yield numbers.get(key, key), names

    def lay_out(self, title: str, names: Sequence[str]) -> Iterator[OutputFile]:
        """Yield the files of some parameters: first what all ranks share, then each rank's own."""
        shared = [name for name in names if self._is_shared(name)]
        own = [name for name in names if name not in set(shared)]
        if shared:
            yield self._finish(f"common/{title}.safetensors", [(name, None) for name in shared])
        for rank in range(self._placement.world_size):
            mine = [(name, find_holding(self._holdings[rank], name)) for name in own if name in self._names[rank]]
            if mine and (file := self._finish(f"rank-{rank}/{title}.safetensors", mine)).tensors:
                yield file

    def _is_shared(self, name: str) -> bool:
        if find_holding(self._holdings[0], name) is not None or self._placement.world_size == 1:
            return False
        return all(name in names for names in self._names)

    def _finish(self, path: str, wanted: Sequence[tuple[str, Holding | None]]) -> OutputFile:
        arrays: list[_Array] = []
        regions: dict[str, tuple[Region, ...]] = {}
        forms: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name, holding in wanted:
            base, _, last = name.rpartition(".")
            source, target = source_of(self._blueprint.parameters[name])
            if target is not None and last != "weight":
                continue  # it is written with the weight
            names = (name,) if target is None else tuple(f"{base}.{part}" for part in _PARTS[: _count_parts(target)])
            node = source
            if holding is not None:
                if holding.is_empty or (belongs_to_sum(last, holding.division) and not holding.adds):
                    continue  # zeros, which need no bytes
                node, found = _hold(source, last, holding, name)
                for part in names:
                    whole = self._blueprint.parameters[part].shape
                    regions[part] = tuple(find_regions(_last(part), whole, holding.division, holding.spans)[0])
                regions[name] = found if target is None else regions[name]
            for part in names:
                regions.setdefault(part, ())
            forms |= dict(zip(names, _forms(node, target), strict=True))
            arrays.append(_Array(names, node, target))
        offsets, header, end = _make_header(forms)
        placed = tuple(
            _Array(array.names, array.node, array.target, tuple(len(header) + offsets[n] for n in array.names))
            for array in arrays
        )
        used = {self._stored[name].file for name in sources(array.node for array in arrays)}
        return OutputFile(path, header, regions, tuple(sorted(used)), len(header) + end, placed, self._stored)


def _hold(node: Expression, last: str, holding: Holding, name: str) -> tuple[Expression, tuple[Region, ...]]:
    """Return what a rank has of a parameter as an expression, and its regions."""
    try:
        regions, axis = find_regions(last, node.shape, holding.division, holding.spans)
    except ValueError as error:
        raise PlanError(
            f"the split cuts through a group of {name}: {error}",
            hint="choose other shares, a smaller --q-group-size, or another --split",
        ) from None
    if regions == [full(node.shape)]:
        return node, ()
    taken = [_take(node, region) for region in regions]
    return (taken[0] if len(taken) == 1 else record(mx.concatenate, taken, axis)), tuple(regions)


def _take(node: Expression, region: Region) -> Expression:
    """Return a region of an expression; of a stack as one of fewer arrays, so that the others' files need not come."""
    operation = node.operation
    alike = all(x.dtype == node.dtype for x in node.inputs)
    if operation.name == "stack" and operation.kwargs.get("axis", 0) == 0 and len(operation.args) == 1 and alike:
        node = record(mx.stack, list(node.inputs[slice(*region[0])]))
        region = ((0, node.shape[0]), *region[1:])
    if region == full(node.shape):
        return node
    taken: Expression = record(mx.array.__getitem__, node, tuple(slice(*span) for span in region))
    return taken


def _forms(node: Expression, target: Quantization | None) -> list[tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of each part of a result."""
    dtype = spell(node.dtype)
    if target is None:
        return [(dtype, node.shape)]
    widths = part_bytes(node.shape[-1], dtype, target)
    kinds = ("U32", dtype, dtype) if target.mode == "affine" else ("U32", "U8")
    return [(kind, (*node.shape[:-1], width // item_bytes(kind))) for kind, width in zip(kinds, widths, strict=True)]


def _count_parts(target: Quantization) -> int:
    return 3 if target.mode == "affine" else 2


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _make_header(forms: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[dict[str, int], bytes, int]:
    """Return the offset of each array after the header, the header, and the bytes after it."""
    offsets: dict[str, int] = {}
    entries: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    end = 0
    for name in sorted(forms, key=lambda n: (-_RANK[forms[n][0]], n)):
        dtype, shape = forms[name]
        offsets[name], end = end, end + math.prod(shape) * item_bytes(dtype)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offsets[name], end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return offsets, len(text).to_bytes(8, "little") + text, end


def _find_pieces(array: _Array, stored: Mapping[str, StoredTensor]) -> Iterator[Piece]:
    node = array.node
    if not node.size:
        return
    dtype, target = spell(node.dtype), array.target
    rectangles = find_rectangles(node, full(node.shape))
    if rectangles is None or not all(_is_plain(r, node, target) for r in rectangles):
        yield from _compute(array, stored)
        return
    for rectangle in rectangles:
        place = stored[rectangle.name]
        for first, at, matrix in _cut_rows(_square(rectangle, node), dtype, target or dtype):
            to = tuple(
                start + skip for start, skip in zip(array.at, part_bytes(at, dtype, target or dtype), strict=True)
            )
            stride = _square(rectangle, node).stride
            yield Piece(place.file, place.offset + rectangle.offset + first * stride, stride, matrix, to)


def _is_plain(rectangle: Rectangle, node: Expression, target: Quantization | None) -> bool:
    """Whether stored rows are enough: those of the result consist of whole groups, and can be turned where they are."""
    if rectangle.transposed and spell(node.dtype) not in FLOATS:
        return False
    if target is None:
        return True
    columns = rectangle.rows if rectangle.transposed else rectangle.cols
    return not any(length % target.group_size for length in (columns, rectangle.at, node.shape[-1]))


def _square(rectangle: Rectangle, node: Expression) -> Rectangle:
    """Return a rectangle of one long row as rows of the result."""
    columns, item = (node.shape or (1,))[-1], node.dtype.size
    if rectangle.transposed or rectangle.rows > 1 or rectangle.cols <= columns or rectangle.cols % columns:
        return rectangle
    rows = rectangle.cols // columns
    return Rectangle(rectangle.name, rectangle.offset, columns * item, rows, columns, False, rectangle.at)


def _cut_rows(rectangle: Rectangle, dtype: str, target: Quantization | str) -> Iterator[tuple[int, int, Matrix]]:
    """Cut a large matrix by rows; yield (first row, elements of the result before it, matrix)."""
    step = max(1, _PIECE_BYTES // max(1, rectangle.cols * item_bytes(dtype)))
    if rectangle.transposed or rectangle.rows <= step:
        yield 0, rectangle.at, Matrix(rectangle.rows, rectangle.cols, dtype, rectangle.transposed, target)
        return
    for first in range(0, rectangle.rows, step):
        rows = min(step, rectangle.rows - first)
        yield first, rectangle.at + first * rectangle.cols, Matrix(rows, rectangle.cols, dtype, False, target)


def _compute(array: _Array, stored: Mapping[str, StoredTensor]) -> Iterator[Piece]:
    node, target = array.node, array.target
    places = sorted((stored[name].file, stored[name].offset) for name in sources([node]))
    file, offset = places[0] if places else ("", 0)
    at = 0
    for region in chunks(full(node.shape), node.dtype.size, _PIECE_BYTES):
        yield Piece(file, offset, 0, Computed(node, region, target), _after(array, at))
        at += math.prod(stop - start for start, stop in region)


def _after(array: _Array, elements: int) -> tuple[int, ...]:
    """Return the offset of each part behind its first `elements`."""
    dtype = spell(array.node.dtype)
    skips = part_bytes(elements, dtype, array.target or dtype)
    return tuple(start + skip for start, skip in zip(array.at, skips, strict=True))


Read = Callable[[int, int, memoryview, int], None]  # (first row, rows, buffer, bytes between rows in the buffer)
Write = Callable[[int, int, memoryview], None]  # (part, byte offset within the matrix's part, data)
