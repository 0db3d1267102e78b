"""Nothing of a request is logged, whatever becomes of it: no text, no tool, no header, no key, no path."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest

from moectl.server import messages, responses
from moectl.server.http import CHAT
from tests.server.test_http import KEY, Site, run_site

MARK = "xyzzy"
_SCHEMA = {"type": "object", "properties": {MARK: {"description": MARK}}}
_FUNCTION = {"name": MARK, "description": MARK}
TOOLS: dict[str, Any] = {
    CHAT: {"type": "function", "function": {**_FUNCTION, "parameters": _SCHEMA}},
    responses.PATH: {"type": "function", **_FUNCTION, "parameters": _SCHEMA},
    messages.PATH: {**_FUNCTION, "input_schema": _SCHEMA},
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    yield from run_site(tmp_path_factory.mktemp("site") / "run" / "s", KEY)


def bodies(path: str) -> Iterator[dict[str, Any]]:
    """Yield what is answered, refused by its reader, refused by the cluster, broken off, and a bug's."""
    field = "input" if path == responses.PATH else "messages"
    for word in ("hello", "refuse", "full", "stopping", "lose", "bug", "unfinished"):
        body = {field: [{"role": "user", "content": f"{word} {MARK}"}], "max_tokens": 9, "user": MARK}
        yield body
        yield {**body, "tools": [TOOLS[path]]}
        yield {**body, "temperature": MARK}
        yield {**body, "model": MARK}
        yield {**body, field: [{"role": MARK, "content": MARK}]}
        yield {**body, "tools": [{**TOOLS[path], "type": MARK}], "tool_choice": MARK}


@pytest.mark.parametrize("path", TOOLS)
def test_a_request_is_not_logged(site: Site, path: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    assert logging.getLogger("uvicorn.error").level > logging.ERROR  # it would quote a bug's message
    with site.http() as http:
        http.headers["x-mark"] = MARK
        for body in bodies(path):
            for stream in (False, True):
                http.post(path, json={**body, "stream": stream}, params={MARK: MARK})
        http.post(path, content=MARK.encode())
        http.post(path, content=MARK.encode(), headers={"content-type": "application/json"})
        http.post(path, json={}, headers={"authorization": f"Bearer {MARK}"})
        http.post(f"{path}/{MARK}", json={})
        http.get("/", headers={"host": f"{MARK}.example"})
    told = [record for record in caplog.records if record.name.startswith(("moectl", "uvicorn.error"))]
    assert not logging.getLogger("uvicorn.access").propagate, "where this test does not listen, it has no handler"
    assert any("bug" in record.getMessage() for record in told), "the logs say something"
    text = "\n".join(logging.Formatter().format(record) for record in told)
    for secret in (MARK, KEY):  # the bug's own message quotes the prompt
        assert secret not in text


def test_a_bug_that_comes_too_late_for_a_status_is_logged_without_its_words(
    site: Site, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(value: object) -> bytes:
        raise RuntimeError(MARK)

    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr("moectl.server.replies.encode_event", fail)
    with site.http() as http, pytest.raises(Exception, match=r"without sending complete message|closed|disconnected"):
        http.post(CHAT, json={"messages": [{"role": "user", "content": "hi"}], "stream": True})
    text = caplog.text
    assert f"{CHAT} fails by a bug" in text
    assert "RuntimeError" in text
    assert MARK not in text
