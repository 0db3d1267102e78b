"""Measure a group of nodes with a shortened model: the real layers, engine and exchanges, with random weights.

`python -m moectl.engine.measure` is a worker whose only request is a `measured.Job` (the prompt, as JSON); rank 0
answers with
the text of a list of `measured.Speed`. It loads no shard and writes nothing; the controller holds it by the same leash.

Whole passes: an engine answers with a model of few layers and with one of more. The slope over depth is one layer as it
runs in a session, exchange, waiting for the slowest rank and host work included; what is left is embedding, head,
sampling and agreement. All ranks work at once, so that ranks which share a machine slow each other down as they will.

Parts: each rank's layers without the group, and the exchange without work. They say where a pass's time goes.

Weights that would not fit in the job's memory are shared by all layers; then the experts are made fewer where their
number costs no time, and their hidden dimension shorter, whose time is scaled up again.
"""

from __future__ import annotations

import json
import queue
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import tokenizers
from mlx.utils import tree_flatten
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import make_prompt_cache

from moectl.engine.engine import Engine
from moectl.engine.network.dbrx import Model
from moectl.engine.network.exchange import sum_over_ranks
from moectl.engine.network.load import compute_dtype
from moectl.engine.protocol import Done, Generate, Load, Loaded, Ready, Start, Token
from moectl.engine.request import Request, Stats
from moectl.engine.unseen import Prompts, check_unseen
from moectl.engine.worker import Leash, open_group, run
from moectl.errors import PlanError
from moectl.model.balance import share_out
from moectl.model.manifest import Quantization
from moectl.model.placement import Placement
from moectl.planner.measured import Job, Pass, RankSpeed, Speed, read_job
from moectl.shards.tokenizer import Tokenizer

DEEP = 6  # layers of the longer model, at most
SHALLOW_PART = 3  # the shorter one has this part of them
_PART_S = 0.04  # for each part
_LEAST_TOKENS = 11  # of an answer: a short prompt and what it takes to time a step
_PROBE_WIDTH = 2048
_PATIENCE = 4  # times the budget that an estimate of the least may be, since estimates are rough
_LEAST_SCALE = 1 / 8
_LEAST_ROUNDS = 2
_MOST_TOKENS = 64
_NAME = re.compile(r"transformer\.blocks\.(\d+)\.(.*)")
# Block scales are bytes of an 8-bit float: small ones, so that random weights give no infinities.
_SCALE_BYTES = {"nvfp4": 24}
_SCALE_BYTE = 118


@dataclass(frozen=True, slots=True)
class Group:
    """This rank among all."""

    rank: int
    size: int
    group: Any

    def share(self, *values: float) -> list[list[float]]:
        """Return every rank's values, by rank; everybody waits for everybody."""
        mine = mx.array([values], dtype=mx.float32)
        if self.group is None:
            return mine.tolist()  # type: ignore[return-value]
        with mx.stream(mx.cpu):
            return mx.distributed.all_gather(mine, group=self.group).tolist()  # type: ignore[return-value]

    def largest(self, value: float) -> float:
        """Return the largest of all ranks' values, so that all decide alike."""
        return max(row[0] for row in self.share(value))

    def wait(self) -> None:
        """Wait until all ranks are here."""
        self.share(0.0)


Tell = Callable[[int], None]  # a token that was generated


def measure(job: Job, group: Group, tell: Tell = lambda token: None) -> list[Speed]:
    """Measure each of a job's placements; every rank returns the same.

    Tokens are told as a worker would tell them. Raises PlanError without enough memory.
    """
    speeds = []
    for placement in job.placements:
        speeds.append(_Bench(placement, job, group, tell).measure())
        mx.clear_cache()
    return speeds


