"""The HTTP server on real sockets, asked by OpenAI's own client; and what it makes of 5,000 bad requests."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from prometheus_client.parser import text_string_to_metric_families

from moectl.engine.protocol import Token
from moectl.engine.request import TOO_LONG
from moectl.server import replies
from moectl.server.http import MAX_BODY_BYTES, Grace, make_app, serve
from moectl.server.sockets import listen_tcp, listen_unix
from tests.support.fake_cluster import ENDS_AFTER, MODEL, THOUGHTS, FakeCluster

KEY = "sesame"


@dataclass
class Site:
    """A server with a fake cluster, on TCP and on a Unix socket."""

    cluster: FakeCluster
    url: str
    path: Path

    def client(self, **more: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, **{"max_retries": 0, **more})

    def async_client(self, **more: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=KEY, **{"max_retries": 0, **more})

    def http(self) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, headers={"authorization": f"Bearer {KEY}"})


def run_site(path: Path, api_key: str | None, **visitors: Any) -> Iterator[Site]:
    cluster, loop, stopping = FakeCluster(), asyncio.new_event_loop(), asyncio.Event()
    with listen_unix(path) as unix:
        tcp = listen_tcp("127.0.0.1", 0, has_key=api_key is not None)
        port = tcp.getsockname()[1]
        app = make_app(cluster, api_keys=() if api_key is None else (api_key,), silence_s=0.1, **visitors)
        thread = threading.Thread(
            target=loop.run_until_complete, args=(serve(app, [unix, tcp], stopping=stopping, grace=Grace(0.2)),)
        )
        thread.start()
        try:
            yield Site(cluster, f"http://127.0.0.1:{port}", path)
        finally:
            loop.call_soon_threadsafe(stopping.set)
            thread.join(20)
            assert not thread.is_alive()
            loop.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    yield from run_site(tmp_path_factory.mktemp("site") / "run" / "s", KEY)


@pytest.fixture(scope="module")
def open_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One without a key."""
    yield from run_site(tmp_path_factory.mktemp("open") / "run" / "s", None)


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def say(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def expected(count: int, seed: int = 0) -> str:
    return "".join(f"{seed}:{i} " for i in range(count))


def ask(client: openai.OpenAI, text: str = "hello", **more: Any) -> Any:
    return client.chat.completions.create(model="tiny", messages=say(text), **more)


# OpenAI's own client.


def test_a_chat(site: Site) -> None:
    with site.client() as client:
        done = ask(client, max_tokens=4)
        assert done.choices[0].message.content == expected(4)
        assert done.choices[0].finish_reason == "length"
        assert done.usage.model_dump(exclude_none=True) == {
            "prompt_tokens": 7,
            "completion_tokens": 4,
            "total_tokens": 11,
            "prompt_tokens_details": {"cached_tokens": 3},
        }
        assert ask(client).choices[0].finish_reason == "stop"
        longest = ask(client, extra_body={"ignore_eos": True}, max_tokens=30)
        assert longest.choices[0].message.content == expected(30)


def test_a_streamed_chat(site: Site) -> None:
    with site.client() as client:
        chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == expected(ENDS_AFTER)
        assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
        assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], ENDS_AFTER)
        assert len({c.id for c in chunks}) == 1


def test_thinking_has_a_field_of_its_own(site: Site) -> None:
    thinking, answer = expected(THOUGHTS), expected(5).removeprefix(expected(THOUGHTS))
    with site.client() as client:
        done = ask(client, "ponder", max_tokens=5)
        message = done.choices[0].message
        assert (message.reasoning_content, message.content) == (thinking, answer)
        assert done.usage.completion_tokens_details.reasoning_tokens == THOUGHTS
        deltas = [chunk.choices[0].delta for chunk in ask(client, "ponder", max_tokens=5, stream=True)]
        assert "".join(getattr(delta, "reasoning_content", "") for delta in deltas) == thinking
        assert "".join(delta.content or "" for delta in deltas) == answer
        assert not any(delta.content for delta in deltas if hasattr(delta, "reasoning_content"))
        cut = ask(client, "ponder", max_tokens=2).choices[0]
        assert (cut.message.content, cut.message.reasoning_content) == ("", expected(2))
        assert cut.finish_reason == "length"


