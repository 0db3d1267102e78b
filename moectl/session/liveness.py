"""Whether a rank is alive, whether work goes on and whether this machine slept: from heartbeats and signs of work.

Heartbeats are counted, not seconds: after a sleep of this machine one is missing, not many. Nothing here sends, waits
or ends anything; `session` does.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from dataclasses import dataclass, field

MISSES = 4  # heartbeats in a row without an answer: the rank counts as dead, after MISSES + 1 seconds
LOADING_MISSES = 60  # the same while weights are read and wired, perhaps without the interpreter lock
LATE_S = 2.5  # between two heartbeats: this machine was stopped, or slept
_AWAKE_S = 10.0  # a failure within this time after a sleep counts as caused by it

# A step times out after FACTOR × the slowest recent one of its kind, and after LEAST_S at least.
FACTOR = 10.0
RECENT = 64  # steps of a kind that count
LEAST_S = 5.0
TEXT_CHARS_S = 200_000.0  # characters that are turned into tokens in a second; there is no event meanwhile


class Pulse:
    """One rank's answers to heartbeats."""

    def __init__(self) -> None:
        self.heard_s = 0.0  # when it last said anything, on the monotonic clock
        self._seen_s = 0.0  # what that was at the beat before
        self._missed = 0  # beats in a row without an answer, since it last said anything
        self._asked = True  # whether the last one wanted an answer
        self._is_over = False

    def hear(self) -> None:
        """Note that the rank said something."""
        self.heard_s = time.monotonic()

    @property
    def quiet(self) -> int:
        """How many heartbeats it has not answered since it last said anything."""
        return self._missed

    def count(self, most: int, *, asked: bool = True) -> bool:
        """Count one heartbeat, to be answered if `asked`; return True once when `most` in a row had no answer."""
        if self.heard_s != self._seen_s:
            self._missed = 0
            self._is_over = False
        elif self._asked:
            self._missed += 1
        self._seen_s, self._asked = self.heard_s, asked
        if self._is_over or self._missed < most:
            return False
        self._is_over = True
        return True


class Sleep:
    """Whether this machine slept, by its own heartbeats; `time.monotonic` stops during a sleep."""

    def __init__(self) -> None:
        self._beat_s = _now_s()
        self._woke_s = -_AWAKE_S
        self._slept_s = 0.0

    def beat(self) -> None:
        """Note that this machine is awake; due every BEAT_S."""
        now_s = _now_s()
        if now_s - self._beat_s > LATE_S:
            self._woke_s, self._slept_s = now_s, now_s - self._beat_s
        self._beat_s = now_s

    @property
    def slept_s(self) -> float | None:
        """How long this machine slept until a moment ago; None when it did not."""
        now_s = _now_s()
        if now_s - self._beat_s > LATE_S:
            return now_s - self._beat_s
        return self._slept_s if now_s - self._woke_s < _AWAKE_S else None


def _now_s() -> float:
    # A clock that is never set and that runs during a sleep; its name differs between systems.
    clock = time.CLOCK_MONOTONIC if sys.platform == "darwin" else time.CLOCK_BOOTTIME
    return time.clock_gettime(clock)


@dataclass(slots=True)
class StepDeadline:
    """How long to wait for the next sign of work, from how long the last ones took.

    Prompts are timed by token, because chunks differ in size; answers by step. Without a measurement the limit is
    `most_s`. `patience` multiplies the limit after a rank was slow and not dead.
    """

    most_s: float
    chunk_tokens: int
    patience: float = 1.0
    _since_s: float = field(default_factory=time.monotonic)
    _token_s: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))  # each, of a prompt's
    _step_s: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    _chars: dict[int, int] = field(default_factory=dict)  # of prompts without an event yet, by request
    _read: dict[int, int] = field(default_factory=dict)  # tokens read, by request, of those that are still read

    @property
    def is_reading(self) -> bool:
        """Whether a prompt waits or is being read."""
        return bool(self._read)

    def expect(self, request_id: int, *, is_first: bool, chars: int = 0) -> None:
        """Note a request and the length of its text; `is_first`: there was no other work."""
        self._read[request_id] = 0
        self._chars[request_id] = chars
        if is_first:
            self._since_s = time.monotonic()

    def read(self, request_id: int, tokens: int, *, cached: int = 0) -> None:
        """Note that this many tokens of a prompt have been read, the first `cached` of them at no cost."""
        self._chars.pop(request_id, None)
        new = tokens - max(cached, self._read.get(request_id, 0))
        took_s = self._lap()
        if new > 0:
            self._read[request_id] = tokens
            # A few tokens take as long as a step: their time per token says nothing about a chunk.
            if 2 * new >= self.chunk_tokens or not self._token_s:
                self._token_s.append(took_s / new)

    def step(self, request_id: int) -> None:
        """Note a token of an answer."""
        took_s = self._lap()
        self._chars.pop(request_id, None)
        if request_id in self._read:  # its first token: it took the rest of the prompt
            del self._read[request_id]
        elif not self._read:
            self._step_s.append(took_s)

    def forget(self, request_id: int) -> None:
        """Note the end of a request."""
        self._lap()
        self._chars.pop(request_id, None)
        self._read.pop(request_id, None)

    @property
    def seconds(self) -> float:
        """How long from the last sign to the next one at most."""
        step_s = max(self._step_s, default=None)
        slowest_s = step_s
        if self._read:
            token_s = max(self._token_s, default=None)
            slowest_s = None if token_s is None else token_s * self.chunk_tokens + (step_s or 0.0)
        if slowest_s is None:
            return self.most_s
        text_s = sum(self._chars.values()) / TEXT_CHARS_S
        return min(self.most_s, max(LEAST_S, FACTOR * slowest_s) * self.patience + text_s)

    @property
    def left_s(self) -> float:
        """The rest of `seconds`; 0 when they are over."""
        return max(0.0, self._since_s + self.seconds - time.monotonic())

    def learn(self, token_s: float, step_s: float) -> None:
        """Take the measured times of a prompt's token and of a step; 0 is none."""
        if token_s:
            self._token_s.append(token_s)
        if step_s:
            self._step_s.append(step_s)

    def forgive(self) -> None:
        """Begin the time again after a sleep of this machine."""
        self._since_s = time.monotonic()

    def _lap(self) -> float:
        now_s = time.monotonic()
        took_s, self._since_s = now_s - self._since_s, now_s
        return took_s
