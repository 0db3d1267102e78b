"""Compute the canary of a shard set on one machine, layer by layer: at any time one rank's part of a layer is there.

The ranks' parts are read from the set and added up here; nothing is exchanged. So a model that no machine holds can be
run once, slowly, on the machine that cut it. It is the network of the ranks, built from
the same config.json: it finds what differs between machines, and no misread config.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import KVCache

from moectl.canary import TOP, Canary, cut_chunks, encode_points, make_prompts
from moectl.manifest import Manifest
from moectl.model.dbrx import DecoderLayer
from moectl.model.fingerprint import take_fingerprint
from moectl.model.load import compute_dtype, load_part

_States = list[list[mx.array]]  # by prompt and chunk, (1, L, D)


def compute_canary(
    directory: Path, manifest: Manifest, *, on_layer: Callable[[int, int], None] = lambda done, of: None
) -> Canary:
    """Run the canary's prompts through a finished shard set.

    `on_layer(done, of)` is told how far it is. Takes the memory of one rank's part of a layer. Raises IntegrityError.
    """
    return _Reference(directory, manifest).compute(on_layer)


class _Reference:
    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self._directory = directory
        self._manifest = manifest
        self._placement = manifest.placement
        self._dtype = compute_dtype()
        geometry = self._placement.geometry
        self._chunks = [cut_chunks(tokens) for tokens in make_prompts(geometry.vocab_size, geometry.max_seq_len)]
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
        return Canary(str(self._dtype).rpartition(".")[2], points, top, spread)

    def _embed(self) -> _States:
        holder = next(rank for rank in self._ranks if self._placement.holds_embedding(rank))
        wte = load_part(self._directory, self._manifest, holder, None, dtype=self._dtype).transformer.wte
        states = [[wte(mx.array([chunk])) for chunk in chunks] for chunks in self._chunks]
        mx.eval(states)
        return states

    def _read_head(self, states: _States) -> tuple[tuple[tuple[tuple[int, float], ...], ...], tuple[float, ...]]:
        holder = next(rank for rank in self._ranks if self._placement.holds_head(rank))
        model = load_part(self._directory, self._manifest, holder, None, dtype=self._dtype)
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
        experts = self._add_parts(layer, holders, states, _feed, told=summed)
        states = _map(lambda x, y: x + y, states, experts)
        mx.eval(states)
        self._note_hand_over(layer, holders[0], states)
        return states

    def _add_parts(
        self, layer: int, ranks: Iterable[int], states: _States, run: Callable[..., list[mx.array]], *, told: bool
    ) -> _States:
        """Return the sum of these ranks' parts, as `model.reduce` adds them up; note each where it is `told`."""
        total: _States | None = None
        for rank in ranks:
            block = load_part(self._directory, self._manifest, rank, layer, dtype=self._dtype).layers[0]
            parts = [[y.astype(mx.float32) for y in run(block, chunks)] for chunks in states]
            if told:
                self._note(rank, parts)
            total = parts if total is None else _map(lambda x, y: x + y, total, parts)
            mx.eval(total)
        assert total is not None
        return [[y.astype(self._dtype) for y in chunks] for chunks in total]

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


def _attend(block: DecoderLayer, chunks: list[mx.array]) -> list[mx.array]:
    part, cache = block.norm_attn_norm, KVCache()
    found = []
    for x in chunks:
        found.append(part.attn(part.norm_1(x), create_attention_mask(x, cache), cache))
        mx.eval(found[-1], cache.state)
    return found


def _feed(block: DecoderLayer, chunks: list[mx.array]) -> list[mx.array]:
    found = [block.ffn(block.norm_attn_norm.norm_2(x)) for x in chunks]
    mx.eval(found)
    return found


def _numbers(x: mx.array) -> list[float]:
    found: list[float] = x.tolist()  # type: ignore[assignment]
    return found


def _map(function: Callable[[Any, Any], Any], one: _States, other: _States) -> _States:
    return [[function(x, y) for x, y in zip(*pair, strict=True)] for pair in zip(one, other, strict=True)]