def test_how_to_think_reaches_the_request(site: Site) -> None:
    options = {"enable_thinking": False}
    with site.client() as client:
        ask(client, reasoning_effort="high", extra_body={"chat_template_kwargs": options, "think": False})
    request = site.cluster.requests[-1]
    assert request.think is False
    assert request.template_options == {"reasoning_effort": "high", **options}


def test_over_the_unix_socket_no_key_is_wanted(site: Site) -> None:
    transport = httpx2.HTTPTransport(uds=str(site.path))
    with (
        httpx2.Client(transport=transport) as http,
        openai.OpenAI(base_url="http://moectl/v1", api_key="none", http_client=http) as client,
    ):
        assert ask(client, max_tokens=2).choices[0].message.content == expected(2)


def test_choices_differ_by_seed_and_stream_together(site: Site) -> None:
    with site.client() as client:
        done = ask(client, n=3, seed=5, max_tokens=2)
        assert [c.message.content for c in done.choices] == [expected(2, seed) for seed in (5, 6, 7)]
        assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (7, 6)
        texts = ["", "", ""]
        for chunk in ask(client, n=3, seed=5, max_tokens=2, stream=True):
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        assert texts == [expected(2, seed) for seed in (5, 6, 7)]


def test_logprobs(site: Site) -> None:
    with site.client() as client:
        [choice] = ask(client, max_tokens=2, logprobs=True, top_logprobs=3).choices
        first, second = choice.logprobs.content
        assert (first.token, first.logprob, bytes(first.bytes)) == ("0:0 ", -0.5, b"0:0 ")
        assert [(t.token, t.logprob) for t in second.top_logprobs] == [
            ("0:1 ", -0.5),
            ("0:2 ", -1.5),
            ("\ufffd", -9999),
        ]
        legacy = client.completions.create(model="tiny", prompt="hello", max_tokens=2, logprobs=1)
        assert legacy.choices[0].logprobs is not None
        assert legacy.choices[0].logprobs.tokens == ["0:0 ", "0:1 "]
        assert legacy.choices[0].logprobs.text_offset == [0, 4]
        streamed = ask(client, max_tokens=2, logprobs=True, stream=True)
        told = [c.choices[0].logprobs.content for c in streamed if c.choices[0].logprobs]
        assert [entry[0].token for entry in told] == ["0:0 ", "0:1 "]


def test_completions(site: Site) -> None:
    with site.client() as client:
        done = client.completions.create(model="tiny", prompt=["a", "b"], max_tokens=2, stop=["x"], seed=3)
        assert [c.text for c in done.choices] == [expected(2, 3)] * 2
        assert done.usage is not None
        assert done.usage.prompt_tokens == 14
        assert site.cluster.requests[-1].stop == ("x",)
        assert client.completions.create(model="tiny", prompt=[1, 2, 3]).choices[0].text == expected(16)
        assert site.cluster.requests[-1].prompt_tokens == (1, 2, 3)
        stream = client.completions.create(model="tiny", prompt="hello", max_tokens=3, stream=True)
        assert "".join(c.choices[0].text for c in stream) == expected(3)


def test_models(site: Site) -> None:
    with site.client() as client:
        assert [m.id for m in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny").created == site.cluster.created
        with pytest.raises(openai.NotFoundError) as caught:
            client.models.retrieve("org/other")
        assert caught.value.code == "model_not_found"
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="other", messages=say("hello"))


@pytest.mark.parametrize("stream", [False, True])
def test_refusals_have_their_status(site: Site, stream: bool) -> None:
    with site.client() as client:
        with pytest.raises(openai.BadRequestError, match="context is 256") as long:
            ask(client, "refuse", stream=stream)
        assert (long.value.code, long.value.param) == ("context_length_exceeded", "messages")
        with pytest.raises(openai.BadRequestError, match="between 0 and 2") as bad:
            ask(client, temperature=9, stream=stream)
        assert bad.value.param == "temperature"
        with pytest.raises(openai.RateLimitError) as full:
            ask(client, "full", stream=stream)
        assert full.value.response.headers["retry-after"] == "3"
        with pytest.raises(openai.InternalServerError, match="is stopping") as stopping:
            ask(client, "stopping", stream=stream)
        assert stopping.value.status_code == 503
        ask(client, max_tokens=1)


