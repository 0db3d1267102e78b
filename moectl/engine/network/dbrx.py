"""DBRX, one rank's part of it, in the order in which a token passes through it.

Attention, norms and caches are mlx-lm's; new here are the stacked experts, the router's normalisation, the sums over
ranks (one per layer; two where attention is divided) and the hand-over from rank to rank in a pipeline. Parameter names
match the checkpoint. Sources: databricks modeling_dbrx.py, mlx_lm/models/dbrx.py.

Sizes in comments: B batch, L tokens, D model width, V vocabulary, T = B·L.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.dbrx import Attention, ModelArgs, NormAttnNorm, Router as RouterLogits
from mlx_lm.models.rope_utils import initialize_rope
from mlx_lm.models.switch_layers import SwitchGLU

from moectl.engine.network import experts as cpu
from moectl.engine.network.exchange import Pipeline, sum_over_ranks, take_first
from moectl.engine.network.stored import StoredMatrix
from moectl.model.balance import Shares, share_out
from moectl.model.geometry import Geometry
from moectl.model.placement import Placement


class Experts(nn.Module):
    """A rank's experts of a layer, or its slice of the hidden dimension of all."""

    def __init__(self, placement: Placement, rank: int) -> None:
        super().__init__()
        numbers, (low, high) = placement.experts_of(rank), placement.hidden(rank)
        self.mlp = SwitchGLU(placement.geometry.d_model, high - low, len(numbers), bias=False)
        self._rank = rank
        self._count = len(numbers)
        self._place = np.full(placement.geometry.n_experts, -1)  # in the stack, by expert
        self._place[list(numbers)] = np.arange(len(numbers))
        self._owns_some = placement.split == "experts"  # pairs of other ranks' experts are skipped
        self._owners = placement.owners if placement.replicas > 1 else None

    def __call__(self, x: mx.array, indices: mx.array, weights: mx.array) -> mx.array:
        """Return this rank's share of Σₖ weightₖ · expertₖ(x).

        x (T, D); indices (T, K) of experts; weights (T, K). Returns (T, D) in x's dtype. Syncs with the host only in
        the `experts` split and, on the CPU, when many pairs are grouped.
        """
        if self._groups_on_cpu(indices):
            return self._grouped_on_cpu(x, indices, weights)
        if not self._owns_some:
            y = self.mlp(x, indices)
            return (y * weights[..., None]).sum(axis=-2)
        return self._owned_only(x, indices, weights)

    def waits_for_host(self, indices: mx.array) -> bool:
        """Return whether a call with these indices evaluates its inputs before it returns."""
        return self._owns_some or self._groups_on_cpu(indices)

    def _groups_on_cpu(self, indices: mx.array) -> bool:
        on_cpu = mx.default_device() == mx.Device(mx.cpu)
        many = indices.size >= cpu.GROUP_FROM_PAIRS or (indices.shape[0] > 1 and self._is_large)
        return on_cpu and (many or self._cannot_gather)

    @property
    def _is_large(self) -> bool:
        return (
            "scales" not in self.mlp.gate_proj and math.prod(self.mlp.gate_proj.weight.shape[1:]) >= cpu.LARGE_ELEMENTS
        )

    @property
    def _cannot_gather(self) -> bool:
        # MLX's CPU gather_mm knows float32 only; gather_qmm knows all.
        return "scales" not in self.mlp.gate_proj and self.mlp.gate_proj.weight.dtype != mx.float32

    def find_idle(self, indices: Sequence[mx.array]) -> list[int]:
        """Return the numbers of this rank's experts that have nothing to do in calls with these indices."""
        busy = np.unique(np.concatenate([self._own(chunk) for chunk in indices]))
        idle: list[int] = np.flatnonzero((self._place >= 0) & ~np.isin(self._place, busy)).tolist()
        return idle

    def _own(self, indices: mx.array) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return for each pair (T, K) the place of its expert in the stack, -1 where other ranks compute it."""
        chosen = np.array(indices).astype(np.int64)
        places = self._place[chosen]
        if self._owners is not None:
            experts, counts = np.unique(chosen, return_counts=True)
            shares = _share_out(tuple(zip(experts.tolist(), counts.tolist(), strict=True)), self._owners)
            for expert in (e for e, share in shares.items() if self._rank in share):
                token, slot = np.nonzero(chosen == expert)  # dealt out in the order of tokens, by rank
                start = sum(n for rank, n in shares[expert].items() if rank < self._rank)
                theirs = np.ones(token.size, dtype=bool)
                theirs[start : start + shares[expert][self._rank]] = False
                places[token[theirs], slot[theirs]] = -1
        return places

    def _owned_only(self, x: mx.array, indices: mx.array, weights: mx.array) -> mx.array:
        local = self._own(indices)
        token, slot = np.nonzero(local >= 0)
        if token.size == 0:
            return mx.zeros_like(x)
        rows = mx.array(token.astype(np.uint32))
        mine = mx.array(local[token, slot].astype(np.uint32))
        y = self.mlp(x[rows], mine[:, None])[:, 0]
        return mx.zeros_like(x).at[rows].add(y * weights[rows, mx.array(slot.astype(np.uint32))][:, None])

    def _grouped_on_cpu(self, x: mx.array, indices: mx.array, weights: mx.array) -> mx.array:
        mx.eval(x, indices, weights)
        xs, ws = cpu.to_numpy(x), cpu.to_numpy(weights)
        return mx.array(self.add_up(xs, [indices], ws)).astype(x.dtype)

    def add_up(
        self,
        x: np.ndarray[Any, np.dtype[np.float32]],
        indices: Sequence[mx.array],
        weights: np.ndarray[Any, np.dtype[np.float32]],
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Return what several calls do, expert by expert; x (T, D) and weights (T, K) of all calls, indices of each."""
        places = np.concatenate([self._own(chunk) for chunk in indices])
        out = np.zeros(x.shape, dtype=np.float32)
        for expert in range(self._count):
            token, slot = np.nonzero(places == expert)
            if token.size == 0:
                continue
            rows = x[token]
            gate, up = _times(rows, self.mlp.gate_proj, expert), _times(rows, self.mlp.up_proj, expert)
            with np.errstate(over="ignore"):
                hidden = gate / (1.0 + np.exp(-gate)) * up
            # Top-k experts of one token differ, so `token` holds no row twice.
            out[token] += _times(hidden, self.mlp.down_proj, expert) * weights[token, slot, None]
        return out


