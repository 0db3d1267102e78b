"""The hand-over between the ranks of a pipeline: hidden states go to the next rank. It knows nothing of layers."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from moectl.model.placement import Placement
from moectl.model.reduce import run_exchange


class Pipeline:
    """A rank's place among the ranks that a token passes through; with all layers on each rank, there is one place."""

    def __init__(self, placement: Placement, rank: int, group: mx.distributed.Group | None) -> None:
        self.is_last = placement.split != "layers" or rank == placement.world_size - 1
        self._rank = rank
        self._group = group

    def receive(self, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        """Return what the rank before sends, of this shape and dtype."""
        source, group = self._rank - 1, self._group
        return run_exchange(mx.zeros((0,)), lambda _: mx.distributed.recv(shape, dtype, source, group=group))

    def send(self, h: mx.array, cache: Any) -> mx.array:
        """Send `h` to the next rank and return it.

        Whoever evaluates the result or `cache` has sent it: at prefill only caches are evaluated.
        """
        sent = run_exchange(h, lambda x: mx.distributed.send(x, self._rank + 1, group=self._group))
        if cache is not None:
            cache.keys = mx.depends([cache.keys], [sent])[0]
        return sent
