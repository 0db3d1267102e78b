"""Measure a group of nodes with shortened models: the real layers, engine and exchanges, with random weights.

`python -m moectl.engine.measure` is a worker whose only request is a `measured.Job` (the prompt, as JSON). Rank 0
answers with a list of `measured.Speed` as JSON. It loads no shard and writes nothing.

An engine answers with models of the first few layers. From their times at several depths follow the time of a layer of
each kind in a session (exchange, host work and waiting for the slowest rank are in it), and what is left: embedding,
head, sampling and agreement. All ranks work at once, so ranks that share a machine slow each other down as they will in
a session.

Weights that do not fit in the job's memory are shared by layers that are alike.
"""

from __future__ import annotations

import json
import queue
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, replace
from typing import Any

import mlx.core as mx
import numpy as np
import tokenizers
from mlx_lm.models.cache import make_prompt_cache

from moectl.engine.controller_link import ControllerLink
from moectl.engine.engine import Engine
from moectl.engine.gpu_memory import working_set_bytes
from moectl.engine.network.exchange import seam, sum_over_ranks
from moectl.engine.network.load import compute_dtype
from moectl.engine.protocol import Done, Generate, Token
from moectl.engine.random_model import RandomWeights, choose_depths, with_depth
from moectl.engine.random_prompts import RandomPrompts, check_uncached
from moectl.engine.request import Request, Stats
from moectl.engine.timed_group import PART_S, Group, join_without_model, time_exchange
from moectl.engine.worker import run
from moectl.errors import PlanError
from moectl.model.placement import Placement
from moectl.model.structure import Structure
from moectl.planner.measured import Job, Pass, RankSpeed, Speed, read_job
from moectl.shards.chat.tokenizer import Tokenizer

_LEAST_ROUNDS = 2
_MOST_TOKENS = 64
_PATIENCE, _PATIENCE_S = 4, 20.0  # times the budget, and seconds, that the least may take

Tell = Callable[[int], None]  # gets a token that was generated


def measure(job: Job, group: Group, tell: Tell = lambda token: None) -> list[Speed]:
    """Measure each of a job's placements; every rank returns the same.

    `tell` gets each token, as a worker would send it. Raises PlanError without enough memory.
    """
    speeds = []
    for placement in job.placements:
        speeds.append(_Bench(placement, job, group, tell).measure())
        mx.clear_cache()
    return speeds