class Weights:
    """Random arrays by name, made once and held by every model that is filled from here."""

    def __init__(self, quantization: Quantization | None, *, shared: bool) -> None:
        self._held: dict[str, mx.array] = {}
        self._quantization = quantization
        self._shared = shared  # whether all layers have the same ones

    def make_model(self, placement: Placement, rank: int, group: Any) -> Model:
        """Return a model without values: nothing has been computed, only names, shapes and types are known."""
        model = Model(placement, rank, group)
        if self._quantization is not None:
            q = self._quantization
            nn.quantize(
                model,
                group_size=q.group_size,
                bits=q.bits,
                mode=q.mode,
                class_predicate=lambda path, module: hasattr(module, "to_quantized") and ".router." not in path,
            )
        model.eval()
        return model

    def count_bytes(self, model: Model, dtype: mx.Dtype) -> int:
        """Return the bytes that `fill` would take."""
        sizes = {self._key(name): _size(array, dtype) for name, array in tree_flatten(model.parameters())}
        return sum(sizes.values())

    def fill(self, model: Model, dtype: mx.Dtype) -> Model:
        """Give every parameter a value; return the model."""
        ready = []
        for name, array in tree_flatten(model.parameters()):
            key = self._key(name)
            if key not in self._held:
                self._held[key] = self._make(name, array, dtype)
                mx.eval(self._held[key])
            ready.append((name, self._held[key]))
        model.load_weights(ready, strict=False)
        return model

    def _key(self, name: str) -> str:
        match = _NAME.fullmatch(name)
        return f"any layer: {match[2]}" if match and self._shared else name

    def _make(self, name: str, like: mx.array, dtype: mx.Dtype) -> mx.array:
        q = self._quantization
        if like.dtype == mx.uint32:
            return mx.full(like.shape, 0x9E3779B9, dtype=mx.uint32)  # any bits do, and random ones take long
        if like.dtype == mx.uint8:
            return mx.full(like.shape, _SCALE_BYTES.get(q.mode if q else "", _SCALE_BYTE), dtype=mx.uint8)
        if name.endswith(("scales", "biases")) and q is not None:
            step = 0.04 / 2**q.bits  # weights between -0.02 and 0.02
            return mx.full(like.shape, step if name.endswith("scales") else -0.02, dtype=dtype)
        if like.ndim == 1:
            return mx.ones(like.shape, dtype=dtype)
        bound = like.shape[-1] ** -0.5
        matrix = mx.random.uniform(-bound, bound, like.shape[-2:], dtype=dtype)
        return mx.contiguous(mx.broadcast_to(matrix, like.shape))  # experts may be alike, but have a place each


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
        parts = _Parts(solo, short, self._group, prefill.tokens, scale)
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
        each = _module_bytes(layer.norm_attn_norm, self._dtype) + chosen * _module_bytes(layer.ffn, self._dtype)
        head = _module_bytes(model.lm_head, self._dtype) if "lm_head" in model else 0.0
        answers = {self._shallow: _LEAST_ROUNDS + 3, self._deep: _LEAST_ROUNDS + 1}
        return sum(n * (_LEAST_TOKENS * depth * each + 4 * head) for depth, n in answers.items())


def _module_bytes(module: Any, dtype: mx.Dtype) -> float:
    return float(sum(_size(array, dtype) for _, array in tree_flatten(module.parameters())))


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
    return _module_bytes(linear, dtype) / min(seconds)


class _Passes:
    """Whole passes through the engine, with a shallow and a deep model in turn."""

    def __init__(self, models: dict[int, Model], job: Job, group: Group, tell: Tell) -> None:
        self._tell = tell
        self._models = models
        self._job = job
        self._group = group
        vocab_size = next(iter(models.values())).placement.geometry.vocab_size
        self._prompts = Prompts(vocab_size)  # the same ones on every rank
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
                check_unseen(stats)
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


