"""Prompts for measurements: random tokens that no cache has seen, and the check that none has.

A prompt that was answered before is not computed again, so its time is not the model's.
"""

from __future__ import annotations

import random

from moectl.engine.request import Stats
from moectl.errors import StateError


class RandomPrompts:
    """Draws prompts, the same ones for the same seed on every machine; no two begin alike."""

    def __init__(self, vocab_size: int, seed: int = 0) -> None:
        self._source = random.Random(seed)
        self._vocab_size = vocab_size
        self._next = self._source.randrange(vocab_size)

    def draw(self, count: int) -> tuple[int, ...]:
        """Return a prompt of this many tokens."""
        first, self._next = self._next, (self._next + 1) % self._vocab_size
        return (first, *(self._source.randrange(self._vocab_size) for _ in range(count - 1)))


def check_uncached(stats: Stats) -> None:
    """Raise StateError when a part of a measured prompt was not computed."""
    if stats.cached_tokens:
        raise StateError(
            f"{stats.cached_tokens} of a prompt's {stats.prompt_tokens} tokens came from the prompt cache, so its time "
            "is not the model's",
            hint="measure a session that has no other user",
        )