def test_errors_on_the_way(site: Site) -> None:
    with site.client() as client:
        for word, reason in (("lose", "mac2: rank 1 was lost"), ("bug", "unexpected RuntimeError")):
            with pytest.raises(openai.InternalServerError, match=reason) as caught:
                ask(client, word)
            assert "secret" not in str(caught.value)
            stream = ask(client, word, stream=True)
            got = [next(stream).choices[0].delta.content for _ in range(4)]  # the role, then three tokens
            assert "".join(got) == expected(3)
            with pytest.raises(openai.APIError, match=reason):
                next(stream)
        with pytest.raises(openai.InternalServerError, match="before it was done"):
            ask(client, "unfinished")
        ask(client, max_tokens=1)


def test_an_error_in_a_stream_is_an_event_before_done(site: Site) -> None:
    with site.http() as http:
        body = {"messages": say("lose"), "stream": True}
        lines = http.post("/v1/chat/completions", json=body).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    error = json.loads(lines[-3].removeprefix("data: "))["error"]
    assert (error["type"], error["kind"], error["hint"]) == ("server_error", "PeerLost", "moectl doctor")


def test_an_error_in_writing_a_stream_is_its_last_event_and_no_others(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = replies.Reply.take

    def poisoned(self: replies.Reply, index: int, event: Any) -> Any:
        if isinstance(event, Token) and self._asked.requests[0].seed == 666:
            raise TypeError("secret")
        return take(self, index, event)

    monkeypatch.setattr(replies.Reply, "take", poisoned)

    async def one(client: openai.AsyncOpenAI, seed: int) -> str:
        try:
            stream = await client.chat.completions.create(
                model="tiny", messages=say("hello"), max_tokens=5, seed=seed, stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        except openai.APIError as error:
            return error.message

    async def many() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{site.url}/v1", api_key=KEY, max_retries=0) as client:
            return await asyncio.gather(*(one(client, 666 if n == 3 else n) for n in range(8)))

    answers = asyncio.run(many())
    assert answers.pop(3) == "unexpected TypeError (a bug in moectl) (hint: the server's log says more; report it)"
    assert answers == [expected(5, seed) for seed in (0, 1, 2, 4, 5, 6, 7)]
    with site.client() as client, pytest.raises(openai.InternalServerError, match="unexpected TypeError"):
        ask(client, seed=666)


def test_async_streams_side_by_side(site: Site) -> None:
    async def one(client: openai.AsyncOpenAI, seed: int) -> str:
        stream = await client.chat.completions.create(model="tiny", messages=say("hi"), seed=seed, stream=True)
        return "".join([c.choices[0].delta.content or "" async for c in stream])

    async def all_of_them() -> list[str]:
        async with site.async_client() as client:
            return await asyncio.gather(*(one(client, seed) for seed in range(16)))

    assert asyncio.run(all_of_them()) == [expected(ENDS_AFTER, seed) for seed in range(16)]


def test_llms_own_models(open_site: Site, tmp_path: Path) -> None:
    entry = "- model_id: {}\n  model_name: tiny\n  api_base: {}/v1\n  completion: {}\n"
    models = entry.format("chat", open_site.url, "false") + entry.format("raw", open_site.url, "true")
    (tmp_path / "extra-openai-models.yaml").write_text(models)
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "llm", *arguments]
        return subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
        )

    assert run("-m", "chat", "-s", "be brief", "-o", "max_tokens", "3", "hello").stdout == f"{expected(3)}\n"
    assert [m["role"] for m in open_site.cluster.requests[-1].messages or ()] == ["system", "user"]
    assert run("-m", "raw", "hello").stdout == f"{expected(16)}\n"
    lost = run("-m", "chat", "lose")
    assert (lost.returncode, lost.stdout) == (1, expected(3))
    assert "mac2: rank 1 was lost" in lost.stderr


# Clients that leave.


def test_leaving_a_stream_cancels_every_choice(site: Site) -> None:
    before = site.cluster.cancelled
    with site.client() as client:
        stream = ask(client, "endless", n=2, stream=True)
        for chunk in stream:
            if chunk.choices[0].delta.content:
                break
        stream.close()
        wait_until(lambda: site.cluster.cancelled == before + 2)
        assert site.cluster.running == 0
        ask(client, max_tokens=1)


def test_an_async_task_cancelled_in_its_stream(site: Site) -> None:
    before = site.cluster.cancelled

    async def read_all(stream: Any) -> None:
        async for _ in stream:
            pass

    async def leave() -> None:
        async with site.async_client() as client:
            stream = await client.chat.completions.create(model="tiny", messages=say("endless"), stream=True)
            reading = asyncio.create_task(read_all(stream))
            await asyncio.sleep(0.1)
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading

    asyncio.run(leave())
    wait_until(lambda: site.cluster.cancelled == before + 1)