class _Bench:
    """One placement's measurement on one rank."""

    def __init__(self, placement: Placement, job: Job, group: Group, tell: Tell) -> None:
        self._tell = tell
        self._placement, self._structure = placement, placement.structure
        self._job = job
        self._group = group
        self._dtype = compute_dtype()
        least = placement.world_size if placement.split == "layers" else 1
        self._depths = choose_depths(self._structure.order, least)

    def measure(self) -> Speed:
        weights = self._choose_weights()
        rank, group = self._group.rank, self._group.group
        models = {depth: weights.make_model(with_depth(self._placement, depth), rank, group) for depth in self._depths}
        decode, prefill = _Passes(models, self._placement, self._job, self._group, self._tell).measure()
        collective = self._time_collectives(prefill.tokens)
        del models
        own = self._measure_alone(weights, prefill.tokens)
        ranks = tuple(RankSpeed(*row) for row in self._group.share(*astuple(own)))
        if self._placement.split == "layers":
            uneven = weigh_layers([last - first for first, last in self._spans()], ranks)
            decode, prefill = (replace(p, layer_s=uneven * p.layer_s) for p in (decode, prefill))
        placement = self._placement
        return Speed(
            placement.split, placement.shares, decode, prefill, collective, ranks, prefill.tokens, placement.held
        )

    def _spans(self) -> list[tuple[int, int]]:
        return [self._placement.layers(rank) for rank in range(self._placement.world_size)]

    def _choose_weights(self) -> RandomWeights:
        """Return where weights come from, alike on every rank."""
        deep = with_depth(self._placement, self._depths[-1])
        needed = 0.0
        for shared in (False, True):
            weights = RandomWeights(self._job.config, self._job.quantization, self._dtype, shared)
            needed = self._group.largest(weights.count_bytes(deep, self._group.rank))
            if needed <= self._job.memory_bytes:
                return weights
        allowed = self._job.memory_bytes
        raise PlanError(
            f"measuring needs {needed / 1e9:.1f} GB, and may take {allowed / 1e9:.1f} GB here",
            hint="free some memory there, or plan without --probe",
        )

    def _measure_alone(self, weights: RandomWeights, tokens: int) -> RankSpeed:
        """Return this rank's own work on a layer, beside the other ranks and without exchanges."""
        times: dict[int, list[float]] = {}
        many: dict[int, list[float]] = {}
        for depth in self._depths:
            placement = with_depth(self._placement, depth)
            if placement.split == "layers":  # its layers are whole
                placement = replace(placement, shares=(1,))
            model = weights.make_model(placement, 0 if placement.world_size == 1 else self._group.rank, None)
            many[depth], times[depth] = self._time_model(model, tokens)
        order = self._structure.order
        one, all_of = fit_pass(1, times, order), fit_pass(tokens, many, order)
        read, operations = _work_of(self._placement, self._group.rank, self._dtype.size)
        bytes_s, flops_s = read / max(one.layer_s, 1e-9), tokens * operations / max(all_of.layer_s, 1e-9)
        return RankSpeed(one.layer_s, bytes_s, flops_s, float(working_set_bytes() or 0))

    def _time_model(self, model: Any, tokens: int) -> tuple[list[float], list[float]]:
        """Return the seconds of some prompts, and of some single tokens after one."""
        prompts, steps = [], []
        self._group.largest(0.0)  # all ranks begin together
        for _ in range(3):
            cache = make_prompt_cache(model)
            begin = time.perf_counter()
            mx.eval(model(mx.zeros((1, tokens), dtype=mx.int32), cache=cache))
            prompts.append(time.perf_counter() - begin)
            begin, count = time.perf_counter(), 0
            while time.perf_counter() - begin < PART_S or count < 2:
                mx.eval(model(mx.zeros((1, 1), dtype=mx.int32), cache=cache))
                count += 1
            steps.append((time.perf_counter() - begin) / count)
        return prompts[1:], steps[1:]

    def _time_collectives(self, tokens: int) -> dict[int, float]:
        """Return the seconds of one sum over all ranks, by bytes, for one token and for a prompt."""
        if self._group.size == 1:
            return {}
        row, width = self._structure.width * self._dtype.size, self._structure.width
        return {
            count * row: time_exchange(
                lambda x: sum_over_ranks(x, self._group.group), mx.ones((count, width), dtype=self._dtype), self._group
            )
            for count in sorted({1, tokens})
        }


def _work_of(placement: Placement, rank: int, dtype_bytes: int) -> tuple[float, float]:
    """Return the bytes that a token reads in an average layer of a rank, and the operations with them."""
    structure, read, operations = placement.structure, 0.0, 0.0
    for layer in structure.layers:
        for part in layer.parts:
            share = placement.fraction(part, rank) * part.active
            read += part.count_bytes(dtype_bytes) * share
            operations += 2 * part.values * share
    return read / structure.n_layers, operations / structure.n_layers


