"""The controller: one process that owns a running session, keeps it warm, and serves many users of it at once.

`Controller` is a `serving.Cluster` over a session; `run` puts it behind the HTTP server until somebody stops it, it
has been idle for long enough, or the session fails. In the foreground (`moectl serve`) and in the background (started
by `moectl run`) it is the same code. It decides who waits; what runs beside what is the engine's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from socket import socket
from typing import Any

from moectl.deployment import Deployment
from moectl.errors import MoectlError, QueueFull, StateError, UsageError
from moectl.launch import Target, count_ranks, open_session
from moectl.leash import Done, Prefilled, Ready, Refused, Token
from moectl.request import Request
from moectl.server import Grace, make_app
from moectl.server import serve as serve_http
from moectl.serving import Health, Settings
from moectl.session import Session
from moectl.sockets import listen_tcp, listen_unix
from moectl.throughput import Throughput

MAX_WAITING = 64  # requests beside those that are being answered
ALIVE_S = 5.0  # a rank that has not answered a heartbeat for so long is not well
GRACE_S = 5.0
READING_S = 600.0  # for somebody who has paused in reading the last answer
BYTES_PER_TOKEN = 256  # more than any token has: longer prompts need not travel to be refused
SAME = ("dtype", "backend", "prefill_step", "speculate")  # what two who share a controller have to agree on
FIRST_S = 60.0  # for the first question to come
_RETRY_S = 5.0


class Controller:
    """A session that many use; lives in one event loop, hears the session in a thread of its own."""

    def __init__(
        self, session: Session, name: str, *, ranks: int, keep_alive: KeepAlive, max_waiting: int = MAX_WAITING
    ) -> None:
        self.name = name
        self.created = int(time.time())
        self.failure: MoectlError | None = None
        self._session = session
        self._ranks = ranks
        self._keep_alive = keep_alive
        self._max_waiting = max_waiting
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        self._closed = False
        self._changed = asyncio.Event()  # somebody came or went
        self._answers: dict[int, _Answer] = {}  # by request id, until their Done
        self._started: set[int] = set()  # of those: a sign of work was seen
        self._last_id = 0
        self._submitting = asyncio.Lock()
        self._progress_s = time.monotonic()
        self.throughput = Throughput(self._progress_s)
        threading.Thread(target=self._listen, name="session", daemon=True).start()

    @property
    def model(self) -> Ready:
        """What kind of model it is."""
        return self._session.model

    async def submit(self, request: Request) -> _Answer:
        """Number a request and hand it to every rank; see `serving.Cluster.submit`."""
        async with self._submitting:
            if self.failure is not None:
                raise self.failure
            if self._closed:
                raise StateError("moectl is stopping", hint="ask again: that starts it anew")
            _refuse_too_long(request, self.model.max_seq_len)
            if len(self._answers) - len(self._started) >= self._max_waiting:
                raise QueueFull(f"{self._max_waiting} requests wait already", retry_after_s=_RETRY_S)
            if not self._answers:
                self._progress_s = time.monotonic()
            self._last_id += 1
            answer = _Answer(replace(request, id=self._last_id), self._cancel)
            self._answers[answer.request.id] = answer
            self._changed.set()
            # Leashes are pipes and SSH channels: a full one would stop everybody else.
            await asyncio.to_thread(self._session.submit, answer.request)
            return answer

    def close(self) -> None:
        """Accept nothing any more."""
        self._closed = True

    def health(self) -> Health:
        """Return how the cluster is."""
        alive = 0 if self.failure is not None else self._session.count_alive(ALIVE_S)
        return Health(
            self._ranks,
            alive,
            time.monotonic() - self._progress_s,
            len(self._started),
            len(self._answers) - len(self._started),
            self._session.memory_bytes,
            0,
        )

    async def wait_until_over(self) -> None:
        """Return when the session has failed, or nobody has asked anything for the time to keep it alive."""
        while not self._ended.is_set():
            self._changed.clear()
            left_s = None if self._answers else self._keep_alive.left_s()
            if left_s is not None and left_s <= 0:
                return
            waits = [
                asyncio.create_task(event.wait()) for event in (self._ended, self._changed, self._keep_alive.changed)
            ]
            await asyncio.wait(waits, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            for task in waits:
                task.cancel()
            self._keep_alive.changed.clear()

    def _cancel(self, answer: _Answer) -> None:
        if self._answers.get(answer.request.id) is answer:
            threading.Thread(target=self._session.cancel, args=(answer.request.id,), daemon=True).start()

    def _listen(self) -> None:
        failure: MoectlError
        try:
            for event in self._session.events():
                self._loop.call_soon_threadsafe(self._take, event)
        except MoectlError as error:
            failure = error
        except Exception as error:
            failure = MoectlError(f"unexpected {type(error).__name__}: {error} (a bug in moectl)")
        with contextlib.suppress(RuntimeError):  # the loop may be gone
            self._loop.call_soon_threadsafe(self._fail, failure)

    def _take(self, event: Prefilled | Token | Done | Refused) -> None:
        self._progress_s = time.monotonic()
        if isinstance(event, Token) and event.token >= 0:
            self.throughput.add(self._progress_s)
        answer = self._answers.get(event.id)
        if answer is None:
            return
        self._started.add(event.id)
        if isinstance(event, Done | Refused):
            self._forget(event.id)
        match event:
            case Token() | Done():
                answer.inbox.put_nowait(event)
            case Refused():
                answer.inbox.put_nowait(UsageError(event.message, hint=event.hint))
            case _:
                pass

    def _forget(self, request_id: int) -> None:
        del self._answers[request_id]
        self._started.discard(request_id)
        if not self._answers:
            self._keep_alive.renew()

    def _fail(self, error: MoectlError) -> None:
        self.failure = error
        for answer in self._answers.values():
            answer.inbox.put_nowait(error)
        self._answers.clear()
        self._started.clear()
        self._ended.set()


def _refuse_too_long(request: Request, max_seq_len: int) -> None:
    texts = [request.prompt, request.system or "", *(text for m in request.messages or () for text in m.values())]
    size = sum(map(len, texts))
    if size > BYTES_PER_TOKEN * max_seq_len or len(request.prompt_tokens or ()) > max_seq_len:
        raise UsageError(f"the prompt is longer than the model's context of {max_seq_len} tokens", hint="shorten it")


class _Answer:
    """One request's events as they come; see `serving.Answer`."""

    def __init__(self, request: Request, cancel: Callable[[_Answer], None]) -> None:
        self.request = request
        self.inbox: asyncio.Queue[Token | Done | MoectlError] = asyncio.Queue()
        self._cancel = cancel
        self._cancelled = False

    async def __aiter__(self) -> AsyncIterator[Token | Done]:
        while True:
            event = await self.inbox.get()
            if isinstance(event, MoectlError):
                raise event
            yield event
            if isinstance(event, Done):
                return

    def cancel(self) -> None:
        """Stop soon; the ranks' Done follows and is heard by nobody."""
        if not self._cancelled:
            self._cancelled = True
            self._cancel(self)


