"""Attend on a CPU: queries meet their keys in numpy, block by block.

MLX's Linux wheel multiplies matrices some 30 times slower than numpy, so that a long history costs a turn more than all
of the model's experts do. mlx-lm's models call `mx.fast.scaled_dot_product_attention`; here it gets another way. What
is so short that the wait for the host costs more stays MLX's. On a GPU nothing is installed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import product
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from moectl.engine.network.experts import computes_on_gpu, to_numpy
from moectl.shards.look.hooks import Hook, hook_call

_Floats = np.ndarray[Any, np.dtype[np.float32]]

# Below so many multiplications the wait for the host costs more than the product saves.
FEWEST_PRODUCTS = 1 << 17
# So many scores are held at once: 16 MiB, about a core's cache and far below a layer's weights.
_BLOCK_SCORES = 1 << 22

_attend_in_mlx = mx.fast.scaled_dot_product_attention


def install(layers: Iterable[nn.Module]) -> None:
    """Let a model's layers attend so, where this process computes on a CPU."""
    if not computes_on_gpu():
        for layer in layers:
            hook_call(layer, _run)


def _run(call: Hook, *args: Any, **kwargs: Any) -> Any:
    mx.fast.scaled_dot_product_attention = attend  # type: ignore[assignment]
    try:
        return call(*args, **kwargs)
    finally:
        mx.fast.scaled_dot_product_attention = _attend_in_mlx


def attend(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    scale: float,
    mask: str | mx.array | None = None,
    sinks: mx.array | None = None,
    **options: Any,
) -> mx.array:
    """Return softmax(scale · queries · keysᵀ + mask) · values, as `mx.fast.scaled_dot_product_attention` does.

    queries (B, H, L, D), keys (B, K, S, D) and values (B, K, S, V), with H a multiple of K; the result is (B, H, L, V)
    in the dtype of queries. `mask` is "causal", or bool or floats that broadcast to (B, H, L, S); `sinks` (H,) are
    scores that take a share and give nothing. It evaluates what it is given unless that is short.
    """
    count, length = queries.shape[-2], keys.shape[-2]
    if math.prod(queries.shape) * length < FEWEST_PRODUCTS:
        return _attend_in_mlx(queries, keys, values, scale=scale, mask=mask, sinks=sinks, **options)
    mx.eval(queries, keys, values)
    rows, columns, held = to_numpy(queries), to_numpy(keys), to_numpy(values)
    batch, heads = rows.shape[:2]
    shared = heads // columns.shape[1]  # so many heads of queries have the same keys
    told = _broadcast(mask, (batch, heads, count, length))
    extra = None if sinks is None else to_numpy(sinks)[:, None, None]
    found = np.empty((*rows.shape[:-1], held.shape[-1]), np.float32)
    step = max(1, _BLOCK_SCORES // (shared * length))
    for row, head, start in product(range(batch), range(0, heads, shared), range(0, count, step)):
        part = (row, slice(head, head + shared), slice(start, start + step))
        block: _Floats = rows[part] * np.float32(scale)
        # A causal mask hides all keys behind the block's last query: they need not be multiplied.
        seen = length - count + start + block.shape[1] if mask == "causal" else length
        scores: _Floats = block.reshape(-1, block.shape[-1]) @ columns[row, head // shared, :seen].T
        scores = scores.reshape(*block.shape[:2], seen)
        if mask == "causal":
            _hide_later(scores)
        elif told is not None:
            _apply(scores, told[part])
        sums = _soften(scores, None if extra is None else extra[head : head + shared])
        weighed = scores.reshape(-1, seen) @ held[row, head // shared, :seen]
        found[part] = weighed.reshape(*block.shape[:2], -1) / sums
    return mx.array(found).astype(queries.dtype)


def _broadcast(mask: str | mx.array | None, shape: tuple[int, ...]) -> np.ndarray[Any, Any] | None:
    if mask is None or isinstance(mask, str):
        return None
    return np.broadcast_to(np.array(mask) if mask.dtype == mx.bool_ else to_numpy(mask), shape)


def _hide_later(scores: _Floats) -> None:
    """Hide from each of a block's queries, which end with the last key, the keys that come after it."""
    count = scores.shape[1]
    if count > 1:
        scores[..., -count:][:, np.triu(np.ones((count, count), bool), 1)] = -np.inf


def _apply(scores: _Floats, mask: np.ndarray[Any, Any]) -> None:
    if mask.dtype == np.bool_:
        scores[~mask] = np.finfo(np.float32).min  # as MLX: a query that sees nothing attends to all alike
    else:
        scores += mask


def _soften(scores: _Floats, sinks: _Floats | None) -> _Floats:
    """Turn scores (H, L, S) into their exponentials in place; return the sums (H, L, 1) to divide by."""
    highest = scores.max(axis=-1, keepdims=True)
    if sinks is not None:
        np.maximum(highest, sinks, out=highest)
    np.subtract(scores, highest, out=scores)
    np.exp(scores, out=scores)
    sums: _Floats = scores.sum(axis=-1, keepdims=True)
    return sums if sinks is None else sums + np.exp(sinks - highest)
