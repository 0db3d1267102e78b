"""One server, several models: who waits for a switch, what it costs, and what goes wrong with it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import pytest

from moectl.engine.protocol import Done, Ready, Token
from moectl.engine.request import Request
from moectl.errors import MoectlError, PeerLost, QueueFull, StateError, UsageError
from moectl.server import models as module
from moectl.server.contracts import Notice
from moectl.server.controller import MAX_WAITING, Controller, KeepAlive
from moectl.server.http import make_app
from moectl.server.menu import Menu, Offered
from moectl.server.models import ServedModels
from moectl.session.target import Local
from tests.server.test_controller import STATS, FakeSession, collect, until


class Site:
    """Two models, a and b, over fake sessions; `loads` says in what order they were loaded."""

    def __init__(self, *, keep_alive_s: float = -1, stays: bool = True, pin: str | None = None) -> None:
        self.loads: list[tuple[str, int | None]] = []
        self.sessions: list[FakeSession] = []
        self.failures: list[MoectlError] = []  # of the next loads
        self.gate = threading.Event()  # closed: loads wait
        self.gate.set()
        self.said: list[str] = []
        self.keep_alive = KeepAlive(keep_alive_s)
        offers = [_offer(name) for name in "ab"]
        self.menu = Menu(offers)
        self.models = ServedModels(
            self.menu,
            self._open,
            self._make_controller,
            keep_alive=self.keep_alive,
            stays=stays,
            pin=self.menu.find(pin) if pin else None,
            say=self.said.append,
        )
        opened = ExitStack()
        first: Any = opened.enter_context(self._open(offers[0].target, lambda session: None, None))
        self.models.take(offers[0], first, opened)

    @contextlib.contextmanager
    def _open(self, target: Any, on_made: Callable[[Any], None], kv_tokens: int | None) -> Iterator[Any]:
        self.loads.append((target.directory.name, kv_tokens))
        session = FakeSession()
        on_made(session)
        self.gate.wait(20)
        if self.failures:
            raise self.failures.pop()
        if session.closed:
            raise StateError("the session is closed")
        self.sessions.append(session)
        yield session
        assert session.closed

    def _make_controller(self, offer: Offered, session: Any) -> Controller:
        return Controller(session, offer.name, ranks=2, keep_alive=self.keep_alive)

    @property
    def session(self) -> FakeSession:
        """The one that was opened last."""
        return self.sessions[-1]

    async def ask(self, name: str, prompt: str = "x") -> Any:
        return await self.models.find(name).submit(Request(0, prompt, 5))

    async def answer(self, count: int) -> None:
        """Let the session that is up answer this many requests."""
        session = self.session
        await until(lambda: len(session.submitted) >= count)
        for request in session.submitted[-count:]:
            session.heard.put(Done(request.id, "stop", STATS))


def _offer(name: str) -> Offered:
    target = Local(Path("/") / name, None)  # type: ignore[arg-type]
    return Offered(name, frozenset(), target, Ready("hidden", 4, 1000, 256, 4, tools=""), "4bit", 1000, demo=False)


def drive(test: Callable[[Site], Coroutine[Any, Any, None]], **how: Any) -> None:
    async def main() -> None:
        site = Site(**how)
        ending = threading.Event()

        def end_sessions() -> None:  # a fake session does not end its events by itself
            while not ending.wait(0.01):
                for session in site.sessions:
                    if session.closed:
                        session.heard.put(StateError("the session is closed"))

        thread = threading.Thread(target=end_sessions)
        thread.start()
        try:
            await asyncio.wait_for(test(site), 30)
            await asyncio.wait_for(site.models.end(), 30)
        finally:
            ending.set()
            site.gate.set()
            thread.join()

    asyncio.run(main())


def notices(events: list[Any]) -> list[str]:
    return [event.text for event in events if isinstance(event, Notice)]


async def keep(answer: Any, told: list[Any]) -> None:
    async for event in answer:
        told.append(event)


def test_one_load_however_many_ask() -> None:
    async def test(site: Site) -> None:
        answers = [await site.ask("b", str(i)) for i in range(8)]
        assert site.models.health().queued == 8
        await until(lambda: len(site.loads) == 2 and site.models.loaded_name == "b")
        await site.answer(8)
        for answer in answers:
            events = await collect(answer)
            assert isinstance(events[-1], Done)
            assert "Loading b." in notices(events)
        assert [name for name, _ in site.loads] == ["a", "b"]
        assert site.sessions[0].closed
        assert site.models.find("b").model.tools == "none"  # what the workers said
        assert [(one.name, one.loaded) for one in site.models.listed()] == [("a", False), ("b", True)]

    drive(test)


def test_a_switch_waits_for_the_running_answers_and_who_comes_later_waits_behind_it() -> None:
    async def test(site: Site) -> None:
        running = await site.ask("a", "running")
        other = await site.ask("b", "other")
        late = await site.ask("a", "late")
        first = site.sessions[0]
        await until(lambda: len(first.submitted) == 1)
        first.heard.put(Token(1, 7, "t"))
        await asyncio.sleep(0.05)
        assert [r.prompt for r in first.submitted] == ["running"]
        assert not first.closed
        assert site.models.health().queued == 2
        first.heard.put(Done(1, "stop", STATS))
        assert [type(event) for event in await collect(running)] == [Token, Done]
        await until(lambda: len(site.sessions) == 2)
        await site.answer(1)
        told = notices(await collect(other))
        assert told[0] == "b is loaded when 1 answer of a came to the end."
        await until(lambda: len(site.sessions) == 3)
        await site.answer(1)
        assert notices(await collect(late))[0] == "a waits: b comes first."
        # What fitted once fits again: the room is that of its first start.
        assert site.loads == [("a", None), ("b", None), ("a", FakeSession.kv_tokens)]

    drive(test)


def test_a_load_that_fails_is_an_error_and_the_model_before_comes_back() -> None:
    async def test(site: Site) -> None:
        site.failures.append(PeerLost("rank 1 was lost", host="mac2", hint="moectl doctor"))
        with pytest.raises(StateError, match="b cannot be loaded: mac2: rank 1 was lost") as caught:
            await collect(await site.ask("b"))
        assert caught.value.hint == "moectl doctor"
        assert site.models.loaded_name is None
        assert site.models.health().healthy
        back = await site.ask("a")
        await until(lambda: len(site.sessions) == 2)
        await site.answer(1)
        assert isinstance((await collect(back))[-1], Done)
        again = await site.ask("b")
        await until(lambda: len(site.sessions) == 3)
        await site.answer(1)
        assert isinstance((await collect(again))[-1], Done)

    drive(test)


HELLO = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("path", "body", "kinds"),
    [
        ("/v1/chat/completions", {"messages": HELLO}, ("server_error", "server_error")),
        ("/v1/messages", {"messages": HELLO, "max_tokens": 5}, ("api_error", "api_error")),
        ("/v1/responses", {"input": "hello"}, ("server_error", "server_error")),
    ],
)
def test_a_load_that_fails_is_an_error_of_each_protocol(
    path: str, body: dict[str, Any], kinds: tuple[str, str]
) -> None:
    async def test(site: Site) -> None:
        transport = httpx2.ASGITransport(make_app(site.models))
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as http:
            replies = []
            for stream in (False, True):
                site.failures.append(PeerLost("rank 1 was lost"))
                replies.append(await http.post(path, json={**body, "model": "b", "stream": stream}))
            unknown = await http.post(path, json={**body, "model": "c"})
            listed = (await http.get("/v1/models")).json()["data"]
        assert [reply.status_code for reply in (*replies, unknown)] == [503, 200, 404]
        assert replies[0].json()["error"]["type"] == kinds[0]
        assert "b cannot be loaded: rank 1 was lost" in replies[0].json()["error"]["message"]
        lines = replies[1].text.split("\n")
        assert ": moectl: Loading b." in lines
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        told = events[-1].get("response", events[-1])["error"]
        assert told["type"] == kinds[1]
        assert "b cannot be loaded" in told["message"]
        assert [(one["id"], one["loaded"]) for one in listed] == [("a", False), ("b", False)]

    drive(test)


def test_who_gives_up_before_a_switch_causes_none() -> None:
    async def test(site: Site) -> None:
        running = await site.ask("a")
        other = await site.ask("b")
        await until(lambda: len(site.session.submitted) == 1)
        behind = await site.ask("a", "behind")
        other.cancel()
        other.cancel()
        with pytest.raises(StateError, match="cancelled before it began"):
            await collect(other)
        await until(lambda: len(site.session.submitted) == 2)  # nothing has to be waited for
        behind.cancel()
        assert await asyncio.to_thread(site.session.cancelled.get) == 2
        await site.answer(2)
        assert isinstance((await collect(running))[-1], Done)
        assert len(site.loads) == 1

    drive(test)


def test_a_request_that_cannot_be_answered_loads_nothing() -> None:
    async def test(site: Site) -> None:
        with pytest.raises(UsageError, match="longer than the model's context"):
            await site.ask("b", "x" * 100_000)
        assert len(site.loads) == 1
        assert site.models.loaded_name == "a"

    drive(test)


def test_as_many_wait_for_a_switch_as_may() -> None:
    async def test(site: Site) -> None:
        await site.ask("a")
        for _ in range(MAX_WAITING):
            await site.ask("b")
        with pytest.raises(QueueFull):
            await site.ask("b")
        await until(lambda: len(site.session.submitted) == 1)

    drive(test)


def test_an_idle_model_is_unloaded_and_the_next_request_loads_it_again() -> None:
    async def test(site: Site) -> None:
        await site.answer(0)
        first = await site.ask("a")
        site.keep_alive.renew(0)
        await site.answer(1)
        assert isinstance((await collect(first))[-1], Done)
        await until(lambda: site.models.loaded_name is None and site.sessions[0].closed)
        assert not site.models.is_closed
        assert any("was idle and is unloaded" in text for text in site.said)
        health = site.models.health()
        assert (health.ranks, health.healthy) == (0, True)
        again = await site.ask("a")
        await until(lambda: len(site.sessions) == 2)
        await site.answer(1)
        assert isinstance((await collect(again))[-1], Done)

    drive(test, keep_alive_s=100)


def test_a_controller_of_run_is_over_when_it_was_idle() -> None:
    async def test(site: Site) -> None:
        over = asyncio.create_task(site.models.wait_until_over())
        answer = await site.ask("a")
        site.keep_alive.renew(0)
        await site.answer(1)
        await collect(answer)
        await over
        assert site.models.is_closed
        with pytest.raises(StateError, match="is stopping"):
            await site.ask("a")

    drive(test, keep_alive_s=100, stays=False)


def test_a_pinned_model_stays() -> None:
    async def test(site: Site) -> None:
        with pytest.raises(StateError, match="b is not loaded, and a stays loaded: it is pinned") as caught:
            await site.ask("b")
        assert caught.value.hint == "ask for 'a', or start the server without --pin"
        answer = await site.ask("a")
        await site.answer(1)
        assert isinstance((await collect(answer))[-1], Done)
        assert [one.pinned for one in site.models.listed()] == [True, False]

    drive(test, pin="a")


def test_without_the_pin_of_the_hint_the_other_model_answers() -> None:
    async def test(site: Site) -> None:
        answer = await site.ask("b")
        await until(lambda: len(site.sessions) == 2)
        await site.answer(1)
        assert isinstance((await collect(answer))[-1], Done)

    drive(test)


def test_a_failure_for_good_ends_all_and_is_told_to_who_waits() -> None:
    async def test(site: Site) -> None:
        running, other = await site.ask("a"), await site.ask("b")
        await until(lambda: len(site.session.submitted) == 1)
        site.session.heard.put(PeerLost("gone", host="mac2"))
        for answer in (running, other):
            with pytest.raises(PeerLost, match="mac2: gone"):
                await collect(answer)
        await site.models.wait_until_over()
        assert isinstance(site.models.failure, PeerLost)
        with pytest.raises(PeerLost):
            await site.ask("b")
        assert len(site.loads) == 1

    drive(test)


def test_a_stop_ends_a_load_and_tells_who_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TELL_S", 0.01)

    async def test(site: Site) -> None:
        site.gate.clear()
        answer = await site.ask("b")
        await until(lambda: len(site.loads) == 2)
        await asyncio.sleep(0.05)
        ending = asyncio.create_task(site.models.end())
        await asyncio.sleep(0.05)
        site.gate.set()
        told: list[Any] = []
        with pytest.raises(StateError, match="moectl is stopping"):
            await keep(answer, told)
        assert notices(told) == ["Loading b.", "Loading b: 1 % of 1.0 kB."]
        await ending
        assert all(session.closed for session in site.sessions)

    drive(test)
