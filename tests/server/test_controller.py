"""One process that owns the cluster: in the foreground, in the background, and over a session that is none."""

from __future__ import annotations

import asyncio
import contextlib
import functools
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
from moectl.server.client import Client, is_running
from moectl.server.contracts import Notice
from moectl.server.control import Control
from moectl.server.controller import MAX_FAILURES, Controller, KeepAlive
from moectl.server.http import Grace
from moectl.server.restarts import Restarts, ResumedAnswer
from moectl.server.sockets import beating, listen_unix
from moectl.session import target as launch
from moectl.session.deployment import Deployment
from moectl.shards import prepare
from moectl.shards.prepare import Wanted

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
        owned: Any = controller
        control = Control(owned, dict, controller._keep_alive, stays=False)
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


def test_stats_tell_what_was_cached_and_guessed() -> None:
    text = stats_text(Stats(100, 21, 0.5, 2.0, 0.5, 1000, cached_tokens=90, drafted_tokens=20, accepted_tokens=15))
    assert "100 prompt tokens (90 cached) at 20.0 tok/s" in text
    assert "21 tokens (15 of 20 guesses right, 75%) at 10.0 tok/s" in text


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
    for nodes, name in ((1, "a"), (2, "b")):
        prepare.shard(str(demo_dir()), Wanted(nodes=nodes), directory=tmp_path / name)
    one, two = (launch.decode_target(f"local {tmp_path / name}") for name in ("a", "b"))
    assert launch.decode_target(launch.encode_target(one)) == one
    assert launch.target_key(one) != launch.target_key(two)
    assert (len(one.addresses), len(two.addresses)) == (1, 2)
