"""Measure a group of nodes with a shortened model: the real layers, engine and exchanges, with random weights.

`python -m moectl.engine.measure` is a worker whose only request is a `measured.Job` (the prompt, as JSON). Rank 0
answers with a list of `measured.Speed` as JSON. It loads no shard and writes nothing.

An engine answers with a model of few layers and with one of more. The slope over depth is the time of one layer in a
session: exchange, host work and waiting for the slowest rank are in it. What is left is embedding, head, sampling and
agreement. All ranks work at once, so ranks that share a machine slow each other down as they will in a session.

A model's first layers may be of other kinds than most: the slope is scaled by the bytes that one token reads. Weights
that do not fit in the job's memory are shared by all layers; if that is not enough, there are fewer experts where their
number costs no time.
"""

from __future__ import annotations

import json
import queue
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import mlx.core as mx
import mlx.nn as nn
import tokenizers

from moectl.engine.controller_link import ControllerLink
from moectl.engine.engine import Engine
from moectl.engine.group import open_group
from moectl.engine.network.exchange import seam
from moectl.engine.network.load import compute_dtype
from moectl.engine.parts import Group, time_collectives, time_model
from moectl.engine.protocol import Done, Generate, Load, Loaded, Ready, Start, Token
from moectl.engine.random_model import Short, Weights, fewer_experts, module_bytes
from moectl.engine.random_prompts import RandomPrompts, check_uncached
from moectl.engine.request import Request, Stats
from moectl.engine.worker import run
from moectl.errors import PlanError
from moectl.model.placement import Placement
from moectl.model.structure import Layer, Quantization, Structure
from moectl.planner.measured import Job, Pass, RankSpeed, Speed, read_job
from moectl.shards.tokenizer import Tokenizer

DEEP = 6  # layers of the longer model, at most
SHALLOW_PART = 3  # the shorter one has this part of them
_LEAST_TOKENS = 11  # of an answer: a short prompt and what it takes to time a step
_PROBE_WIDTH = 2048
_PATIENCE = 4  # times the budget that an estimate of the least may be, since estimates are rough
_LEAST_ROUNDS = 2
_MOST_TOKENS = 64
_LEAST_EXPERTS = 16  # models choose them in groups
_LEAST_SLOPE = 0.05  # of a layer's share of a pass: noise may not make it nothing

Tell = Callable[[int], None]  # gets a token that was generated


def measure(job: Job, group: Group, tell: Tell = lambda token: None) -> list[Speed]:
    """Measure each of a job's placements; every rank returns the same.

    `tell` gets each token, as a worker would send it. Raises PlanError without enough memory, and for a model that
    cannot be shortened.
    """
    speeds = []
    with seam():
        for placement in job.placements:
            speeds.append(_Bench(placement, job, group, tell).measure())
            mx.clear_cache()
    return speeds