class KeepAlive:
    """How long an idle controller stays: seconds since the last answer, or for ever."""

    def __init__(self, seconds: float) -> None:
        self.changed = asyncio.Event()
        self._seconds = seconds
        # Whoever started it for one question has to come first.
        self._until_s = time.monotonic() + max(seconds, FIRST_S)

    def renew(self, seconds: float | None = None, *, asks: bool = False) -> None:
        """Begin the time again, with another length if wished; `asks`: somebody is about to ask."""
        self._seconds = self._seconds if seconds is None else seconds
        self._until_s = time.monotonic() + (max(self._seconds, FIRST_S) if asks else self._seconds)
        self.changed.set()

    def left_s(self) -> float | None:
        """Return the seconds that are left, None for ever."""
        return None if self._seconds < 0 else self._until_s - time.monotonic()


def run(
    target: Target,
    settings: Settings,
    *,
    on_ready: Callable[[Sequence[socket]], None] = lambda sockets: None,
    **options: Any,
) -> None:
    """Run a session behind its sockets until it is over; `options` are `launch.open_session`'s.

    Raises what starting raises, the session's failure, and KeyboardInterrupt after SIGINT.
    """
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(listen_unix(settings.socket_path))]
        if settings.tcp is not None:
            sockets.append(held.enter_context(listen_tcp(*settings.tcp, has_key=settings.api_key is not None)))
        session = held.enter_context(open_session(target, **options))
        # Not asyncio.run: its handler for SIGINT would cancel what ends by itself.
        with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            runner.run(_run(target, session, settings, sockets, on_ready, options))