class _Passes:
    """Whole passes through the engine, with models of several depths in turn."""

    def __init__(self, models: dict[int, Any], placement: Placement, job: Job, group: Group, tell: Tell) -> None:
        self._tell = tell
        self._models = models
        self._placement = placement
        self._job = job
        self._group = group
        self._prompts = RandomPrompts(placement.structure.vocab_size)  # the same ones on every rank
        self._first: dict[int, list[float]] = {depth: [] for depth in models}  # seconds of the prompt
        self._step: dict[int, list[float]] = {depth: [] for depth in models}  # seconds per generated token

    def measure(self) -> tuple[Pass, Pass]:
        """Return (decode, prefill)."""
        shallow = min(self._models)
        ratio = sum(self._models) / shallow
        self._answer(shallow, 8, 3)  # compiles kernels
        prompt_s, step_s = self._answer(shallow, 8, 3)
        least_s = (_LEAST_ROUNDS + 1) * ratio * (prompt_s + 3 * step_s)
        if least_s > max(_PATIENCE * self._job.budget_s, _PATIENCE_S):
            raise PlanError(f"these hosts would take {least_s:.0f} s to measure", hint="plan without --probe")
        budget = self._job.budget_s / (_LEAST_ROUNDS + 1)
        # Eight tokens at once take no less per token than many.
        prompt = int(min(self._job.prompt_tokens, max(8, budget / 2 / ratio / (prompt_s / 8))))
        count = int(min(_MOST_TOKENS, max(3, budget / 2 / ratio / step_s)))
        begin, rounds = time.perf_counter(), 0
        while True:
            for depth in sorted(self._models):
                first, step = self._answer(depth, prompt, count)
                if rounds:  # the first one compiles kernels for this length
                    self._first[depth].append(first)
                    self._step[depth].append(step)
            rounds += 1
            spent = self._group.largest(time.perf_counter() - begin)
            if rounds > _LEAST_ROUNDS and spent > self._job.budget_s:
                order = self._placement.structure.order
                return fit_pass(1, self._step, order), fit_pass(prompt, self._first, order)

    def _answer(self, depth: int, prompt: int, count: int) -> tuple[float, float]:
        """Return the seconds (to the first token, per further token) of one answer, the same on every rank."""
        structure: Structure = self._placement.structure
        engine = Engine(
            self._models[depth],
            _NoText(),
            vocab_size=structure.vocab_size,
            rank=self._group.rank,
            head_rank=self._placement.head_rank,
            group=self._group.group,
            max_seq_len=1 << 20,
            trimmable=structure.can_trim,
            batchable=structure.can_batch,
        )
        inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        tokens = self._prompts.draw(prompt)
        inbox.put(Generate(Request(1, "", count, prompt_tokens=tokens, cache_prompt=False)))
        inbox.put(None)
        stats: Stats | None = None
        for event in engine.serve(inbox):
            if isinstance(event, Token):
                self._tell(event.token)
            if isinstance(event, Done):
                stats = event.stats
                check_uncached(stats)
        first, step = (stats.prompt_s, stats.decode_s / (count - 1)) if stats else (0.0, 0.0)
        told = self._group.share(first, step)
        return max(row[0] for row in told), max(row[1] for row in told)


def fit_pass(tokens: int, seconds: Mapping[int, Sequence[float]], order: Sequence[int]) -> Pass:
    """Return the time of an average layer of the whole model, and what is left, from medians at several depths.

    `order` has the kind of each layer. The deepest model's time is met; noise may not make a part negative.
    """
    kinds = sorted(set(order))
    depths = sorted(seconds)
    times = [statistics.median(seconds[depth]) for depth in depths]
    counts = np.array([[list(order[:depth]).count(kind) for kind in kinds] for depth in depths], dtype=float)
    if len(depths) == 1:
        return Pass(tokens, times[0] / depths[0], 0.0)
    rows = np.hstack([np.ones((len(depths), 1)), counts])
    found, *_ = np.linalg.lstsq(rows, np.array(times), rcond=None)
    each = np.maximum(found[1:], 0.0)
    each *= min(1.0, times[-1] / max(float(counts[-1] @ each), 1e-12))
    whole = np.array([list(order).count(kind) for kind in kinds], dtype=float)
    return Pass(tokens, float(whole @ each / whole.sum()), max(0.0, times[-1] - float(counts[-1] @ each)))


class _NoText(Tokenizer):
    """A tokenizer for prompts that are tokens already; it knows no end, and no text."""

    def __init__(self) -> None:
        super().__init__(tokenizers.Tokenizer(tokenizers.models.BPE()), eos_token_ids=set())


def weigh_layers(counts: Sequence[int], ranks: Sequence[RankSpeed]) -> float:
    """Return how much longer a layer takes on average where the ranks have these numbers of layers than evenly."""
    times = [rank.layer_s for rank in ranks]
    mean = statistics.fmean(times)
    return sum(n * t for n, t in zip(counts, times, strict=True)) / (sum(counts) * mean) if mean else 1.0


def _serve(link: ControllerLink) -> None:
    group = join_without_model(link)  # there is no model before there is a job
    order: Generate = link.take(Generate)
    # Without text: the findings come with the end.
    with seam():
        speeds = measure(
            read_job(order.request.prompt),
            group,
            lambda token: link.tell(Token(order.request.id, token, "")),
        )
    if group.rank == 0:
        stats = Stats(0, 0, 0.0, 0.0, 0.0, mx.get_peak_memory())
        link.tell(Done(order.request.id, "stop", stats, json.dumps([speed.to_json() for speed in speeds])))
    link.orders.get()  # the controller closes the link after rank 0's answer


if __name__ == "__main__":
    run(_serve)
