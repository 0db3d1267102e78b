"""Restarts of a failed cluster: when to start again, and one answer that goes on over them.

It lives in the controller's event loop; the controller starts sessions and hands requests over.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

from moectl.engine.protocol import Done, Prefilled, Refused, Token
from moectl.engine.request import Request, Stats
from moectl.errors import (
    AuthFailed,
    CheckpointError,
    HostKeyError,
    HostUnfit,
    IntegrityError,
    LinkLost,
    MoectlError,
    Stalled,
    StateError,
    UsageError,
    VersionMismatch,
)
from moectl.server.contracts import Notice

WITHIN_S = 600.0  # in which restarts are counted
FIRST_S = 0.5  # to wait before a start; twice as long after each start without progress
MOST_S = 30.0
# Errors that a restart does not mend. Too little memory and a missing address are not among them: the cluster was up,
# so the memory of a killed worker is still being freed, or the interface is about to come back.
_LASTING = (
    AuthFailed,
    CheckpointError,
    HostKeyError,
    HostUnfit,
    IntegrityError,
    StateError,
    UsageError,
    VersionMismatch,
)


class ResumedAnswer:
    """One request's events as they come, over restarts; see `contracts.AnswerEvents`."""

    def __init__(self, request: Request, cancel: Callable[[ResumedAnswer], None]) -> None:
        self.number = 0  # the session's
        self.started = False  # a sign of work on it was seen
        self.cancelled = False
        self.restarts = 0  # of sessions that had it
        self.failures = 0  # of those: not caused by a sleep of this machine
        self._request = request
        self._inbox: asyncio.Queue[Token | Done | Notice | MoectlError] = asyncio.Queue()
        self._cancel = cancel
        self._tokens: list[int] = []
        self._furthest_read = 0  # tokens of the prompt
        self._asked_s = time.monotonic()
        self._first_s = 0.0

    @property
    def remaining(self) -> Request:
        """The request, to go on after the tokens that were sent."""
        return replace(self._request, id=self.number, answered=tuple(self._tokens))

    async def __aiter__(self) -> AsyncIterator[Token | Done | Notice]:
        while True:
            event = await self._inbox.get()
            if isinstance(event, MoectlError):
                raise event
            yield event
            if isinstance(event, Done):
                return

    def cancel(self) -> None:
        """Stop soon; the Done that follows is ignored."""
        if not self.cancelled:
            self.cancelled = True
            self._cancel(self)

    def take(self, event: Prefilled | Token | Done | Refused) -> bool:
        """Take an event of the session; return whether the answer has come further than in any session before."""
        self.started = True
        match event:
            case Token(token=token):
                self._first_s = self._first_s or time.monotonic()
                self._tokens.append(token)
                self._inbox.put_nowait(event)
                return True
            case Done():
                self._inbox.put_nowait(replace(event, stats=self._over_all(event.stats)))
            case Refused():
                self.fail(event.to_error())
            case Prefilled(tokens=tokens) if tokens > self._furthest_read:
                self._furthest_read = tokens
                return True
            case _:
                pass
        return False

    def break_off(self, *, is_failure: bool) -> None:
        """Note that its session is over; the next one begins after the last token."""
        self.restarts += 1
        self.failures += is_failure

    def tell(self, text: str) -> None:
        """Tell the client some news."""
        self._inbox.put_nowait(Notice(text))

    def fail(self, error: MoectlError) -> None:
        """End the answer with an error."""
        self._inbox.put_nowait(error)

    def _over_all(self, stats: Stats) -> Stats:
        # The last session has measured only its own part of the time.
        if not self.restarts or not self._first_s:
            return stats
        now_s = time.monotonic()
        return replace(stats, ttft_s=self._first_s - self._asked_s, decode_s=now_s - self._first_s)


class Restarts:
    """When a failed cluster starts again: at most `most` times within WITHIN_S."""

    def __init__(self, most: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.most = most
        self.total = 0  # since the beginning
        self.patience = 1.0  # doubled by each session that stalled
        self._clock = clock
        self._recent: deque[float] = deque()
        self._in_vain = 0  # starts since the last progress
        self._was_up = True  # since the last failure

    @property
    def recent(self) -> int:
        """How many count at this moment."""
        return len(self._recent)

    def progress(self) -> None:
        """Note that an answer makes progress."""
        self._in_vain = 0

    def come_up(self) -> None:
        """Note that the cluster has started."""
        self._was_up = True

    def delay_s(self, failure: MoectlError) -> float | None:
        """Count a failure; return how long to wait before the next start, None when there shall be none.

        A sleep of this machine does not count, unless the cluster was not up since the last failure.
        """
        if self.most == 0 or isinstance(failure, _LASTING):
            return None
        if isinstance(failure, Stalled):
            self.patience *= 2
        now_s = self._clock()
        while self._recent and now_s - self._recent[0] > WITHIN_S:
            self._recent.popleft()
        was_up, self._was_up = self._was_up, False
        if isinstance(failure, LinkLost) and was_up:
            self.total += 1
            return FIRST_S
        if len(self._recent) == self.most:
            return None
        self._recent.append(now_s)
        self.total += 1
        delay_s = float(min(MOST_S, FIRST_S * 2**self._in_vain))
        self._in_vain += 1
        return delay_s
