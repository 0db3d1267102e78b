"""The recipe of a shard set: its files, their headers, and the source of each byte.

Pure arithmetic on headers and shapes. It reads no weights, writes nothing and uses no array library; `writer` makes the
files, and `quantize` computes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from moectl.errors import CheckpointError, PlanError
from moectl.model.geometry import PROJECTIONS, Geometry, expert_name, stacked_name
from moectl.model.placement import Placement
from moectl.model.structure import Quantization
from moectl.shards.tensors import FLOATS, ITEM_BYTES, MODES, SourceTensor, item_bytes

_RANK = {dtype: i for i, dtype in enumerate(ITEM_BYTES)}
_PARTS = ("weight", "scales", "biases")
_PIECE_BYTES = 64 << 20  # larger matrices are cut by rows, so that two threads can work on one


class Described(Protocol):
    """The geometry and the precision of a model."""

    @property
    def geometry(self) -> Geometry: ...
    @property
    def quantization(self) -> Quantization | None: ...


class CheckpointHeaders(Described, Protocol):
    """The part of `checkpoint.Checkpoint` that a recipe needs."""

    @property
    def tensors(self) -> Mapping[str, SourceTensor]: ...


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


Read = Callable[[int, int, memoryview, int], None]  # (first row, rows, buffer, bytes between rows in the buffer)
Write = Callable[[int, int, memoryview], None]  # (part, byte offset within the matrix's part, data)
Quantise = Callable[[Matrix, Read, Write], None]  # turn one matrix into its parts through read and write


@dataclass(frozen=True, slots=True)
class Piece:
    """One matrix to write: where it is read, and where its parts are written."""

    file: str  # source file
    offset: int  # of the first byte, in the source file
    stride: int  # bytes from one stored row to the next
    matrix: Matrix
    to: tuple[int, ...]  # absolute offset of each part in the output file


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One safetensors file of a shard set."""

    path: str
    header: bytes
    tensors: tuple[str, ...]
    pieces: tuple[Piece, ...]
    bytes: int


def check_quantization(checkpoint: Described, wanted: Quantization | None) -> None:
    """Raise PlanError unless the checkpoint can be converted to this quantisation."""
    kept = checkpoint.quantization
    if kept is not None:
        if wanted != kept:
            raise PlanError(
                f"the checkpoint is quantised ({describe(kept)}) and cannot become {describe(wanted)}",
                hint="leave --q-bits, --q-group-size and --q-mode out, or start from the 16-bit checkpoint",
            )
        return
    if wanted is None:
        return
    if wanted.mode not in MODES:
        raise PlanError(f"unknown quantisation mode {wanted.mode!r}; it is one of {', '.join(MODES)}")
    groups, widths = MODES[wanted.mode]
    if wanted.bits not in widths:
        raise PlanError(f"{wanted.mode} cannot have {wanted.bits} bits; it can have {_list(widths)}")
    if wanted.group_size not in groups:
        raise PlanError(f"{wanted.mode} cannot have groups of {wanted.group_size}; it can have {_list(groups)}")
    sizes = {"d_model": checkpoint.geometry.d_model, "ffn_hidden_size": checkpoint.geometry.ffn_hidden}
    for what, size in sizes.items():
        if size % wanted.group_size:
            fits = [g for g in groups if all(s % g == 0 for s in sizes.values())]
            raise PlanError(
                f"groups of {wanted.group_size} do not divide the model's {what} {size}",
                hint=f"--q-group-size {min(fits)}" if fits else "--q-bits 16, or another --q-mode",
            )


def describe(quantization: Quantization | None) -> str:
    """Return a quantisation in a few words."""
    if quantization is None:
        return "16-bit"
    return f"{quantization.bits}-bit {quantization.mode}, groups of {quantization.group_size}"