class _Parts:
    """One rank's work by itself, and the exchange by itself."""

    def __init__(self, model: Model, placement: Placement, group: Group, tokens: int, scale: float) -> None:
        self._model = model
        self._placement = placement
        self._group = group
        self._tokens = tokens
        self._scale = scale
        self._width = placement.geometry.d_model

    def row_bytes(self, dtype: mx.Dtype) -> int:
        return self._width * dtype.size

    def measure(self) -> tuple[RankSpeed, ...]:
        """Return every rank's speeds."""
        top_k = self._placement.geometry.top_k
        attention = self._time_attention()
        experts = {count: self._time_experts(chosen) / self._scale for count, chosen in self._choices().items()}
        head = self._time_head()
        flops = self._time_many()
        most = max(experts)
        bytes_s = most * self._expert_bytes() / self._scale / experts[most] if most else 0.0
        row = [attention, head, bytes_s, flops, *(experts.get(count, -1.0) for count in range(top_k + 1))]
        return tuple(
            RankSpeed(a, {n: s for n, s in enumerate(e) if s >= 0}, h if h > 0 else None, b, f)
            for a, h, b, f, *e in self._group.share(*row)
        )

    def time_collectives(self, dtype: mx.Dtype) -> dict[int, float]:
        """Return the seconds of one sum over all ranks, by bytes, for one token and for a prompt."""
        if self._group.size == 1:
            return {}
        return {
            tokens * self.row_bytes(dtype): self._time_collective(mx.ones((tokens, self._width), dtype=dtype))
            for tokens in sorted({1, self._tokens})
        }

    def _time_collective(self, x: mx.array) -> float:
        def chain(count: int) -> float:
            y = x
            for _ in range(count):
                y = sum_over_ranks(y, self._group.group) * (1 / self._group.size)
            self._group.wait()
            begin = time.perf_counter()
            mx.eval(y)
            return (time.perf_counter() - begin) / count

        chain(2)
        count = max(2, min(50, int(_PART_S / self._group.largest(chain(2)) / 2)))
        return self._group.largest(statistics.median(chain(count) for _ in range(5)))

    def _time_attention(self) -> float:
        layers = self._model.layers
        caches = make_prompt_cache(self._model)
        prompt = self._vectors(self._tokens)[None]
        mask = create_attention_mask(prompt, caches[0])
        for layer, cache in zip(layers, caches, strict=True):
            mx.eval(layer.norm_attn_norm(prompt, mask, cache))
        one = self._vectors(1)[None]

        def step() -> None:
            x = one
            chosen: list[mx.array] = []
            for layer, cache in zip(layers, caches, strict=True):
                residual, h = layer.norm_attn_norm(x, None, cache)
                chosen.extend(layer.ffn.router(h[0]))
                x = residual + h
            mx.eval(x, chosen)

        return self._time(step) / len(layers)

    def _time_experts(self, chosen: Sequence[int]) -> float:
        layers = self._model.layers
        one = self._vectors(1)
        indices = mx.array([chosen], dtype=mx.uint32)
        weights = mx.full((1, len(chosen)), 1 / len(chosen), dtype=one.dtype)
        mx.eval(one, indices, weights)

        def step() -> None:
            x = one
            for layer in layers:
                x = one + layer.ffn.experts(x, indices, weights)
            mx.eval(x)

        return self._time(step) / len(layers)

    def _time_head(self) -> float:
        model, one = self._model, self._vectors(1)
        if "lm_head" not in model:
            self._group.wait()
            return 0.0
        return self._time(lambda: mx.eval(model.lm_head(model.transformer.norm_f(one))))

    def _time_many(self) -> float:
        """Return the operations per second of a prompt's products with the experts of one layer."""
        geometry = self._placement.geometry
        x = self._vectors(self._tokens)
        random = np.random.default_rng(0)  # the same choices on every rank
        rows = [random.permutation(geometry.n_experts)[: geometry.top_k] for _ in range(self._tokens)]
        counts = Counter(int(expert) for row in rows for expert in row)
        own = sum(counts.values())
        if self._placement.split == "experts":
            own = sum(s.get(self._group.rank, 0) for s in share_out(counts, self._placement.owners).values())
        indices = mx.array(np.array(rows, dtype=np.uint32))
        weights = mx.full(indices.shape, 1 / geometry.top_k, dtype=x.dtype)
        mx.eval(x, indices, weights)
        experts = self._model.layers[0].ffn.experts
        seconds = self._time(lambda: mx.eval(experts(x, indices, weights)))
        low, high = self._placement.hidden(self._group.rank)
        return float(6 * geometry.d_model * (high - low) * own / seconds)

    def _choices(self) -> dict[int, list[int]]:
        """Return choices of experts by how many of them this rank computes."""
        geometry, rank = self._placement.geometry, self._group.rank
        own = list(self._placement.experts_of(rank))
        others = [expert for expert in range(geometry.n_experts) if expert not in own]
        found = {}
        for count in range(min(geometry.top_k, len(own)) + 1):
            chosen = own[:count] + others[: geometry.top_k - count]
            if len(chosen) == geometry.top_k:
                shares = share_out(dict.fromkeys(chosen, 1), self._placement.owners)
                # In splits other than `experts` every rank computes its part of every expert.
                alone = self._placement.split == "experts"
                found[sum(share.get(rank, 0) for share in shares.values()) if alone else count] = chosen
        return found

    def _expert_bytes(self) -> float:
        parameters = self._model.layers[0].ffn.experts.parameters()
        held = len(self._placement.experts_of(self._group.rank))
        return float(sum(array.nbytes for _, array in tree_flatten(parameters)) / held)

    def _vectors(self, count: int) -> mx.array:
        dtype = self._model.layers[0].norm_attn_norm.norm_1.weight.dtype
        x = mx.random.normal((count, self._width)).astype(dtype)
        mx.eval(x)
        return x

    def _time(self, work: Callable[[], object]) -> float:
        """Return the median seconds of some runs, after one that counts for nothing; all ranks begin together."""
        self._group.wait()
        work()
        seconds: list[float] = []
        begin = time.perf_counter()
        while len(seconds) < 3 or time.perf_counter() - begin < _PART_S:
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
            if time.perf_counter() - begin > 4 * _PART_S:
                break
        return statistics.median(seconds)