def test_a_client_that_times_out_waiting_for_the_whole(site: Site) -> None:
    before = site.cluster.cancelled
    with site.client(timeout=0.3) as client:
        with pytest.raises(openai.APITimeoutError):
            ask(client, "endless")
        wait_until(lambda: site.cluster.cancelled == before + 1)
        ask(client.with_options(timeout=20), max_tokens=1)


def test_a_long_silence_is_filled_with_comments(site: Site) -> None:
    with site.http() as http:
        body = {"messages": say("slow"), "stream": True, "max_tokens": 1}
        text = http.post("/v1/chat/completions", json=body).text
    assert text.count(": still working\n\n") >= 1
    with site.client() as client:
        chunks = ask(client, "slow", stream=True, max_tokens=1)
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == expected(1)


def test_tokens_without_text_are_silence_too(site: Site) -> None:
    body = {"prompt": "endless hushed", "stream": True}
    with site.http() as http, http.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        assert [line for line in itertools.islice(lines, 4) if line] == [": still working"] * 2


# Keys and hosts.


def test_without_the_key(site: Site) -> None:
    with httpx2.Client(base_url=site.url) as http:
        assert http.get("/health").status_code == 200
        wrong = ("", "Bearer", "Bearer other", f"Basic {KEY}", f"Bearer {KEY}x", "Bearer \xff")
        for header in wrong:
            reply = http.get("/v1/models", headers={b"authorization": header.encode("latin-1")})
            assert reply.status_code == 401
            assert reply.json()["error"]["code"] == "invalid_api_key"
            assert reply.headers["www-authenticate"] == "Bearer"
        assert http.get("/metrics").status_code == 401
        assert http.get("/v1/models", headers={"authorization": f"bearer {KEY}"}).status_code == 200
    with openai.OpenAI(base_url=f"{site.url}/v1", api_key="other") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_without_a_key_a_browsers_page_cannot_come_in(open_site: Site) -> None:
    port = open_site.url.rpartition(":")[2]
    with httpx2.Client(base_url=open_site.url) as http:
        for name in (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}", "LOCALHOST"):
            assert http.get("/v1/models", headers={"host": name}).status_code == 200
        for name in ("evil.example", f"evil.example:{port}", "localhost.evil.example", "[evil", ""):
            assert http.get("/v1/models", headers={"host": name}).status_code == 403
        form = http.post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"})
        assert form.status_code == 415


# Health and metrics.


def test_health(site: Site) -> None:
    with httpx2.Client(base_url=site.url) as http:
        assert http.get("/health").json() == {
            "status": "ok",
            "model": "tiny",
            "ranks": 2,
            "ranks_answered": 2,
            "progress_age_s": 0.0,
            "running": 0,
            "queued": 0,
            "memory_bytes": [1000, 2000],
            "restarts": 1,
        }
        site.cluster.ranks_answered = 1
        assert http.get("/health").status_code == 503
        site.cluster.ranks_answered, site.cluster.progress_age_s = 2, 1e6
        assert http.get("/health").status_code == 200  # idle: nothing to be late with
        site.cluster.running += 1
        assert http.get("/health").json()["status"] == "unhealthy"
        site.cluster.running -= 1
        site.cluster.progress_age_s = 0.0


def read_metrics(site: Site) -> dict[tuple[str, ...], float]:
    with site.http() as http:
        families = text_string_to_metric_families(http.get("/metrics").text)
        return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


def test_metrics(site: Site) -> None:
    before = read_metrics(site)
    with site.client() as client:
        ask(client, max_tokens=4, n=2)
        with pytest.raises(openai.BadRequestError):
            ask(client, "refuse")
        with pytest.raises(openai.RateLimitError):
            ask(client, "full")
        with pytest.raises(openai.APIStatusError):
            client.get("/nothing", cast_to=object)
    after = read_metrics(site)
    grown = {key: value - before.get(key, 0) for key, value in after.items()}
    assert grown["moectl_requests_total", "length"] == 2
    assert grown["moectl_requests_total", "refused"] == 1
    assert grown["moectl_requests_total", "rejected"] == 1
    assert grown["moectl_prompt_tokens_total",] == 14
    assert grown["moectl_cached_prompt_tokens_total",] == 6
    assert grown["moectl_completion_tokens_total",] == 8
    assert grown["moectl_time_to_first_token_seconds_count",] == 2
    assert grown["moectl_inter_token_seconds_count",] == 6
    assert grown["moectl_http_requests_total", "/v1/chat/completions", "200"] == 1
    assert grown["moectl_http_requests_total", "other", "404"] == 1
    assert after["moectl_memory_bytes", "1"] == 2000
    assert after["moectl_restarts_total",] == 1
    assert after["moectl_healthy",] == 1


