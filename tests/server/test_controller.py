"""One process that owns the cluster: in the foreground, in the background, and over a session that is none."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from moectl.cli.target import advise
from moectl.cli.terminal import stats_text
from moectl.demo import demo_dir
from moectl.engine.protocol import Done, Prefilled, Ready, Refused, Token
from moectl.engine.request import Request, Stats
from moectl.errors import (
    CommandFailed,
    IntegrityError,
    LinkLost,
    MoectlError,
    PeerLost,
    PlanError,
    QueueFull,
    RanksDisagree,
    RemoteError,
    Stalled,
    StateError,
    Unreachable,
    UsageError,
    VersionMismatch,
)
from moectl.paths import runtime_dir
from moectl.server import background, client, run
from moectl.server.client import Client, find_running, is_running
from moectl.server.contracts import Notice
from moectl.server.control import Control
from moectl.server.controller import MAX_FAILURES, Controller, KeepAlive
from moectl.server.http import Grace
from moectl.server.restarts import Restarts, ResumedAnswer
from moectl.server.sockets import beating, listen_unix
from moectl.session import target as launch
from moectl.session.deployment import Deployment
from tests.support.ring import process_env, rank_env
from tests.support.running import wait_for, workers
from tests.support.terminal import Terminal

STATS = Stats(3, 2, 0.1, 0.2, 0.1, 1000)


class FakeSession:
    """What a Controller needs of a session; the test says what is heard."""

    model = Ready("hidden", 4, 1000, 256, 4)
    memory_bytes = (5, 6)
    kv_tokens = 5000

    def __init__(self) -> None:
        self.heard: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.submitted: list[Request] = []
        self.cancelled: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.closed = False
        self.unstuck = threading.Event()  # a pipe that is full

    def submit(self, request: Request) -> None:
        if "stuck" in request.prompt:
            self.unstuck.wait(20)
        self.submitted.append(request)

    def cancel(self, request_id: int) -> None:
        self.cancelled.put(request_id)

    def events(self) -> Iterator[Any]:
        while True:
            event = self.heard.get()
            if isinstance(event, Exception):
                raise event
            yield event

    def count_alive(self, within_s: float) -> int:
        return 2

    def close(self) -> None:
        self.closed = True
        self.unstuck.set()


def drive(test: Callable[[Controller, FakeSession], Any], *, keep_alive_s: float = -1, max_waiting: int = 2) -> None:
    """Run a test with a controller over a fake session."""

    async def main() -> None:
        session = FakeSession()
        controller = Controller(
            session,  # type: ignore[arg-type]
            "model",
            ranks=2,
            keep_alive=KeepAlive(keep_alive_s),
            max_waiting=max_waiting,
        )
        await asyncio.wait_for(test(controller, session), 30)
        session.heard.put(StateError("over"))

    asyncio.run(main())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


async def ask(controller: Controller, session: FakeSession, request: Request) -> Any:
    """Submit a request, and wait until the session has it."""
    before = len(session.submitted)
    answer = await controller.submit(request)
    await until(lambda: len(session.submitted) > before)
    return answer


async def collect(answer: Any) -> list[Any]:
    return [event async for event in answer]


def test_answers_get_their_own_events_by_number() -> None:
    async def test(controller: Controller, session: FakeSession) -> None:
        first, second = (
            await ask(controller, session, Request(0, "a", 5)),
            await ask(controller, session, Request(0, "b", 5)),
        )
        assert [r.id for r in session.submitted] == [1, 2]
        assert (controller.health().running, controller.health().queued) == (0, 2)
        done = [Done(1, "stop", STATS), Done(2, "length", STATS)]
        for event in (Prefilled(1, 3), Token(1, 7, "x"), Token(2, 8, "y"), done[1], Token(1, 9, "z"), done[0]):
            session.heard.put(event)
        assert await collect(second) == [Token(2, 8, "y"), done[1]]
        assert await collect(first) == [Token(1, 7, "x"), Token(1, 9, "z"), done[0]]
        health = controller.health()
        assert (health.running, health.queued, health.memory_bytes, health.healthy) == (0, 0, (5, 6), True)

    drive(test)


def test_as_many_wait_as_may() -> None:
    async def test(controller: Controller, session: FakeSession) -> None:
        first = await controller.submit(Request(0, "a", 5))
        await controller.submit(Request(0, "b", 5))
        with pytest.raises(QueueFull) as caught:
            await controller.submit(Request(0, "c", 5))
        assert caught.value.hint == f"ask again in {caught.value.retry_after_s:g} s"
        session.heard.put(Token(1, 7, "x"))
        async for _ in first:
            break
        await controller.submit(Request(0, "d", 5))  # the first is being answered now
        await until(lambda: [r.id for r in session.submitted] == [1, 2, 3])

    drive(test)


def test_a_refusal_is_the_askers_alone() -> None:
    async def test(controller: Controller, session: FakeSession) -> None:
        refused, other = (
            await ask(controller, session, Request(0, "a", 5)),
            await ask(controller, session, Request(0, "b", 5)),
        )
        session.heard.put(Refused.make(1, UsageError("too long", hint="shorten it")))
        session.heard.put(Done(2, "stop", STATS))
        with pytest.raises(UsageError, match="too long"):
            await collect(refused)
        assert await collect(other) == [Done(2, "stop", STATS)]

    drive(test)


def test_an_error_in_passing_an_event_on_is_that_answers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    take = ResumedAnswer.take

    def poisoned(self: ResumedAnswer, event: Any) -> bool:
        if isinstance(event, Token) and event.text == "poison":
            raise TypeError("poison")
        return take(self, event)

    monkeypatch.setattr(ResumedAnswer, "take", poisoned)

    async def test(controller: Controller, session: FakeSession) -> None:
        bad, good = [await ask(controller, session, Request(0, text, 5)) for text in "ab"]
        done = Done(2, "stop", STATS)
        for event in (Token(1, 7, "poison"), Token(2, 7, "x"), Token(1, 8, "y"), Done(1, "stop", STATS), done):
            session.heard.put(event)
        with pytest.raises(MoectlError, match="internal error in this request: TypeError: poison"):
            await collect(bad)
        assert await collect(good) == [Token(2, 7, "x"), done]
        assert await asyncio.to_thread(session.cancelled.get) == 1
        assert controller.health().queued == controller.health().running == 0

    drive(test)


def test_cancelling_once_is_enough() -> None:
    async def test(controller: Controller, session: FakeSession) -> None:
        answer = await ask(controller, session, Request(0, "a", 5))
        answer.cancel()
        answer.cancel()
        assert await asyncio.to_thread(session.cancelled.get) == 1
        session.heard.put(Done(1, "cancelled", STATS))
        assert await collect(answer) == [Done(1, "cancelled", STATS)]
        answer.cancel()
        assert session.cancelled.empty()

    drive(test)


def test_a_failure_ends_every_answer_and_all_that_come() -> None:
    async def test(controller: Controller, session: FakeSession) -> None:
        answer = await ask(controller, session, Request(0, "a", 5))
        session.heard.put(PeerLost("rank 1 was lost", host="mac2"))
        with pytest.raises(PeerLost, match="mac2: rank 1 was lost"):
            await collect(answer)
        await controller.wait_until_over()
        with pytest.raises(PeerLost):
            await controller.submit(Request(0, "b", 5))
        assert not controller.health().healthy

    drive(test)


def restart(
    test: Callable[[Controller, Sequence[FakeSession | MoectlError]], Any], *next_ones: FakeSession | MoectlError
) -> None:
    """Run a test with a controller over fake sessions, each of which follows when the one before has failed."""

    async def main() -> None:
        sessions = [FakeSession(), *next_ones]
        left = iter(next_ones)

        @contextlib.contextmanager
        def reopen(patience: float, on_made: Callable[[Any], None]) -> Iterator[Any]:
            session = next(left)
            if isinstance(session, MoectlError):
                raise session
            on_made(session)
            yield session

        first: Any = sessions[0]
        controller = Controller(
            first, "model", ranks=2, keep_alive=KeepAlive(-1), open_=reopen, restarts=Restarts(len(next_ones))
        )
        await asyncio.wait_for(test(controller, sessions), 30)

    asyncio.run(main())


def test_an_answer_goes_on_in_the_next_session() -> None:
    first, second = FakeSession(), FakeSession()

    async def test(controller: Controller, sessions: Any) -> None:
        answer = await ask(controller, sessions[0], Request(0, "a", 5))
        sessions[0].heard.put(Token(1, 7, "x"))
        sessions[0].heard.put(PeerLost("gone"))
        await until(lambda: controller.health().restarts == 1)
        waits = await controller.submit(Request(0, "b", 5))
        await until(lambda: len(second.submitted) == 2)
        assert [(r.id, r.prompt, r.answered) for r in second.submitted] == [(1, "a", (7,)), (2, "b", ())]
        for event in (Token(1, 8, "y"), Done(1, "stop", STATS), Done(2, "stop", STATS)):
            second.heard.put(event)
        told = await collect(answer)
        assert [e.text for e in told if isinstance(e, Token)] == ["x", "y"]
        assert [e.text for e in told if isinstance(e, Notice)] == [
            "gone. Starting again (1 of 1).",
            "All ranks are back: the answer goes on.",
        ]
        assert (await collect(waits))[-1] == Done(2, "stop", STATS)
        second.heard.put(PeerLost("gone again"))
        await until(lambda: controller.failure is not None)

    restart(test, second)
    assert first.submitted == []


def test_the_rest_of_a_text_is_told_once_when_only_the_end_was_lost() -> None:
    second = FakeSession()

    async def test(controller: Controller, sessions: Any) -> None:
        answer = await ask(controller, sessions[0], Request(0, "a", 2, stop=("!",)))
        for before in (Token(1, 7, "x"), Token(1, 8, ""), PeerLost("gone")):
            sessions[0].heard.put(before)
        await until(lambda: len(second.submitted) == 1)
        assert second.submitted[0].answered == (7, 8)
        second.heard.put(Done(1, "length", STATS, "rest"))
        told = [event for event in await collect(answer) if not isinstance(event, Notice)]
        assert [e.text for e in told if isinstance(e, Token)] == ["x", ""]
        assert isinstance(told[-1], Done)
        assert told[-1].rest == "rest"

    restart(test, second)


def test_an_answer_that_fails_every_session_ends_and_the_others_go_on() -> None:
    later = [FakeSession() for _ in range(MAX_FAILURES)]

    async def test(controller: Controller, sessions: Any) -> None:
        poison = await ask(controller, sessions[0], Request(0, "a", 5))
        for number, session in enumerate(sessions[:-1]):
            session.heard.put(Prefilled(1, 2))
            session.heard.put(PeerLost(f"gone {number}"))
            if number + 1 < MAX_FAILURES:
                await until(lambda n=number: len(sessions[n + 1].submitted) == 1)  # type: ignore[misc]
        with pytest.raises(PeerLost, match="gone 2"):
            await collect(poison)
        good = await controller.submit(Request(0, "b", 5))
        await until(lambda: len(sessions[-1].submitted) == 1)
        sessions[-1].heard.put(Done(1, "stop", STATS))
        assert (await collect(good))[-1] == Done(1, "stop", STATS)

    restart(test, *later)


def test_starts_that_fail_are_nobodys_fault() -> None:
    last = FakeSession()

    async def test(controller: Controller, sessions: Any) -> None:
        answer = await ask(controller, sessions[0], Request(0, "a", 5))
        sessions[0].heard.put(Token(1, 7, "x"))
        sessions[0].heard.put(PeerLost("gone"))
        await until(lambda: len(last.submitted) == 1)
        last.heard.put(Done(1, "stop", STATS))
        done = (await collect(answer))[-1]
        assert isinstance(done, Done)
        assert done.finish_reason == "stop"

    restart(test, *[PeerLost("no route")] * MAX_FAILURES, last)


def test_a_failure_that_lasts_is_told_with_what_helps() -> None:
    async def test(controller: Controller, sessions: Any) -> None:
        answer = await ask(controller, sessions[0], Request(0, "a", 5))
        sessions[0].heard.put(PeerLost("gone"))
        with pytest.raises(IntegrityError, match="damaged"):
            await collect(answer)
        assert isinstance(controller.failure, IntegrityError)

    restart(test, IntegrityError("damaged"), FakeSession())


def test_nobody_who_listens_holds_up_no_answer() -> None:
    def say(text: str) -> None:
        raise BrokenPipeError

    async def main() -> None:
        first, second = FakeSession(), FakeSession()

        @contextlib.contextmanager
        def reopen(patience: float, on_made: Callable[[Any], None]) -> Iterator[Any]:
            on_made(second)
            yield second

        session: Any = first
        controller = Controller(
            session, "model", ranks=2, keep_alive=KeepAlive(-1), open_=reopen, restarts=Restarts(1), say=say
        )
        answer = await controller.submit(Request(0, "a", 5))
        await until(lambda: len(first.submitted) == 1)
        first.heard.put(PeerLost("gone"))
        await asyncio.wait_for(until(lambda: len(second.submitted) == 1), 20)
        second.heard.put(Done(1, "stop", STATS))
        assert isinstance((await collect(answer))[-1], Done)
        second.heard.put(PeerLost("over"))
        await until(lambda: controller.failure is not None)

    asyncio.run(main())


def test_advice_that_fails_hides_no_failure() -> None:
    def advise(failure: MoectlError) -> str | None:
        raise OSError("disk full")

    async def main() -> None:
        session: Any = FakeSession()
        controller = Controller(session, "model", ranks=2, keep_alive=KeepAlive(-1), advise=advise)
        answer = await ask(controller, session, Request(0, "a", 5))
        session.heard.put(PeerLost("gone", hint="look there"))
        with pytest.raises(PeerLost, match="gone") as caught:
            await asyncio.wait_for(collect(answer), 20)
        assert caught.value.hint == "look there"

    asyncio.run(main())


@pytest.mark.parametrize("kind", [Unreachable, RemoteError])
def test_going_on_without_a_host_is_advised_when_it_is_away(
    monkeypatch: pytest.MonkeyPatch, kind: type[MoectlError]
) -> None:
    monkeypatch.setattr("moectl.cluster.deploy.remedy.find_remedy", lambda target, lost: f"without {lost}")
    target: Any = object.__new__(Deployment)
    assert advise(target, kind("gone", host="mac2")) == "without mac2"
    assert advise(target, kind("gone")) is None


@pytest.mark.parametrize(
    "kind", [CommandFailed, IntegrityError, LinkLost, PeerLost, PlanError, RanksDisagree, Stalled, VersionMismatch]
)
def test_a_host_that_is_there_is_not_advised_away(monkeypatch: pytest.MonkeyPatch, kind: type[MoectlError]) -> None:
    monkeypatch.setattr("moectl.cluster.deploy.remedy.find_remedy", lambda target, lost: f"without {lost}")
    target: Any = object.__new__(Deployment)
    assert advise(target, kind("wrong", host="mac2")) is None


def test_sleeping_often_ends_no_answer() -> None:
    last = FakeSession()
    naps = [FakeSession() for _ in range(MAX_FAILURES)]

    async def test(controller: Controller, sessions: Any) -> None:
        answer = await ask(controller, sessions[0], Request(0, "a", 5))
        for number, session in enumerate(sessions[:-1]):
            session.heard.put(Token(1, 7 + number, "x"))
            session.heard.put(LinkLost("slept"))
            await until(lambda n=number: len(sessions[n + 1].submitted) == 1)  # type: ignore[misc]
        last.heard.put(Done(1, "stop", STATS))
        told = await collect(answer)
        assert [e.text for e in told if isinstance(e, Token)] == ["x"] * (MAX_FAILURES + 1)

    restart(test, *naps, last)


def test_a_machine_that_sleeps_before_anything_comes_of_an_answer_ends_it_some_time() -> None:
    naps = [FakeSession() for _ in range(MAX_FAILURES)]

    async def test(controller: Controller, sessions: Any) -> None:
        answer = await ask(controller, sessions[0], Request(0, "a", 5))
        for number, session in enumerate(sessions[:-1]):
            session.heard.put(Prefilled(1, 512))  # no further than the time before
            session.heard.put(LinkLost(f"slept {number}"))
            if number < MAX_FAILURES:
                await until(lambda n=number: len(sessions[n + 1].submitted) == 1)  # type: ignore[misc]
        with pytest.raises(LinkLost, match=f"slept {MAX_FAILURES}"):
            await collect(answer)

    restart(test, *naps, FakeSession())


def test_whoever_waits_while_others_come_further_is_not_to_blame_for_naps() -> None:
    last = FakeSession()
    naps = [FakeSession() for _ in range(MAX_FAILURES + 1)]

    async def test(controller: Controller, sessions: Any) -> None:
        reads, waits = (
            await ask(controller, sessions[0], Request(0, "a", 5)),
            await ask(controller, sessions[0], Request(0, "b", 5)),
        )
        for number, session in enumerate(sessions[:-1]):
            session.heard.put(Prefilled(1, 512 * (number + 1)))
            session.heard.put(LinkLost("slept"))
            await until(lambda n=number: len(sessions[n + 1].submitted) == 2)  # type: ignore[misc]
        last.heard.put(Done(1, "stop", STATS))
        last.heard.put(Done(2, "stop", STATS))
        assert isinstance((await collect(reads))[-1], Done)
        assert isinstance((await collect(waits))[-1], Done)

    restart(test, *naps, last)


def test_a_restart_keeps_the_room_that_the_first_start_found() -> None:
    opened: list[dict[str, Any]] = []
    open_: Any = lambda **options: opened.append(options)  # noqa: E731
    first: Any = FakeSession()
    made: Any = None
    run.open_like(first, functools.partial(open_, dtype="float32"))(2.0, made)
    assert opened == [{"dtype": "float32", "kv_tokens": 5000, "patience": 2.0, "on_made": None}]


def test_a_stop_while_it_waits_to_start_again_is_a_stop_like_any_other() -> None:
    async def test(controller: Controller, sessions: Any) -> None:
        answer = await ask(controller, sessions[0], Request(0, "a", 5))
        sessions[0].heard.put(PeerLost("gone"))
        await until(lambda: controller.health().restarts == 1)
        controller.close()
        with pytest.raises(StateError, match="stopping"):
            await collect(answer)
        await controller.wait_until_over()
        assert controller.failure is None

    restart(test, FakeSession())


def test_a_failure_while_it_stops_is_told() -> None:
    async def test(controller: Controller, session: FakeSession) -> None:
        answer = await ask(controller, session, Request(0, "a", 5))
        controller.close()
        session.heard.put(PeerLost("gone"))
        with pytest.raises(PeerLost):
            await collect(answer)
        assert controller.failure is not None

    drive(test)


def test_no_session_is_left_that_opens_while_the_controller_ends() -> None:
    session: Any = FakeSession()
    left, opening, opened = threading.Event(), threading.Event(), threading.Event()

    @contextlib.contextmanager
    def reopen(patience: float, on_made: Callable[[Any], None]) -> Iterator[Any]:
        on_made(session)
        opening.set()
        opened.wait(20)
        try:
            yield session
        finally:
            left.set()

    async def main() -> None:
        first: Any = FakeSession()
        controller = Controller(first, "model", ranks=2, keep_alive=KeepAlive(-1), open_=reopen, restarts=Restarts(1))
        first.heard.put(PeerLost("gone"))
        await asyncio.to_thread(opening.wait, 20)
        await asyncio.to_thread(controller.end_session)
        assert session.closed
        session.heard.put(StateError("the session is closed"))
        opened.set()
        assert await asyncio.to_thread(left.wait, 20)

    asyncio.run(main())


def test_an_order_that_is_stuck_holds_no_asker_and_a_cancel_before_it_is_obeyed() -> None:
    async def test(controller: Controller, session: FakeSession) -> None:
        stuck = await controller.submit(Request(0, "stuck", 5))
        behind = await asyncio.wait_for(controller.submit(Request(0, "b", 5)), 10)
        behind.cancel()
        with pytest.raises(StateError, match="cancelled"):
            await collect(behind)
        session.unstuck.set()
        third = await controller.submit(Request(0, "c", 5))
        await until(lambda: [(r.id, r.prompt) for r in session.submitted] == [(1, "stuck"), (2, "c")])
        session.heard.put(Done(1, "stop", STATS))
        session.heard.put(Done(2, "stop", STATS))
        assert [await collect(answer) for answer in (stuck, third)]

    drive(test)


def test_who_asks_while_the_cluster_is_down_or_cancels_then_is_not_forgotten() -> None:
    second = FakeSession()

    async def test(controller: Controller, sessions: Any) -> None:
        first = await controller.submit(Request(0, "a", 5))
        await until(lambda: len(sessions[0].submitted) == 1)
        sessions[0].heard.put(PeerLost("gone"))
        await until(lambda: controller.health().restarts == 1 and controller.health().ranks_answered == 0)
        late, other = await controller.submit(Request(0, "b", 5)), await controller.submit(Request(0, "c", 5))
        first.cancel()
        other.cancel()
        with pytest.raises(StateError, match="cancelled"):
            await collect(other)
        await until(lambda: len(second.submitted) == 1)
        assert [(r.id, r.prompt) for r in second.submitted] == [(1, "b")]
        late.cancel()
        assert await asyncio.to_thread(second.cancelled.get) == 1
        second.heard.put(Done(1, "cancelled", STATS))
        assert (await collect(late))[-1] == Done(1, "cancelled", STATS)
        assert second.cancelled.empty()
        assert sessions[0].cancelled.empty()

    restart(test, second)


def test_a_session_that_fails_while_it_is_handed_an_answer_hands_it_over_to_the_next() -> None:
    second = FakeSession()

    async def test(controller: Controller, sessions: Any) -> None:
        answers = [await controller.submit(Request(0, prompt, 5)) for prompt in ("stuck", "b")]
        sessions[0].heard.put(PeerLost("gone"))
        second.unstuck.set()
        await until(lambda: len(second.submitted) == 2)
        assert [(r.id, r.prompt) for r in second.submitted] == [(1, "stuck"), (2, "b")]
        assert [r.prompt for r in sessions[0].submitted] == ["stuck"]
        for number in (1, 2):
            second.heard.put(Done(number, "stop", STATS))
        assert [isinstance((await collect(answer))[-1], Done) for answer in answers] == [True, True]

    restart(test, second)


def test_an_idle_controller_leaves_and_a_busy_one_stays() -> None:
    async def test(controller: Controller, session: FakeSession) -> None:
        over = asyncio.create_task(controller.wait_until_over())
        answer = await ask(controller, session, Request(0, "a", 5))
        controller._keep_alive.renew(0)
        await asyncio.sleep(0.05)
        assert not over.done()
        session.heard.put(Done(1, "stop", STATS))
        await collect(answer)
        await over

    drive(test, keep_alive_s=100)


def test_a_controller_that_leaves_promises_to_stay_to_nobody() -> None:
    async def test(controller: Controller, session: FakeSession) -> None:
        control = Control(controller, {}, controller._keep_alive, stays=False)
        control.keep_alive(5, asks=True)
        control.keep_alive(0, asks=False)
        await controller.wait_until_over()
        with pytest.raises(RemoteError, match="leaving"):
            control.keep_alive(5, asks=True)
        with pytest.raises(StateError, match="stopping"):
            await controller.submit(Request(0, "a", 5))

    drive(test, keep_alive_s=0)


def test_how_long_to_stay() -> None:
    for_ever, short = KeepAlive(-1), KeepAlive(0)
    assert for_ever.left_s() is None
    assert (short.left_s() or 0) > 30  # the first question has to come
    short.renew()
    assert (short.left_s() or 0) <= 0
    short.renew(50)
    assert 0 < (short.left_s() or 0) <= 50


# Processes.


def moectl(*words: str, check: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "moectl", *words], capture_output=True, text=True, env=process_env(**env), timeout=120
    )
    assert done.returncode == check, done.stderr
    return done


@pytest.fixture
def _nothing_left() -> Iterator[None]:
    yield
    moectl("stop", "--now")
    wait_for(lambda: not workers())


QUESTION = ("run", "--local", "2", "What is expert parallelism?")


@pytest.mark.usefixtures("_nothing_left")
def test_run_keeps_the_model_and_stop_unloads_it() -> None:
    first = moectl(*QUESTION, "--keep-alive", "5m", "--stats")
    assert "Loading " in first.stderr
    [path] = find_running()
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    described = Client(path).describe()
    assert (described["hosts"], described["running"], len(workers())) == (["localhost"] * 2, 0, 2)
    second = moectl(*QUESTION, "--keep-alive", "-1")
    assert second.stdout == first.stdout
    assert "Loading " not in second.stderr
    assert Client(path).describe()["pid"] == described["pid"]
    other = moectl(*QUESTION, "--dtype", "bfloat16", check=8)
    assert "is loaded with the device's own dtype" in other.stderr
    assert "moectl stop" in moectl("bench", "--local", "2", check=8).stderr
    stopped = moectl("stop")
    assert stopped.stdout.startswith("Stopped 2 workers, ")
    assert not find_running()
    assert moectl("stop").stdout == "Nothing is running.\n"
    assert json.loads(moectl("stop", "--json").stdout) == {"schema": "moectl.stop/1", "workers": 0, "memory_bytes": 0}


@pytest.mark.usefixtures("_nothing_left")
def test_a_controller_that_was_killed_leaves_no_worker_and_no_obstacle() -> None:
    answer = moectl(*QUESTION, "--keep-alive", "-1").stdout
    [path] = find_running()
    os.kill(Client(path).describe()["pid"], signal.SIGKILL)
    wait_for(lambda: not workers())
    assert path.exists()  # stale
    assert not is_running(path)
    assert moectl("stop").stdout == "Nothing is running.\n"
    assert moectl(*QUESTION).stdout == answer


def test_keep_alive_zero_unloads_at_once() -> None:
    moectl(*QUESTION)
    assert not find_running()
    wait_for(lambda: not workers())


def test_keep_alive_zero_is_for_after_the_answer() -> None:
    warm = moectl(*QUESTION, "--keep-alive", "5m").stdout
    assert moectl(*QUESTION, "--keep-alive", "0").stdout == warm
    wait_for(lambda: not find_running())


def test_a_refusal_does_not_keep_the_model() -> None:
    refused = moectl("run", "--local", "1", "--keep-alive", "0", "word " * 5000, check=2)
    assert "the model's context" in refused.stderr
    assert not find_running()


@pytest.mark.usefixtures("_nothing_left")
def test_two_that_start_at_once_share_one() -> None:
    command = [sys.executable, "-m", "moectl", "run", "--local", "1", "Hello", "--keep-alive", "1m"]
    env = process_env()
    moectl("run", "--local", "1", "Hello", "--keep-alive", "0")  # so that the shard set is there
    both = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in "ab"]
    answers = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], answers
    assert answers[0][0] == answers[1][0]
    assert (len(find_running()), len(workers())) == (1, 1)


@pytest.mark.usefixtures("_nothing_left")
def test_a_frozen_worker_and_a_long_prompt_do_not_hold_the_controller() -> None:
    moectl("run", "--local", "1", "Hello", "--keep-alive", "-1", "--no-restart")
    [path], [worker] = find_running(), workers()
    os.kill(worker, signal.SIGSTOP)
    long = "word " * 12_900  # all but fills the pipe to it
    with pytest.raises(RemoteError, match="has not answered for 4 s"):  # no process: it might come too late
        list(Client(path).complete({"prompt": long}))
    wait_for(lambda: not is_running(path))


@pytest.mark.usefixtures("_nothing_left")
def test_a_controller_that_loads_is_stopped() -> None:
    command = [sys.executable, "-m", "moectl", "run", "--local", "2", "Hello", "--keep-alive", "1m"]
    with subprocess.Popen(command, env=process_env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as starting:
        wait_for(lambda: bool(workers()))
        moectl("stop", "--now")
        _, stderr = starting.communicate(timeout=60)
    assert starting.returncode != 0, stderr
    wait_for(lambda: not workers())


def test_a_second_stop_makes_the_first_one_shorter() -> None:
    async def main() -> None:
        grace, task = Grace(1000), asyncio.create_task(asyncio.sleep(1000))
        waiting = asyncio.create_task(grace.wait(task))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        grace.change(0)
        await asyncio.wait_for(waiting, 10)
        task.cancel()

    asyncio.run(main())


def test_a_prompt_beyond_any_context_does_not_travel() -> None:
    async def test(controller: Controller, session: FakeSession) -> None:
        with pytest.raises(UsageError, match="longer than the model's context of 256 tokens"):
            await controller.submit(Request(0, "x" * 100_000, 5))
        controller.close()
        with pytest.raises(StateError, match="is stopping"):
            await controller.submit(Request(0, "x", 5))
        assert session.submitted == []

    drive(test)


def test_guessing_and_small_steps_change_no_answer() -> None:
    plain = moectl(*QUESTION)
    guessed = moectl(*QUESTION, "--speculate", "8", "--prefill-step", "16", "--stats")
    assert guessed.stdout == plain.stdout


def test_stats_tell_what_was_cached_and_guessed() -> None:
    text = stats_text(Stats(100, 21, 0.5, 2.0, 0.5, 1000, cached_tokens=90, drafted_tokens=20, accepted_tokens=15))
    assert "100 prompt tokens (90 cached) at 20.0 tok/s" in text
    assert "21 tokens (15 of 20 guesses right, 75%) at 10.0 tok/s" in text


@pytest.mark.usefixtures("_nothing_left")
def test_a_second_turn_computes_only_what_is_new() -> None:
    long = "What is expert parallelism? " * 6
    moectl("run", "--local", "2", long, "--keep-alive", "-1")
    again = json.loads(moectl("run", "--local", "2", long, "--keep-alive", "-1", "--json").stdout)
    assert again["stats"]["cached_tokens"] > again["stats"]["prompt_tokens"] / 2


def test_what_goes_wrong_in_the_background_is_told(tmp_path: Path) -> None:
    directory = tmp_path / "set"
    moectl("shard", str(demo_dir()), "--nodes", "1", "-o", str(directory))
    weights = directory / "rank-0" / "layer-000.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    failed = moectl("run", "--shards", str(directory), "Hello", check=7)
    assert "layer-000.safetensors" in failed.stderr
    assert not find_running()


def test_run_without_a_prompt_chats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in rank_env().items():
        monkeypatch.setenv(name, value)
    words = [
        sys.executable,
        "-W",
        "default",
        "-m",
        "moectl",
        "run",
        "--local",
        "1",
        "--model",
        str(demo_dir()),
        "--stats",
    ]
    with Terminal(words, tmp_path) as terminal:
        terminal.wait(lambda: any("on 1 rank of this machine. /? for help" in line for line in terminal.lines))
        terminal.wait(lambda: terminal.lines[-1].startswith(">>>"))
        terminal.type("What is expert parallelism?\r")
        terminal.wait(lambda: any("prompt tokens at" in line for line in terminal.lines))
        terminal.wait(lambda: terminal.lines[-1].startswith(">>>"))
        terminal.type("/bye\r")
        assert terminal.end() == 0
    assert not find_running()


@pytest.fixture
def served() -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "moectl", "serve", "--local", "2", "--port", "0", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=process_env(),
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.communicate()[1]
    yield process, json.loads(line)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130, stderr
    wait_for(lambda: not workers())


def test_serving_openais_client(served: tuple[subprocess.Popen[str], dict[str, Any]]) -> None:
    api = openai.OpenAI(base_url=served[1]["url"], api_key="none", max_retries=0)
    name = api.models.list().data[0].id
    assert name == served[1]["model"]
    asked: dict[str, Any] = {
        "model": name,
        "messages": [{"role": "user", "content": "What is expert parallelism?"}],
        "temperature": 0,
        "max_tokens": 40,
    }
    whole = api.chat.completions.create(**asked)
    with api.chat.completions.create(**asked, stream=True) as stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == whole.choices[0].message.content
    assert moectl(*QUESTION, "-m", "40").stdout == f"{text}\n"  # run attaches to the same controller
    assert moectl("serve", "--local", "2", check=8).stderr.startswith("Error: ")
    with pytest.raises(openai.BadRequestError, match="context"):
        api.completions.create(model=name, prompt="word " * 5000)
    with api.chat.completions.create(**{**asked, "max_tokens": 400}, stream=True, extra_body={"ignore_eos": True}) as s:
        for _ in s:
            break
    [path] = find_running()
    wait_for(lambda: Client(path).describe()["running"] == 0)
    assert api.chat.completions.create(**asked).choices[0].message.content == text


def test_what_is_no_api_key(tmp_path: Path) -> None:
    key = tmp_path / "key"
    assert "exclude each other" in moectl("serve", "--api-key", "a", "--api-key-file", str(key), check=2).stderr
    assert "cannot be read" in moectl("serve", "--api-key-file", str(key), check=2).stderr
    key.write_text("\n")
    assert "not empty" in moectl("serve", "--api-key-file", str(key), check=2).stderr
    assert "without an API key" in moectl("serve", "--local", "1", "--host", "0.0.0.0", check=2).stderr


@pytest.mark.usefixtures("_nothing_left")
def test_a_detached_server() -> None:
    found = json.loads(moectl("serve", "--local", "1", "--port", "0", "-d", "--api-key", "sesame", "--json").stdout)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=found["url"], api_key="wrong", max_retries=0).models.list()
    api = openai.OpenAI(base_url=found["url"], api_key="sesame", max_retries=0)
    assert api.models.list().data[0].id == found["model"]
    assert moectl("stop").stdout.startswith("Stopped 1 worker, ")


@pytest.mark.usefixtures("_nothing_left")
def test_a_detached_server_lets_in_what_its_flags_say() -> None:
    page, other, name = "http://localhost:3000", "http://evil.example", "host.docker.internal"
    words = ("serve", "--local", "1", "--port", "0", "-d", "--json", "--allow-origin", page, "--allow-host", name)
    url = json.loads(moectl(*words).stdout)["url"]
    preflight = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    with httpx2.Client() as http:
        for origin, status in ((page, 200), (other, 403)):
            assert (
                http.options(f"{url}/chat/completions", headers={**preflight, "origin": origin}).status_code == status
            )
        found = http.get(f"{url}/models", headers={"host": f"{name}:8080", "origin": page})
        assert (found.status_code, found.headers["access-control-allow-origin"]) == (200, page)
        assert http.get(f"{url}/models", headers={"host": "other.example"}).status_code == 403
        prompts: list[Any] = ["word " * 5000, "x" * 3_000_000, [5] * 3000]
        asked = [({"prompt": prompt}, "completions", "prompt") for prompt in prompts]
        asked += [({"messages": [{"role": "user", "content": p}]}, "chat/completions", "messages") for p in prompts[:2]]
        for body, path, param in asked:
            for stream in (False, True):
                reply = http.post(f"{url}/{path}", json={**body, "stream": stream, "max_tokens": 32_000}, timeout=60)
                error = reply.json()["error"]
                assert (reply.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", param)
        greedy, zero = (
            http.post(f"{url}/completions", json={"prompt": "What is", "max_tokens": 8, **how}, timeout=60).json()
            for how in ({"temperature": 0}, {"top_p": 0, "temperature": 1, "stop": [""]})
        )
        assert greedy["choices"][0]["text"] == zero["choices"][0]["text"] != ""
    assert moectl("stop").stdout.startswith("Stopped 1 worker, ")


@pytest.mark.parametrize("flag", ["--allow-origin", "--allowed-origins"])
def test_all_origins_need_a_key(flag: str) -> None:
    told = moectl("serve", "--local", "1", flag, "*", check=2).stderr
    assert told.startswith("Error: --allow-origin '*' needs an API key")
    assert "Hint: add --api-key-file FILE" in told


# The client.


def test_errors_arrive_as_they_were() -> None:
    body = {"kind": "PeerLost", "message": "mac2: rank 1 was lost", "host": "mac2", "hint": "look"}
    error = client._rebuild(body)
    assert isinstance(error, PeerLost)
    assert (str(error), error.hint) == ("mac2: rank 1 was lost", "look")
    for kind in ("os", "", None, 3, "Stats", "BaseException"):
        assert isinstance(client._rebuild({"kind": kind, "message": "x"}), MoectlError)


def test_a_socket_that_nobody_has_is_not_running(tmp_path: Path) -> None:
    path = runtime_dir() / "a.sock"
    assert not is_running(path)
    with listen_unix(path):
        assert is_running(path)
    assert not is_running(path)
    with pytest.raises(MoectlError, match="has gone"):
        Client(path).describe()


def test_a_controller_that_is_frozen_is_told_from_one_that_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_SILENT_S", 0.2)
    path = tmp_path / "run" / "a.sock"
    told: queue.SimpleQueue[MoectlError] = queue.SimpleQueue()

    def ask() -> None:
        try:
            Client(path).describe(timeout_s=None)
        except MoectlError as error:
            told.put(error)

    with listen_unix(path):  # and nobody answers
        with pytest.raises(StateError, match="does not answer") as caught:
            list(Client(path).complete({"prompt": "a"}))
        assert caught.value.hint is not None
        assert caught.value.hint.startswith("moectl stop --now")
        with beating(path, 0.02):
            asking = threading.Thread(target=ask)
            asking.start()
            time.sleep(1)
            assert told.empty()
        assert isinstance(told.get(timeout=20), StateError)
        asking.join()


def test_a_controller_that_freezes_while_it_starts_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "_SILENT_S", 0.05)
    signs = iter([1, 2, 3, 4, 4])
    reading, writing = os.pipe()
    try:
        os.write(writing, b"one\ntwo\nth")
        lines = background._read_lines(reading, lambda: next(signs))
        assert [next(lines), next(lines)] == [b"one", b"two"]
        with pytest.raises(StateError, match="does not answer"):
            next(lines)
        assert next(signs, None) is None  # it waited for as long as they came
    finally:
        os.close(reading)
        os.close(writing)


FROZEN = """
import signal, sys, time
from pathlib import Path
from moectl.server.sockets import listen_unix
if sys.argv[2] == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
with listen_unix(Path(sys.argv[1])):
    print("ready", flush=True)
    time.sleep(100)
