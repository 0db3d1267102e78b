"""Compute the canary of a shard set on one machine, layer by layer.

The ranks' parts are read from the set and added up here; nothing is exchanged. So a model that no machine holds can be
run once on the machine that cut it. On a GPU one rank's part of a layer is there at a time. On a CPU matrices stay on
disk, and each is read once for all tokens of both prompts. It is the network of the ranks, built from
the same config.json: it finds what differs between machines, and no misread config.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import KVCache, make_prompt_cache

from moectl.engine.network.dbrx import DecoderLayer, Model
from moectl.engine.network.exchange import Exchange, observed
from moectl.engine.network.fingerprint import take_fingerprint
from moectl.engine.network.load import compute_dtype, load_part
from moectl.engine.network.stored import Reader, StoredMatrix
from moectl.model.canary import (
    CHUNK,
    LONG,
    TOP,
    Canary,
    CanaryVerdict,
    choose_tolerance,
    cut_chunks,
    decode_points,
    encode_points,
    judge,
    judge_logits,
    make_prompts,
)
from moectl.model.manifest import Manifest

_States = list[list[mx.array]]  # by prompt and chunk, (1, L, D)


def compute_canary(
    directory: Path, manifest: Manifest, *, on_layer: Callable[[int, int], None] = lambda done, of: None
) -> Canary:
    """Run the canary's prompts through a finished shard set.

    `on_layer(done, of)` is told how far it is. Raises IntegrityError.
    """
    mx.clear_cache()
    if mx.default_device() != mx.Device(mx.cpu):
        return _Reference(directory, manifest, None).compute(on_layer)
    with Reader() as reader:
        return _Reference(directory, manifest, reader).compute(on_layer)


class _Reference:
    def __init__(self, directory: Path, manifest: Manifest, reader: Reader | None) -> None:
        self._directory = directory
        self._manifest = manifest
        self._reader = reader
        self._placement = manifest.placement
        self._dtype = compute_dtype()
        geometry = self._placement.geometry
        prompts = make_prompts(geometry.vocab_size, geometry.max_seq_len, CHUNK)
        self._chunks = [cut_chunks(tokens, CHUNK) for tokens in prompts]
        self._unmet: list[tuple[int, int]] = []
        # By rank, prompt and exchange.
        self._points: list[list[list[mx.array]]] = [[[] for _ in self._chunks] for _ in self._ranks]

    @property
    def _ranks(self) -> range:
        return range(self._placement.world_size)

    def compute(self, on_layer: Callable[[int, int], None]) -> Canary:
        layers = self._placement.geometry.n_layers
        states = self._embed()
        for layer in range(layers):
            states = self._pass_layer(layer, states)
            on_layer(layer + 1, layers)
        top, spread = self._read_head(states)
        points = tuple(
            tuple(encode_points([_numbers(point) for point in prompt]) for prompt in rank) for rank in self._points
        )
        dtype = str(self._dtype).rpartition(".")[2]
        return Canary(dtype, points, top, spread, chunk=CHUNK, deals=True, unmet=tuple(self._unmet))

    def _embed(self) -> _States:
        holder = next(rank for rank in self._ranks if self._placement.holds_embedding(rank))
        wte = self._load(holder, None).transformer.wte
        states = [[wte(mx.array([chunk])) for chunk in chunks] for chunks in self._chunks]
        mx.eval(states)
        return states

    def _read_head(self, states: _States) -> tuple[tuple[tuple[tuple[int, float], ...], ...], tuple[float, ...]]:
        holder = next(rank for rank in self._ranks if self._placement.holds_head(rank))
        model = self._load(holder, None)
        top, spread = [], []
        for chunks in states:
            logits = model.lm_head(model.transformer.norm_f(chunks[-1]))[0, -1].astype(mx.float32)
            count = min(TOP, logits.size)
            ids = mx.argsort(-logits)[:count]
            pairs = zip(_numbers(ids), _numbers(logits[ids]), strict=True)
            top.append(tuple((int(token), float(f"{value:.6g}")) for token, value in pairs))
            spread.append(float(f"{mx.std(logits).item():.6g}"))
        return tuple(top), tuple(spread)

    def _pass_layer(self, layer: int, states: _States) -> _States:
        holders = [rank for rank in self._ranks if layer in range(*self._placement.layers(rank))]
        divided = self._placement.split == "tensor"
        attention = self._add_parts(layer, holders if divided else holders[:1], states, _attend, told=divided)
        states = _map(lambda x, y: x + y, states, attention)
        summed = self._placement.split in ("tensor", "hidden", "experts") and len(holders) > 1
        unmet: set[int] = set()
        experts = self._add_parts(layer, holders, states, partial(_feed, unmet=unmet), told=summed)
        self._unmet += [(layer, expert) for expert in sorted(unmet)]
        states = _map(lambda x, y: x + y, states, experts)
        mx.eval(states)
        self._note_hand_over(layer, holders[0], states)
        return states

    def _add_parts(
        self, layer: int, ranks: Iterable[int], states: _States, run: Callable[..., _States], *, told: bool
    ) -> _States:
        """Return the sum of these ranks' parts, as `exchange` adds them up; note each where it is `told`."""
        total: _States | None = None
        for rank in ranks:
            block = self._load(rank, layer).layers[0]
            parts = [[y.astype(mx.float32) for y in chunks] for chunks in run(block, states)]
            if told:
                self._note(rank, parts)
            total = parts if total is None else _map(lambda x, y: x + y, total, parts)
            mx.eval(total)
            if self._reader is not None:
                self._reader.close_files()
        assert total is not None
        return [[y.astype(self._dtype) for y in chunks] for chunks in total]

    def _load(self, rank: int, layer: int | None) -> Model:
        return load_part(self._directory, self._manifest, rank, layer, dtype=self._dtype, reader=self._reader)

    def _note(self, rank: int, parts: _States) -> None:
        for prompt, chunks in enumerate(parts):
            first, point = 0, mx.array(0.0)
            for chunk in chunks:
                point = point + take_fingerprint(chunk, first)
                first += chunk.shape[1]
            mx.eval(point)
            self._points[rank][prompt].append(point)

    def _note_hand_over(self, layer: int, rank: int, states: _States) -> None:
        last = self._placement.layers(rank)[1] - 1
        if self._placement.split == "layers" and layer == last and rank + 1 in self._ranks:
            self._note(rank, states)


