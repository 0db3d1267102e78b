"""Check on a rank, at every start, that it computes what the canary of its shard set says."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from moectl.engine.network.exchange import Exchange, observed
from moectl.engine.network.fingerprint import take_fingerprint
from moectl.engine.network.routing import count_experts, dealt
from moectl.model.canary import (
    LONG,
    Canary,
    CanaryVerdict,
    choose_tolerance,
    cut_chunks,
    decode_points,
    judge,
    judge_logits,
    make_prompts,
)
from moectl.model.placement import Placement


@dataclass(frozen=True, slots=True)
class Checked:
    """A rank's verdict, and how long it took: seconds per token of the long prompt, and for a single token."""

    verdict: CanaryVerdict
    token_s: float
    step_s: float


def check(model: Any, canary: Canary, placement: Placement, *, rank: int) -> Checked:
    """Return what comes of the prompts on this rank; caches are thrown away."""
    structure = placement.structure
    dtype, all_experts = find_dtype(model), count_experts(structure)
    worst, wrong_at, token_s, step_s = 0.0, None, 0.0, 0.0
    for number, tokens in enumerate(make_prompts(structure.vocab_size, structure.context, canary.chunk)):
        experts = all_experts if number == LONG else None
        tolerance = choose_tolerance(canary, dtype, chooses=experts is None and any(all_experts))
        run = _Run(model, canary.chunk, experts)
        token_s, step_s = run.read(tokens)
        expected = decode_points(canary.points[rank][number])
        verdict = judge(expected, run.points, tolerance=tolerance)
        if rank == placement.head_rank:
            off = judge_logits(canary, number, run.logits_of([token for token, _ in canary.top[number]]))
            after_all = len(expected) if off > tolerance else None
            verdict = CanaryVerdict(
                max(off, verdict.worst), after_all if verdict.wrong_at is None else verdict.wrong_at
            )
        worst = max(worst, verdict.worst)
        if verdict.wrong_at is not None and (wrong_at is None or verdict.wrong_at < wrong_at):
            wrong_at = verdict.wrong_at
    if wrong_at is not None and placement.split == "layers":
        wrong_at += rank  # a rank of a pipeline has one exchange, and they are in its order
    return Checked(CanaryVerdict(worst, wrong_at), token_s, step_s)


def find_dtype(model: Any) -> str:
    """Return the type that most floats of a model have: it computes in that."""
    floats = [array.dtype for _, array in tree_flatten(model.parameters()) if mx.issubdtype(array.dtype, mx.floating)]
    return str(Counter(map(str, floats)).most_common(1)[0][0]).rpartition(".")[2]


class _Run:
    """One prompt, chunk by chunk; `experts` are those of each layer where its tokens are dealt out."""

    def __init__(self, model: Any, chunk: int, experts: list[int] | None) -> None:
        self._model = model
        self._experts = experts
        self._chunk = chunk
        self._sums: list[mx.array] = []  # by exchange
        self._first = self._tokens = 0  # of the chunk
        self._number = 0
        self._logits = mx.array([])

    def read(self, tokens: list[int]) -> tuple[float, float]:
        """Read a prompt; return the seconds per token of what comes before its last one, and for that."""
        cache = make_prompt_cache(self._model)
        times = []
        for chunk in cut_chunks(tokens, self._chunk):
            begin = time.perf_counter()
            self._number, self._tokens = 0, len(chunk)
            deals = dealt(self._model, self._experts, self._first) if self._experts is not None else nullcontext()
            with observed(self._see), deals:
                self._logits = self._model(mx.array([chunk]), cache=cache)
            # Of a chunk only what the cache needs is computed, as in prefill: no head.
            last = [self._logits] if len(chunk) == 1 else []
            mx.eval([c.state for c in cache if not c.empty()], self._sums, last)
            self._first += len(chunk)
            times.append(time.perf_counter() - begin)
        return sum(times[:-1]) / max(1, len(tokens) - 1), times[-1]

    @property
    def points(self) -> list[list[float]]:
        return [point.tolist() for point in self._sums]  # type: ignore[misc]

    def logits_of(self, tokens: list[int]) -> list[float]:
        found: list[float] = self._logits[0, -1, mx.array(tokens)].astype(mx.float32).tolist()  # type: ignore[assignment]
        return found

    def _see(self, x: mx.array, exchange: Exchange) -> mx.array:
        if x.size:  # what is only received is not this rank's
            point = take_fingerprint(x, self._first, self._tokens)
            if self._number == len(self._sums):
                self._sums.append(point)
            else:
                self._sums[self._number] = self._sums[self._number] + point
            self._number += 1
        return exchange(x)
