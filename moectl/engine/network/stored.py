"""Matrices of a file that stay on disk: they are read piece by piece each time something is multiplied with them.

A piece is turned into float32 where it still lies in a core's cache, and is gone after its product; so a model of any
size runs in a few megabytes, and each weight is read once for all rows that meet it. For a CPU.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from moectl.errors import IntegrityError
from moectl.model.regions import Span
from moectl.model.structure import Quantization
from moectl.shards.quantize import thread_stream
from moectl.shards.source.tensors import ITEM_BYTES, StoredTensor, read_header

_PIECE_BYTES = 2 << 20  # in float32
_DTYPES = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32, "U32": np.uint32, "U8": np.uint8}
# numpy's wheels and Debian's package; Apple's Accelerate has none, and does not wait for threads in a spin.
_SET_BLAS_THREADS = ("scipy_openblas_set_num_threads64_", "openblas_set_num_threads64_", "openblas_set_num_threads")
_Floats = np.ndarray[Any, np.dtype[np.float32]]


class Reader:
    """Threads that read and multiply, and the files that they read. Use it as a context manager."""

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads or os.cpu_count() or 1
        self._local = threading.local()
        self._files: dict[Path, tuple[int, dict[str, StoredTensor]]] = {}

    def __enter__(self) -> Reader:
        with ExitStack() as stack:
            stack.callback(self.close_files)
            stack.enter_context(_single_threaded_blas())
            self._pool = stack.enter_context(ThreadPoolExecutor(self._threads, "read"))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def open(self, path: Path) -> dict[str, StoredTensor]:
        """Open a file for `read`, and return what its header says. Raises IntegrityError."""
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC), read_header(path, str(path))
        return self._files[path][1]

    def close_files(self) -> None:
        for fd, _ in self._files.values():
            os.close(fd)
        self._files.clear()

    def read(self, tensor: StoredTensor, first: int, count: int, slot: str) -> np.ndarray[Any, Any]:
        """Return rows of a tensor, as they are stored; valid until this thread reads the `slot` again."""
        columns = tensor.shape[-1]
        width = columns * ITEM_BYTES[tensor.dtype]
        data = self.room(slot, count * width)
        fd, offset, got = self._files[Path(tensor.file)][0], tensor.offset + first * width, 0
        while got < data.size:
            step = os.preadv(fd, [data[got:].data], offset + got)
            if step == 0:
                raise IntegrityError(f"{tensor.file} ended too early: it was cut short while being read")
            got += step
        return data.view(_DTYPES[tensor.dtype]).reshape(count, columns)

    def room(self, slot: str, nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return memory of this thread; the same again for the same slot, because new pages cost more than the work."""
        held: np.ndarray[Any, np.dtype[np.uint8]] | None = getattr(self._local, slot, None)
        if held is None or held.size < nbytes:
            held = np.empty(nbytes, np.uint8)
            setattr(self._local, slot, held)
        return held[:nbytes]

    def share_out(self, work: Any, pieces: range) -> None:
        """Call `work(first)` for all pieces, on all threads where there are several."""
        for _ in self._pool.map(work, pieces) if len(pieces) > 1 else map(work, pieces):
            pass


@dataclass(frozen=True, slots=True)
class Parts:
    """A matrix (out, in), or a stack of them, as it is stored: weights, and scales and biases where it is quantised."""

    weight: StoredTensor
    scales: StoredTensor | None
    biases: StoredTensor | None
    quantization: Quantization | None
    factors: _Floats | None = None  # nvfp4's scale of each whole matrix


