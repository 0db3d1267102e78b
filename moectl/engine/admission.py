"""Decide, on the leader, which requests join the batch and which leave it: the control word of each step.

First come, first served: a request waits while the batch has no free row, or while the keys and values that all
running requests may need would exceed the memory. The requests behind it wait too, so every request gets its turn. A
decision counts only once every rank has heard it.

Requests are numbered from 1 without gaps and admitted in that order on every rank. A request that is cancelled while it
waits is answered at once. All ranks have it already, so its number goes out as a cancel, and every rank skips it when
its turn comes. Only requests that were cancelled by such a word may be skipped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection


def held_tokens(reaches: Collection[int], row_tokens: int = 0) -> int:
    """Return the tokens of memory of a batch whose rows may reach these lengths: all take as much as the longest.

    `row_tokens` is what a row takes whatever its length, counted in tokens.
    """
    return len(reaches) * (max(reaches, default=0) + row_tokens)


class Admission:
    """The leader's view of the requests that wait and run, and of the cancels to send."""

    def __init__(self, *, max_rows: int, kv_tokens: int | None, max_cancels: int, row_tokens: int = 0) -> None:
        self._max_rows = max_rows
        self._kv_tokens = kv_tokens
        self._row_tokens = row_tokens
        self._max_cancels = max_cancels  # in one word
        self._waiting: dict[int, int] = {}  # by id: the length it may reach; 0: it is refused and takes no row
        self._running: dict[int, int] = {}  # promised a row, not ended yet
        self._promised = 0  # highest id that a word has admitted
        self._cancels: deque[int] = deque()  # of running requests, not sent yet
        self._withdrawn: deque[int] = deque()  # cancelled while waiting, not sent yet
        self._early: set[int] = set()  # cancelled before they came

    @property
    def waiting(self) -> int:
        """How many requests have no row yet."""
        return len(self._waiting)

    def arrive(self, request_id: int, reach: int) -> bool:
        """Queue a request that may reach `reach` tokens; return whether it is cancelled already."""
        self._waiting[request_id] = reach
        return request_id in self._early and self.cancel(request_id)

    def cancel(self, request_id: int) -> bool:
        """Note a cancel; return whether the request was waiting, so that it can be answered at once."""
        self._early.discard(request_id)
        if request_id in self._running:
            if request_id not in self._cancels:
                self._cancels.append(request_id)
            return False
        if request_id in self._waiting:
            if request_id in self._withdrawn:
                return False
            self._withdrawn.append(request_id)
            return True
        if request_id > self._promised:
            self._early.add(request_id)
        return False

    def admit(self, request_id: int) -> None:
        """Note that every rank has reached this number, by a word or because all were idle."""
        self._promised = max(self._promised, request_id)
        self._early.discard(request_id)
        if request_id in self._waiting:  # idle ranks do not wait for a word
            self._promise(request_id)

    def end(self, request_id: int) -> None:
        """Note that a request has left the batch."""
        self._running.pop(request_id, None)
        if request_id in self._cancels:
            self._cancels.remove(request_id)

    def make_word(self) -> tuple[int, list[int]]:
        """Return (admit requests up to, cancel these); the caller has to send it."""
        cancels = [self._cancels.popleft() for _ in range(min(len(self._cancels), self._max_cancels))]
        while self._withdrawn and len(cancels) < self._max_cancels:
            withdrawn = self._withdrawn.popleft()
            cancels.append(withdrawn)
            self._waiting[withdrawn] = 0  # skipped from now on
        while (reach := self._waiting.get(self._promised + 1)) is not None:
            if self._promised + 1 in self._withdrawn or not self._has_room(reach):
                break
            self._promised += 1
            self._promise(self._promised)
        return self._promised, cancels

    def _promise(self, request_id: int) -> None:
        reach = self._waiting.pop(request_id)
        if reach:
            self._running[request_id] = reach
        if request_id in self._withdrawn:  # the cancel is not sent yet: admit it, then cancel it like a running request
            self._withdrawn.remove(request_id)
            self._cancels.append(request_id)

    def _has_room(self, reach: int) -> bool:
        if reach == 0:
            return True
        reaches = [*self._running.values(), reach]
        if self._kv_tokens is None or len(reaches) == 1:  # there is memory for what one row may reach
            return len(reaches) <= self._max_rows
        return held_tokens(reaches, self._row_tokens) <= self._kv_tokens and len(reaches) <= self._max_rows
