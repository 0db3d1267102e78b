"""The controller: one process that owns a running session, keeps it loaded, and serves many users of it at once.

`Controller` is a `contracts.Cluster` over a session, and over the next one when that fails: answers in progress go on
after the tokens that were sent. It decides which requests wait; the engine decides which ones run together.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from moectl.engine.isolation import explain
from moectl.engine.protocol import Done, Prefilled, Ready, Refused, Token
from moectl.engine.request import Request, too_long
from moectl.errors import LinkLost, MoectlError, QueueFull, StateError, unexpected, with_hint
from moectl.server.contracts import Health
from moectl.server.metrics import Throughput
from moectl.server.restarts import Restarts, ResumedAnswer
from moectl.session.session import Session

FIRST_S = 60.0  # for the first question to come
MAX_WAITING = 64  # requests beside those that are being answered
ALIVE_S = 5.0  # a rank without an answered heartbeat for this long is not healthy
GRACE_S = 5.0
READING_S = 600.0  # for a client that is still reading the last answer
BYTES_PER_TOKEN = 256  # more than any token has: a longer prompt is refused here, not on the workers
MAX_FAILURES = 3  # an answer that was in progress at this many failures ends: it may be their cause
_RETRY_S = 5.0

Open = Callable[[float, Callable[[Session], None]], AbstractContextManager[Session]]


class Controller:
    """A session with many users, and the next one when it fails; lives in one event loop, reads events in a thread.

    `open_` (patience, on_made) opens another session; `restarts` says when.
    """

    def __init__(
        self,
        session: Session,
        name: str,
        *,
        ranks: int,
        keep_alive: KeepAlive,
        max_waiting: int = MAX_WAITING,
        open_: Open | None = None,
        restarts: Restarts | None = None,
        advise: Callable[[MoectlError], str | None] = lambda failure: None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.name = name
        self.created = int(time.time())
        self.failure: MoectlError | None = None
        self._session = session
        self._opened: AbstractContextManager[Session] | None = None  # around the session, when it is not the first
        self._model = session.model
        self._ranks = ranks
        self._keep_alive = keep_alive
        self._max_waiting = max_waiting
        self._open = open_
        self._restarts = restarts or Restarts(0)
        self._advise = advise
        self._say_to_owner = say
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        self._closed = False
        self._shut = threading.Event()  # the session is to end for good
        self._closing = threading.Lock()
        self._changed = asyncio.Event()  # a request came or ended
        self.idle = asyncio.Event()  # no request is unfinished
        self.idle.set()
        self._unfinished: list[ResumedAnswer] = []  # in the order in which they came
        self._numbered: dict[int, ResumedAnswer] = {}  # of those: handed to the session, by its request ids
        self._last_id = 0
        self._is_up = True
        self._downs = 0  # how often it went down
        self._came_further = False  # whether an answer has, since it is up
        self._in_use = session  # as the loop knows: the one that is up, or was
        self._handing_over = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._progress_s = time.monotonic()
        self.throughput = Throughput(self._progress_s)
        threading.Thread(target=self._listen, name="session", daemon=True).start()

    @property
    def model(self) -> Ready:
        return self._model

    async def submit(self, request: Request) -> ResumedAnswer:
        """Line a request up, to be numbered and handed to every rank; see `contracts.Cluster.submit`."""
        if self.failure is not None:
            raise self.failure
        if self._closed:
            raise StateError("moectl is stopping", hint="ask again: that starts it again")
        refuse_too_long(request, self.model.max_seq_len)
        refuse_full(sum(not answer.started for answer in self._unfinished), self._max_waiting)
        if not self._unfinished:
            self._progress_s = time.monotonic()
        answer = ResumedAnswer(request, self._cancel)
        self._unfinished.append(answer)
        self._changed.set()
        self.idle.clear()
        if self._is_up:
            self._hand_over_soon()
        return answer

    def _hand_over_soon(self) -> None:
        # In a task of its own: links to workers are pipes and SSH channels, and a full one would block this loop.
        task = asyncio.ensure_future(self._hand_over_all(self._downs))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _hand_over_all(self, downs: int) -> None:
        """Give the session what it does not have yet, one after the other, for as long as it is up."""
        async with self._handing_over:
            for answer in list(self._unfinished):
                if downs != self._downs:  # it has failed meanwhile
                    return
                if answer in self._unfinished and answer not in self._numbered.values():
                    answer.number = self._last_id + 1
                    self._numbered[answer.number] = answer
                    try:
                        await asyncio.to_thread(self._in_use.submit, answer.remaining)
                    except Exception as error:  # the client has to hear of it; the next request gets this number
                        self._end(answer, error if isinstance(error, MoectlError) else unexpected(error))
                    else:
                        self._last_id += downs == self._downs  # a session that started since then counts from 1

    @property
    def is_closed(self) -> bool:
        """Whether it accepts no more requests."""
        return self._closed or self.failure is not None

    @property
    def unfinished(self) -> int:
        """How many requests have not ended."""
        return len(self._unfinished)

    def close(self) -> None:
        """Accept no more requests, and do not restart."""
        self._closed = True
        self._shut.set()

    def end_session(self) -> None:
        """End the session, also while it starts. Blocks until its workers are gone."""
        self._shut.set()
        self._close_session()

    def health(self) -> Health:
        is_up = self._is_up and self.failure is None
        running = sum(answer.started for answer in self._unfinished)
        return Health(
            self._ranks,
            self._session.count_alive(ALIVE_S) if is_up else 0,
            time.monotonic() - self._progress_s,
            running,
            len(self._unfinished) - running,
            self._session.memory_bytes,
            self._restarts.total,
        )

    async def wait_until_over(self) -> None:
        """Return when the session has failed for good, or was idle for the time to keep it alive."""
        while not self._ended.is_set():
            self._changed.clear()
            left_s = None if self._unfinished else self._keep_alive.left_s()
            if left_s is not None and left_s <= 0:
                self.close()  # at once: the next client gets an error
                return
            waits = [
                asyncio.create_task(event.wait()) for event in (self._ended, self._changed, self._keep_alive.changed)
            ]
            await asyncio.wait(waits, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            for task in waits:
                task.cancel()
            self._keep_alive.changed.clear()

    def _cancel(self, answer: ResumedAnswer) -> None:
        if self._numbered.get(answer.number) is answer:
            threading.Thread(target=self._in_use.cancel, args=(answer.number,), daemon=True).start()
        else:  # no session has it
            self._end(answer, StateError("the answer was cancelled before it began"))

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # the terminal may be gone; answers go on
            self._say_to_owner(text)

    # The session's thread: it reads the events of one session, then of the next.

    def _listen(self) -> None:
        failure, is_up = self._hear(), True
        while not self._shut.is_set() and (delay_s := self._find_delay(failure)) is not None:
            again = self._reopen(failure, delay_s)
            is_up = again is None
            if again is None:
                self._restarts.come_up()
                self._call(self._resume, self._session)
                again = self._hear()
            failure = again
        if self._shut.is_set() and not is_up:  # it was stopped before it was up again
            self._call(self._stop)
        else:
            if not self._shut.is_set():
                with contextlib.suppress(Exception):  # looking for advice may fail; clients still get the failure
                    failure = with_hint(failure, self._advise(failure))
            self._call(self._fail, failure)
        with contextlib.suppress(Exception):  # a session that came up while another thread ended the one before
            self._close_session()

    def _find_delay(self, failure: MoectlError) -> float | None:
        return None if self._open is None else self._restarts.delay_s(failure)

    def _hear(self) -> MoectlError:
        """Pass on a session's events; return why they ended."""
        try:
            for event in self._session.events():
                self._call(self._take, event)
        except Exception as error:
            return error if isinstance(error, MoectlError) else unexpected(error)
        raise AssertionError("a session's events never end")

    def _reopen(self, failure: MoectlError, delay_s: float) -> MoectlError | None:
        """Start again after a failure; return None, or the next failure."""
        assert self._open is not None
        self._call(self._pause, failure)
        self._close_session()
        if self._shut.wait(delay_s):
            return failure
        opening = self._open(self._restarts.patience, self._take_session)
        try:
            opening.__enter__()
        except Exception as error:
            return error if isinstance(error, MoectlError) else unexpected(error)
        self._opened = opening
        return None

    def _close_session(self) -> None:
        with self._closing:
            self._session.close()
            opened, self._opened = self._opened, None
            if opened is not None:
                opened.__exit__(None, None, None)

    def _take_session(self, session: Session) -> None:
        self._session = session
        if self._shut.is_set():
            session.close()

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop may be gone
            self._loop.call_soon_threadsafe(function, *arguments)

    # The loop's side of it.

    def _take(self, event: Prefilled | Token | Done | Refused) -> None:
        self._progress_s = time.monotonic()
        self._restarts.progress()
        if isinstance(event, Token):
            self.throughput.add(self._progress_s)
        answer = self._numbered.get(event.id)
        if answer is None:
            return
        try:
            self._came_further |= answer.take(event)
        except Exception as error:  # it concerns this answer alone; the loop would only log it
            answer.cancel()
            self._end(answer, explain(event.id, error))
            return
        if isinstance(event, Done | Refused):
            self._forget(answer)

    def _forget(self, answer: ResumedAnswer) -> None:
        if self._numbered.get(answer.number) is answer:  # not if it had that number in an earlier session
            del self._numbered[answer.number]
        self._unfinished.remove(answer)
        if not self._unfinished:
            self._keep_alive.renew()
            self._changed.set()
            self.idle.set()

    def _end(self, answer: ResumedAnswer, error: MoectlError) -> None:
        if answer in self._unfinished:
            self._forget(answer)
            answer.fail(error)

    def _pause(self, failure: MoectlError) -> None:
        """Tell the clients that the cluster is down, and will be up again."""
        self._is_up = False
        self._downs += 1
        # A sleep of this machine is no failure, unless it sleeps again before any answer came further.
        is_failure = not (isinstance(failure, LinkLost) and self._came_further)
        for answer in self._numbered.values():  # none at a start that fails: no session had it
            answer.break_off(is_failure=is_failure)
        self._numbered.clear()
        self._came_further = False
        text = f"{failure}. Starting again ({self._restarts.recent} of {self._restarts.most})."
        self._say(text)
        for answer in list(self._unfinished):
            if answer.cancelled or answer.failures >= MAX_FAILURES:
                self._end(answer, failure)
            else:
                answer.tell(text)

    def _resume(self, session: Session) -> None:
        self._in_use = session
        self._is_up = True
        self._last_id = 0
        self._progress_s = time.monotonic()
        self._say("All ranks are back.")
        for answer in self._unfinished:
            answer.tell("All ranks are back: the answer goes on.")
        self._hand_over_soon()

    def _fail(self, error: MoectlError) -> None:
        self.failure = error
        self._end_all(error)

    def _stop(self) -> None:
        hint = "ask again: that starts it again"
        self._end_all(StateError("moectl is stopping and does not restart its failed cluster", hint=hint))

    def _end_all(self, error: MoectlError) -> None:
        for answer in self._unfinished:
            answer.fail(error)
        self._unfinished.clear()
        self._numbered.clear()
        self._ended.set()
        self.idle.set()


