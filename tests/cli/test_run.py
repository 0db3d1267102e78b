"""`moectl run` in front of a server without a model: what it asks for, and what it shows of thinking and answer."""

from __future__ import annotations

import asyncio
import io
import json
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from moectl import __main__
from moectl.cli.chat.settings import ChatSettings
from moectl.cli.terminal import AnswerWriter
from moectl.cli.verbs import run as verb
from moectl.engine.protocol import Ready
from moectl.server import attach
from moectl.server.client import Client
from moectl.server.contracts import Thinking
from moectl.server.http import Grace, make_app, serve
from moectl.server.openai import read_chat
from moectl.server.sockets import listen_unix
from tests.support.fake_cluster import FakeCluster

Call = Callable[..., tuple[int, str, str]]


class Site:
    """A controller with a fake cluster."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cluster = FakeCluster()
        self.sampling: dict[str, float] = {}

    async def describe(self, http: HttpRequest) -> Response:
        return JSONResponse({"samplings": {self.cluster.name: self.sampling}})


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site, loop, stopping = Site(tmp_path / "run" / "s"), asyncio.new_event_loop(), asyncio.Event()
    with listen_unix(site.path) as unix:
        app = make_app(site.cluster, owner_routes=[Route("/moectl", site.describe)])
        serving = serve(app, [unix], stopping=stopping, grace=Grace(0.2))
        thread = threading.Thread(target=loop.run_until_complete, args=(serving,))
        thread.start()
        try:
            yield site
        finally:
            loop.call_soon_threadsafe(stopping.set)
            thread.join(20)
            assert not thread.is_alive()
            loop.close()


@pytest.fixture
def call(site: Site, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    monkeypatch.setattr(attach, "attach", lambda *args, **kw: attach.Attached(Client(site.path), False))
    monkeypatch.setattr(attach, "place_of", lambda target: site.path)
    monkeypatch.setattr(verb, "choose_target", lambda common, options: SimpleNamespace(name=site.cluster.name))

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moectl", "run", *words])
        monkeypatch.setattr(sys, "stdin", None)
        code = __main__.run()
        return code, *capsys.readouterr()

    return call


CUT = "[cut after 5 tokens: --max-tokens 20 allows more; without it, the context decides]\n"
THOUGHT, ANSWER = "0:0 0:1 0:2 ", "0:3 0:4 "


def test_a_pipe_gets_the_thinking_before_the_answer_as_plain_text(call: Call) -> None:
    shown = f"Thinking...\n{THOUGHT}\n...done thinking.\n\n{ANSWER}\n"
    assert call("--color", "always", "--max-tokens", "5", "ponder") == (0, shown, CUT)
    assert call("--max-tokens", "5", "--hide-thinking", "ponder") == (0, ANSWER + "\n", CUT)
    assert call("--max-tokens", "5", "hello") == (0, THOUGHT + ANSWER + "\n", CUT)


def test_json_has_the_thinking_in_a_field_of_its_own(call: Call) -> None:
    for words, thinking, text in (
        (["ponder"], THOUGHT, ANSWER),
        (["--hide-thinking", "ponder"], None, ANSWER),
        (["hello"], None, THOUGHT + ANSWER),
    ):
        code, out, _ = call("--json", "--max-tokens", "5", *words)
        found = json.loads(out)
        assert (code, found["thinking"], found["text"], found["finish_reason"]) == (0, thinking, text, "length")
        assert found["stats"]["thinking_tokens"] == (3 if words[-1] == "ponder" else 0)


def test_an_answer_that_ends_before_it_begins_says_so(call: Call) -> None:
    code, out, err = call("--max-tokens", "2", "ponder")
    assert (code, out) == (0, "Thinking...\n0:0 0:1 \n")
    assert err == CUT.replace("5 tokens", "2 tokens, before the answer").replace("20 allows", "8 allows")
    code, out, err = call("--max-tokens", "2", "--hide-thinking", "-q", "ponder")
    assert (code, out, err) == (0, "\n", "")


def test_what_the_user_gives_wins_over_the_models_defaults(site: Site, call: Call) -> None:
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")

    def asked() -> tuple[float, ...]:
        return tuple(getattr(site.cluster.requests[-1], name) for name in names)

    call("hello")
    assert asked() == (0, 1, 0, 0, 1)  # greedy, where a model says nothing
    request = {"messages": [{"role": "user", "content": "hello"}]}
    for sampling in ({}, {"temperature": 0.6, "top_k": 20}):  # the API chooses in the same way
        model = Ready("hidden", None, 100, 100, 0, sampling=sampling)
        [asks] = read_chat(request, "tiny", model).requests
        settings = ChatSettings(**sampling)  # type: ignore[arg-type]
        assert [getattr(asks, name) for name in names] == [getattr(settings, name) for name in names]
    site.sampling = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.05}
    _, _, err = call("-v", "hello")
    assert asked() == (0.6, 0.95, 20, 0, 1.05)
    assert "Sampling: temperature 0.6, top_p 0.95, top_k 20, repetition_penalty 1.05.\n" in err
    _, _, err = call("-v", "-t", "0", "--top-k", "0", "--repetition-penalty", "1", "hello")
    assert asked() == (0, 0.95, 0, 0, 1)
    assert "Sampling: greedy, top_p 0.95.\n" in err
    call("--raw", "--min-p", "0.1", "--top-p", "0.5", "hello")
    assert asked() == (0.6, 0.5, 20, 0.1, 1.05)


def test_how_to_think_reaches_the_request(site: Site, call: Call) -> None:
    call("hello")
    assert site.cluster.requests[-1].think is None
    call("--no-think", "hello")
    assert site.cluster.requests[-1].think is False
    call("--think", "--reasoning-effort", "low", "--system", "Be brief.", "hello")
    request = site.cluster.requests[-1]
    assert (request.think, request.template_options) == (True, {"reasoning_effort": "low"})
    assert [message["role"] for message in request.messages or ()] == ["system", "user"]
    for flags in (["--think"], ["--no-think"], ["--reasoning-effort", "low"]):
        code, _, err = call("--raw", *flags, "hello")
        assert code == 2
        assert "--raw and " in err


def test_a_schema_reaches_the_request(site: Site, call: Call, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object", "properties": {"a": {"type": "integer"}}}')
    for flags in ((), ("--raw",)):
        assert call("--schema", str(schema), *flags, "hello")[0] == 0
        assert site.cluster.requests[-1].schema == json.loads(schema.read_text())
    for text, said in (
        ("{", "is not JSON"),
        ("[]", "should be an object"),
        ("[" * 100_000, "is not JSON"),
        ('{"properties": {"a": {"not": {}}}}', "schema.properties.a.not cannot be enforced"),
        ('{"type": "string", "minLength": 3, "maxLength": 2}', "Unsatisfiable"),
    ):
        schema.write_text(text)
        code, out, err = call("--schema", str(schema), "hello")
        assert (code, out) == (2, "")
        assert said in err
        assert err.count("\n") <= 2, "a line and its hint"
    assert call("--schema", str(tmp_path / "none"), "hello")[0] == 2


class _Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("variable", "dim", "bright"), [("TERM", "\x1b[2m", "\x1b[22m"), ("NO_COLOR", "", "")])
def test_a_terminal_shows_thinking_dimmed(
    monkeypatch: pytest.MonkeyPatch, variable: str, dim: str, bright: str
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv(variable, "1")
    monkeypatch.setattr(sys, "stdout", screen := _Screen())
    writer = AnswerWriter()
    for piece in (Thinking("I "), Thinking("add\x1b.\n"), "4", " = 4"):
        writer.write(piece)
    assert not writer.end_thinking()
    shown = [f"{dim}{text}{bright}" for text in ("Thinking...\nI ", "add␛.\n", "...done thinking.\n\n")]
    assert screen.getvalue() == "".join(shown) + "4 = 4"
    writer.write(Thinking("and"))
    assert writer.end_thinking()
    assert not writer.end_thinking()
