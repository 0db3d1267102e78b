"""A few numbers that stand for an array: sums over all its elements with fixed random signs."""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx
import numpy as np

from moectl.model.canary import WIDTH

_TOKENS = 4096  # have signs of their own; then these come again


def take_fingerprint(x: mx.array, first: int, tokens: int | None = None) -> mx.array:
    """Return (WIDTH,) float32 for the rows x (…, D) of the tokens from number `first` on; chunks' add up.

    There are as many rows as `tokens`, or several for each, whose order does not matter.
    """
    rows = x.reshape(-1, x.shape[-1]).astype(mx.float32)
    if tokens is not None and rows.shape[0] != tokens:
        rows = rows.reshape(tokens, -1, rows.shape[-1]).sum(axis=1)
    signs, columns = _signs(rows.shape[1])
    return signs[mx.arange(first, first + rows.shape[0]) % _TOKENS] @ rows @ columns


@lru_cache(maxsize=8)
def _signs(width: int) -> tuple[mx.array, mx.array]:
    source = np.random.default_rng(20_251_121)
    tokens = source.integers(0, 2, _TOKENS) * 2 - 1
    columns = source.integers(0, 2, (width, WIDTH)) * 2 - 1
    return mx.array(tokens.astype(np.float32)), mx.array(columns.astype(np.float32))