# HTTP itself.


def test_wrong_ways_in(site: Site) -> None:
    good = json.dumps({"messages": say("hello"), "max_tokens": 1}).encode()
    with site.http() as http:

        def post(body: bytes, **headers: str) -> httpx2.Response:
            given = {"content-type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
            return http.post("/v1/chat/completions", content=body, headers=given)

        assert post(good).status_code == 200
        assert post(good, content_type="Application/JSON; charset=utf-8").status_code == 200
        assert post(good, content_type="text/plain").status_code == 415
        for lax in ("", "application/x-www-form-urlencoded"):  # curl -d, with and without its own header
            assert post(good, content_type=lax).status_code == 200
            assert post(good, content_type=lax, origin="http://evil.example").status_code == 415  # a page's form
        assert post(good, content_encoding="gzip").status_code == 415
        assert http.get("/v1/chat/completions").headers["allow"] == "POST"
        assert http.get("/v1/chat/completions").json()["error"]["message"].startswith("GET is not allowed")
        assert http.post("/v1/models").status_code == 405
        for path in ("/v1/models/", "/v1//models", "//v1/models/tiny/"):
            assert http.get(f"{site.url}{path}").status_code == 200
        assert http.head("/v1/models").status_code == 200
        for path in ("//moectl", "/moectl/", "/moectl//stop"):
            assert http.post(f"{site.url}{path}").status_code == 404
        assert http.get("/v2").json()["error"]["code"] == "unknown_url"
        assert post(good).status_code == 200


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_beyond_the_limit(site: Site, declared: bool) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(MAX_BODY_BYTES // 2**20 + 1):
            yield b" " * 2**20

    headers = {"content-type": "application/json"}
    with site.http() as http:
        content: Any = b" " * (MAX_BODY_BYTES + 1) if declared else chunks()
        reply = http.post("/v1/completions", content=content, headers=headers)
        assert (reply.status_code, reply.json()["error"]["code"]) == (413, TOO_LONG)
        assert http.get("/v1/models").status_code == 200


def test_a_stop_ends_streams_within_their_grace(tmp_path: Path) -> None:
    running = run_site(tmp_path / "run" / "s", None)
    site = next(running)
    with site.client() as client:
        stream = ask(client, "endless", stream=True)
        next(stream)
        with pytest.raises(StopIteration):
            next(running)  # stops the server, and asserts that it ended
        with pytest.raises(openai.APIError, match="moectl is stopping") as caught:
            list(stream)
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["hint"] == "moectl serve"
    assert site.cluster.running == 0
    assert not (tmp_path / "run" / "s").exists()
    again = run_site(tmp_path / "run" / "s", None)
    with next(again).client() as client:
        ask(client)
    with pytest.raises(StopIteration):
        next(again)


# 5,000 bad requests, straight into the application: what matters here is not TCP.

CALL_S = 20


async def call(app: Any, path: str, body: bytes, *, after: Any = None) -> tuple[int, bytes]:
    """Post a body to an ASGI application; return the status and the body of the reply.

    With `after`, a message or Ellipsis for none, the body is only the first part of what was promised.
    """
    headers = [(b"content-type", b"application/json"), (b"host", b"localhost")]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8080),
    }
    sent: list[Any] = []
    asked: Iterator[Any] = iter([{"type": "http.request", "body": body, "more_body": after is not None}])
    if after not in (None, ...):
        asked = itertools.chain(asked, [after])

    async def receive() -> Any:
        for message in asked:
            return message
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    async with asyncio.timeout(CALL_S):
        await app(scope, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent)


