"""Tools in the JSON of chat completions: definitions, choices, past calls and results in; calls out, in both forms."""

from __future__ import annotations

import json
from typing import Any

import pytest

from moectl.engine.protocol import Done, Generate, Token, decode, encode
from moectl.engine.request import MAX_DEPTH, MAX_TOOLS, Request, Stats
from moectl.errors import BadField
from moectl.server.conversation import INVALID
from moectl.shards.chat.calls import CallPart
from tests.server.test_openai import check_form, make_reply, read_chat

HELLO: list[Any] = [{"role": "user", "content": "hello"}]


def define(name: str, **more: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": schema, **more}}


def call(arguments: Any, call_id: str = "1") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": "add", "arguments": arguments}}


def test_tools_and_the_choice_among_them() -> None:
    tools = [define("add"), define("sub", strict=True)]

    def ask(**more: Any) -> Request:
        [request] = read_chat(messages=HELLO, tools=tools, **more).requests
        return request

    for auto in (ask(), ask(tool_choice="auto"), ask(tool_choice=None, parallel_tool_calls=True)):
        assert (auto.tools, auto.must_call, auto.parallel_calls) == (tuple(tools), (), True)
        assert decode(encode(Generate(auto))) == Generate(auto)
    assert ask(tool_choice="none").tools == ()
    assert ask(tool_choice="required").must_call == ("add", "sub")
    named = ask(tool_choice={"type": "function", "function": {"name": "sub"}}, parallel_tool_calls=False)
    assert (named.tools, named.must_call, named.parallel_calls) == (tuple(tools), ("sub",), False)
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "add"}}]}
    some = ask(tool_choice={"type": "allowed_tools", "allowed_tools": allowed})
    assert (some.tools, some.must_call) == ((tools[0],), ("add",))
    bare = {"type": "function", "function": {"name": "f"}}
    [request] = read_chat(messages=HELLO, tools=[bare]).requests
    assert request.tools[0]["function"]["parameters"] == {"type": "object", "properties": {}}


def test_past_calls_and_their_results() -> None:
    talk = [
        *HELLO,
        {"role": "assistant", "content": None, "reasoning": "I add.", "tool_calls": [call('{"a": 2}'), call("", "2")]},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "5"}]},
        {"role": "tool", "tool_call_id": "2", "content": None},
        {"role": "assistant", "content": "", "tool_calls": [call('{"a": 2, "b', "3"), call({"a": 1}, "4")]},
    ]
    [request] = read_chat(messages=talk).requests
    _, first, five, none, second = request.messages or ()
    assert first["reasoning_content"] == "I add."
    assert [each["function"]["arguments"] for each in first["tool_calls"]] == [{"a": 2}, {}]
    assert five == {"role": "tool", "tool_call_id": "1", "content": "5", "name": "add"}
    assert (none["content"], none["name"]) == ("", "add")
    cut, whole = (each["function"]["arguments"] for each in second["tool_calls"])
    assert (cut, whole) == ({INVALID: '{"a": 2, "b'}, {"a": 1})


DEEP: Any = json.loads("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1))
REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"tools": [5]}, "of the type"),
    ({"tools": [{"type": "web_search"}]}, "of the type"),
    ({"tools": [define("")]}, "it is empty"),
    ({"tools": [define("a b")]}, "letters, digits"),
    ({"tools": [define("a"), define("a")]}, "'a' is there twice"),
    ({"tools": [define("a", parameters=5)]}, "parameters should be an object, it is a number"),
    ({"tools": [define("a", parameters={"type": "array"})]}, 'should be "object"'),
    ({"tools": [define("a", parameters={"x": DEEP})]}, f"at most {MAX_DEPTH} objects"),
    ({"tools": [define("a", strict="yes")]}, "should be true or false"),
    ({"tools": [define(f"t{i}") for i in range(MAX_TOOLS + 1)]}, f"at most {MAX_TOOLS}"),
    ({"tools": [define("a")], "tool_choice": "any"}, "should be auto, none, required or name"),
    ({"tools": [define("a")], "tool_choice": {"function": {"name": "b"}}}, "'b' is none of them"),
    ({"tools": [define("a")], "tool_choice": {"type": "function"}}, "should name a function"),
    ({"tools": [define("a")], "parallel_tool_calls": 1}, "should be true or false"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "needs tools"),
    ({"messages": [*HELLO, {"role": "assistant", "tool_calls": [5]}]}, "with a function"),
    ({"messages": [*HELLO, {"role": "assistant", "tool_calls": [call(5)]}]}, "should be a JSON object, it is a number"),
    ({"messages": [*HELLO, {"role": "assistant", "tool_calls": [call({"x": DEEP})]}]}, f"at most {MAX_DEPTH} objects"),
    ({"messages": [*HELLO, {"role": "tool", "tool_call_id": "7", "content": "5"}]}, "name a call before it"),
    ({"messages": [*HELLO, {"role": "assistant", "content": "", "function_call": {"name": "f"}}]}, "older form"),
]


@pytest.mark.parametrize(("fields", "reason"), REFUSALS)
def test_refusals(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadField, match=reason) as caught:
        read_chat(**{"messages": HELLO, **fields})
    check_form(caught.value, [*fields][-1])


def test_calls_are_told_streamed_and_whole() -> None:
    begun, more = CallPart(0, "x1", "add", '{"a"'), CallPart(0, arguments=": 2}", ended=True)
    second = CallPart(1, "x2", "sub", "{}", ended=True)
    events: list[Token | Done] = [
        Token(0, 1, "Sure.", calls=[begun]),
        Token(0, 2, ""),
        Token(0, 3, "", calls=[more]),
        Done(0, "tool_calls", Stats(7, 3, 0, 0, 0, 0), rest_calls=[second]),
    ]
    reply = make_reply(read_chat(messages=HELLO, stream=True))
    deltas = [chunk["choices"][0]["delta"] for event in events for chunk in reply.take(0, event)]
    assert deltas == [
        {
            "content": "Sure.",
            "tool_calls": [
                {"index": 0, "id": "x1", "type": "function", "function": {"name": "add", "arguments": '{"a"'}}
            ],
        },
        {"tool_calls": [{"index": 0, "function": {"arguments": ": 2}"}}]},
        {"tool_calls": [{"index": 1, "id": "x2", "type": "function", "function": {"name": "sub", "arguments": "{}"}}]},
        {},
    ]
    choice = reply.whole()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Sure."
    assert [(c["id"], c["function"]) for c in choice["message"]["tool_calls"]] == [
        ("x1", {"name": "add", "arguments": '{"a": 2}'}),
        ("x2", {"name": "sub", "arguments": "{}"}),
    ]
