"""Does it fit: the bytes that a rank needs against the bytes that its host can give. Pure arithmetic.

A host's budget is min(GPU working set, RAM - what the system keeps - what is in use). Up to 0.9 of it fits, up to 1.0
is borderline, more is refused. A cluster fits only if every host does: a sum over hosts says nothing (a published pair
of 16 GB minis crashed on 22 GB). When macOS runs out of wired memory, it panics; it raises no error.
"""

from __future__ import annotations

import bisect
import enum
from collections.abc import Callable
from dataclasses import dataclass

from moectl.model.geometry import Geometry
from moectl.model.placement import Placement
from moectl.model.structure import Quantization

COMFORTABLE = 0.9
PREFILL_TOKENS = 512  # the engine's chunk
KV_STEP = 256  # mlx-lm's caches grow by this many tokens
SYSTEM_BYTES = 4 << 30  # what the system and its services keep, or a quarter of a smaller machine
METAL_DTYPE_BYTES, CPU_DTYPE_BYTES = 2, 4  # bfloat16 on a GPU, float32 on a CPU (engine.network.load)
# A worker before it has loaded: Python, MLX, mlx-lm, the tokenizer. 0.39 GB were measured on Linux; the 0.2 GB more for
# Metal are an estimate.
RUNTIME_BYTES = {METAL_DTYPE_BYTES: 600_000_000, CPU_DTYPE_BYTES: 400_000_000}


class Verdict(enum.IntEnum):
    """Whether a need fits its budget, best first."""

    FITS = 0
    BORDERLINE = 1
    TOO_MUCH = 2


