"""Every refusal of the API over HTTP: one form, the same code and field whichever way the request came."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from moectl.engine.protocol import Refused, decode, encode
from moectl.engine.request import MAX_PROMPT_BYTES, TOO_LONG, Request, too_long
from moectl.errors import BadField, QueueFull, UsageError
from moectl.server import replies
from moectl.server.client import _rebuild
from moectl.server.http import MAX_BODY_BYTES, make_app
from tests.server.test_http import GOOD, KEY, Site, run_site, say
from tests.server.test_openai import CHAT_REFUSALS, COMPLETION_REFUSALS, SHARED_REFUSALS, ask_form
from tests.support.fake_cluster import MODEL, FakeCluster

CHAT, COMPLETIONS = GOOD
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
OLD_CALL = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
}
ALL = [
    *((CHAT, name, value) for name, value, _ in (*CHAT_REFUSALS, *SHARED_REFUSALS)),
    *((COMPLETIONS, name, value) for name, value, _ in (*COMPLETION_REFUSALS, *SHARED_REFUSALS)),
]


async def post(
    app: Any, path: str, body: bytes, method: str = "POST", **headers: str
) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Send one request straight to the application; return status, JSON body and headers."""
    given = {"content-type": "application/json", "host": "localhost"}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    raw = [(name.encode(), value.encode("latin-1")) for name, value in given.items()]
    scope = {"type": "http", "method": method, "path": path, "raw_path": b"", "query_string": b"", "headers": raw}
    scope |= {"server": ("127.0.0.1", 80), "client": ("127.0.0.1", 9), "scheme": "http", "http_version": "1.1"}
    asked = iter([{"type": "http.request", "body": body, "more_body": False}])
    sent: list[Any] = []

    async def receive() -> Any:
        for message in asked:
            return message
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    await app({**scope}, receive, send)
    answered = b"".join(message.get("body", b"") for message in sent)
    names = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], json.loads(answered), names


def ask(path: str, body: dict[str, Any] | bytes, *, app: Any = None, method: str = "POST", **headers: str) -> Any:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return asyncio.run(post(app or make_app(FakeCluster()), path, raw, method, **headers))


def check_form(told: dict[str, Any]) -> None:
    """Check the keys of an error, and that it says what to do."""
    assert set(told) == {"message", "type", "param", "code", "kind", "hint", "host"}
    assert told["hint"] or "should" in told["message"] or "needs" in told["message"]
    if told["hint"]:
        assert told["message"].endswith(f" (hint: {told['hint']})")


@pytest.mark.parametrize(("path", "name", "value"), ALL, ids=lambda value: str(value)[:20])
def test_a_refusal_is_the_same_streamed_or_not(path: str, name: str, value: Any) -> None:
    body = {**GOOD[path], name: value}
    whole = ask(path, body)
    assert whole[0] in (400, 404)
    check_form(whole[1]["error"])
    if name != "stream":
        assert ask(path, {**body, "stream": True}) == whole


@pytest.mark.parametrize(("name", "value"), [refusal[:2] for refusal in SHARED_REFUSALS], ids=str)
def test_a_refusal_is_the_same_of_both_endpoints(name: str, value: Any) -> None:
    first, second = (ask(path, {**good, name: value}) for path, good in GOOD.items())
    assert first == second


HTTP_REFUSALS: list[tuple[str, str, bytes, dict[str, str], int, str | None]] = [
    ("POST", CHAT, b"{", {}, 400, None),
    ("POST", CHAT, b"[]", {}, 400, None),
    ("POST", CHAT, b"{}", {"content_type": "text/plain"}, 415, None),
    ("POST", CHAT, b"{}", {"content_type": "", "origin": "http://localhost:3000"}, 415, None),
    ("POST", CHAT, b"{}", {"content_type": "", "sec_fetch_site": "cross-site"}, 415, None),
    ("POST", CHAT, b"{}", {"origin": "http://evil.example"}, 403, "forbidden_origin"),
    ("POST", CHAT, b"{}", {"content_encoding": "gzip"}, 415, None),
    ("POST", CHAT, b" " * (MAX_BODY_BYTES + 1), {}, 413, TOO_LONG),
    ("POST", COMPLETIONS, b"{}", {"content_length": str(MAX_BODY_BYTES + 1)}, 413, TOO_LONG),
    ("POST", CHAT, b"", {"content_length": "9" * 20, "expect": "100-continue"}, 413, TOO_LONG),
    ("GET", CHAT, b"", {}, 405, None),
    ("POST", "/v1/models", b"{}", {}, 405, None),
    ("OPTIONS", CHAT, b"", {}, 405, None),
    ("GET", "/v1/nothing", b"", {}, 404, "unknown_url"),
    ("POST", "/chat/completions", b"{}", {}, 404, "unknown_url"),
    ("POST", "/moectl/stop", b"", {}, 404, "unknown_url"),
    ("GET", "/v1/models/other", b"", {}, 404, "model_not_found"),
    ("GET", "/v1/models", b"", {"host": "host.docker.internal:8080"}, 403, "forbidden_host"),
    ("GET", "/v1/models", b"", {"host": ""}, 403, "forbidden_host"),
    (
        "OPTIONS",
        CHAT,
        b"",
        {"origin": "http://a.example", "access_control_request_method": "POST"},
        403,
        "forbidden_origin",
    ),
]


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "code"), HTTP_REFUSALS, ids=lambda value: str(value)[:20]
)
def test_refusals_of_http_have_the_same_form(
    method: str, path: str, body: bytes, headers: dict[str, str], status: int, code: str | None
) -> None:
    found, told, _ = ask(path, body, method=method, **headers)
    assert (found, told["error"]["code"], told["error"]["type"]) == (status, code, "invalid_request_error")
    check_form(told["error"])
    if code == TOO_LONG:
        assert told["error"]["param"] == ("messages" if path == CHAT else "prompt")


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer other"}, {"x_api_key": "other"}])
def test_refusals_of_keys_have_the_same_form(headers: dict[str, str]) -> None:
    status, told, names = ask("/v1/models", b"", app=make_app(FakeCluster(), api_keys=(KEY,)), method="GET", **headers)
    assert (status, told["error"]["code"], names["www-authenticate"]) == (401, "invalid_api_key", "Bearer")
    assert "--api-key-file" in told["error"]["message"]
    check_form(told["error"])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("word", ["full", "stopping", "lose", "bug", "unfinished"])
