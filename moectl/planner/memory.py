"""Does it fit: the bytes that a rank needs against the bytes that its host can give. Pure arithmetic.

A host's budget is min(GPU working set, RAM - what the system keeps - what is in use). Up to 0.9 of it fits, up to 1.0
is borderline, more is refused. A cluster fits only if every host does: a sum over hosts says nothing (a published pair
of 16 GB minis crashed on 22 GB). When macOS runs out of wired memory, it panics; it raises no error.
"""

from __future__ import annotations

import bisect
import enum
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from moectl.model.placement import Placement
from moectl.model.regions import Role
from moectl.model.structure import CacheSize, Layer, Moment, Part

COMFORTABLE = 0.9
PREFILL_TOKENS = 512  # the engine's chunk
KV_STEP = 256  # mlx-lm's caches grow by this many tokens
SYSTEM_BYTES = 4 << 30  # what the system and its services keep, or a quarter of a smaller machine
METAL_DTYPE_BYTES, CPU_DTYPE_BYTES = 2, 4  # bfloat16 on a GPU, float32 on a CPU (engine.network.load)
# A worker before it has loaded: Python, MLX, mlx-lm, the tokenizer. 0.39 GB were measured on Linux; the 0.2 GB more for
# Metal are an estimate.
RUNTIME_BYTES = {METAL_DTYPE_BYTES: 600_000_000, CPU_DTYPE_BYTES: 400_000_000}

# What MLX may keep of freed arrays on a GPU at most, to give them out again; its own limit is nearly the working set.
CACHE_LIMIT_BYTES = 2 << 30
# What a rank on a Mac may wire beyond its need: blocks are larger than what is in them.
WIRED_EXTRA_BYTES = 2 << 30


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
    cache_limit: int = 0  # of freed arrays that MLX keeps

    @property
    def arrays(self) -> int:
        """The peak of MLX's own memory."""
        return self.weights + max(self.loading, self.kv + self.activations + self.communication)

    @property
    def freed(self) -> int:
        """What MLX may keep of freed arrays: as much as a step gives back."""
        return min(self.cache_limit, self.activations + self.communication)

    @property
    def total(self) -> int:
        return self.runtime + self.arrays + self.freed

    def wired_limit(self, working_set_bytes: int, ranks_here: int) -> int:
        """Return how much a rank may wire where several share a GPU's working set."""
        return min(self.arrays + self.freed + WIRED_EXTRA_BYTES, working_set_bytes // ranks_here)


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
    rank: int,
    *,
    context: int,
    concurrency: int = 1,
    dtype_bytes: int = METAL_DTYPE_BYTES,
) -> Need:
    """Return what a rank needs for `concurrency` answers of `context` tokens, prompt included.

    `dtype_bytes` is the size of the type that it calculates in; scales and weights that are not packed have it too.
    """
    return Need(
        weights=weight_bytes(placement, rank, dtype_bytes),
        kv=cache_bytes(placement, rank, context, concurrency, dtype_bytes),
        activations=_activation_bytes(placement, rank, context, dtype_bytes),
        communication=PREFILL_TOKENS * placement.structure.width * dtype_bytes * (placement.world_size > 1),
        runtime=_runtime_bytes(placement, rank, context, dtype_bytes),
        loading=_loading_bytes(placement, rank, dtype_bytes),
        cache_limit=CACHE_LIMIT_BYTES if dtype_bytes == METAL_DTYPE_BYTES else 0,  # on a CPU it keeps none
    )


def weight_bytes(placement: Placement, rank: int, dtype_bytes: int) -> int:
    """Return the bytes of a rank's weights."""
    kinds = count_kinds(placement, rank)
    layers = sum(count * layer_bytes(placement, layer, rank, dtype_bytes) for layer, count in kinds.items())
    return round(layers) + outer_bytes(placement, rank, dtype_bytes)


def layer_bytes(placement: Placement, layer: Layer, rank: int, dtype_bytes: int) -> float:
    """Return the bytes of a rank's part of one layer."""
    return sum(part.count_bytes(dtype_bytes) * placement.fraction(part, rank) for part in layer.parts)


def outer_bytes(placement: Placement, rank: int, dtype_bytes: int) -> int:
    """Return the bytes of what a rank has and is in no layer."""
    held = (outer.part for outer in placement.structure.outer if placement.holds_outer(outer, rank))
    return sum(part.count_bytes(dtype_bytes) for part in held)


def cache_bytes(placement: Placement, rank: int, context: int, concurrency: int, dtype_bytes: int) -> int:
    """Return the bytes of a rank's caches for answers of this many tokens each."""
    kinds = count_kinds(placement, rank).items()
    each = (count * layer_cache_bytes(placement, layer, rank, context, dtype_bytes) for layer, count in kinds)
    return concurrency * round(sum(each))


def count_read(placement: Placement, layer: Layer, rank: int, context: int, dtype_bytes: int) -> float:
    """Return the bytes that a rank reads of a layer's caches for one token after `context` others."""
    read = 0.0
    for cache in layer.caches:
        heads = 1.0 if cache.heads is None else placement.fraction_of(cache.heads, rank)
        kept = context if cache.limit is None else min(context, cache.limit)
        # What does not grow is written, too.
        fixed = 2 * (cache.fixed * dtype_bytes + cache.floats * CPU_DTYPE_BYTES)
        read += heads * (cache.per_token * kept * dtype_bytes + fixed)
    return read