@dataclass(frozen=True, slots=True)
class Memory:
    """A host's memory in bytes."""

    total: int
    working_set: int | None = None  # what its GPU may use; None: all of it
    in_use: int = 0
    ranks: int = 1  # on this host together

    @property
    def budget(self) -> int:
        """What each of its ranks may use."""
        free = self.total - min(SYSTEM_BYTES, self.total // 4) - self.in_use
        return max(0, free if self.working_set is None else min(free, self.working_set)) // self.ranks


@dataclass(frozen=True, slots=True)
class Need:
    """What a rank needs, in bytes. Loading ends before the first request, so the two peaks do not add up."""

    weights: int
    kv: int
    activations: int
    communication: int
    runtime: int
    loading: int  # beside the weights while the last of them are read

    @property
    def arrays(self) -> int:
        """The peak of MLX's own memory."""
        return self.weights + max(self.loading, self.kv + self.activations + self.communication)

    @property
    def total(self) -> int:
        return self.runtime + self.arrays


def judge(need_bytes: int, budget_bytes: int) -> Verdict:
    """Return whether a need fits into a budget, both in bytes."""
    if need_bytes > budget_bytes:
        return Verdict.TOO_MUCH
    return Verdict.FITS if need_bytes <= COMFORTABLE * budget_bytes else Verdict.BORDERLINE


def most_that_fits(fits: Callable[[int], bool], most: int) -> int:
    """Return the largest n from 1 to `most` that fits, 0 when none does; where n fits, every smaller one does."""
    return bisect.bisect_left(range(1, most + 1), 1, key=lambda n: not fits(n))


def rank_need(
    placement: Placement,
    quantization: Quantization | None,
    rank: int,
    *,
    context: int,
    concurrency: int = 1,
    dtype_bytes: int = METAL_DTYPE_BYTES,
) -> Need:
    """Return what a rank needs for `concurrency` answers of `context` tokens, prompt included.

    `dtype_bytes` is the size of the type that it calculates in; scales and weights that are not packed have it too.
    """
    tensors = RankTensors(placement, quantization, rank, dtype_bytes)
    return Need(
        weights=tensors.all_bytes(),
        kv=kv_bytes(placement, rank, context, concurrency, dtype_bytes),
        activations=_activation_bytes(placement, rank, context, dtype_bytes),
        communication=2 * PREFILL_TOKENS * placement.geometry.d_model * dtype_bytes * (placement.world_size > 1),
        runtime=_runtime_bytes(placement, rank, context, dtype_bytes),
        loading=tensors.loading_bytes(),
    )


def kv_bytes(placement: Placement, rank: int, context: int, concurrency: int, dtype_bytes: int) -> int:
    """Return the bytes of a rank's keys and values."""
    first, last = placement.layers(rank)
    low, high = placement.kv_heads(rank)
    tokens = -(-context // KV_STEP) * KV_STEP * concurrency
    return (last - first) * 2 * (high - low) * placement.geometry.head_dim * dtype_bytes * tokens


def head_bytes(geometry: Geometry, quantization: Quantization | None, dtype_bytes: int = METAL_DTYPE_BYTES) -> int:
    """Return the bytes of the head, which its rank reads for each token."""
    return matrix_bytes(geometry.vocab_size, geometry.d_model, quantization, dtype_bytes)


def matrix_bytes(rows: int, columns: int, quantization: Quantization | None, dtype_bytes: int) -> int:
    """Return the bytes of a matrix in memory: packed with its scales and biases, or plain."""
    if quantization is None:
        return rows * columns * dtype_bytes
    groups = rows * columns // quantization.group_size
    packed = rows * columns * quantization.bits // 8
    return packed + groups * (2 * dtype_bytes if quantization.mode == "affine" else 1)


@dataclass(frozen=True, slots=True)
class RankTensors:
    """The bytes of a rank's tensors in memory, which are also those that it reads for a token."""

    placement: Placement
    quantization: Quantization | None
    rank: int
    dtype_bytes: int

    def all_bytes(self) -> int:
        geometry = self.placement.geometry
        first, last = self.placement.layers(self.rank)
        layer = self.attention + len(self.placement.experts_of(self.rank)) * self.expert
        ends = self.placement.holds_embedding(self.rank) + self.placement.holds_head(self.rank)
        norm = geometry.d_model * self.dtype_bytes
        return (last - first) * layer + ends * head_bytes(geometry, self.quantization, self.dtype_bytes) + norm

    @property
    def attention(self) -> int:
        """Attention, router and norms of a layer."""
        geometry = self.placement.geometry
        low, high = self.placement.kv_heads(self.rank)
        heads = (high - low) * (geometry.n_heads // geometry.kv_n_heads) * geometry.head_dim
        kv = 2 * (high - low) * geometry.head_dim
        projections = self._matrix(heads + kv, geometry.d_model) + self._matrix(geometry.d_model, heads)
        return projections + (2 + geometry.n_experts) * geometry.d_model * self.dtype_bytes

    @property
    def expert(self) -> int:
        """Return the part of one expert in one layer."""
        start, stop = self.placement.hidden(self.rank)
        d_model = self.placement.geometry.d_model
        return 2 * self._matrix(stop - start, d_model) + self._matrix(d_model, stop - start)

    def loading_bytes(self) -> int:
        """Return what is held twice while types are converted: a layer's worth on a CPU, nothing on a GPU."""
        if self.dtype_bytes == METAL_DTYPE_BYTES:
            return 0
        stored = RankTensors(self.placement, self.quantization, self.rank, METAL_DTYPE_BYTES)
        outer = (self.placement.holds_embedding(self.rank) + self.placement.holds_head(self.rank)) * head_bytes(
            self.placement.geometry, self.quantization, METAL_DTYPE_BYTES
        )
        return max(outer, stored.attention + len(self.placement.experts_of(self.rank)) * stored.expert)

    def _matrix(self, rows: int, columns: int) -> int:
        return matrix_bytes(rows, columns, self.quantization, self.dtype_bytes)


def _activation_bytes(placement: Placement, rank: int, context: int, dtype_bytes: int) -> int:
    """Return the largest set of MLX's intermediate arrays, at prefill.

    A GPU's attention is fused and its experts are gathered; a CPU writes the scores of all heads out. The 11.5 and 5.5
    are fitted to MLX's peak on a CPU for d_model 64 to 1024 (tests/test_memory.py); on Metal nothing was measured.
    """
    geometry = placement.geometry
    tokens = min(PREFILL_TOKENS, context)
    start, stop = placement.hidden(rank)
    low, high = placement.kv_heads(rank)
    heads = (high - low) * (geometry.n_heads // geometry.kv_n_heads)
    if dtype_bytes == CPU_DTYPE_BYTES:
        kv = (high - low) * geometry.head_dim
        arrays = heads * tokens * context + tokens * (23 * geometry.d_model + 11 * kv) // 2
    else:
        experts = tokens * geometry.top_k * (3 * (stop - start) + 2 * geometry.d_model)
        arrays = experts + tokens * (4 * geometry.d_model + 2 * (heads + 2 * (high - low)) * geometry.head_dim)
    return arrays * dtype_bytes


def _runtime_bytes(placement: Placement, rank: int, context: int, dtype_bytes: int) -> int:
    """Return what is held outside MLX: the process, and on a CPU numpy's dequantised expert with the rows for it."""
    if dtype_bytes != CPU_DTYPE_BYTES:
        return RUNTIME_BYTES[dtype_bytes]
    start, stop = placement.hidden(rank)
    rows = min(PREFILL_TOKENS, context)
    numpy = (2 * placement.geometry.d_model + 3 * rows) * (stop - start) * dtype_bytes
    return RUNTIME_BYTES[dtype_bytes] + numpy