GOOD = {
    "/v1/chat/completions": {"messages": say("hello"), "max_tokens": 1},
    "/v1/completions": {"prompt": "hello", "max_tokens": 1},
}
SHARED = [
    "model",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stop",
    "n",
]
SHARED += [
    "stop",
    "repetition_penalty",
    "stream",
    "stream_options",
    "ignore_eos",
    "logit_bias",
    "logprobs",
    "max_tokens",
]
FIELDS = {
    "/v1/chat/completions": [*SHARED, "messages", "top_logprobs", "max_completion_tokens", "tools", "response_format"],
    "/v1/completions": [*SHARED, "prompt", "echo", "suffix", "best_of"],
}
OTHERS = {
    "/v1/messages": {"messages": say("hello"), "max_tokens": 1},
    "/v1/responses": {"input": "hello", "max_output_tokens": 1},
}
FIELDS |= {
    "/v1/messages": [
        *("model", "max_tokens", "messages", "system", "stop_sequences", "stream", "temperature", "top_k", "top_p"),
        *("tools", "tool_choice", "thinking", "output_config", "mcp_servers", "metadata"),
    ],
    "/v1/responses": [
        *("model", "input", "instructions", "max_output_tokens", "previous_response_id", "background", "stream"),
        *("text", "reasoning", "tools", "tool_choice", "parallel_tool_calls", "temperature", "top_logprobs", "include"),
    ],
}
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**31, 2**63, 2**64, -(2**63) - 1, 10**400, -1, 0])
    | st.floats()
    | st.text(st.characters(), max_size=8)
)
junk = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "include_usage", "input", "name", "7"])
            | st.text(max_size=4),
            inner | st.sampled_from(["user", "assistant", "text", "tool_use", "function_call", "reasoning"]),
            max_size=4,
        )
    ),
    max_leaves=6,
)


async def check(app: Any, path: str, body: bytes) -> int:
    """Post a body; return 1 if it was a bad request, which has to be told in the API's shape."""
    status, reply = await call(app, path, body)
    assert status < 500, (body, reply)
    if status == 200:
        return 0
    error = json.loads(reply)["error"]
    assert isinstance(error["message"], str)
    assert len(error["message"]) < 1000
    assert error["type"] in ("invalid_request_error", "not_found_error")  # the second is Anthropic's
    return 1


async def check_all(junk: list[Any], raw: list[bytes]) -> int:
    app, bad = make_app(FakeCluster()), 0
    for path, good in {**GOOD, **OTHERS}.items():
        for value in junk:
            for field in FIELDS[path]:
                bad += await check(app, path, json.dumps({**good, field: value}).encode())
        for body in raw:
            bad += await check(app, path, body)
        status, reply = await call(app, path, json.dumps(good).encode())
        usage = json.loads(reply)["usage"]
        assert (status, usage.get("completion_tokens", usage.get("output_tokens"))) == (200, 1)
    return bad


def test_bad_requests_are_refused_and_good_ones_answered() -> None:
    bad = 0

    @settings(max_examples=90, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(junk, min_size=2, max_size=4), st.lists(st.binary(max_size=32), max_size=4))
    def throw(values: list[Any], raw: list[bytes]) -> None:
        nonlocal bad
        bad += asyncio.run(check_all(values, raw))

    throw()
    assert bad >= 5000


def test_every_byte_of_a_good_request_may_be_missing() -> None:
    body = json.dumps({**GOOD["/v1/chat/completions"], "stop": ["x"], "logit_bias": {"7": 1}}).encode()

    async def cut() -> AsyncIterator[int]:
        app = make_app(FakeCluster())
        for length in range(len(body)):
            yield await check(app, "/v1/chat/completions", body[:length])
            yield await check(app, "/v1/chat/completions", body[length:])

    async def count() -> int:
        return sum([bad async for bad in cut()])

    assert asyncio.run(count()) == 2 * len(body) - 1  # cut at 0 is the whole


def test_bodies_that_never_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moectl.server.http.BODY_S", 0.05)
    cluster = FakeCluster()
    app = make_app(cluster)
    assert asyncio.run(call(app, "/v1/completions", b"{", after=...))[0] == 408
    asyncio.run(call(app, "/v1/completions", b"{", after={"type": "http.disconnect"}))
    assert cluster.requests == []


def test_a_prompt_at_the_edge_of_the_context(site: Site) -> None:
    with site.client() as client:
        fits: list[Any] = [1] * (MODEL.max_seq_len - 1)
        assert client.completions.create(model="tiny", prompt=fits, max_tokens=1).choices[0].text
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="tiny", prompt=[*fits, 1], max_tokens=1)
        assert caught.value.code == "context_length_exceeded"
