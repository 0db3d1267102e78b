"""The result of a forward pass in two numbers that every rank can compare: its routing, and its hidden state.

Each rank chooses experts by itself from the same hidden state. If one rank computes something else, the sums mix parts
that do not belong together, and the answers are wrong without an error. A witness looks at the routers only when it is
told to, so that other steps cost nothing. It compares nothing by itself: that takes an exchange. The choice is what a
stack of experts is called with; a dense model has none, and its state alone is compared.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx

from moectl.engine.network.fingerprint import take_fingerprint
from moectl.shards.look.hooks import Hook, hook_call
from moectl.shards.look.routers import find_last_unit, find_stacks

WORDS = 2  # int32, of each rank
# Between chips that round differently the states differ by some percent of their size, and errors by all of it.
TOLERANCE = 0.1
_APART = 1 << 16  # numbers of experts in different layers


@dataclass(frozen=True, slots=True)
class Dissent:
    """Ranks that computed other things than the rest; None where there is no majority."""

    rank: int | None
    what: str


class Witness:
    """Watches what one rank's experts are called with while `looks` is set."""

    def __init__(self, model: Any) -> None:
        self.looks = False
        self._routing: list[mx.array] = []
        self._states: list[mx.array] = []
        for number, stack in enumerate(find_stacks(model)):
            hook_call(stack.module, partial(self._watch_choice, number))
        hook_call(find_last_unit(model), self._watch_state)

    def _watch_choice(self, number: int, call: Hook, x: mx.array, indices: mx.array, *args: Any) -> Any:
        if self.looks:
            self.see_choice(number, indices)
        return call(x, indices, *args)

    def _watch_state(self, call: Hook, *args: Any, **kwargs: Any) -> Any:
        if self.looks:
            self.see_state(next(value for value in (*args, *kwargs.values()) if isinstance(value, mx.array)))
        return call(*args, **kwargs)

    def see_choice(self, number: int, indices: mx.array) -> None:
        """Note a layer's choice (…, K), whatever the order of its experts."""
        chosen = indices.reshape(-1, indices.shape[-1]).astype(mx.uint32)
        place = mx.arange(1, 2 * chosen.shape[0], 2, dtype=mx.uint32)
        self._routing.append((_hash(chosen + _APART * number).sum(axis=-1) * place).sum())

    def see_state(self, x: mx.array) -> None:
        """Note the last unit's input (…, D)."""
        rows = x.reshape(-1, x.shape[-1]).astype(mx.float32)
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
        routing = sum(self._routing, mx.array(0, dtype=mx.uint32))
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


def _hash(numbers: mx.array) -> mx.array:
    """Return numbers (uint32) without any order among them, so that sums of some tell which these are (murmur3)."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        numbers = (numbers ^ (numbers >> shift)) * mx.array(factor, dtype=mx.uint32)
    return numbers ^ (numbers >> 16)