class _NoText(Tokenizer):
    """A tokenizer for prompts that are tokens already; it knows no end, and no text."""

    def __init__(self) -> None:
        super().__init__(tokenizers.Tokenizer(tokenizers.models.BPE()), eos_token_ids=set())


def with_depth(placement: Placement, depth: int) -> Placement:
    """Return a placement of the same layers, this many of them; a pipeline's evenly on all ranks."""
    shorter = replace(placement, geometry=replace(placement.geometry, n_layers=depth))
    if placement.split != "layers":
        return shorter
    base, extra = divmod(depth, placement.world_size)
    return replace(shorter, shares=tuple(base + (rank < extra) for rank in range(placement.world_size)))


def weigh_layers(shares: Sequence[int], ranks: Sequence[RankSpeed]) -> float:
    """Return how much longer a layer takes on average with these shares than with even ones."""
    times = [rank.attention_s + max(rank.experts_s.values()) for rank in ranks]
    mean = statistics.fmean(times)
    return sum(n * t for n, t in zip(shares, times, strict=True)) / (sum(shares) * mean) if mean else 1.0


def shrink(placement: Placement, quantization: Quantization | None) -> Placement:
    """Return a placement that needs less memory; the same one when there is none."""
    geometry = placement.geometry
    if placement.split == "experts":
        group = quantization.group_size if quantization else 1
        hidden = max(group, geometry.ffn_hidden // 2 // group * group)
        return replace(placement, geometry=replace(geometry, ffn_hidden=hidden))
    if geometry.n_experts > geometry.top_k:  # a token's time depends on the experts it chooses, not on the others
        return replace(placement, geometry=replace(geometry, n_experts=geometry.top_k))
    shares = tuple(max(1, share // 2) for share in placement.shares)
    hidden = sum(shares) * placement.unit
    return replace(placement, shares=shares, geometry=replace(geometry, ffn_hidden=hidden))


def scale_up(measured: Pass, other_s: float, scale: float) -> Pass:
    """Return a pass with the time of whole experts; `other_s` of each layer's is not the experts'."""
    return replace(measured, layer_s=measured.layer_s + max(0.0, measured.layer_s - other_s) * (1 / scale - 1))


def _size(array: mx.array, dtype: mx.Dtype) -> int:
    return array.size * dtype.size if mx.issubdtype(array.dtype, mx.floating) else array.nbytes


def _serve(leash: Leash) -> None:
    start: Start = leash.take(Start)
    group = open_group(leash, start)
    leash.take(Load)
    leash.tell(Loaded())
    leash.tell(Ready("", None, 0, 0, 0))  # there is no model before there is a job
    order: Generate = leash.take(Generate)
    # Without text: that is the answer's alone.
    speeds = measure(
        read_job(order.request.prompt),
        Group(start.rank, start.world_size, group),
        lambda token: leash.tell(Token(order.request.id, token, "")),
    )
    if start.rank == 0:
        leash.tell(Token(order.request.id, -1, json.dumps([speed.to_json() for speed in speeds])))
        leash.tell(Done(order.request.id, "stop", Stats(0, 0, 0.0, 0.0, 0.0, mx.get_peak_memory())))
    leash.join()  # the controller lets go once it has heard rank 0


if __name__ == "__main__":
    run(_serve)
