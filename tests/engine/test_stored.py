"""Matrices that stay on disk give the products of those that are in memory, however they are stored."""

from __future__ import annotations

import os
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from moectl.engine.network import stored
from moectl.engine.network.stored import Parts, Reader, StoredEmbedding, StoredMatrix
from moectl.errors import IntegrityError
from moectl.model.structure import Quantization
from moectl.shards.tensors import MODES

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
        shaped = np.array(matrix(mx.array(x)[None].astype(mx.float32)))
        np.testing.assert_allclose(shaped, x[None] @ whole[0].T, rtol=1e-4, atol=1e-4)
        rows = np.array(StoredEmbedding(parts, reader)(mx.array([[2, 39, 2]])))
        np.testing.assert_allclose(rows, whole[0][[2, 39, 2]][None], rtol=1e-5, atol=1e-6)


def test_a_file_that_was_cut_short_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write(path, mx.bfloat16, None)
    with Reader() as reader:
        matrix = StoredMatrix(open_parts(reader, path, None), reader)
        os.truncate(path, path.stat().st_size - 100)
        with pytest.raises(IntegrityError, match="ended too early"):
            matrix.times(np.zeros((1, COLUMNS), np.float32), STACK - 1)