def _attend(block: DecoderLayer, states: _States) -> _States:
    part, attention = block.norm_attn_norm, block.norm_attn_norm.attn
    projected = _apply(attention.Wqkv, [[part.norm_1(x) for x in chunks] for chunks in states])
    leave = attention.out_proj
    attention.Wqkv = attention.out_proj = _pass_on  # only what is between them depends on a token's place
    found = []
    for chunks in projected:
        cache, attended = KVCache(), []
        for x in chunks:
            attended.append(attention(x, create_attention_mask(x, cache), cache))
            mx.eval(attended[-1], cache.state)
        found.append(attended)
    return _apply(leave, found)


def _feed(block: DecoderLayer, states: _States, *, unmet: set[int]) -> _States:
    """Return the experts' part for each chunk; add to `unmet` those of this rank's experts that no token went to."""
    experts = block.ffn.experts
    rows = [[block.norm_attn_norm.norm_2(x)[0] for x in chunks] for chunks in states]
    routed = [_route(block, chunks, deals=prompt == LONG) for prompt, chunks in enumerate(rows)]
    mx.eval(routed)
    flat = [route for routes in routed for route in routes]
    indices = [chosen for chosen, _ in flat]  # by chunk: copies of experts share out a chunk's work
    unmet.update(experts.find_idle(indices))
    if not isinstance(experts.mlp.gate_proj, StoredMatrix):
        pairs = zip(rows, routed, strict=True)
        return [[experts(x, *route)[None] for x, route in zip(*pair, strict=True)] for pair in pairs]
    weights = np.concatenate([np.array(weight.astype(mx.float32)) for _, weight in flat])
    x = np.concatenate([np.array(x.astype(mx.float32)) for chunks in rows for x in chunks])
    return _cut_like(states, mx.array(experts.add_up(x, indices, weights)))


