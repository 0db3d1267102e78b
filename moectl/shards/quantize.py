"""Turn pieces of a checkpoint into what a shard holds, block by block: packed weights with scales, or floats.

It opens no files: functions to read and to write bytes are arguments. `mx.quantize` works on blocks of whole groups, so
the result equals that of the whole tensor bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import mlx.core as mx
import numpy as np

from moectl.model.structure import Quantization
from moectl.shards.recipe import Computed, Matrix, Read, Write
from moectl.shards.trace import parts
from moectl.shards.trace.formats import quantise

_BLOCK_BYTES = 2 << 20  # read at a time: fits into a core's cache while it is transposed and quantised
_CACHE_BYTES = 32 << 20
_SKEW_BYTES = 64  # rows a power of two apart use the same cache sets: one line more makes transposing 3× faster
_CPU_RUN = 32  # elements that MLX's CPU kernels of the fp modes process at once
_TURN_ROWS = 64  # transposed at a time; the fastest number measured

_IDLE: list[mx.Stream] = []

_DTYPES = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}
_STORED = {"BF16": mx.uint16, "F16": mx.uint16, "F32": mx.float32}  # types that Python's buffers can hold


class Converter:
    """One thread's way to convert pieces, on a stream of its own, in about `memory_bytes`."""

    def __init__(self, stream: mx.Stream, memory_bytes: int) -> None:
        self._stream = stream
        self._memory_bytes = memory_bytes
        self._buffers = _Buffers(stream)

    def convert(self, matrix: Matrix, read: Read, write: Write) -> None:
        """Convert a stored matrix; the next block is read while the device works on the one before."""
        task = _Task(matrix, read, write, self._buffers, self._stream)
        if matrix.transposed:
            _stream_transposed(task, self._memory_bytes)
        else:
            _stream_rows(task)

    def compute(self, work: Computed, read: parts.Read, write: Write) -> None:
        """Compute a region of an expression, chunk by chunk."""
        at = [0, 0, 0]
        with mx.stream(self._stream):
            for region in parts.chunks(work.region, work.node.dtype.size, _BLOCK_BYTES):
                found = parts.part(work.node, region, read)
                q = work.target
                made = (found,) if q is None else quantise(found, q.group_size, q.bits, q.mode)
                for i, array in enumerate(made):
                    whole = mx.contiguous(array)
                    whole = whole.view(mx.uint16) if whole.dtype in (mx.bfloat16, mx.float16) else whole
                    mx.eval(whole)
                    write(i, at[i], _bytes_of(whole))
                    at[i] += whole.nbytes

    def close(self) -> None:
        mx.synchronize(self._stream)
        self._buffers.clear()


@contextmanager
def converter(memory_bytes: int) -> Iterator[Converter]:
    """Yield the calling thread's converter."""
    mx.set_cache_limit(_CACHE_BYTES)
    with thread_stream() as stream:
        made = Converter(stream, memory_bytes)
        try:
            yield made
        finally:
            made.close()


@contextmanager
def thread_stream() -> Iterator[mx.Stream]:
    """Yield a stream for the calling thread alone."""
    stream = _take_stream()
    try:
        yield stream
    finally:
        mx.synchronize(stream)
        _IDLE.append(stream)


def _take_stream() -> mx.Stream:
    # A CPU stream has an OS thread that never ends (also not by `clear_streams`): use streams again.
    try:
        return _IDLE.pop()
    except IndexError:
        return mx.new_thread_unsafe_stream(mx.gpu if mx.metal.is_available() else mx.cpu)


class _Buffers:
    """Arrays for the blocks, used again for each block so that their memory is mapped only once."""

    def __init__(self, stream: mx.Stream) -> None:
        self._stream = stream
        self._arrays: dict[tuple[str, int], mx.array] = {}
        self._tile = np.empty(0, np.uint8)

    def array(self, name: str, slot: int, shape: tuple[int, int], dtype: mx.Dtype) -> mx.array:
        held = self._arrays.get((name, slot))
        if held is None or held.dtype != dtype or held.shape != shape:
            held = mx.zeros(shape, dtype, stream=self._stream)
            mx.eval(held)
            self._arrays[name, slot] = held
        return held

    def tile(self, rows: int, widths: tuple[int, ...]) -> list[np.ndarray[Any, Any]]:
        """Return a byte matrix (rows, width) for each width, one after the other in memory that is used again."""
        sizes = [rows * width for width in widths]
        if self._tile.size < sum(sizes):
            self._tile = np.empty(sum(sizes), np.uint8)
        ends = list(accumulate(sizes))
        return [
            self._tile[end - size : end].reshape(rows, width)
            for end, size, width in zip(ends, sizes, widths, strict=True)
        ]

    def clear(self) -> None:
        self._arrays.clear()
        self._tile = np.empty(0, np.uint8)


