"""Hostile bodies for every endpoint that asks the model: a right answer or a refusal in the protocol's own form.

Behind the server is what each rank does with a request: the worker protocol, the chat template and the tokenizer.
`pytest tests/server/test_api_fuzz.py --fuzz-seconds 300` gives each endpoint five minutes.
"""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from moectl.engine.answer import read_prompt
from moectl.engine.protocol import Generate, decode, encode
from moectl.engine.request import MAX_DEPTH, MAX_MESSAGES, MAX_PROMPT_BYTES, MAX_TOOLS, Request
from moectl.errors import UsageError
from moectl.server import messages, responses
from moectl.server.http import CHAT, make_app
from moectl.shards.chat.tokenizer import Tokenizer
from tests.server.test_http import call
from tests.support.callers import STYLES, make_caller
from tests.support.fake_cluster import FakeAnswer, FakeCluster
from tests.support.mutation import fuzz, refuse_or_accept

COMPLETIONS = "/v1/completions"
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "enum": [1, 2]}, "b": {"anyOf": [{"type": "string"}, {"type": "null"}]}},
    "required": ["a"],
    "additionalProperties": False,
}
ABOUT = {"name": "add", "description": "Add"}
TEXT = {"type": "text", "text": "5"}
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {
        "model": "tiny",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "2+3?"}]},
            {
                "role": "assistant",
                "content": None,
                "reasoning_content": "I add.",
                "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": "3"}'}}
                ],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "5"},
            {"role": "user", "content": "Go on."},
        ],
        "tools": [{"type": "function", "function": {**ABOUT, "parameters": SCHEMA, "strict": False}}],
        "tool_choice": {"type": "function", "function": {"name": "add"}},
        "parallel_tool_calls": False,
        "max_completion_tokens": 2,
        "stop": ["END"],
        "logit_bias": {"7": 1},
        "logprobs": True,
        "top_logprobs": 2,
        "chat_template_kwargs": {"enable_thinking": True},
        "stream_options": {"include_usage": True},
    },
    COMPLETIONS: {"model": "tiny", "prompt": ["hello", "you"], "max_tokens": 2, "stop": "END", "logprobs": 1, "n": 2},
    messages.PATH: {
        "model": "tiny",
        "max_tokens": 2,
        "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            {"role": "user", "content": "2+3?"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "I add.", "signature": "x"},
                    {"type": "tool_use", "id": "c1", "name": "add", "input": {"a": 2}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "c1", "is_error": True, "content": [TEXT]},
                    {"type": "text", "text": "Go on."},
                ],
            },
        ],
        "tools": [{**ABOUT, "input_schema": SCHEMA}],
        "tool_choice": {"type": "tool", "name": "add", "disable_parallel_tool_use": True},
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "output_config": {"effort": "low"},
        "stop_sequences": ["END"],
    },
    responses.PATH: {
        "model": "tiny",
        "instructions": "Be brief.",
        "input": [
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "2+3?"}]},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "I add."}]},
            {"type": "function_call", "call_id": "c1", "name": "add", "arguments": '{"a": 2}'},
            {"type": "function_call_output", "call_id": "c1", "output": "5"},
        ],
        "tools": [{"type": "function", **ABOUT, "parameters": SCHEMA, "strict": False}],
        "tool_choice": {"type": "function", "name": "add"},
        "reasoning": {"effort": "low"},
        "text": {"format": {"type": "text"}},
        "max_output_tokens": 2,
    },
}  # fmt: skip
BODIES[f"{messages.PATH}/count_tokens"] = BODIES[messages.PATH]
TALK = {CHAT: "messages", messages.PATH: "messages", responses.PATH: "input"}  # where the conversation is


class RankedCluster(FakeCluster):
    """A cluster that reads each request as its ranks do."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self.prompt = ""  # the last one, as the model reads it

    async def submit(self, request: Request) -> FakeAnswer:
        told = decode(encode(Generate(request)))
        assert told == Generate(request)
        tokens = read_prompt(request, self._tokenizer, vocab_size=10**6, max_seq_len=10**6)
        self.prompt = self._tokenizer.decode(tokens)
        return await super().submit(request)


@pytest.fixture(scope="module", params=["json_tools", pytest.param("as text", marks=pytest.mark.long)])
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RankedCluster:
    """One of a template that knows tools, one of a template that knows none."""
    plain = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    more = {} if request.param == "json_tools" else {"template": plain}
    return RankedCluster(make_caller(tmp_path_factory.mktemp("caller"), STYLES["json_tools"], **more))


def reader(cluster: FakeCluster, path: str) -> Callable[[bytes], None]:
    """Return what posts a body, and raises UsageError for a refusal in the protocol's form."""
    app = make_app(cluster)

    def read(body: bytes) -> None:
        status, reply = asyncio.run(call(app, path, body))
        if status == 200:
            assert reply.startswith((b"{", b"event: ", b"data: ", b": "))
            return
        assert status in (400, 404, 413), reply
        told = json.loads(reply)
        if path.startswith(messages.PATH):
            assert told["type"] == "error"
            assert told["error"]["type"] in ("invalid_request_error", "not_found_error", "request_too_large")
        else:
            assert told["error"]["type"] == "invalid_request_error"
        message = told["error"]["message"]
        assert len(message) < 1000
        raise UsageError(message)

    return read


@pytest.fixture
def seconds(pytestconfig: pytest.Config) -> float:
    """How long each target is to be fuzzed; 0: the short run."""
    return float(pytestconfig.getoption("fuzz_seconds"))


