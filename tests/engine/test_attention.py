"""Attention in numpy gives what MLX's own gives, whatever the mask, the heads and the dtype."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from moectl.engine.network import attention
from moectl.engine.network.attention import attend
from moectl.engine.network.experts import to_numpy

pytestmark = pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="a GPU keeps MLX's own")

_MASKS = ["none", "causal", "bool", "added", "per head"]


def make_mask(kind: str, heads: int, queries: int, keys: int) -> str | mx.array | None:
    if kind in ("none", "causal"):
        return None if kind == "none" else kind
    seen = np.tri(queries, keys, keys - queries, dtype=bool)
    seen &= ~np.tri(queries, keys, keys - queries - 40, dtype=bool)  # a window
    if kind == "bool":
        return mx.array(seen)
    added = mx.where(mx.array(seen), mx.random.normal((queries, keys)), -mx.inf)
    return added if kind == "added" else mx.broadcast_to(added, (1, heads, queries, keys))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("kind", _MASKS)
@pytest.mark.parametrize(
    ("heads", "shared", "queries", "keys"),
    [(4, 2, 64, 300), (2, 1, 300, 300), (6, 6, 129, 513), (8, 4, 1, 700), (8, 2, 3, 700)],
)
def test_it_equals_mlx(
    kind: str, has_sinks: bool, heads: int, shared: int, queries: int, keys: int, dtype: mx.Dtype
) -> None:
    mx.random.seed(7)
    q = mx.random.normal((1, heads, queries, 32)).astype(dtype)
    k = mx.random.normal((1, heads // shared, keys, 32)).astype(dtype)
    v = mx.random.normal((1, heads // shared, keys, 16)).astype(dtype)
    sinks = mx.random.normal((heads,)).astype(dtype) if has_sinks else None
    mask = make_mask(kind, heads, queries, keys)
    if isinstance(mask, mx.array) and mask.dtype != mx.bool_:
        mask = mask.astype(dtype)
    exact: list[Any] = [
        x.astype(mx.float32) if isinstance(x, mx.array) and x.dtype == dtype else x for x in (q, k, v, mask, sinks)
    ]
    wanted = mx.fast.scaled_dot_product_attention(*exact[:3], scale=0.2, mask=exact[3], sinks=exact[4])
    found = attend(q, k, v, scale=0.2, mask=mask, sinks=sinks)
    assert (found.shape, found.dtype) == (wanted.shape, dtype)
    close = 2e-6 if dtype == mx.float32 else 1e-2  # the result is rounded once
    assert float(mx.abs(found - wanted).max()) < close


def test_rows_of_a_batch_have_their_own_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_BLOCK_SCORES", 1000)  # several blocks
    q, k, v = (mx.random.normal((3, 2, 200, 16)) for _ in range(3))
    left = mx.array([0, 7, 90])[:, None, None, None]  # as padding on the left
    seen = mx.array(np.tri(200, dtype=bool)) & (mx.arange(200) >= left)
    wanted = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=seen)
    rows = mx.arange(200)[:, None] >= left
    assert float(mx.abs((attend(q, k, v, scale=0.3, mask=seen) - wanted) * rows).max()) < 2e-6


def test_keys_of_a_cache_are_not_copied() -> None:
    cache = mx.zeros((1, 2, 1024, 32))
    keys = cache[..., :700, :]
    mx.eval(keys)
    assert to_numpy(keys).strides[1] == 4 * 32 * 1024


def test_what_is_short_is_not_evaluated() -> None:
    q, k = mx.random.normal((1, 2, 1, 16)), mx.random.normal((1, 2, 50, 16))
    assert mx.array_equal(attend(q, k, k, scale=1.0), mx.fast.scaled_dot_product_attention(q, k, k, scale=1.0))
