"""The result of a forward pass in two numbers that every rank can compare: its routing, and its hidden state.

Each rank chooses experts by itself from the same hidden state. If one rank computes something else, the sums mix parts
that do not belong together, and the answers are wrong without an error. A witness looks at the routers only when it is
told to, so that other steps cost nothing. It compares nothing by itself: that takes an exchange.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from moectl.engine.network.dbrx import Model
from moectl.engine.network.fingerprint import take_fingerprint

WORDS = 2  # int32, of each rank
# Between chips that round differently the states differ by some percent of their size, and errors by all of it.
TOLERANCE = 0.1


@dataclass(frozen=True, slots=True)
class Dissent:
    """Ranks that computed other things than the rest; None where there is no majority."""

    rank: int | None
    what: str


class Witness:
    """Watches one rank's routers while `looks` is set."""

    def __init__(self, model: Model) -> None:
        self.looks = False
        self._routing: list[mx.array] = []
        self._states: list[mx.array] = []
        source = np.random.default_rng(20_251_121)
        hashes = source.integers(0, 2**32, (len(model.layers), model.placement.geometry.n_experts), dtype=np.uint32)
        for number, layer in enumerate(model.layers):
            is_last = number == len(model.layers) - 1
            watched = _Watched(layer.ffn.router, self, mx.array(hashes[number]), is_last)
            layer.ffn.router = watched  # type: ignore[assignment]

    def see(self, hashes: mx.array, x: mx.array, indices: mx.array, *, is_last: bool) -> None:
        """Note one layer's choice (T, K), whatever the order of its experts, and the last layer's input (T, D)."""
        place = mx.arange(1, 2 * indices.shape[0], 2, dtype=mx.uint32)
        self._routing.append((hashes[indices].sum(axis=-1) * place).sum())
        if is_last:
            rows = x.astype(mx.float32)
            size = mx.sqrt((rows * rows).sum()) + 1e-30
            self._states.append(take_fingerprint(rows, 0)[0] / size)

    def settle(self) -> None:
        """Compute what was seen and not taken.

        The last layer of a chunk of a prompt is of no use to the caches: if it waited until it is told, its exchanges
        would come in no certain order beside those of a later step.
        """
        mx.eval(self._routing, self._states)

    def take(self) -> mx.array:
        """Return what was seen since the last call, (WORDS,) int32; zeros where nothing was."""
        if not self._states:
            return mx.zeros((WORDS,), dtype=mx.int32)
        routing = sum(self._routing[1:], self._routing[0]).astype(mx.uint32)
        state = sum(self._states[1:], self._states[0]).astype(mx.float32)
        self._routing, self._states = [], []
        return mx.stack([routing.view(mx.int32), state.view(mx.int32)])


def find_dissent(words: Sequence[int]) -> Dissent | None:
    """Compare what all ranks saw: their `take`s, one after the other; nothing is in agreement with itself."""
    if not words:
        return None
    routing, states = words[0::WORDS], [_to_float(word) for word in words[1::WORDS]]
    if len(set(routing)) > 1:
        return Dissent(_odd_one(routing), "chose other experts")
    middle = sorted(states)[len(states) // 2]
    far = [not abs(state - middle) <= TOLERANCE for state in states]  # also when it is no number
    if any(far):
        return Dissent(far.index(True) if far.count(True) == 1 and len(far) > 2 else None, "computed another state")
    return None


def _odd_one(values: Sequence[int]) -> int | None:
    alone = [rank for rank, value in enumerate(values) if values.count(value) == 1]
    return alone[0] if len(alone) == 1 and len(values) > 2 else None


def _to_float(word: int) -> float:
    value: float = struct.unpack("f", struct.pack("i", word))[0]
    return value


@dataclass(frozen=True, slots=True)
class _Watched:
    """Stands in for one layer's router."""

    router: Any
    witness: Witness
    hashes: mx.array
    is_last: bool

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        indices, weights = self.router(x)
        if self.witness.looks:
            self.witness.see(self.hashes, x, indices, is_last=self.is_last)
        return indices, weights
