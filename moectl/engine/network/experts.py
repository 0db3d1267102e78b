"""A layer's experts as stacked arrays, and the two ways to run a rank's part of them.

`hidden`: the rank holds a slice of every expert and computes it for every selected (token, expert) pair. `experts`: the
rank holds whole experts and computes only its own pairs: all pairs of an expert that no other rank has, and its share
of the pairs of an expert that has copies. Either result is a partial sum over ranks. The router and the sum itself are
elsewhere.

Decode gathers matrices by index on the device. Prefill, and on a CPU a batch of large ones, groups the pairs by
expert: on a GPU by mlx-lm's sorted gather, on a CPU with one dense product per expert in numpy, whose GEMM is some 40
times faster than MLX's Linux wheel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import SwitchGLU

from moectl.engine.network.stored import StoredMatrix
from moectl.model.balance import Shares, share_out
from moectl.model.placement import Placement

# Fewer (token, expert) pairs than this are gathered one by one on the CPU; more are grouped by expert.
GROUP_FROM_PAIRS = 64
# Where a matrix has this many elements and is not quantised, two tokens are grouped already: reading it once, in numpy,
# costs less than the wait for the host (2 to 3 times a batch of 8's speed at 512 × 896; below this it is slower).
LARGE_ELEMENTS = 1 << 17


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
        many = indices.size >= GROUP_FROM_PAIRS or (indices.shape[0] > 1 and self._is_large)
        return on_cpu and (many or self._cannot_gather)

    @property
    def _is_large(self) -> bool:
        return "scales" not in self.mlp.gate_proj and math.prod(self.mlp.gate_proj.weight.shape[1:]) >= LARGE_ELEMENTS

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
        xs, ws = _to_numpy(x), _to_numpy(weights)
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
    if isinstance(linear, StoredMatrix):
        return linear.times(rows, expert)
    found: np.ndarray[Any, np.dtype[np.float32]] = rows @ _matrix(linear, expert).T
    return found


def _matrix(linear: Any, expert: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return one expert's (out, in) matrix in float32, dequantised for this use only."""
    part = slice(expert, expert + 1)  # an int index would copy the expert
    weight = linear.weight[part]
    if "scales" in linear:
        biases = linear.get("biases")
        weight = mx.dequantize(
            weight,
            linear.scales[part],
            None if biases is None else biases[part],
            group_size=linear.group_size,
            bits=linear.bits,
            mode=linear.mode,
        )
    return _to_numpy(weight)[0]


def _to_numpy(x: mx.array) -> np.ndarray[Any, np.dtype[np.float32]]:
    # Without a copy when x is float32 already.
    return np.asarray(x.astype(mx.float32))