def test_failures_have_the_same_form(word: str, stream: bool) -> None:
    body = {"messages": say(word), "max_tokens": 9}
    cluster = FakeCluster()
    whole = ask(CHAT, body, app=make_app(cluster))[1]["error"]
    check_form(whole)
    if word in ("full", "stopping"):
        assert ask(CHAT, {**body, "stream": True}, app=make_app(cluster))[1]["error"] == whole


# A prompt that is too long.

LONG_TEXT = "refuse"  # the cluster's word for: as many tokens as no context has
LONG: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, {"messages": say(LONG_TEXT)}),
    "chat in parts": (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": LONG_TEXT}]}]}),
    "chat in bytes": (CHAT, {"messages": say("x" * (MAX_PROMPT_BYTES + 1))}),
    "chat over many": (CHAT, {"messages": say("x" * (MAX_PROMPT_BYTES // 8 + 1)) * 8}),
    "text": (COMPLETIONS, {"prompt": LONG_TEXT}),
    "texts": (COMPLETIONS, {"prompt": [LONG_TEXT, LONG_TEXT]}),
    "text in bytes": (COMPLETIONS, {"prompt": "x" * (MAX_PROMPT_BYTES + 1)}),
    "tokens": (COMPLETIONS, {"prompt": [1] * MODEL.max_seq_len}),
    "lists of tokens": (COMPLETIONS, {"prompt": [[1], [1] * MODEL.max_seq_len]}),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("form", LONG)
def test_a_prompt_that_is_too_long_has_openais_code(form: str, stream: bool) -> None:
    path, body = LONG[form]
    for more in ({}, {"max_tokens": 1}, {"max_tokens": -1}, {"n": 2}):
        status, told, _ = ask(path, {**body, **more, "stream": stream})
        error = told["error"]
        assert (status, error["code"], error["type"]) == (400, TOO_LONG, "invalid_request_error")
        assert (error["param"], error["hint"]) == ("messages" if path == CHAT else "prompt", "shorten the prompt")


def test_a_refusal_of_the_ranks_comes_through_whole() -> None:
    refused = Refused.make(3, too_long("the prompt has 60 tokens", "messages"))
    assert decode(encode(refused)) == refused
    error = refused.to_error()
    assert isinstance(error, BadField)
    assert (error.message, error.hint, error.param, error.code) == (
        "the prompt has 60 tokens",
        "shorten the prompt",
        "messages",
        TOO_LONG,
    )


@pytest.mark.parametrize(
    "error",
    [
        UsageError("x", hint="do y"),
        UsageError("x"),
        BadField("x", hint="y", param="n"),
        QueueFull("x", hint="z", host="mac1"),
    ],
)
def test_the_command_line_says_a_hint_once(error: UsageError) -> None:
    again = _rebuild(replies.describe_error(error)[1]["error"])
    assert (str(again), again.hint, type(again)) == (str(error), error.hint, type(error))


def test_requests_name_the_field_that_is_wrong() -> None:
    for field, value in {"top_p": 2.0, "min_p": -1.0, "top_k": -1, "presence_penalty": 3.0, "max_tokens": -1}.items():
        with pytest.raises(BadField, match=f"^{field} should") as caught:
            Request(0, "x", **{"max_tokens": 1, field: value})  # type: ignore[arg-type]
        assert caught.value.param == field


# OpenAI's own client.


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    yield from run_site(tmp_path_factory.mktemp("site") / "run" / "s", KEY)


@contextlib.contextmanager
def refused(code: str, param: str) -> Iterator[None]:
    with pytest.raises(openai.BadRequestError) as caught:
        yield
    assert (caught.value.code, caught.value.param) == (code, param)


@pytest.mark.parametrize("stream", [False, True])
def test_openais_client_hears_the_code(site: Site, stream: bool) -> None:
    with site.client() as client:
        with refused(TOO_LONG, "messages"):
            client.chat.completions.create(model="tiny", messages=say(LONG_TEXT), stream=stream)
        for prompt in (LONG_TEXT, [1] * 300, [[1] * 300], [LONG_TEXT]):
            with refused(TOO_LONG, "prompt"):
                client.completions.create(model="tiny", prompt=prompt, stream=stream)


def test_openais_client_sends_what_others_accept(site: Site) -> None:
    turns: list[Any] = [
        *say("hi"),
        {"role": "assistant", "content": None},
        {"role": "assistant"},
        {"role": "assistant", "content": None, "tool_calls": []},
        *say("again"),
    ]
    with site.client() as client:
        ask_for: dict[str, Any] = {"model": "tiny", "messages": turns, "top_p": 0, "stop": ["", "x"], "seed": -1}
        ask_for |= {"max_tokens": 32_000, "logit_bias": None, "user": None, "store": False, "parallel_tool_calls": True}
        done = client.chat.completions.create(**ask_for)
        assert done.choices[0].finish_reason == "stop"
        again = [*turns, done.choices[0].message.model_dump(), *say("on")]  # as scripts send an answer back
        client.chat.completions.create(**{**ask_for, "messages": again, "max_tokens": -1})
        [request] = site.cluster.requests[-1:]
        assert (request.max_tokens, request.top_p, request.stop, request.seed) == (MODEL.max_seq_len, 0, ("x",), None)
        assert [m["content"] for m in request.messages or ()][:4] == ["hi", "", "", ""]
        client.completions.create(model="tiny", prompt="a", stop=[f"<{i}>" for i in range(16)], max_tokens=1)


@pytest.mark.parametrize("name", ["authorization", "x-api-key"])
def test_a_key_may_come_under_either_name(site: Site, name: str) -> None:
    with site.http() as http:
        del http.headers["authorization"]
        value = f"Bearer {KEY}" if name == "authorization" else KEY
        assert http.get("/v1/models", headers={name: value}).status_code == 200


@pytest.mark.parametrize(
    ("path", "wrong", "hint", "right"),
    [
        (CHAT, {"tools": [{"type": "web_search"}]}, "leave out other tools", {"tools": [TOOL]}),
        (
            CHAT,
            {"tool_choice": "required"},
            "send tools, or leave it out",
            {"tools": [TOOL], "tool_choice": "required"},
        ),
        (CHAT, {"tool_choice": "required"}, "send tools, or leave it out", {}),
        (CHAT, {"messages": [*say("hi"), OLD_CALL]}, "send tool_calls", {"messages": [*say("hi"), CALL]}),
        (CHAT, {"functions": [{"name": "f"}]}, "send tools and tool_choice", {"tools": [TOOL], "tool_choice": "auto"}),
        (
            CHAT,
            {"response_format": ask_form({"type": "string", "minLength": 2, "maxLength": 1})},
            "change the schema",
            {"response_format": ask_form({"type": "string", "minLength": 1, "maxLength": 2})},
        ),
        (CHAT, {"modalities": ["audio"]}, "leave it out", {"modalities": ["text"]}),
        (COMPLETIONS, {"best_of": 3}, "leave it out", {}),
        (CHAT, {"model": "other"}, "ask for 'tiny', or for no model", {"model": "tiny"}),
        (CHAT, {"model": "other"}, "ask for 'tiny', or for no model", {"model": None}),
    ],
)
def test_what_a_hint_says_is_answered(path: str, wrong: dict[str, Any], hint: str, right: dict[str, Any]) -> None:
    status, body, _ = ask(path, {**GOOD[path], **wrong})
    assert (status // 100, body["error"]["hint"]) == (4, hint)
    assert ask(path, {**GOOD[path], **right})[0] == 200


def test_what_the_hint_about_a_body_says_is_answered() -> None:
    _, body, _ = ask(CHAT, b"hello")
    hint = body["error"]["hint"]
    assert hint == 'send one JSON object, as {"messages": [{"role": "user", "content": "hello"}]}'
    assert ask(CHAT, hint.partition(", as ")[2].encode())[0] == 200
    good = json.dumps(GOOD[CHAT]).encode()
    status, body, _ = ask(CHAT, good, content_type="text/plain")
    assert (status, body["error"]["hint"]) == (415, "send the header Content-Type: application/json")
    status, body, _ = ask(CHAT, good, content_encoding="gzip")
    assert (status, body["error"]["hint"]) == (415, "send the body uncompressed")
    status, body, headers = ask(CHAT, b"", method="PUT")
    assert (status, body["error"]["hint"]) == (405, f"send {headers['allow']}")
    assert ask(CHAT, good, content_type="application/json", method=headers["allow"].split(", ")[-1])[0] == 200