"""


@pytest.mark.parametrize("kind", ["frozen", "deaf"])
def test_a_frozen_controller_is_stopped_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(client, "_BUSY_S", 0.1)
    monkeypatch.setattr(client, "_ANSWER_S", 0.5 if kind == "deaf" else 20)
    path = tmp_path / "run" / "a.sock"
    command = [sys.executable, "-c", FROZEN, str(path), kind]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGSTOP)
        if kind == "deaf":
            with pytest.raises(StateError, match="does not end") as caught:
                Client(path).stop(0.1)
            assert caught.value.hint == "moectl stop --now"
        assert Client(path).stop(0.0) is None
        assert process.wait(20) == -(signal.SIGKILL if kind == "deaf" else signal.SIGTERM)


def test_targets_have_a_place_each(tmp_path: Path) -> None:
    moectl("shard", str(demo_dir()), "--nodes", "1", "-o", str(tmp_path / "a"))
    moectl("shard", str(demo_dir()), "--nodes", "2", "-o", str(tmp_path / "b"))
    one, two = (launch.decode_target(f"local {tmp_path / name}") for name in ("a", "b"))
    assert launch.decode_target(launch.encode_target(one)) == one
    assert launch.target_key(one) != launch.target_key(two)
    assert (len(one.addresses), len(two.addresses)) == (1, 2)