def plan_files(
    checkpoint: CheckpointHeaders,
    placement: Placement,
    quantization: Quantization | None,
) -> list[OutputFile]:
    """Lay out every safetensors file of a shard set, in the order in which it is written.

    It is the order of the tensors in checkpoints, so that each source file is needed during one span of time only.
    float32 weights become bfloat16 in a 16-bit copy; routers and norms keep their type. Weights are quantised from the
    type in which they are stored. Raises PlanError when the placement cuts through a quantisation group,
    CheckpointError when experts of one layer cannot be stacked.
    """
    check_quantization(checkpoint, quantization)
    planner = _Planner(checkpoint, placement, quantization)
    geometry = checkpoint.geometry
    outer = geometry.outer_shapes()
    embedding = {name: outer.pop(name) for name in list(outer) if ".wte." in name}
    pipeline = placement.split == "layers"
    first, last = ("rank-0", f"rank-{placement.head_rank}") if pipeline else ("common", "common")
    files = [planner.whole(f"{first}/embedding.safetensors", embedding)]
    for layer in range(geometry.n_layers):
        files.extend(planner.layer(layer))
    files.append(planner.whole(f"{last}/head.safetensors", outer))
    return files


def part_bytes(columns: int, dtype: str, target: Quantization | str) -> tuple[int, ...]:
    """Return the bytes of `columns` elements of a row in each part of the result."""
    if isinstance(target, str):
        return (columns * item_bytes(target),)
    groups = columns // target.group_size
    packed = groups * target.group_size * target.bits // 8
    if target.mode == "affine":
        return (packed, groups * item_bytes(dtype), groups * item_bytes(dtype))
    return (packed, groups)


@dataclass(frozen=True, slots=True)
class _Span:
    """Elements start to stop of `total` along one axis."""

    start: int
    stop: int
    total: int

    def scale(self, stored: int, name: str) -> tuple[int, int]:
        """Return the span in stored elements, where `stored` of them hold `total` values."""
        if self.start * stored % self.total or self.stop * stored % self.total:
            raise PlanError(
                f"the split at {self.start}…{self.stop} of {self.total} cuts through a group of {name}",
                hint="choose shares in whole groups of this checkpoint, or --split experts",
            )
        return self.start * stored // self.total, self.stop * stored // self.total


class _Draft:
    """Tensors and pieces of one file, collected before offsets are known."""

    def __init__(self) -> None:
        self.tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
        self.pieces: list[tuple[SourceTensor, int, int, Matrix, tuple[tuple[str, int], ...]]] = []

    def finish(self, path: str) -> OutputFile:
        order = sorted(self.tensors, key=lambda n: (-_RANK[self.tensors[n][0]], n))
        offsets: dict[str, int] = {}
        entries: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
        end = 0
        for name in order:
            dtype, shape = self.tensors[name]
            offsets[name], end = end, end + math.prod(shape) * item_bytes(dtype)
            entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offsets[name], end]}
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        header = len(text).to_bytes(8, "little") + text
        pieces = [
            Piece(s.file, offset, stride, matrix, tuple(len(header) + offsets[n] + at for n, at in to))
            for s, offset, stride, matrix, to in self.pieces
        ]
        pieces.sort(key=lambda p: (p.file, p.offset))  # disks are faster when read in order
        return OutputFile(path, header, tuple(order), tuple(pieces), len(header) + end)