def layer_cache_bytes(placement: Placement, layer: Layer, rank: int, context: int, dtype_bytes: int) -> float:
    """Return the bytes of what a rank keeps of one answer in one layer."""
    total = 0.0
    for cache in layer.caches:
        heads = 1.0 if cache.heads is None else placement.fraction_of(cache.heads, rank)
        elements = cache.per_token * count_kept(cache, context) + cache.fixed
        total += heads * dtype_bytes * elements + heads * CPU_DTYPE_BYTES * cache.floats
    return total


def count_kept(cache: CacheSize, context: int) -> int:
    """Return for how many tokens a cache has room after this many."""
    if cache.limit is not None and context > cache.limit:
        # The last chunk of a prompt is there whole, with what each of its tokens looks back to.
        return min(context, cache.limit + PREFILL_TOKENS - 1)
    return -(-context // KV_STEP) * KV_STEP


def count_kinds(placement: Placement, rank: int) -> dict[Layer, int]:
    """Return how many layers of each kind a rank has."""
    structure = placement.structure
    counts = Counter(structure.order[slice(*placement.layers(rank))])
    return {structure.kinds[kind]: count for kind, count in sorted(counts.items())}


def _loading_bytes(placement: Placement, rank: int, dtype_bytes: int) -> int:
    """Return what is held twice while types are converted: a layer's worth on a CPU, nothing on a GPU."""
    if dtype_bytes == METAL_DTYPE_BYTES:
        return 0
    kinds = count_kinds(placement, rank)
    largest = max(layer_bytes(placement, layer, rank, METAL_DTYPE_BYTES) for layer in kinds)
    return max(round(largest), outer_bytes(placement, rank, METAL_DTYPE_BYTES))


# A block of attention's scores with its mask, in numpy (`engine.network.attention`).
_SCORES_BYTES = 1 << 25


def _activation_bytes(placement: Placement, rank: int, context: int, dtype_bytes: int) -> int:
    """Return the largest set of MLX's intermediate arrays, at prefill (`shards.working`)."""
    structure = placement.structure
    tokens = min(PREFILL_TOKENS, context)
    moments = structure.cpu_moments if dtype_bytes == CPU_DTYPE_BYTES else structure.gpu_moments
    hidden, heads = _divided(placement, rank)

    def count(moment: Moment) -> float:
        rows = moment.whole + hidden * moment.hidden + heads * moment.heads
        return tokens * (rows + context * (moment.pairs + heads * moment.head_pairs))

    growing = 0.0
    if context > PREFILL_TOKENS:  # keys and values move to a larger array
        before, kinds = context - PREFILL_TOKENS, count_kinds(placement, rank)
        growing = max(layer_cache_bytes(placement, layer, rank, before, dtype_bytes) for layer in kinds)
    unpacked = _unpacked_bytes(placement, rank) if dtype_bytes == CPU_DTYPE_BYTES else 0.0
    return round(dtype_bytes * max(map(count, moments), default=0.0) + growing + unpacked)


def _divided(placement: Placement, rank: int) -> tuple[float, float]:
    """Return how much a rank has of the units' hidden dimension and of the attention's heads, at most."""
    hidden = heads = 0.0
    for part in {part for layer in placement.structure.kinds for part in layer.parts}:
        pieces = part.pieces("tensor")
        if pieces is None:
            continue
        if pieces.role is Role.HIDDEN:
            hidden = max(hidden, placement.fraction(part, rank))
        elif pieces.role is Role.HEAD:
            heads = max(heads, placement.fraction(part, rank))
    return hidden, heads


def _unpacked_bytes(placement: Placement, rank: int) -> float:
    """Return the bytes of one expert's matrix, which a CPU unpacks to multiply with it (`engine.network.experts`)."""
    stacks = [part for kind in placement.structure.kinds for part in kind.parts if part.experts and part.quantization]
    widest = max((_hidden_of(placement, part, rank) for part in stacks), default=0.0)
    return CPU_DTYPE_BYTES * placement.structure.width * widest


def _runtime_bytes(placement: Placement, rank: int, context: int, dtype_bytes: int) -> int:
    """Return what is held outside MLX: the process, and on a CPU what numpy needs for stacked experts and scores."""
    if dtype_bytes != CPU_DTYPE_BYTES:
        return RUNTIME_BYTES[dtype_bytes]
    tokens, width = min(PREFILL_TOKENS, context), placement.structure.width
    stacks = [part for kind in placement.structure.kinds for part in kind.parts if part.experts]
    rows = (part.top_k * (_hidden_of(placement, part, rank) + width) for part in stacks)
    return RUNTIME_BYTES[dtype_bytes] + round(tokens * max(rows, default=0.0) * dtype_bytes) + _SCORES_BYTES


def _hidden_of(placement: Placement, part: Part, rank: int) -> float:
    """Return the hidden dimension of a rank's part of an expert; 0 where the part is no stack of experts."""
    if not part.experts or part.hidden is None:
        return 0.0
    whole = placement.split == "experts" and part.is_shared_out
    return part.hidden.count * (1.0 if whole else placement.fraction(part, rank))