class StoredMatrix:
    """A matrix, or a stack of them, that is multiplied where it lies."""

    def __init__(self, parts: Parts, reader: Reader) -> None:
        self._parts = parts
        self._reader = reader
        self.rows = parts.weight.shape[-2]
        q = parts.quantization
        self.columns = parts.weight.shape[-1] * 32 // q.bits if q else parts.weight.shape[-1]
        self._planes = 8 // q.bits if q and q.mode == "affine" and 8 % q.bits == 0 else 0  # 0: rows are in order

    def times(self, x: _Floats, item: int = 0, rows: Span | None = None) -> _Floats:
        """Return x (T, in) times the transpose of (some rows of) matrix number `item` of the stack: (T, out)."""
        begin, end = rows or (0, self.rows)
        out = np.empty((end - begin, x.shape[0]), np.float32)
        sums = self._sum_groups(x)
        if self._planes:
            x = x.reshape(x.shape[0], -1, self._planes).swapaxes(1, 2).reshape(x.shape)
        turned = np.ascontiguousarray(x.T)  # this way round a product with few rows of `x` is fastest
        step = max(1, _PIECE_BYTES // (4 * self.columns))
        step = max(step // 16 * 16, min(step, 16))

        def work(first: int) -> None:
            count = min(step, end - begin - first)
            piece, biases = self._read(item * self.rows + begin + first, count)
            part = out[first : first + count]
            np.matmul(piece, turned, out=part)
            if sums is not None and biases is not None:
                part += biases @ sums.T

        self._reader.share_out(work, range(0, end - begin, step))
        if self._parts.factors is not None:
            out *= self._parts.factors[item]
        return np.ascontiguousarray(out.T)

    def read_rows(self, numbers: list[int]) -> _Floats:
        """Return these rows, (n, in)."""
        out = np.empty((len(numbers), self.columns), np.float32)
        for place, number in enumerate(numbers):
            piece, biases = self._read(number, 1)
            out[place] = piece.reshape(self._planes, -1).T.reshape(-1) if self._planes else piece[0]
            if biases is not None:
                out[place] += np.repeat(biases[0], self.columns // biases.shape[1])
        if self._parts.factors is not None:
            out *= self._parts.factors[0]
        return out

    def _sum_groups(self, x: _Floats) -> _Floats | None:
        # A group's bias meets the sum of its inputs: that is less work than to add it to each weight.
        if self._parts.biases is None:
            return None
        found: _Floats = x.reshape(x.shape[0], self._parts.biases.shape[-1], -1).sum(axis=-1)
        return found

    def _read(self, first: int, count: int) -> tuple[_Floats, _Floats | None]:
        """Return rows in float32, (count, in), plane by plane, and the biases of groups that have still to be added."""
        q, room = self._parts.quantization, self._reader.room
        weight = self._reader.read(self._parts.weight, first, count, "weight")
        whole = room("whole", 4 * count * self.columns).view(np.float32).reshape(count, self.columns)
        if q is None:
            return _widen(weight, self._parts.weight.dtype, whole), None
        assert self._parts.scales is not None
        kept = self._parts.scales.dtype
        scales = self._reader.read(self._parts.scales, first, count, "scales")
        biases = None
        if self._parts.biases is not None:
            biases = self._reader.read(self._parts.biases, first, count, "biases")
            biases = _widen(biases, kept, np.empty(biases.shape, np.float32))
        if self._planes:
            self._unpack(weight.view(np.uint8), _widen(scales, kept, np.empty(scales.shape, np.float32)), whole)
            return whole, biases
        if biases is not None:
            scales = _widen(scales, kept, np.empty(scales.shape, np.float32))
        return self._dequantise(weight, scales, biases, q), None

    def _unpack(self, codes: np.ndarray[Any, Any], scales: _Floats, out: _Floats) -> None:
        """Take codes (count, bytes) apart, plane by plane, one code of each byte at a time: faster than in order."""
        width = codes.shape[1]
        bits = 8 // self._planes
        spread = np.repeat(scales, width // scales.shape[1], axis=1)
        one = self._reader.room("plane", codes.size).reshape(codes.shape)
        for plane in range(self._planes):
            np.right_shift(codes, plane * bits, out=one)
            if plane < self._planes - 1:
                np.bitwise_and(one, (1 << bits) - 1, out=one)
            part = out[:, plane * width : (plane + 1) * width]
            np.copyto(part, one)
            part *= spread

    def _dequantise(self, weight: Any, scales: Any, biases: Any, q: Quantization) -> _Floats:
        with thread_stream() as stream:
            found = mx.dequantize(
                mx.array(weight),
                mx.array(scales),
                None if biases is None else mx.array(biases),
                q.group_size,
                q.bits,
                q.mode,
                dtype=mx.float32,
                stream=stream,
            )
            mx.eval(found)
            return np.asarray(found)


def _widen(stored: np.ndarray[Any, Any], dtype: str, out: _Floats) -> _Floats:
    if dtype == "BF16":
        bits = out.view(np.uint32)
        np.copyto(bits, stored)
        np.left_shift(bits, 16, out=bits)
    else:
        np.copyto(out, stored)
    return out


@contextmanager
def _single_threaded_blas() -> Iterator[None]:
    """Keep numpy's products on the thread that asks for them: OpenBLAS's threads wait for each other in a spin.

    On a busy machine that is a hundred times the work. There is no way into numpy for it but its library's own.
    """
    library = ctypes.CDLL(sys.modules["numpy._core._multiarray_umath"].__file__)
    name = next((name for name in _SET_BLAS_THREADS if hasattr(library, name)), None)
    if name is None:
        yield
        return
    set_threads, get_threads = getattr(library, name), getattr(library, name.replace("_set_", "_get_"))
    before = get_threads()
    set_threads(1)
    try:
        yield
    finally:
        set_threads(before)