def refuse_full(waiting: int, most: int = MAX_WAITING) -> None:
    """Raise QueueFull when no more requests may wait."""
    if waiting >= most:
        raise QueueFull(f"{most} requests wait already", hint=f"ask again in {_RETRY_S:g} s", retry_after_s=_RETRY_S)


def refuse_too_long(request: Request, max_seq_len: int) -> None:
    """Raise UsageError for a prompt that is longer than the context, without its tokens."""
    if request.chars > BYTES_PER_TOKEN * max_seq_len or len(request.prompt_tokens or ()) > max_seq_len:
        raise too_long(f"the prompt is longer than the model's context of {max_seq_len} tokens", request.source)


class KeepAlive:
    """How long an idle controller stays: seconds since the last answer, or for ever."""

    def __init__(self, seconds: float) -> None:
        self.changed = asyncio.Event()
        self._seconds = seconds
        # The client that started it needs time to ask its question.
        self._until_s = time.monotonic() + max(seconds, FIRST_S)

    def renew(self, seconds: float | None = None, *, asks: bool = False) -> None:
        """Begin the time again, with another length if one is given; `asks`: a question is about to come."""
        self._seconds = self._seconds if seconds is None else seconds
        self._until_s = time.monotonic() + (max(self._seconds, FIRST_S) if asks else self._seconds)
        self.changed.set()

    def left_s(self) -> float | None:
        """Return the seconds that are left, None for ever."""
        return None if self._seconds < 0 else self._until_s - time.monotonic()
