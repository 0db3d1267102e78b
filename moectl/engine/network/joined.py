"""The arrays of a whole model, joined from the files of all ranks by the regions that the manifest lists.

A matrix stays on disk: its rows, columns or experts are parts of several files, and where ranks have columns of it, the
products of each rank's part can be had apart. All other arrays are small, and are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from moectl.engine.network.load import HINT
from moectl.engine.network.stored import Parts, Reader, StoredMatrix
from moectl.errors import IntegrityError
from moectl.model.manifest import Manifest, refuse_links_outside
from moectl.model.regions import Region, Span
from moectl.model.structure import Quantization
from moectl.shards.trace.parts import full

_NVFP4_MOST = 448 * 6  # the largest scale times the largest value
_Floats = np.ndarray[Any, np.dtype[np.float32]]
_Matrices = dict[str, StoredMatrix]  # by file


@dataclass(frozen=True, slots=True)
class Segment:
    """A span of an array's axis, and where a file has it."""

    span: Span  # of the whole
    file: str
    rank: int | None  # that the file is for; None: all
    first: int  # along the axis of what the file holds

    def within(self, start: int, stop: int) -> Span:
        """Return a part of the span as the file counts it."""
        return start - self.span[0] + self.first, stop - self.span[0] + self.first


class JoinedMatrix:
    """A linear layer's matrix, or a stack of them; `axis` is that along which ranks have parts of it, if they have."""

    def __init__(
        self, axis: int | None, segments: Sequence[Segment], whole: Sequence[Segment], matrices: _Matrices, rows: int
    ) -> None:
        self.axis = axis
        self.rows = rows
        self._segments = segments  # in the order of files, and of places in a file
        self._cover = whole  # those that together are the matrix
        self._matrices = matrices

    def spans(self, rank: int) -> list[Span]:
        """Return which spans of the axis a rank has, in the order in which its file has them."""
        return [segment.span for segment in self._segments if segment.rank == rank]

    def times(self, x: _Floats, item: int = 0) -> _Floats:
        """Return x (T, in) times the transpose of matrix number `item`: (T, out)."""
        if self.axis is None:
            return self._matrices[self._cover[0].file].times(x, item)
        if self.axis == 0:
            owner = next(s for s in self._cover if s.span[0] <= item < s.span[1])
            return self._matrices[owner.file].times(x, owner.within(item, item + 1)[0])
        found = [self._matrices[s.file].times(x, item, s.within(*s.span)) for s in self._cover]
        return np.concatenate(found, axis=1)

    def times_part(self, rank: int, x: _Floats, item: int = 0) -> _Floats:
        """Return what a rank's columns give for x (T, in of the rank): (T, out). Raises ValueError."""
        if x.shape[1] != sum(stop - start for start, stop in self.spans(rank)):
            raise ValueError(f"an input of {x.shape[1]} columns")
        files = [segment.file for segment in self._segments if segment.rank == rank]
        return self._matrices[files[0]].times(x, item) if files else np.zeros((len(x), self.rows), np.float32)

    def read_rows(self, numbers: list[int]) -> _Floats:
        """Return these rows, (n, in), of a matrix that is in one file."""
        return self._matrices[self._cover[0].file].read_rows(numbers)


