"""Where the time of a pass goes: each rank's layers without the group, and the exchange without work."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import make_prompt_cache

from moectl.engine.network.dbrx import Model
from moectl.engine.network.exchange import sum_over_ranks
from moectl.model.balance import share_out
from moectl.model.placement import Placement
from moectl.planner.measured import RankSpeed

_PART_S = 0.04  # for each part


@dataclass(frozen=True, slots=True)
class Group:
    """This rank and the group of all; `group` is None for a single rank."""

    rank: int
    size: int
    group: Any

    def share(self, *values: float) -> list[list[float]]:
        """Return every rank's values, by rank; every rank waits for all."""
        mine = mx.array([values], dtype=mx.float32)
        if self.group is None:
            return mine.tolist()  # type: ignore[return-value]
        with mx.stream(mx.cpu):
            return mx.distributed.all_gather(mine, group=self.group).tolist()  # type: ignore[return-value]

    def largest(self, value: float) -> float:
        """Return the largest of all ranks' values, so that all decide alike."""
        return max(row[0] for row in self.share(value))

    def wait(self) -> None:
        self.share(0.0)


class PartTimes:
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
