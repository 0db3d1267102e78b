"""Measure a group of nodes with a shortened model: the real layers, engine and exchanges, with random weights.

`python -m moectl.engine.measure` is a worker whose only request is a `measured.Job` (the prompt, as JSON). Rank 0
answers with a list of `measured.Speed` as JSON. It loads no shard and writes nothing.

An engine answers with a model of few layers and with one of more. The slope over depth is the time of one layer in a
session: exchange, host work and waiting for the slowest rank are in it. What is left is embedding, head, sampling and
agreement. All ranks work at once, so ranks that share a machine slow each other down as they will in a session.

Weights that do not fit in the job's memory are shared by all layers. If that is not enough, there are fewer experts
where their number costs no time, or a shorter hidden dimension, whose time is scaled up again.
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
from moectl.engine.network.dbrx import Model
from moectl.engine.network.load import compute_dtype
from moectl.engine.parts import Group, PartTimes
from moectl.engine.protocol import Done, Generate, Load, Loaded, Ready, Start, Token
from moectl.engine.random_model import Weights, module_bytes, shrink, with_depth
from moectl.engine.random_prompts import RandomPrompts, check_uncached
from moectl.engine.request import Request, Stats
from moectl.engine.worker import run
from moectl.errors import PlanError
from moectl.model.placement import Placement
from moectl.model.structure import Quantization
from moectl.planner.measured import Job, Pass, RankSpeed, Speed, read_job
from moectl.shards.tokenizer import Tokenizer

DEEP = 6  # layers of the longer model, at most
SHALLOW_PART = 3  # the shorter one has this part of them
_LEAST_TOKENS = 11  # of an answer: a short prompt and what it takes to time a step
_PROBE_WIDTH = 2048
_PATIENCE = 4  # times the budget that an estimate of the least may be, since estimates are rough
_LEAST_SCALE = 1 / 8
_LEAST_ROUNDS = 2
_MOST_TOKENS = 64

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
        self._placement = placement
        self._job = job
        self._group = group
        self._dtype = compute_dtype()
        self._deep = min(DEEP, placement.geometry.n_layers)
        self._shallow = max(1, self._deep // SHALLOW_PART)
        if placement.split == "layers":
            self._shallow, self._deep = placement.world_size, 2 * placement.world_size  # as many on each rank

    def measure(self) -> Speed:
        short, weights = self._choose_size()
        scale = short.geometry.ffn_hidden / self._placement.geometry.ffn_hidden
        models = {
            depth: weights.fill(
                weights.make_model(with_depth(short, depth), self._group.rank, self._group.group), self._dtype
            )
            for depth in {self._shallow, self._deep}
        }
        decode, prefill = _Passes(models, self._job, self._group, self._tell).measure()
        solo = weights.fill(weights.make_model(with_depth(short, self._deep), self._group.rank, None), self._dtype)
        parts = PartTimes(solo, short, self._group, prefill.tokens, scale)
        ranks = parts.measure()
        collective = parts.time_collectives(self._dtype)
        attention = max(rank.attention_s for rank in ranks)
        if self._placement.split == "layers":
            sums, uneven = [0.0, 0.0], weigh_layers(self._placement.shares, ranks)
        else:
            sums, uneven = [collective.get(n * parts.row_bytes(self._dtype), 0.0) for n in (1, prefill.tokens)], 1.0
        decode, prefill = (replace(p, layer_s=uneven * p.layer_s) for p in (decode, prefill))
        return Speed(
            self._placement.split,
            self._placement.shares,
            scale_up(decode, attention + sums[0], scale),
            scale_up(prefill, attention + sums[1], scale),
            collective,
            ranks,
            prefill.tokens,
            scale,
            self._placement.held,
        )

    def _choose_size(self) -> tuple[Placement, Weights]:
        """Return the placement to build and where its weights come from, the same on every rank; set the depths."""
        short, shared = self._placement, False
        bytes_s = _matvec_rate(self._job.quantization, self._dtype)
        while True:
            weights = Weights(self._job.quantization, shared=shared)
            model = weights.make_model(with_depth(short, self._deep), self._group.rank, None)
            needed = self._group.largest(weights.count_bytes(model, self._dtype))
            needed_s = self._group.largest(self._least_work(model, short) / bytes_s)
            fits, quick = needed <= self._job.memory_bytes, needed_s <= _PATIENCE * self._job.budget_s
            if fits and quick:
                return short, weights
            if not quick and self._deep > 2 and self._placement.split != "layers":
                self._shallow, self._deep = 1, 2
            elif not fits and not shared:
                shared = True
            elif (shorter := shrink(short, self._job.quantization)) != short and self._is_telling(shorter):
                short = shorter
            else:
                self._refuse(needed, needed_s, fits)

    def _is_telling(self, short: Placement) -> bool:
        """Whether times of experts so narrow can be scaled up without blowing up their noise."""
        return short.geometry.ffn_hidden >= _LEAST_SCALE * self._placement.geometry.ffn_hidden

    def _refuse(self, needed: float, needed_s: float, fits: bool) -> NoReturn:
        if fits:
            raise PlanError(f"this host would take {needed_s:.0f} s to measure", hint="plan without --probe")
        allowed = self._job.memory_bytes
        raise PlanError(
            f"measuring needs {needed / 1e9:.1f} GB, and may take {allowed / 1e9:.1f} GB here",
            hint="free some memory there, or plan without --probe",
        )

    def _least_work(self, model: Model, placement: Placement) -> float:
        """Return the bytes that the fewest passes of both models read, one token after the other."""
        layer = model.layers[0]
        held = len(placement.experts_of(self._group.rank))
        chosen = min(placement.geometry.top_k, held) / held
        each = module_bytes(layer.norm_attn_norm, self._dtype) + chosen * module_bytes(layer.ffn, self._dtype)
        head = module_bytes(model.lm_head, self._dtype) if "lm_head" in model else 0.0
        answers = {self._shallow: _LEAST_ROUNDS + 3, self._deep: _LEAST_ROUNDS + 1}
        return sum(n * (_LEAST_TOKENS * depth * each + 4 * head) for depth, n in answers.items())


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

    def __init__(self, models: dict[int, Model], job: Job, group: Group, tell: Tell) -> None:
        self._tell = tell
        self._models = models
        self._job = job
        self._group = group
        vocab_size = next(iter(models.values())).placement.geometry.vocab_size
        self._prompts = RandomPrompts(vocab_size)  # the same ones on every rank
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
        model = self._models[depth]
        engine = Engine(
            model,
            _NoText(),
            rank=self._group.rank,
            head_rank=model.placement.head_rank,
            group=self._group.group,
            max_seq_len=1 << 20,
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


def weigh_layers(shares: Sequence[int], ranks: Sequence[RankSpeed]) -> float:
    """Return how much longer a layer takes on average with these shares than with even ones."""
    times = [rank.attention_s + max(rank.experts_s.values()) for rank in ranks]
    mean = statistics.fmean(times)
    return sum(n * t for n, t in zip(shares, times, strict=True)) / (sum(shares) * mean) if mean else 1.0


def scale_up(measured: Pass, other_s: float, scale: float) -> Pass:
    """Return a pass with the time of whole experts; `other_s` of each layer's is not the experts'."""
    return replace(measured, layer_s=measured.layer_s + max(0.0, measured.layer_s - other_s) * (1 / scale - 1))


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