def _route(block: DecoderLayer, chunks: list[mx.array], *, deals: bool) -> list[tuple[mx.array, mx.array]]:
    found, first = [], 0
    for x in chunks:
        found.append(block.ffn.router.deal(x, first) if deals else block.ffn.router(x))
        first += x.shape[0]
    return found


def _apply(linear: Any, states: _States) -> _States:
    """Run a linear layer on all chunks: one that is on disk at once, one that is there on each by itself."""
    if not isinstance(linear, StoredMatrix):
        return [[linear(x) for x in chunks] for chunks in states]
    return _cut_like(states, linear(mx.concatenate([x[0] for chunks in states for x in chunks])))


def _cut_like(states: _States, rows: mx.array) -> _States:
    """Return rows (T, …) of all tokens as prompts' chunks."""
    lengths = iter(np.cumsum([x.shape[1] for chunks in states for x in chunks]).tolist())
    found, first = [], 0
    for chunks in states:
        found.append([rows[first : (first := next(lengths))][None] for _ in chunks])
    return found


def _pass_on(x: mx.array) -> mx.array:
    return x


def _numbers(x: mx.array) -> list[float]:
    found: list[float] = x.tolist()  # type: ignore[assignment]
    return found


def _map(function: Callable[[Any, Any], Any], one: _States, other: _States) -> _States:
    return [[function(x, y) for x, y in zip(*pair, strict=True)] for pair in zip(one, other, strict=True)]


@dataclass(frozen=True, slots=True)
class Checked:
    """A rank's verdict, and how long it took: seconds per token of the long prompt, and for a single token."""

    verdict: CanaryVerdict
    token_s: float
    step_s: float


def check(model: Model, canary: Canary, *, rank: int) -> Checked:
    """Return what comes of the prompts on this rank; caches are thrown away."""
    geometry = model.placement.geometry
    dtype = str(model.layers[0].norm_attn_norm.norm_1.weight.dtype).rpartition(".")[2]
    tolerance = choose_tolerance(canary, dtype)
    worst, wrong_at, token_s, step_s = 0.0, None, 0.0, 0.0
    for number, tokens in enumerate(make_prompts(geometry.vocab_size, geometry.max_seq_len, canary.chunk)):
        run = _Run(model, canary.chunk, deals=canary.deals and number == LONG)
        token_s, step_s = run.read(tokens)
        expected = decode_points(canary.points[rank][number])
        verdict = judge(expected, run.points, tolerance=tolerance)
        if model.placement.holds_head(rank):
            off = judge_logits(canary, number, run.logits_of([token for token, _ in canary.top[number]]))
            after_all = len(expected) if off > tolerance else None
            verdict = CanaryVerdict(
                max(off, verdict.worst), after_all if verdict.wrong_at is None else verdict.wrong_at
            )
        worst = max(worst, verdict.worst)
        if verdict.wrong_at is not None and (wrong_at is None or verdict.wrong_at < wrong_at):
            wrong_at = verdict.wrong_at
    if wrong_at is not None and model.placement.split == "layers":
        wrong_at += rank  # a rank of a pipeline has one exchange, and they are in its order
    return Checked(CanaryVerdict(worst, wrong_at), token_s, step_s)


@contextmanager
def _dealt(model: Model, first: int) -> Iterator[None]:
    """Let all routers deal tokens out, whose numbers begin with `first`."""
    held = [layer.ffn.router for layer in model.layers]
    for layer, router in zip(model.layers, held, strict=True):
        own: Any = getattr(router, "router", router)  # a witness may stand in its place
        layer.ffn.router = partial(own.deal, first=first)  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer, router in zip(model.layers, held, strict=True):
            layer.ffn.router = router


class _Run:
    """One prompt, chunk by chunk."""

    def __init__(self, model: Model, chunk: int, *, deals: bool) -> None:
        self._model = model
        self._deals = deals
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
            with observed(self._see), _dealt(self._model, self._first) if self._deals else nullcontext():
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
