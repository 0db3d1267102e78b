"""Attention of some of a layer's heads (`--split tensor`): mlx-lm's, over slices of its matrices, then a sum."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.dbrx import Attention, ModelArgs

from moectl.model.reduce import sum_over_ranks
from moectl.placement import Placement


class HeadsAttention(Attention):
    """The attention of one rank's KV heads and the query heads that go with them; its cache holds these heads only."""

    def __init__(self, args: ModelArgs, placement: Placement, rank: int, group: mx.distributed.Group | None) -> None:
        kv_start, kv_stop = placement.kv_heads(rank)
        start, stop = placement.query_heads(rank)
        heads, kv_heads = stop - start, kv_stop - kv_start
        head_dim = placement.geometry.head_dim
        # mlx-lm takes the width of all query heads for that of the model: here it is that of the slice.
        width = heads * head_dim
        super().__init__(
            replace(args, d_model=width, n_heads=heads, attn_config={**args.attn_config, "kv_n_heads": kv_heads})
        )
        self.Wqkv = nn.Linear(args.d_model, width + 2 * kv_heads * head_dim, bias=False)
        self.out_proj = nn.Linear(width, args.d_model, bias=False)
        self._group = group

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:  # (B, L, D) → (B, L, D)
        return sum_over_ranks(super().__call__(x, mask, cache), self._group)