class JoinedSet:
    """A shard set's arrays as those of one model. Files stay open until `close_files`."""

    def __init__(self, directory: Path, manifest: Manifest, reader: Reader) -> None:
        refuse_links_outside(directory)
        self._directory, self._manifest, self._reader = directory, manifest, reader
        for name, entry in manifest.files.items():
            if name.endswith(".safetensors") and (size := _size_of(directory / name)) != entry.bytes:
                raise IntegrityError(f"{name} has {size} bytes, expected {entry.bytes}", hint=HINT)
        self._loaded: dict[str, dict[str, mx.array]] = {}

    def release(self) -> None:
        """Let go of what was read, as it is stored."""
        self._loaded.clear()

    def close_files(self) -> None:
        self.release()
        self._reader.close_files()

    def has(self, name: str) -> bool:
        """Whether any file holds (a part of) a parameter."""
        return bool(self._manifest.tensors.get(name))

    def read(self, name: str, shape: tuple[int, ...]) -> mx.array:
        """Return a whole array, as it is stored."""
        axis, segments = self._find(name, shape)
        if axis is None:
            return self._load(segments[0].file)[name]
        found = []
        for segment in cover(segments, shape[axis], name):
            index: list[slice] = [slice(None)] * len(shape)
            index[axis] = slice(*segment.within(*segment.span))
            found.append(self._load(segment.file)[name][tuple(index)])
        return mx.concatenate(found, axis=axis)

    def take(self, name: str, whole: mx.array, rank: int) -> mx.array:
        """Return what of a whole array a rank has, as its file holds it; all of it where no file is its own."""
        axis, segments = self._find(name, whole.shape)
        spans = [segment.span for segment in segments if segment.rank == rank]
        if axis is None or not spans:
            return whole
        parts = [mx.take(whole, mx.arange(*span), axis=axis) for span in spans]
        return mx.concatenate(parts, axis=axis)

    def open_matrix(self, path: str, module: Any) -> JoinedMatrix:
        """Return the matrix of a module, quantised or not."""
        shape = module.weight.shape
        axis, segments = self._find(f"{path}.weight", shape)
        quantization = None
        if "scales" in module:
            quantization = Quantization(module.bits, module.group_size, getattr(module, "mode", "affine"))
        matrices = {s.file: StoredMatrix(self._open_parts(path, s.file, quantization), self._reader) for s in segments}
        if axis is None:
            return JoinedMatrix(None, segments, segments[:1], matrices, shape[-2])
        length = shape[axis]
        if axis == len(shape) - 1 and quantization is not None:
            length = length * 32 // quantization.bits
            segments = [_widen(segment, 32, quantization.bits) for segment in segments]
        place = {1: -1, 2: -2}.get(len(shape) - axis, 0)
        return JoinedMatrix(place, segments, cover(segments, length, path), matrices, shape[-2])

    def _open_parts(self, path: str, file: str, quantization: Quantization | None) -> Parts:
        held = self._reader.open(self._directory / file)
        if quantization is None:
            return Parts(held[f"{path}.weight"], None, None, None)
        factors = None
        if f"{path}.global_scale" in held:
            factors = np.array(self._load(file)[f"{path}.global_scale"].reshape(-1) / _NVFP4_MOST)
        return Parts(held[f"{path}.weight"], held[f"{path}.scales"], held.get(f"{path}.biases"), quantization, factors)

    def _load(self, file: str) -> dict[str, mx.array]:
        if file not in self._loaded:
            try:
                loaded = mx.load(str(self._directory / file), format="safetensors")
            except (OSError, RuntimeError, ValueError) as error:
                raise IntegrityError(f"{self._directory / file} cannot be read: {error}", hint=HINT) from None
            assert isinstance(loaded, dict)
            self._loaded[file] = loaded
        return self._loaded[file]

    def _find(self, name: str, shape: tuple[int, ...]) -> tuple[int | None, list[Segment]]:
        """Return along which axis files have parts of a parameter, None for none, and these parts."""
        places = self._manifest.tensors.get(name)
        if not places:
            raise IntegrityError(f"{self._directory} has no tensor {name!r}", hint=HINT)
        regions = {file: found or (full(shape),) for file, found in places.items()}
        axes = {axis for found in regions.values() for region in found for axis in _partial_axes(region, shape)}
        if len(axes) > 1:
            raise IntegrityError(f"{self._directory}: {name} is divided along more than one axis", hint=HINT)
        axis = axes.pop() if axes else None
        segments: list[Segment] = []
        for file in sorted(regions):
            spans = [region[axis or 0] for region in regions[file]] if shape else [(0, 1)]
            firsts = accumulate((stop - start for start, stop in spans), initial=0)
            segments += [Segment(s, file, _rank_of(file), first) for s, first in zip(spans, firsts, strict=False)]
            self._check_shape(name, file, shape, axis, sum(stop - start for start, stop in spans))
        return axis, segments

    def _check_shape(self, name: str, file: str, shape: tuple[int, ...], axis: int | None, length: int) -> None:
        stored = self._reader.open(self._directory / file).get(name)
        wanted = shape if axis is None else (*shape[:axis], length, *shape[axis + 1 :])
        if stored is None:
            raise IntegrityError(f"{self._directory / file} has no tensor {name!r}", hint=HINT)
        if stored.shape != wanted:
            raise IntegrityError(f"{file}: {name} has shape {stored.shape}, expected {wanted}", hint=HINT)


def cover(segments: Sequence[Segment], length: int, name: str) -> list[Segment]:
    """Return segments, or parts of them, that together are an axis of this length, each place once.

    Raises IntegrityError where a place is missing.
    """
    found: list[Segment] = []
    done = 0
    for segment in sorted(segments, key=lambda s: s.span):
        start, stop = segment.span
        if start > done:
            raise IntegrityError(f"no rank has {done} to {start} of {name}", hint=HINT)
        if stop > done:
            found.append(Segment((done, stop), segment.file, segment.rank, segment.within(done, stop)[0]))
            done = stop
    if done < length:
        raise IntegrityError(f"no rank has {done} to {length} of {name}", hint=HINT)
    return found


def _partial_axes(region: Region, shape: tuple[int, ...]) -> list[int]:
    return [axis for axis, (span, length) in enumerate(zip(region, shape, strict=True)) if span != (0, length)]


def _widen(segment: Segment, per_word: int, bits: int) -> Segment:
    """Return a segment of packed columns in elements."""
    start, stop, first = (place * per_word // bits for place in (*segment.span, segment.first))
    return Segment((start, stop), segment.file, segment.rank, first)


def _rank_of(file: str) -> int | None:
    folder = file.partition("/")[0]
    return int(folder.removeprefix("rank-")) if folder.startswith("rank-") else None


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise IntegrityError(f"{path} cannot be read: {error.strerror}", hint=HINT) from None