async def _run(
    target: Target,
    session: Session,
    settings: Settings,
    sockets: list[socket],
    on_ready: Callable[[Sequence[socket]], None],
    options: dict[str, Any],
) -> None:
    keep_alive = KeepAlive(settings.keep_alive_s)
    controller = Controller(session, target.name, ranks=count_ranks(target), keep_alive=keep_alive)
    # Whoever serves others does not leave because one of them has had enough.
    control = _Control(controller, describe_run(target, options), keep_alive, stays=settings.tcp is not None)
    app = make_app(controller, api_key=settings.api_key, control=control)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, control.on_signal, number)
    over = asyncio.create_task(controller.wait_until_over())
    over.add_done_callback(lambda _: control.leave())
    on_ready(sockets)
    try:
        await serve_http(app, sockets, stopping=control.stopping, grace=control.grace)
    finally:
        over.cancel()
        failure = controller.failure  # before closing makes one
        # Here, because a thread that is stuck in sending to a frozen worker would keep the loop from ending.
        await asyncio.to_thread(session.close)
    if failure is not None:
        raise failure
    if control.signal == signal.SIGINT:
        raise KeyboardInterrupt
    if control.signal == signal.SIGTERM:
        raise SystemExit(128 + signal.SIGTERM)


def describe_run(target: Target, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a controller runs, as JSON: what another one would have to agree with to be used in its place."""
    hosts = ["localhost"] * count_ranks(target)
    if isinstance(target, Deployment):
        hosts = [rank.host.address for rank in target.ranks]
    shards = target.shards if isinstance(target, Deployment) else str(target.directory)
    wanted = {name: options.get(name) for name in SAME}
    return {"name": target.name, "hosts": hosts, "shards": shards, "options": wanted}


class _Control:
    """The owner's hands on a running controller."""

    def __init__(
        self, controller: Controller, description: dict[str, Any], keep_alive: KeepAlive, *, stays: bool
    ) -> None:
        self.stopping = asyncio.Event()
        self.grace = Grace(GRACE_S)
        self.signal: int | None = None
        self._controller = controller
        self._description = description
        self._keep_alive = keep_alive
        self._stays = stays

    def describe(self) -> dict[str, Any]:
        health, throughput, now_s = self._controller.health(), self._controller.throughput, time.monotonic()
        return {
            "schema": "moectl.controller/1",
            **self._description,
            "pid": os.getpid(),
            "running": health.running,
            "queued": health.queued,
            "memory_bytes": list(health.memory_bytes),
            "ranks_answered": health.ranks_answered,
            "healthy": health.healthy,
            "restarts": health.restarts,
            "up_s": now_s - throughput.began_s,
            "tokens": throughput.tokens,
            "tok_s": throughput.rate(now_s),
        }

    def keep_alive(self, seconds: float, *, asks: bool) -> None:
        if not self._stays:
            self._keep_alive.renew(seconds, asks=asks)

    def stop(self, grace_s: float) -> None:
        self._controller.close()
        self.grace.change(grace_s)
        self.stopping.set()

    def leave(self) -> None:
        """End because nobody needs it any more, or it has failed; who still reads an answer may go on reading."""
        if not self.stopping.is_set():
            self.stop(GRACE_S if self._controller.failure is not None else READING_S)

    def on_signal(self, number: int) -> None:
        # A second one does not wait for answers any more.
        self.stop(0.0 if self.stopping.is_set() else GRACE_S)
        self.signal = number