@dataclass(frozen=True, slots=True)
class _Task:
    matrix: Matrix
    read: Read
    write: Write
    buffers: _Buffers
    stream: mx.Stream

    def press(self, block: mx.array) -> list[mx.array]:
        """Start the conversion of a block of canonical rows; return its parts, 16-bit floats as uint16."""
        target, stream = self.matrix.target, self.stream
        if isinstance(target, Quantization):
            block = block.view(_DTYPES[self.matrix.dtype], stream=stream)
            rows = block.shape[0]
            if block.size % _CPU_RUN:  # an odd number of nvfp4's groups of 16: MLX's CPU kernel needs pairs
                block = mx.concatenate([block, block[-1:]], stream=stream)
            parts: list[mx.array] = list(
                mx.quantize(block, group_size=target.group_size, bits=target.bits, mode=target.mode, stream=stream)
            )
            parts = [p[:rows] for p in parts] if block.shape[0] > rows else parts
        elif target != self.matrix.dtype:
            parts = [block.view(_DTYPES[self.matrix.dtype], stream=stream).astype(_DTYPES[target], stream=stream)]
        else:
            parts = [block]
        parts = [p.view(mx.uint16, stream=stream) if p.dtype in (mx.bfloat16, mx.float16) else p for p in parts]
        mx.async_eval(*parts)  # type: ignore[no-untyped-call]
        return parts


def _bytes_of(array: mx.array) -> memoryview:
    """Return the bytes of an evaluated array; writing to them changes it."""
    return memoryview(array).cast("B")  # type: ignore[arg-type]  # its stubs lack the buffer protocol


def _stream_rows(task: _Task) -> None:
    matrix = task.matrix
    dtype = _STORED[matrix.dtype]
    item = dtype.size
    row_bytes = matrix.cols * item
    step = min(matrix.rows, max(1, _BLOCK_BYTES // row_bytes))
    offsets = [0, 0, 0]

    def finish(parts: list[mx.array]) -> None:
        mx.eval(*parts)
        for i, part in enumerate(parts):
            task.write(i, offsets[i], _bytes_of(part))
            offsets[i] += part.nbytes

    pending: list[mx.array] | None = None
    for turn, first in enumerate(range(0, matrix.rows, step)):
        rows = min(step, matrix.rows - first)
        name = "rows" if rows == step else "last rows"
        block = task.buffers.array(name, turn % 2, (rows, matrix.cols), dtype)
        task.read(first, rows, _bytes_of(block), row_bytes)
        parts = task.press(block)
        if pending is not None:
            finish(pending)
        pending = parts
    if pending is not None:
        finish(pending)


def _stream_transposed(task: _Task, memory_bytes: int) -> None:
    """Convert a matrix stored (in, out): blocks of whole groups of its rows become columns of the result.

    The result is collected in memory for as many columns as `memory_bytes` allows, so that writes are long.
    """
    matrix = task.matrix
    item = _STORED[matrix.dtype].size
    group = matrix.target.group_size if isinstance(matrix.target, Quantization) else 1
    out_bytes = matrix.cols * max(1, sum(matrix.part_row_bytes(group)))  # of one group of columns
    block_groups = max(1, _BLOCK_BYTES // (matrix.cols * item * group))
    tile_groups = max(block_groups, memory_bytes // out_bytes // block_groups * block_groups)
    total = matrix.rows // group
    for first in range(0, total, tile_groups):
        count = min(tile_groups, total - first)
        tile = _assemble(task, first * group, count * group, block_groups * group)
        _write_tile(task, tile, first * group)


def _assemble(task: _Task, first: int, count: int, step: int) -> list[np.ndarray[Any, Any]]:
    """Return the parts of `count` columns of the result as byte arrays (out rows, bytes)."""
    matrix = task.matrix
    tile = task.buffers.tile(matrix.cols, matrix.part_row_bytes(count))

    def finish(parts: list[mx.array], column: int) -> None:
        mx.eval(*parts)
        for whole, part, start in zip(tile, parts, matrix.part_row_bytes(column), strict=True):
            data = np.asarray(part)
            at = whole[:, start : start + data.shape[1] * data.itemsize].view(data.dtype)
            np.copyto(at, data)

    pending: tuple[list[mx.array], int] | None = None
    for turn, column in enumerate(range(0, count, step)):
        rows = min(step, count - column)
        block = _read_transposed(task, first + column, rows, turn % 2, "" if rows == step else "last ")
        parts = task.press(block)
        if pending is not None:
            finish(*pending)
        pending = parts, column
    if pending is not None:
        finish(*pending)
    return tile


def _read_transposed(task: _Task, first: int, rows: int, slot: int, which: str) -> mx.array:
    """Read `rows` stored rows and return them transposed, (out, rows); `which` is in the names of the buffers."""
    matrix = task.matrix
    dtype = _STORED[matrix.dtype]
    stride = matrix.cols * dtype.size + _SKEW_BYTES
    stored = task.buffers.array(f"{which}stored", 0, (rows, stride // dtype.size), dtype)
    task.read(first, rows, _bytes_of(stored), stride)
    turned = task.buffers.array(f"{which}turned", slot, (matrix.cols, rows), dtype)
    source, target = np.asarray(stored)[:, : matrix.cols], np.asarray(turned)
    for row in range(0, rows, _TURN_ROWS):
        stop = min(rows, row + _TURN_ROWS)
        np.copyto(target[:, row:stop], source[row:stop].T)
    return turned


def _write_tile(task: _Task, tile: list[np.ndarray[Any, Any]], column: int) -> None:
    matrix = task.matrix
    starts = matrix.part_row_bytes(column)
    for i, (part, start, width) in enumerate(zip(tile, starts, matrix.part_row_bytes(matrix.rows), strict=True)):
        data = part.reshape(-1).data
        length = part.shape[1]
        if length == width:
            task.write(i, 0, data)
            continue
        for row in range(part.shape[0]):
            task.write(i, row * width + start, data[row * length : (row + 1) * length])
