"""Run the canary's prompts on the real group and compare this rank's part with what one machine computed.

Every rank has to run it at the same place, before it serves. It decides nothing: `session` does, who hears all ranks.
Agreement means that this rank computes as the machine that cut the set did, right or wrong (`canary`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from moectl.model.canary import (
    Canary,
    Verdict,
    choose_tolerance,
    cut_chunks,
    decode_points,
    judge,
    judge_logits,
    make_prompts,
)
from moectl.model.dbrx import Model
from moectl.model.fingerprint import take_fingerprint
from moectl.model.reduce import Exchange, observed


@dataclass(frozen=True, slots=True)
class Checked:
    """A rank's verdict, and how long it took: seconds per token of the long prompt, and for a single token."""

    verdict: Verdict
    token_s: float
    step_s: float


def check(model: Model, canary: Canary, *, rank: int) -> Checked:
    """Return what comes of the prompts on this rank; caches are thrown away."""
    geometry = model.placement.geometry
    dtype = str(model.layers[0].norm_attn_norm.norm_1.weight.dtype).rpartition(".")[2]
    tolerance = choose_tolerance(canary, dtype)
    worst, wrong_at, token_s, step_s = 0.0, None, 0.0, 0.0
    for number, tokens in enumerate(make_prompts(geometry.vocab_size, geometry.max_seq_len, canary.chunk)):
        run = _Run(model, canary.chunk)
        token_s, step_s = run.read(tokens)
        expected = decode_points(canary.points[rank][number])
        verdict = judge(expected, run.points, tolerance=tolerance)
        if model.placement.holds_head(rank):
            off = judge_logits(canary, number, run.logits_of([token for token, _ in canary.top[number]]))
            after_all = len(expected) if off > tolerance else None
            verdict = Verdict(max(off, verdict.worst), after_all if verdict.wrong_at is None else verdict.wrong_at)
        worst = max(worst, verdict.worst)
        if verdict.wrong_at is not None and (wrong_at is None or verdict.wrong_at < wrong_at):
            wrong_at = verdict.wrong_at
    if wrong_at is not None and model.placement.split == "layers":
        wrong_at += rank  # a rank of a pipeline has one exchange, and they are in its order
    return Checked(Verdict(worst, wrong_at), token_s, step_s)


class _Run:
    """One prompt, chunk by chunk."""

    def __init__(self, model: Model, chunk: int) -> None:
        self._model = model
        self._chunk = chunk
        self._sums: list[mx.array] = []  # by exchange
        self._first = 0
        self._number = 0
        self._logits = mx.array([])

    def read(self, tokens: list[int]) -> tuple[float, float]:
        """Read a prompt; return the seconds per token of what comes before its last one, and for that."""
        cache = make_prompt_cache(self._model)
        times = []
        for chunk in cut_chunks(tokens, self._chunk):
            begin = time.perf_counter()
            self._number = 0
            with observed(self._see):
                self._logits = self._model(mx.array([chunk]), cache=cache)
            # Of a chunk only what the cache needs is computed, as in prefill: no head.
            last = [self._logits] if len(chunk) == 1 else []
            mx.eval([c.state for c in cache], self._sums, last)
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
            point = take_fingerprint(x, self._first)
            if self._number == len(self._sums):
                self._sums.append(point)
            else:
                self._sums[self._number] = self._sums[self._number] + point
            self._number += 1
        return exchange(x)