@lru_cache(maxsize=4096)  # one token has 1820 choices of 4 experts of 16, and each would take 70 µs per layer
def _share_out(counts: tuple[tuple[int, int], ...], owners: tuple[tuple[int, ...], ...]) -> Shares:
    return share_out(dict(counts), owners)


def _times(
    rows: np.ndarray[Any, np.dtype[np.float32]], linear: Any, expert: int
) -> np.ndarray[Any, np.dtype[np.float32]]:
    return linear.times(rows, expert) if isinstance(linear, StoredMatrix) else cpu.times(rows, linear, expert)


class Router(RouterLogits):
    """Choose top-k experts per token: softmax over all in float32, top-k, then divide by the p-norm."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry.d_model, geometry.n_experts)
        self._top_k = geometry.top_k
        self._p = geometry.moe_normalize

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Return (indices, weights), both (T, K), for x (T, D)."""
        scores = self._score(x)
        indices = mx.argpartition(-scores, kth=self._top_k - 1, axis=-1)[:, : self._top_k]
        return indices, self._weigh(scores, indices).astype(x.dtype)

    def deal(self, x: mx.array, first: int) -> tuple[mx.array, mx.array]:
        """Return what a call does, but deal the tokens out to all experts in turn: these have numbers from `first` on.

        The weights are the router's, and no token is undecided.
        """
        scores = self._score(x)
        count = scores.shape[-1]
        numbers = mx.arange(first, first + x.shape[0])[:, None]
        indices = ((numbers + mx.arange(self._top_k) * (count // self._top_k)) % count).astype(mx.uint32)
        return indices, self._weigh(scores, indices).astype(x.dtype)

    def _score(self, x: mx.array) -> mx.array:
        return mx.softmax(super().__call__(x).astype(mx.float32), axis=-1)

    def _weigh(self, scores: mx.array, indices: mx.array) -> mx.array:
        weights = mx.take_along_axis(scores, indices, axis=-1)
        if self._p is not None:
            weights = weights / mx.linalg.norm(weights, ord=self._p, axis=-1, keepdims=True)
        return weights


class SparseMoe(nn.Module):
    """Router and experts; the result is the sum of all ranks' parts."""

    def __init__(self, placement: Placement, rank: int, group: mx.distributed.Group | None) -> None:
        super().__init__()
        self.router = Router(placement.geometry)
        self.experts = Experts(placement, rank)
        self._group = group if placement.split != "layers" else None  # a pipeline's experts are whole
        self._follows = False

    def follow_first_rank(self) -> None:
        """Take rank 0's choice of experts from now on: chips that round differently may choose differently."""
        self._follows = self._group is not None and self._group.size() > 1

    def __call__(self, x: mx.array) -> mx.array:  # (B, L, D) → (B, L, D)
        tokens = x.reshape(-1, x.shape[-1])
        indices, weights = self.router(tokens)
        if self._follows and self._group is not None:
            indices, weights = take_first(indices, weights, self._group)
        partial = self.experts(tokens, indices, weights)
        return sum_over_ranks(partial, self._group).reshape(x.shape)


class DividedAttention(Attention):
    """A rank's heads of attention; the result is the sum of all ranks' parts."""

    def __init__(self, args: ModelArgs, placement: Placement, rank: int, group: mx.distributed.Group | None) -> None:
        first, last = placement.heads(rank)
        low, high = placement.kv_heads(rank)
        width = (last - first) * placement.geometry.head_dim
        # mlx-lm's attention takes its sizes from these; only the two projections reach beyond the rank's own heads.
        attn_config = {**args.attn_config, "kv_n_heads": high - low}
        super().__init__(replace(args, d_model=width, n_heads=last - first, attn_config=attn_config))
        self.Wqkv = nn.Linear(args.d_model, width + 2 * (high - low) * placement.geometry.head_dim, bias=False)
        self.out_proj = nn.Linear(width, args.d_model, bias=False)
        self._group = group

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:  # (B, L, D) → (B, L, D)
        return sum_over_ranks(super().__call__(x, mask, cache), self._group)


class DecoderLayer(nn.Module):
    def __init__(self, args: ModelArgs, placement: Placement, rank: int, group: mx.distributed.Group | None) -> None:
        super().__init__()
        self.norm_attn_norm = NormAttnNorm(args)
        if placement.split == "tensor":
            self.norm_attn_norm.attn = DividedAttention(args, placement, rank, group)
        geometry = placement.geometry
        if geometry.rope_scaling:  # mlx-lm's own DBRX has none
            self.norm_attn_norm.attn.rope = initialize_rope(
                geometry.head_dim, geometry.rope_theta, False, dict(geometry.rope_scaling), geometry.max_seq_len
            )
        self.ffn = SparseMoe(placement, rank, group)

    def __call__(self, x: mx.array, mask: Any, cache: Any) -> mx.array:
        residual, h = self.norm_attn_norm(x, mask, cache)
        return residual + self.ffn(h)


class Transformer(nn.Module):
    """The layers of a rank, between the rank before and the rank after where they are not all."""

    def __init__(self, args: ModelArgs, placement: Placement, rank: int, group: mx.distributed.Group | None) -> None:
        super().__init__()
        first, last = placement.layers(rank)
        if placement.holds_embedding(rank):
            self.wte = nn.Embedding(args.vocab_size, args.d_model)
        self.blocks = [DecoderLayer(args, placement, rank, group) for _ in range(last - first)]
        self.pipeline = Pipeline(placement, rank, group)
        if self.pipeline.is_last:
            self.norm_f = nn.LayerNorm(args.d_model, bias=False)

    def __call__(self, inputs: mx.array, cache: Any) -> mx.array:  # (B, L) → (B, L, D)
        cache = cache or [None] * len(self.blocks)
        if "wte" in self:
            h = self.wte(inputs)
        else:
            norm = self.blocks[0].norm_attn_norm.norm_1.weight
            h = self.pipeline.receive((*inputs.shape, norm.shape[0]), norm.dtype)
        mask = create_attention_mask(h, cache[0])
        for layer, layer_cache in zip(self.blocks, cache, strict=True):
            h = layer(h, mask, layer_cache)
        return self.norm_f(h) if "norm_f" in self else self.pipeline.send(h, cache[-1])


class Model(nn.Module):
    """One rank of DBRX; one rank has the head, the others give placeholders that keep the graph's order."""

    def __init__(self, placement: Placement, rank: int = 0, group: mx.distributed.Group | None = None) -> None:
        super().__init__()
        geometry = placement.geometry
        self.placement = placement
        self.transformer = Transformer(_mlx_args(geometry), placement, rank, group)
        if placement.holds_head(rank):
            self.lm_head = nn.Linear(geometry.d_model, geometry.vocab_size, bias=False)

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        """Return logits (B, L, V) for token ids (B, L); (B, L, 1) zeros on ranks without the head.

        Those zeros depend on the last layer, so that whatever is agreed after a step comes after its exchanges.
        """
        h = self.transformer(inputs, cache)
        if "lm_head" in self:
            return self.lm_head(h)
        zeros = mx.zeros((*inputs.shape, 1), dtype=h.dtype)
        return mx.depends([zeros], [h])[0]

    @property
    def layers(self) -> list[DecoderLayer]:
        """The layers, by the name under which mlx-lm's cache and generator look for them."""
        return self.transformer.blocks


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
