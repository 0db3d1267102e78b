"""Matrices that stay on disk give the products of those that are in memory, however they are stored."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.switch_layers import QuantizedSwitchLinear

from moectl.engine.network import stored
from moectl.engine.network.joined import JoinedSet, Segment, cover
from moectl.engine.network.stored import Parts, Reader, StoredMatrix
from moectl.errors import IntegrityError
from moectl.model.manifest import FileEntry
from moectl.model.structure import Quantization
from moectl.shards.source.tensors import MODES

STACK, ROWS, COLUMNS = 3, 40, 256
_WAYS = [
    Quantization(bits, group, mode) for mode, (groups, widths) in MODES.items() for group in groups for bits in widths
]


def write(path: Path, dtype: mx.Dtype, q: Quantization | None) -> mx.array:
    """Write a stack of matrices and return what it holds, in float32."""
    weight = mx.random.normal((STACK, ROWS, COLUMNS), key=mx.random.key(3)).astype(dtype)
    if q is None:
        mx.save_safetensors(str(path), {"m.weight": weight})
        return weight.astype(mx.float32)
    parts = mx.quantize(weight, q.group_size, q.bits, q.mode)
    mx.save_safetensors(str(path), dict(zip(("m.weight", "m.scales", "m.biases"), parts, strict=False)))
    wide = [part.astype(mx.float32) if mx.issubdtype(part.dtype, mx.floating) else part for part in parts]
    biases = wide[2] if len(wide) > 2 else None
    return mx.dequantize(wide[0], wide[1], biases, q.group_size, q.bits, q.mode, dtype=mx.float32)


def open_parts(reader: Reader, path: Path, q: Quantization | None) -> Parts:
    held = reader.open(path)
    return Parts(held["m.weight"], held.get("m.scales"), held.get("m.biases"), q)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32], ids=str)
@pytest.mark.parametrize("q", [None, *_WAYS], ids=str)
def test_products_are_those_of_the_matrix_in_memory(
    q: Quantization | None, dtype: mx.Dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "_PIECE_BYTES", 7 * 4 * COLUMNS)  # 40 rows in pieces of 7
    whole = np.array(write(tmp_path / "m.safetensors", dtype, q))
    x = np.random.default_rng(1).standard_normal((5, COLUMNS), np.float32)
    with Reader(threads=2) as reader:
        parts = open_parts(reader, tmp_path / "m.safetensors", q)
        matrix = StoredMatrix(parts, reader)
        for item in range(STACK):
            np.testing.assert_allclose(matrix.times(x, item), x @ whole[item].T, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(matrix.times(x, 1, (9, 31)), x @ whole[1][9:31].T, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(matrix.read_rows([2, 39, 2]), whole[0][[2, 39, 2]], rtol=1e-5, atol=1e-6)


def test_a_scale_of_a_whole_matrix_counts(tmp_path: Path) -> None:
    """nvfp4 may have one for each expert."""
    weight = mx.random.normal((STACK, ROWS, COLUMNS), key=mx.random.key(3))
    made = mx.stack([mx.max(mx.abs(one)) for one in weight]).astype(mx.float32)
    pairs: Any = [
        mx.quantize(one, 16, 4, mode="nvfp4", global_scale=scale) for one, scale in zip(weight, made, strict=True)
    ]
    arrays = {"m.weight": mx.stack([w for w, _ in pairs]), "m.scales": mx.stack([s for _, s in pairs])}
    mx.save_safetensors(str(tmp_path / "m.safetensors"), {**arrays, "m.global_scale": made})
    x = np.random.default_rng(1).standard_normal((5, COLUMNS), np.float32)
    module = QuantizedSwitchLinear(COLUMNS, ROWS, STACK, False, 16, 4, "nvfp4")
    files = {"m.safetensors": FileEntry((tmp_path / "m.safetensors").stat().st_size, "")}
    tensors: dict[str, Any] = {name: {"m.safetensors": ()} for name in (*arrays, "m.global_scale")}
    with Reader() as reader:
        manifest: Any = SimpleNamespace(files=files, tensors=tensors)
        matrix = JoinedSet(tmp_path, manifest, reader).open_matrix("m", module)
        for item, (w, s) in enumerate(pairs):
            whole = mx.dequantize(w, s, None, 16, 4, mode="nvfp4", global_scale=made[item], dtype=mx.float32)
            np.testing.assert_allclose(matrix.times(x, item), x @ np.array(whole).T, rtol=1e-4, atol=1e-4)


def segment(start: int, stop: int, rank: int, first: int = 0) -> Segment:
    return Segment((start, stop), f"rank-{rank}", rank, first)


def test_segments_cover_each_place_once() -> None:
    parts = [segment(4, 8, 1), segment(0, 4, 0), segment(2, 8, 2, 1)]
    assert cover(parts, 8, "m") == [segment(0, 4, 0), segment(4, 8, 2, 3)]
    with pytest.raises(IntegrityError, match="no rank has 4 to 6 of m"):
        cover([segment(0, 4, 0), segment(6, 8, 1)], 8, "m")
    with pytest.raises(IntegrityError, match="no rank has 8 to 9 of m"):
        cover(parts, 9, "m")


def test_a_file_that_was_cut_short_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write(path, mx.bfloat16, None)
    with Reader() as reader:
        matrix = StoredMatrix(open_parts(reader, path, None), reader)
        os.truncate(path, path.stat().st_size - 100)
        with pytest.raises(IntegrityError, match="ended too early"):
            matrix.times(np.zeros((1, COLUMNS), np.float32), STACK - 1)
