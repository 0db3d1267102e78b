"""Keep the caches of past prompts and answers, so that a conversation's next turn computes only what is new.

Every rank keeps its own arrays and takes the same decisions: they depend on tokens, their number, and the order of
calls, which are the same on every rank; never on bytes, which differ between ranks of a pipeline. The least recently
used entry goes first. Nothing is evaluated here.

Keys and values of a prefix are those of the longer text, cut off. A window or a state is not: where a model has such
caches, an entry is of use to texts that begin with all of it. So a point at which later texts may branch off is kept
by itself: the end of the system message, and of the conversation before each answer (`moectl.shards.chat.branches`).

A turn takes the place of the turn before. Without that, the answers of one conversation, which most templates tell
without their thinking in the next turn, would drive the other conversations out.

Entries belong to a space, and only requests of that space find them: how fast an answer begins tells nothing about the
prompts of others.

Kept values were computed in other pieces than those of a new prompt (another chunk, or one by one beside other rows),
so they agree up to rounding: in float32 the tokens are the same but for ties within some 1e-6 of a logit, in bfloat16
a close tie may fall the other way. A request that must not depend on earlier ones asks for no cache.
"""

from __future__ import annotations

import copy
import enum
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moectl.engine.admission import held_tokens
from moectl.engine.caches import forget

# A shorter prefix saves nothing, and two prompts that share only a template's first words stay apart.
MIN_PREFIX = 16
_Tokens = np.ndarray[Any, np.dtype[np.int32]]


class Branch(enum.IntEnum):
    """Where the text of an entry ends. One takes the place of those of its own kind and of lower ones."""

    ANSWER = 0
    RESULT = 1  # before an answer, after a tool's result
    QUESTION = 2  # before an answer, after all else: the next question may find the answers after this one changed
    SYSTEM = 3  # other conversations begin so, too: it takes the place of none, and none takes its place


@dataclass(frozen=True, slots=True, eq=False)
class _Entry:
    tokens: _Tokens
    layers: list[Any]  # this rank's caches
    kind: Branch
    firm: int  # a later text that begins with so many of the tokens takes its place
    space: int


class PromptCache:
    """Caches by the tokens they belong to, least recently used first.

    It may take `most` tokens, and of `kv_tokens` what the running rows leave. `trimmable`: whether all caches of the
    model can forget their last tokens. `row_tokens` is what a row takes whatever its length, counted in tokens.
    """

    def __init__(
        self, most: int = 0, kv_tokens: int | None = None, *, trimmable: bool = True, row_tokens: int = 0
    ) -> None:
        self._entries: list[_Entry] = []
        self._most = most
        self._kv_tokens = kv_tokens
        self._trimmable = trimmable
        self._row_tokens = row_tokens

    def find_room(self, reaches: Collection[int]) -> int:
        """Return how many tokens it may take beside running rows that may reach these lengths."""
        if self._kv_tokens is None:
            return self._most
        return max(0, min(self._most, self._kv_tokens - held_tokens(reaches, self._row_tokens)))

    @property
    def tokens(self) -> int:
        """How many tokens' keys and values would take the memory of what is kept."""
        return sum(entry.tokens.size + self._row_tokens for entry in self._entries)

    @property
    def prompts(self) -> list[list[int]]:
        """The kept prompts, least recently used first."""
        return [entry.tokens.tolist() for entry in self._entries]

    def find(self, tokens: Sequence[int], space: int = 0) -> tuple[int, list[Any] | None]:
        """Return (n, layers) for the longest kept prefix of `tokens`, without its last token; (0, None) if too short.

        An entry of which all is found counts as used. The layers are the caller's.
        """
        wanted = np.array(tokens[:-1], dtype=np.int32)
        lengths = [self._count_useful(entry, wanted, space) for entry in self._entries]
        longest = max(lengths, default=0)
        if longest < MIN_PREFIX:
            return 0, None
        entry = self._entries[lengths.index(longest)]
        layers = copy.deepcopy(entry.layers)  # arrays are shared until one is written to
        if longest < entry.tokens.size:
            forget(layers, entry.tokens.size - longest)
        else:
            self._use(entry)
        return longest, layers

    def keep(
        self,
        tokens: Sequence[int],
        layers: list[Any],
        room: int,
        kind: Branch = Branch.ANSWER,
        firm: int | None = None,
        space: int = 0,
    ) -> bool:
        """Keep the layers of these tokens, and what takes `room` tokens in all at most.

        With the first `firm` of the tokens (None: all) begins every later turn of the same conversation.
        Returns whether it holds on to the layers: it may have no room for them, or know these tokens already.
        """
        kept = np.array(tokens, dtype=np.int32)
        if not MIN_PREFIX < kept.size <= room - self._row_tokens:
            self.shrink(room)
            return False
        same = next((e for e in self._entries if self._count_useful(e, kept, space) == kept.size), None)
        if same is not None:
            self._use(same)
        else:
            new = _Entry(kept, layers, kind, kept.size if firm is None else min(firm, kept.size), space)
            self._entries = [entry for entry in self._entries if not _is_replaced(entry, new)]
            self._entries.append(new)
        self.shrink(room)
        return same is None

    def _use(self, entry: _Entry) -> None:
        self._entries.remove(entry)
        self._entries.append(entry)

    def _count_useful(self, entry: _Entry, wanted: _Tokens, space: int) -> int:
        """Return with how many of its tokens an entry can begin a text."""
        if entry.space != space:
            return 0
        length = _common(entry.tokens, wanted)
        return length if self._trimmable or length == entry.tokens.size else 0

    def shrink(self, room: int) -> None:
        """Drop the least recently used entries until no more than `room` tokens are kept."""
        while self.tokens > room:
            self._entries.pop(0)


def _is_replaced(entry: _Entry, new: _Entry) -> bool:
    """Return whether an entry is an earlier turn of the conversation that a new one is of."""
    can_be = entry.space == new.space and entry.kind <= new.kind < Branch.SYSTEM
    return can_be and _common(entry.tokens, new.tokens) >= entry.firm


def _common(a: _Tokens, b: _Tokens) -> int:
    """Return how many tokens two prompts begin with in common."""
    length = min(a.size, b.size)
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if different.size else length