class _Bench:
    """One placement's measurement on one rank."""

    def __init__(self, placement: Placement, job: Job, group: Group, tell: Tell) -> None:
        self._tell = tell
        self._placement = placement
        self._job = job
        self._group = group
        self._dtype = compute_dtype()
        self._least = count_first_layers(placement.structure)
        self._deep = min(max(DEEP, 2 * self._least), placement.structure.n_layers)
        self._shallow = max(self._least, self._deep // SHALLOW_PART)
        if placement.split == "layers":
            ranks = placement.world_size
            self._shallow = ranks * -(-self._least // ranks)  # as many on each rank
            self._deep = self._shallow + ranks

    def measure(self) -> Speed:
        weights = self._choose_size()
        depths = sorted({self._shallow, self._deep})
        models = {depth: self._make(weights, depth, self._group.group) for depth in depths}
        decode, prefill = _Passes(models, self._placement, self._job, self._group, self._tell).measure()
        scale = scale_of(self._placement.structure, models[self._deep].structure, self._shallow)
        alone = self._time_alone(weights, depths, prefill.tokens)
        ranks = tuple(
            RankSpeed(scale * layer_s, bytes_s, flops_s) for layer_s, bytes_s, flops_s in self._group.share(*alone)
        )
        width = self._placement.structure.width
        uneven = scale
        if self._placement.split == "layers":
            uneven *= weigh_layers(self._placement.shares, ranks)
        return Speed(
            self._placement.split,
            self._placement.shares,
            replace(decode, layer_s=uneven * decode.layer_s),
            replace(prefill, layer_s=uneven * prefill.layer_s),
            time_collectives(self._group, width, prefill.tokens, self._dtype),
            ranks,
            prefill.tokens,
            self._placement.held,
        )

    def _make(self, weights: Weights, depth: int, group: Any, *, is_whole: bool = False) -> Short:
        short = weights.make_model(self._placement, depth, self._group.rank, group, is_whole=is_whole)
        return weights.fill(short, self._dtype)

    def _time_alone(self, weights: Weights, depths: Sequence[int], tokens: int) -> tuple[float, float, float]:
        """Return (seconds of a layer for one token, bytes per second, operations per second) of this rank's work."""
        is_whole = self._placement.split == "layers"
        if is_whole:
            depths = [self._least, self._least + 1]
        first, step, found = [], [], None
        for depth in depths:
            found = self._make(weights, depth, None, is_whole=is_whole)
            seconds = time_model(found.model, tokens, self._group)
            first.append(seconds[0])
            step.append(seconds[1])
        assert found is not None
        layers = list(found.structure.layers)[depths[0] :] or list(found.structure.layers)
        count = len(layers)

        def slope(seconds: list[float]) -> float:
            return max((seconds[-1] - seconds[0]) / count, _LEAST_SLOPE * seconds[-1] / depths[-1])

        rank = self._group.rank
        shares = [[1.0 if is_whole else self._placement.fraction(p, rank) for p in layer.parts] for layer in layers]
        active = [[(p, s) for p, s in zip(own.parts, s, strict=True)] for own, s in zip(layers, shares, strict=True)]
        read = sum(p.count_bytes(self._dtype.size) * p.active * s for own in active for p, s in own) / count
        operations = sum(2 * p.values * p.active * s for own in active for p, s in own) / count
        layer_s = slope(step)
        return layer_s, read / layer_s, tokens * operations / slope(first)

    def _choose_size(self) -> Weights:
        """Return where weights come from, the same on every rank; set the depths."""
        config, shared, structure = dict(self._job.config), False, self._placement.structure
        bytes_s = _matvec_rate(self._job.quantization, self._dtype)
        while True:
            weights = Weights(config, self._job.quantization, shared=shared)
            short = weights.make_model(self._placement, self._deep, self._group.rank, None, is_whole=False)
            needed = self._group.largest(weights.count_bytes(short, self._dtype))
            needed_s = self._group.largest(self._least_work(short.structure) / bytes_s)
            fits, quick = needed <= self._job.memory_bytes, needed_s <= _PATIENCE * self._job.budget_s
            if fits and quick:
                return weights
            kept = max(structure.top_k, min(_LEAST_EXPERTS, structure.n_experts))
            if not quick and self._deep > self._least + 1 and self._placement.split != "layers":
                self._shallow, self._deep = self._least, self._least + 1
            elif not fits and not shared:
                shared = True
            elif not fits and config == self._job.config and kept < structure.n_experts and self._can_have_fewer():
                config = fewer_experts(config, structure.n_experts, kept)
            else:
                self._refuse(needed, needed_s, fits)

    def _can_have_fewer(self) -> bool:
        """Whether a token's time depends on the experts it chooses only, not on the others."""
        return self._placement.split != "experts" or self._placement.world_size == 1

    def _refuse(self, needed: float, needed_s: float, fits: bool) -> NoReturn:
        if fits:
            raise PlanError(f"this host would take {needed_s:.0f} s to measure", hint="plan without --probe")
        allowed = self._job.memory_bytes
        raise PlanError(
            f"measuring needs {needed / 1e9:.1f} GB, and may take {allowed / 1e9:.1f} GB here",
            hint="free some memory there, or plan without --probe",
        )

    def _least_work(self, structure: Structure) -> float:
        """Return the bytes that the fewest passes of both models read, one token after the other."""
        placement, rank = self._placement, self._group.rank
        each = sum(read_bytes(layer, self._dtype.size, placement, rank) for layer in structure.layers) / self._deep
        head = sum(o.part.count_bytes(self._dtype.size) for o in structure.outer if o.last)
        answers = {self._shallow: _LEAST_ROUNDS + 3, self._deep: _LEAST_ROUNDS + 1}
        return sum(n * (_LEAST_TOKENS * depth * each + 4 * head) for depth, n in answers.items())


def count_first_layers(structure: Structure) -> int:
    """Return how many of a model's first layers have all kinds among them: some model files need one of each."""
    return 1 + max(structure.order.index(kind) for kind in set(structure.order))


def read_bytes(layer: Layer, dtype_bytes: int, placement: Placement | None = None, rank: int = 0) -> float:
    """Return the bytes of a layer's weights that one token reads: all of them, or a rank's."""
    shares = [1.0 if placement is None else placement.fraction(part, rank) for part in layer.parts]
    return sum(p.count_bytes(dtype_bytes) * p.active * s for p, s in zip(layer.parts, shares, strict=True))


def scale_of(whole: Structure, short: Structure, shallow: int) -> float:
    """Return how much more an average layer of a model reads than those by which a shortened one is deeper."""
    added = [read_bytes(layer, 2) for layer in short.layers]
    added = added[shallow:] or added
    everywhere = [read_bytes(layer, 2) for layer in whole.layers]
    return statistics.fmean(everywhere) / statistics.fmean(added) if min(added) > 0 else 1.0


def _matvec_rate(quantization: Quantization | None, dtype: mx.Dtype) -> float:
    """Return roughly the bytes of weights per second that this device multiplies with one vector."""
    linear: Any = nn.Linear(_PROBE_WIDTH, _PROBE_WIDTH, bias=False)
    linear.set_dtype(dtype)
    if quantization is not None:
        q = quantization
        linear = nn.QuantizedLinear.from_linear(linear, q.group_size, q.bits, q.mode)
    x = mx.ones((1, _PROBE_WIDTH), dtype=dtype)
    mx.eval(linear.parameters(), x)
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        mx.eval(linear(x))
        seconds.append(time.perf_counter() - begin)
    return module_bytes(linear, dtype) / min(seconds)


class _Passes:
    """Whole passes through the engine, with a shallow and a deep model in turn."""

    def __init__(self, models: dict[int, Short], placement: Placement, job: Job, group: Group, tell: Tell) -> None:
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
        shallow, deep = min(self._models), max(self._models)
        ratio = 1 + deep / shallow
        self._answer(shallow, 8, 3)  # compiles kernels
        prompt_s, step_s = self._answer(shallow, 8, 3)
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
                return fit_pass(1, self._step), fit_pass(prompt, self._first)

    def _answer(self, depth: int, prompt: int, count: int) -> tuple[float, float]:
        """Return the seconds (to the first token, per further token) of one answer, the same on every rank."""
        short = self._models[depth]
        engine = Engine(
            short.model,
            _NoText(),
            vocab_size=self._placement.structure.vocab_size,
            rank=self._group.rank,
            head_rank=self._placement.head_rank,
            group=self._group.group,
            max_seq_len=1 << 20,
            trimmable=short.trimmable,
            batchable=short.batchable,
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


def fit_pass(tokens: int, seconds: dict[int, list[float]]) -> Pass:
    """Return the line through the medians of the shallowest and the deepest model, by depth.

    It meets the deepest one's; noise may not make a part negative.
    """
    shallow, deep = min(seconds), max(seconds)
    low, high = (statistics.median(seconds[depth]) for depth in (shallow, deep))
    layer = (high - low) / (deep - shallow) if deep > shallow else high / deep
    layer = min(max(layer, 0.0), high / deep)
    return Pass(tokens, layer, max(0.0, high - deep * layer))


class _NoText(Tokenizer):
    """A tokenizer for prompts that are tokens already; it knows no end, and no text."""

    def __init__(self) -> None:
        super().__init__(tokenizers.Tokenizer(tokenizers.models.BPE()), eos_token_ids=set())


def weigh_layers(shares: Sequence[float], ranks: Sequence[RankSpeed]) -> float:
    """Return how much longer a layer takes on average with these shares than with even ones."""
    times = [rank.layer_s for rank in ranks]
    mean = statistics.fmean(times)
    return sum(n * t for n, t in zip(shares, times, strict=True)) / (sum(shares) * mean) if mean else 1.0


def _serve(link: ControllerLink) -> None:
    start: Start = link.take(Start)
    group = open_group(link, start)
    link.take(Load)
    link.tell(Loaded())
    link.tell(Ready("", None, 0, 0, 0))  # there is no model before there is a job
    order: Generate = link.take(Generate)
    # Without text: the findings come with the end.
    speeds = measure(
        read_job(order.request.prompt),
        Group(start.rank, start.world_size, group),
        lambda token: link.tell(Token(order.request.id, token, "")),
    )
    if start.rank == 0:
        stats = Stats(0, 0, 0.0, 0.0, 0.0, mx.get_peak_memory())
        link.tell(Done(order.request.id, "stop", stats, json.dumps([speed.to_json() for speed in speeds])))
    link.join()  # the controller closes the link after rank 0's answer


if __name__ == "__main__":
    run(_serve)