@pytest.mark.parametrize("path", BODIES)
def test_edited_bodies(cluster: RankedCluster, path: str, seconds: float) -> None:
    bodies = [json.dumps({**BODIES[path], "stream": stream}).encode() for stream in (False, True)]
    fuzz(path, bodies, reader(cluster, path), seconds=seconds)


def nest(levels: int, value: Any = 1) -> Any:
    for _ in range(levels):
        value = {"properties": {"a": value}}
    return value


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (container, key) of each value in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield value, key
        yield from places(each)


HOSTILE = ["\ud800", "\0\x1b[2J\u2028\u202e", 10**400, {"a": {}}, nest(300)]
MORE = ["{{ ''.__class__ }}{% for i in range(9**9) %}x{% endfor %}", -0.0, "x" * 2000, [], {}, [None] * 1000, True]


def shorten(value: Any) -> str:
    return ascii(value)[:20]


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    "hostile", [*HOSTILE, *(pytest.param(value, marks=pytest.mark.long) for value in MORE)], ids=shorten
)
def test_one_hostile_value_anywhere(cluster: RankedCluster, path: str, hostile: Any) -> None:
    read = reader(cluster, path)
    for number, _ in enumerate(places(BODIES[path])):
        body = copy.deepcopy(BODIES[path])
        container, key = list(places(body))[number]
        container[key] = hostile
        refuse_or_accept(read, json.dumps(body).encode())
        if isinstance(container, dict) and isinstance(hostile, str):
            container[hostile] = container.pop(key)
            refuse_or_accept(read, json.dumps(body).encode())
    assert refuse_or_accept(read, json.dumps(BODIES[path]).encode()), "the server goes on"


@pytest.mark.parametrize("path", TALK)
def test_what_a_request_says_is_never_a_template(cluster: RankedCluster, path: str) -> None:
    body = json.dumps(BODIES[path])
    for text in ("2+3?", "Be brief.", '"Add"'):
        body = body.replace(text.strip('"'), "{% if 1 %}{{ 7 * 7 }}{% endif %}")
    assert refuse_or_accept(reader(cluster, path), body.encode())
    assert cluster.prompt.count("{% if 1 %}{{ 7 * 7 }}{% endif %}") == 3
    assert "49" not in cluster.prompt


def with_tools(path: str, tools: list[tuple[str, Any]]) -> bytes:
    """Return a body with tools of these names and schemas."""
    [tool] = BODIES[path]["tools"]
    made = []
    for name, schema in tools:
        parts = {"name": name, "input_schema" if path == messages.PATH else "parameters": schema}
        made.append({**tool, "function": {**tool["function"], **parts}} if path == CHAT else {**tool, **parts})
    return json.dumps({**BODIES[path], "tools": made, "tool_choice": None}).encode()


@pytest.mark.parametrize("path", TALK)
def test_tools_have_limits(cluster: RankedCluster, path: str) -> None:
    read = reader(cluster, path)
    plain = {"type": "object"}
    assert refuse_or_accept(read, with_tools(path, [(f"t{i}", plain) for i in range(MAX_TOOLS)]))
    refused = [
        [(f"t{i}", plain) for i in range(MAX_TOOLS + 1)],
        [("a", nest(MAX_DEPTH))],
        [("a", {"type": "object", "description": "x" * (MAX_PROMPT_BYTES + 1)})],
        *([(name, plain)] for name in ("", "a b", "a\n", "ä", "\0", "x" * 129, "<tool_call>", "\ud800")),
    ]
    for tools in refused:
        assert not refuse_or_accept(read, with_tools(path, tools)), tools[0][0]


def test_many_tools_of_which_many_are_allowed_take_no_time(cluster: RankedCluster) -> None:
    names = [f"t{i}" for i in range(50_000)]
    tools = [{"function": {"name": name}} for name in names]
    choice = {"type": "allowed_tools", "allowed_tools": {"tools": [{"name": name} for name in names]}}
    body = {**BODIES[CHAT], "tools": tools, "tool_choice": choice}
    assert not refuse_or_accept(reader(cluster, CHAT), json.dumps(body).encode())


@pytest.mark.parametrize("path", TALK)
def test_conversations_have_limits(cluster: RankedCluster, path: str) -> None:
    read = reader(cluster, path)

    def talk(count: int) -> bytes:
        roles = [{"role": ("user", "assistant")[i % 2], "content": "x"} for i in range(count)]
        return json.dumps({TALK[path]: roles, "max_tokens": 1}).encode()

    assert refuse_or_accept(read, talk(301))
    assert not refuse_or_accept(read, talk(MAX_MESSAGES + 1))


@pytest.mark.parametrize("path", BODIES)
def test_what_is_hardly_json(cluster: RankedCluster, path: str) -> None:
    read = reader(cluster, path)
    whole = json.dumps(BODIES[path])
    for levels in (70, 900, *range(950, 1000, 5)):
        assert not refuse_or_accept(read, f'{{"metadata": {"[" * levels + "]" * levels}, {whole[1:]}'.encode())
    for refused in (
        "[" * 100_000, '{"a":' * 100_000, '{"messages":' + "9" * 5000 + "}", '{"max_tokens": NaN}', '"\\ud800"', "",
        whole + whole, whole[:-1] + ', "model": "other"}', "\0", "{'messages': []}",
    ):  # fmt: skip
        assert not refuse_or_accept(read, refused.encode())
    for bad in (b"\xff\xfe", b'{"model": "\xed\xa0\x80"}', whole.encode()[:-1] + b"\x80}"):
        assert not refuse_or_accept(read, bad)
    assert refuse_or_accept(read, f"\ufeff{whole}".encode())  # Windows' mark
    # Of a name that is there twice the last counts, as in every usual reader.
    assert refuse_or_accept(read, f'{{"model": "other", {whole[1:]}'.encode())
