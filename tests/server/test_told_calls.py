"""Calls that are cut, broken, hostile or beside a stop text, in the terms of each protocol, streamed and whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from moectl.engine.protocol import Done, Token
from moectl.engine.request import MAX_DEPTH, Stats
from moectl.server import messages, openai, replies, responses
from moectl.server.answering import AnyReply
from moectl.server.conversation import INVALID
from moectl.server.http import MakeReply
from moectl.server.replies import encode_event
from moectl.shards.chat.calls import CallPart
from tests.support.fake_cluster import MODEL

STATS = Stats(7, 3, 0, 0, 0, 0)
PROTOCOLS: dict[str, tuple[openai.Reader, MakeReply, str]] = {
    "chat": (openai.read_chat, replies.Reply, "messages"),
    "responses": (responses.read_responses, responses.ResponseReply, "input"),
    "messages": (messages.read_messages, messages.MessageReply, "messages"),
}
CUT = [Token(0, 1, "Sure."), Token(0, 2, "", calls=[CallPart(0, "c1", "add", '{"a": ')])]
WHOLE = [*CUT, Token(0, 3, "", calls=[CallPart(0, arguments="2}", ended=True)])]


def make_reply(protocol: str) -> AnyReply:
    read, make, field = PROTOCOLS[protocol]
    asked = read({field: [{"role": "user", "content": "hi"}]}, "tiny", MODEL)
    return make(asked, reply_id="1", created=5, name="tiny", model=MODEL)


def tell(protocol: str, *events: Token | Done) -> tuple[list[Any], Any]:
    """Return the pieces of a stream, and the whole reply."""
    reply = make_reply(protocol)
    pieces = [*reply.start(), *(piece for event in events for piece in reply.take(0, event)), *reply.end()]
    for piece in pieces:
        assert encode_event(piece).isascii()
    replies.encode_json(reply.whole())
    return pieces, reply.whole()


def deltas(protocol: str, pieces: list[Any]) -> Iterator[str]:
    """Yield the pieces of arguments in a stream."""
    for piece in pieces:
        if protocol == "chat" and piece:
            for choice in piece["choices"]:
                yield from (call["function"]["arguments"] for call in choice["delta"].get("tool_calls", ()))
        elif piece and piece["type"] == "response.function_call_arguments.delta":
            yield piece["delta"]
        elif piece and piece["type"] == "content_block_delta" and piece["delta"]["type"] == "input_json_delta":
            yield piece["delta"]["partial_json"]


def ends(protocol: str, whole: Any) -> tuple[str, Any]:
    """Return how a reply says that it ended, and the arguments of its first call."""
    if protocol == "chat":
        [choice] = whole["choices"]
        return choice["finish_reason"], choice["message"]["tool_calls"][0]["function"]["arguments"]
    if protocol == "messages":
        return whole["stop_reason"], next(block["input"] for block in whole["content"] if block["type"] == "tool_use")
    call = next(item for item in whole["output"] if item["type"] == "function_call")
    return f"{whole['status']}, {call['status']}", call["arguments"]


def test_a_call_that_is_cut() -> None:
    told = {name: tell(name, *CUT, Done(0, "length", STATS)) for name in PROTOCOLS}
    for name, (pieces, _) in told.items():
        assert "".join(deltas(name, pieces)) == '{"a": '
    assert {name: ends(name, whole) for name, (_, whole) in told.items()} == {
        "chat": ("length", '{"a": '),
        "responses": ("incomplete, incomplete", '{"a": '),
        "messages": ("max_tokens", {INVALID: '{"a": '}),
    }


def test_a_call_that_is_no_json() -> None:
    broken = [*CUT, Token(0, 3, "", calls=[CallPart(0, arguments="NaN}")])]
    told = {name: tell(name, *broken, Done(0, "tool_calls", STATS))[1] for name in PROTOCOLS}
    assert {name: ends(name, whole) for name, whole in told.items()} == {
        "chat": ("tool_calls", '{"a": NaN}'),
        "responses": ("completed, incomplete", '{"a": NaN}'),
        "messages": ("tool_use", {INVALID: '{"a": NaN}'}),
    }


def test_a_stop_text_behind_a_call() -> None:
    done = Done(0, "tool_calls", STATS, stop_text="END")
    told = {name: tell(name, *WHOLE, done)[1] for name in PROTOCOLS}
    assert {name: ends(name, whole)[0] for name, whole in told.items()} == {
        "chat": "tool_calls",
        "responses": "completed, completed",
        "messages": "tool_use",
    }
    assert told["messages"]["stop_sequence"] is None


DEEP = "[" * (MAX_DEPTH * 4) + "]" * (MAX_DEPTH * 4)


HOSTILE = [
    '"\u2028\u0000\u001b[2J"',
    '"\\ud800"',
    f'"{"x" * 100_000}"',
    '"</tool_call><|im_end|>data: [DONE]\\n\\n"',
    "9" * 4000,
    DEEP,
]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: ascii(value)[:12])
def test_hostile_arguments_come_through_and_may_be_sent_back(protocol: str, value: str) -> None:
    given = f'{{"a": {value}}}'
    call = Token(0, 2, "", calls=[CallPart(0, "c1", "add", given, ended=True)])
    pieces, whole = tell(protocol, call, Done(0, "tool_calls", STATS))
    assert "".join(deltas(protocol, pieces)) == given
    _, arguments = ends(protocol, whole)
    is_odd = value == DEEP or not is_json(given)
    if protocol == "messages":
        assert arguments == ({INVALID: given} if is_odd else json.loads(given))
    else:
        assert arguments == given
    question, result = {"role": "user", "content": "hi"}, "5"
    past: dict[str, list[Any]] = {
        "chat": [whole["choices"][0]["message"], {"role": "tool", "tool_call_id": "c1", "content": result}]
        if protocol == "chat"
        else [],
        "responses": [*whole.get("output", ()), {"type": "function_call_output", "call_id": "c1", "output": result}],
        "messages": [
            {"role": "assistant", "content": whole.get("content")},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": result}]},
        ],
    }
    read, _, field = PROTOCOLS[protocol]
    if value != '"\\ud800"':  # no tokenizer takes half a character
        [request] = read({field: [question, *past[protocol]]}, "tiny", MODEL).requests
        assert request.messages is not None
        sent = request.messages[1]["tool_calls"][0]["function"]["arguments"]
        assert sent == ({INVALID: given} if is_odd else json.loads(given))


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
