"""When to start a failed cluster again: how often, after how long, and after what not at all.

It decides; the controller does.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from moectl.errors import (
    AuthFailed,
    CheckpointError,
    HostKeyError,
    IntegrityError,
    LeashLost,
    MoectlError,
    Stalled,
    StateError,
    UsageError,
    VersionMismatch,
)

WITHIN_S = 600.0  # in which restarts are counted
FIRST_S = 0.5  # to wait before a start; twice as long after each one that came to nothing
MOST_S = 30.0
# What will be the same next time. Too little memory and an address that is not there are not among it: the cluster was
# up, so the memory is still being freed after its worker was killed, or the interface is about to come back.
_LASTING = (
    AuthFailed,
    CheckpointError,
    HostKeyError,
    IntegrityError,
    StateError,
    UsageError,
    VersionMismatch,
)


class Restarts:
    """The count of restarts, and what was learnt from them; `most` 0: none at all."""

    def __init__(self, most: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.most = most
        self.total = 0  # since the beginning
        self.patience = 1.0  # doubled by each session that was too slow, or seemed so
        self._clock = clock
        self._recent: deque[float] = deque()
        self._in_vain = 0  # starts since the last sign of work
        self._was_up = True  # since the last failure

    @property
    def recent(self) -> int:
        """How many count at the moment."""
        return len(self._recent)

    def progress(self) -> None:
        """Note a sign of work: what was started is good for something."""
        self._in_vain = 0

    def come_up(self) -> None:
        """Note that the cluster has started."""
        self._was_up = True

    def delay_s(self, failure: MoectlError) -> float | None:
        """Count a failure; return how long to wait before the next start, None when there shall be none.

        A sleep of this machine is nobody's fault and does not count, unless nothing had started since the last failure.
        """
        if self.most == 0 or isinstance(failure, _LASTING):
            return None
        if isinstance(failure, Stalled):
            self.patience *= 2
        now_s = self._clock()
        while self._recent and now_s - self._recent[0] > WITHIN_S:
            self._recent.popleft()
        was_up, self._was_up = self._was_up, False
        if isinstance(failure, LeashLost) and was_up:
            self.total += 1
            return FIRST_S
        if len(self._recent) == self.most:
            return None
        self._recent.append(now_s)
        self.total += 1
        delay_s = float(min(MOST_S, FIRST_S * 2**self._in_vain))
        self._in_vain += 1
        return delay_s
