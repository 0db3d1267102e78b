"""The hand-over of a pipeline (`--split layers`): from the rank before, to the rank after. It knows no layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx


def receive(shape: Sequence[int], dtype: mx.Dtype, rank: int, group: mx.distributed.Group | None) -> mx.array:
    """Return the array of this shape that `rank` hands over, lazily. The ring knows direct neighbours only."""
    return mx.distributed.recv(shape, dtype, rank, group=group)


def hand_over(h: mx.array, rank: int, group: mx.distributed.Group | None, cache: Any) -> mx.array:
    """Return `h`, which is sent to `rank` when it is evaluated, or when the last layer's `cache` (or None) is.

    Prefill evaluates the caches only: without that, the next rank would wait for ever.
    """
    h = mx.distributed.send(h, rank, group=group)
    if cache is not None:
        cache.keys = mx.depends([cache.keys], [h])[0]
    return h
