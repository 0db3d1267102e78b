"""What the hints of the API and of the controller's socket say is done, and then it succeeds."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from moectl.errors import UsageError
from moectl.server import http as server_http
from moectl.server.http import make_app
from moectl.server.sockets import listen_unix
from tests.server.test_http import GOOD, OTHERS
from tests.server.test_refusals import CHAT, COMPLETIONS, LONG, ask
from tests.support.fake_cluster import FakeCluster


@pytest.mark.parametrize("form", LONG)
def test_a_prompt_shortened_as_the_hint_says_is_answered(form: str) -> None:
    path, body = LONG[form]
    status, told, _ = ask(path, body)
    assert (status, told["error"]["hint"]) == (400, "shorten the prompt")
    assert ask(path, {**body, **GOOD[path]})[0] == 200


def test_whole_characters_as_the_hint_asks_for_are_answered() -> None:
    body = {**GOOD[COMPLETIONS], "prompt": "caf\ud800"}
    status, told, _ = ask(COMPLETIONS, body)
    assert (status, told["error"]["hint"]) == (400, "send whole characters")
    assert ask(COMPLETIONS, {**body, "prompt": "café"})[0] == 200


def test_the_paths_that_the_hint_names_answer() -> None:
    status, told, _ = ask("/chat/completions", GOOD[CHAT])
    hint = told["error"]["hint"]
    assert hint.startswith("the base URL ends in /v1, for Anthropic's clients before it; below it are ")
    assert status == 404
    for path, body in {**GOOD, **OTHERS}.items():
        assert path.removeprefix("/v1/") in hint
        assert ask(path, body)[0] == 200
    assert ask("/v1/models", b"", method="GET")[0] == 200


def test_a_server_started_as_the_hint_says_takes_the_name() -> None:
    headers = {"host": "moe.example:8080"}
    status, told, _ = ask(CHAT, GOOD[CHAT], **headers)
    assert status == 403
    hint = told["error"]["hint"]
    assert hint.startswith("start it with: moectl serve --")
    assert "moe.example" in hint
    assert ask(CHAT, GOOD[CHAT], app=make_app(FakeCluster(), hosts=("moe.example",)), **headers)[0] == 200
    keyed = make_app(FakeCluster(), api_keys=("secret",))
    assert ask(CHAT, GOOD[CHAT], app=keyed, authorization="Bearer secret", **headers)[0] == 200


def test_a_body_that_is_sent_again_as_the_hint_says_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_http, "BODY_S", 0.05)
    app = make_app(FakeCluster())
    raw = [(b"content-type", b"application/json"), (b"host", b"localhost"), (b"content-length", b"100")]
    scope = {"type": "http", "method": "POST", "path": CHAT, "raw_path": b"", "query_string": b"", "headers": raw}
    scope |= {"server": ("127.0.0.1", 80), "client": ("127.0.0.1", 9), "scheme": "http", "http_version": "1.1"}
    sent: list[Any] = []

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    told = json.loads(b"".join(message.get("body", b"") for message in sent))
    assert (sent[0]["status"], told["error"]["hint"]) == (408, "send it again")
    assert ask(CHAT, GOOD[CHAT], app=app)[0] == 200


def test_the_directory_that_the_hint_asks_for_holds_the_socket(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for directory, hint in (
        (tmp_path / "file", "set XDG_RUNTIME_DIR to a directory of your own that can be written to"),
        (tmp_path / ("d" * 120), "set XDG_RUNTIME_DIR to a shorter path"),
    ):
        with pytest.raises(UsageError) as caught, listen_unix(directory / "s"):
            pass
        assert caught.value.hint == hint
        with listen_unix(tmp_path / "own" / "s"):
            assert (tmp_path / "own" / "s").is_socket()
