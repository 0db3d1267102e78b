"""DBRX, one rank's part of it, in the order in which a token passes through it.

Attention, norms and caches are mlx-lm's; new here are the stacked experts, the router's normalisation, and what ranks
exchange: one sum per layer, two when attention is divided too, or a hand-over between spans of layers. Parameter names
match the checkpoint. Sources: databricks modeling_dbrx.py, mlx_lm/models/dbrx.py.

Sizes in comments: B batch, L tokens, D model width, V vocabulary, T = B·L.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.dbrx import ModelArgs, NormAttnNorm
from mlx_lm.models.dbrx import Router as RouterLogits

from moectl.geometry import Geometry
from moectl.model.attention import HeadsAttention
from moectl.model.experts import Experts
from moectl.model.reduce import sum_over_ranks
from moectl.model.relay import hand_over, receive
from moectl.placement import Placement


class Router(RouterLogits):
    """Choose top-k experts per token: softmax over all in float32, top-k, then divide by the p-norm."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry.d_model, geometry.n_experts)
        self._top_k = geometry.top_k
        self._p = geometry.moe_normalize

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Return (indices, weights), both (T, K), for x (T, D)."""
        scores = mx.softmax(super().__call__(x).astype(mx.float32), axis=-1)
        indices = mx.argpartition(-scores, kth=self._top_k - 1, axis=-1)[:, : self._top_k]
        weights = mx.take_along_axis(scores, indices, axis=-1)
        if self._p is not None:
            weights = weights / mx.linalg.norm(weights, ord=self._p, axis=-1, keepdims=True)
        return indices, weights.astype(x.dtype)


class SparseMoe(nn.Module):
    """Router and experts; the result is the sum of all ranks' parts, where ranks have parts."""

    def __init__(self, placement: Placement, rank: int, group: mx.distributed.Group | None) -> None:
        super().__init__()
        self.router = Router(placement.geometry)
        self.experts = Experts(placement, rank)
        self._group = None if placement.split == "layers" else group

    def __call__(self, x: mx.array) -> mx.array:  # (B, L, D) → (B, L, D)
        tokens = x.reshape(-1, x.shape[-1])
        indices, weights = self.router(tokens)
        partial = self.experts(tokens, indices, weights)
        return sum_over_ranks(partial, self._group).reshape(x.shape)


class DecoderLayer(nn.Module):
    def __init__(self, args: ModelArgs, placement: Placement, rank: int, group: mx.distributed.Group | None) -> None:
        super().__init__()
        self.norm_attn_norm = NormAttnNorm(args)
        if placement.split == "tensor":
            self.norm_attn_norm.attn = HeadsAttention(args, placement, rank, group)
        self.ffn = SparseMoe(placement, rank, group)

    def __call__(self, x: mx.array, mask: Any, cache: Any) -> mx.array:
        residual, h = self.norm_attn_norm(x, mask, cache)
        return residual + self.ffn(h)


class Transformer(nn.Module):
    def __init__(self, args: ModelArgs, placement: Placement, rank: int, group: mx.distributed.Group | None) -> None:
        super().__init__()
        self._start, stop = placement.layers(rank)
        if placement.holds_embedding(rank):
            self.wte = nn.Embedding(args.vocab_size, args.d_model)
        # Layers have the checkpoint's numbers also where other ranks have the first ones.
        self.blocks: list[DecoderLayer | None] = [None] * self._start
        self.blocks += [DecoderLayer(args, placement, rank, group) for _ in range(self._start, stop)]
        if stop == args.n_layers:
            self.norm_f = nn.LayerNorm(args.d_model, bias=False)
        self._d_model, self._rank, self._group = args.d_model, rank, group

    @property
    def own_blocks(self) -> list[DecoderLayer]:
        """The layers that are on this rank."""
        return [block for block in self.blocks if block is not None]

    def __call__(self, inputs: mx.array, cache: Any) -> mx.array:  # (B, L) → (B, L, D)
        blocks = self.own_blocks
        cache = cache or [None] * len(blocks)
        if "wte" in self:
            h = self.wte(inputs)
        else:
            dtype = blocks[0].norm_attn_norm.norm_1.weight.dtype
            h = receive((*inputs.shape, self._d_model), dtype, self._rank - 1, self._group)
        mask = create_attention_mask(h, cache[0])
        for layer, layer_cache in zip(blocks, cache, strict=True):
            h = layer(h, mask, layer_cache)
        return self.norm_f(h) if "norm_f" in self else hand_over(h, self._rank + 1, self._group, cache[-1])


class Model(nn.Module):
    """One rank of DBRX; one has the head, followers give placeholders that keep the graph's order."""

    def __init__(self, placement: Placement, rank: int = 0, group: mx.distributed.Group | None = None) -> None:
        super().__init__()
        geometry = placement.geometry
        self.transformer = Transformer(_mlx_args(geometry), placement, rank, group)
        if placement.holds_head(rank):
            self.lm_head = nn.Linear(geometry.d_model, geometry.vocab_size, bias=False)

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        """Return logits (B, L, V) for token ids (B, L); (B, L, 1) zeros on followers.

        Followers' zeros depend on the last layer, so that whatever is agreed after a step comes after its exchanges.
        """
        h = self.transformer(inputs, cache)
        if "lm_head" in self:
            return self.lm_head(h)
        zeros = mx.zeros((*inputs.shape, 1), dtype=h.dtype)
        return mx.depends([zeros], [h])[0]

    @property
    def layers(self) -> list[DecoderLayer]:
        """This rank's layers, by the name under which mlx-lm's cache and generator look for them."""
        return self.transformer.own_blocks


def _mlx_args(geometry: Geometry) -> ModelArgs:
    # mlx-lm's attention always clips; infinity is its spelling of "no clip".
    clip = math.inf if geometry.clip_qkv is None else geometry.clip_qkv
    return ModelArgs(
        model_type="dbrx",
        vocab_size=geometry.vocab_size,
        d_model=geometry.d_model,
        ffn_config={},
        attn_config={"kv_n_heads": geometry.kv_n_heads, "clip_qkv": clip, "rope_theta": geometry.rope_theta},
        n_layers=geometry.n_layers,
        n_heads=geometry.n_heads,
    )