@dataclass(frozen=True, slots=True)
class _Planner:
    checkpoint: CheckpointHeaders
    placement: Placement
    quantization: Quantization | None

    def whole(self, path: str, shapes: Mapping[str, tuple[int, ...]]) -> OutputFile:
        """Lay out a file of tensors that are not cut."""
        draft = _Draft()
        self._add_whole(draft, shapes)
        return draft.finish(path)

    def layer(self, layer: int) -> Iterator[OutputFile]:
        """Yield a layer's files: first that of the shared tensors, then each rank's own."""
        placement = self.placement
        name = f"layer-{layer:03d}.safetensors"
        shared = self.checkpoint.geometry.layer_shapes(layer)
        heads = {n: shared.pop(n) for n in list(shared) if ".attn." in n} if placement.split == "tensor" else {}
        if placement.split != "layers":
            yield self.whole(f"common/{name}", shared)
        for rank in range(placement.world_size):
            start, stop = placement.layers(rank)
            if start <= layer < stop:
                draft = _Draft()
                if placement.split == "layers":
                    self._add_whole(draft, shared)
                self._add_heads(draft, heads, rank)
                self._add_experts(draft, layer, rank)
                yield draft.finish(f"rank-{rank}/{name}")

    def _add_whole(self, draft: _Draft, shapes: Mapping[str, tuple[int, ...]]) -> None:
        for name, shape in shapes.items():
            span = _Span(0, shape[-1], shape[-1])
            rows = _Span(0, shape[0], shape[0]) if len(shape) == 2 else _Span(0, 1, 1)
            self._add(draft, name, [name], [rows], span, stacked=False)

    def _add_heads(self, draft: _Draft, shapes: Mapping[str, tuple[int, ...]], rank: int) -> None:
        """Add a rank's part of attention: its heads' rows of queries, keys and values, and their output columns."""
        g = self.checkpoint.geometry
        first, last = self.placement.heads(rank)
        low, high = self.placement.kv_heads(rank)
        keys, values = g.n_heads, g.n_heads + g.kv_n_heads
        for name, (rows, columns) in ((n, (s[0], s[1])) for n, s in shapes.items()):
            if ".Wqkv." in name:
                heads = ((first, last), (keys + low, keys + high), (values + low, values + high))
                spans = [_Span(a * g.head_dim, b * g.head_dim, rows) for a, b in heads]
                self._add(draft, name, [name], spans, _Span(0, columns, columns), stacked=False)
            else:
                across = _Span(first * g.head_dim, last * g.head_dim, columns)
                self._add(draft, name, [name], [_Span(0, rows, rows)], across, stacked=False)

    def _add_experts(self, draft: _Draft, layer: int, rank: int) -> None:
        start, stop = self.placement.hidden(rank)
        geometry = self.checkpoint.geometry
        hidden = _Span(start, stop, geometry.ffn_hidden)
        model = _Span(0, geometry.d_model, geometry.d_model)
        for projection in PROJECTIONS:
            names = [expert_name(layer, e, projection) for e in self.placement.experts_of(rank)]
            rows, columns = (model, hidden) if projection == "w2" else (hidden, model)
            self._add(draft, stacked_name(layer, projection), names, [rows], columns, stacked=True)

    def _add(
        self,
        draft: _Draft,
        name: str,
        sources: Sequence[str],
        rows: Sequence[_Span],  # put together in this order
        columns: _Span,
        *,
        stacked: bool,
    ) -> None:
        """Add a weight, and its scales and biases when the checkpoint has them."""
        for part in _PARTS:
            tensors = [self.checkpoint.tensors.get(s.removesuffix("weight") + part) for s in sources]
            found = [t for t in tensors if t is not None]
            if not found and part != "weight":
                continue
            if len(found) != len(tensors):
                missing = sources[tensors.index(None)].removesuffix("weight") + part
                raise CheckpointError(f"the checkpoint has no tensor {missing}")
            if any(
                (t.dtype, t.shape, t.transposed) != (found[0].dtype, found[0].shape, found[0].transposed) for t in found
            ):
                raise CheckpointError(f"{name}: experts of one layer differ in type or shape and cannot be stacked")
            self._add_stack(draft, name.removesuffix("weight") + part, found, rows, columns, stacked=stacked)

    def _add_stack(
        self,
        draft: _Draft,
        name: str,
        sources: Sequence[SourceTensor],
        rows: Sequence[_Span],
        columns: _Span,
        *,
        stacked: bool,
    ) -> None:
        first = sources[0]
        target = self._target(name, first)
        if isinstance(target, Quantization) and (columns.start % target.group_size or columns.stop % target.group_size):
            raise PlanError(
                f"the split at {columns.start}…{columns.stop} of {columns.total} cuts through groups of "
                f"{target.group_size} in {name}",
                hint="choose a smaller --q-group-size, another number of nodes, or another --split",
            )
        parts = [_cut_rectangle(first, span, columns, target, name) for span in rows]
        out_columns = parts[0].out_columns
        widths = parts[0].matrix.part_row_bytes(out_columns)
        out_rows = sum(part.out_rows for part in parts)
        lead = (len(sources),) if stacked else ()
        names = _part_names(name, target)
        for part, width in zip(names, widths, strict=True):
            dtype = _part_dtype(part, first.dtype, target)
            row = (width // item_bytes(dtype),)
            draft.tensors[part] = (dtype, (*lead, out_rows, *row) if len(first.shape) == 2 else row)
        at = 0
        for source in sources:
            for rectangle in parts:
                for skip, matrix in _cut_rows(rectangle.matrix, rectangle.item):
                    to = tuple((n, (at + skip) * w) for n, w in zip(names, widths, strict=True))
                    offset = source.offset + rectangle.offset + skip * rectangle.stride
                    draft.pieces.append((source, offset, rectangle.stride, matrix, to))
                at += rectangle.out_rows

    def _target(self, name: str, source: SourceTensor) -> Quantization | str:
        if self.checkpoint.quantization is not None or source.dtype not in FLOATS:
            return source.dtype
        if ".router." in name or len(source.shape) == 1:
            return source.dtype
        if self.quantization is not None:
            return self.quantization
        return "BF16" if source.dtype == "F32" else source.dtype


@dataclass(frozen=True, slots=True)
class _Rectangle:
    """A rectangle of a stored tensor: the place of its bytes, and the rows and columns of its result."""

    matrix: Matrix
    offset: int  # of its first byte, from the tensor's first
    stride: int
    item: int

    @property
    def out_rows(self) -> int:
        return self.matrix.cols if self.matrix.transposed else self.matrix.rows

    @property
    def out_columns(self) -> int:
        return self.matrix.rows if self.matrix.transposed else self.matrix.cols


def _cut_rectangle(
    source: SourceTensor, rows: _Span, columns: _Span, target: Quantization | str, name: str
) -> _Rectangle:
    """Find a rectangle, given in values, in a tensor that may be stored transposed or packed."""
    item = item_bytes(source.dtype)
    stored = source.shape if len(source.shape) == 2 else (1, *source.shape)
    down, across = (columns, rows) if source.transposed else (rows, columns)
    top, bottom = down.scale(stored[0], name)
    left, right = across.scale(stored[1], name)
    matrix = Matrix(bottom - top, right - left, source.dtype, source.transposed, target)
    return _Rectangle(matrix, (top * stored[1] + left) * item, stored[1] * item, item)


def _cut_rows(matrix: Matrix, item: int) -> Iterator[tuple[int, Matrix]]:
    """Cut a large matrix by rows; yield (first row, matrix)."""
    step = max(1, _PIECE_BYTES // max(1, matrix.cols * item))
    if matrix.transposed or matrix.rows <= step:
        yield 0, matrix
        return
    for first in range(0, matrix.rows, step):
        rows = min(step, matrix.rows - first)
        yield first, Matrix(rows, matrix.cols, matrix.dtype, matrix.transposed, matrix.target)


def _part_names(name: str, target: Quantization | str) -> tuple[str, ...]:
    if isinstance(target, str):
        return (name,)
    parts = _PARTS if target.mode == "affine" else _PARTS[:2]
    return tuple(name.removesuffix("weight") + p for p in parts)


def _part_dtype(part: str, dtype: str, target: Quantization | str) -> str:
    if isinstance(target, str):
        return target
    if part.endswith(".weight"):
        return "U32"
    return dtype if target.mode == "affine" else "U8"


def _list(values: Sequence[int]) -> str:
    return ", ".join(map(str, sorted(values)))
