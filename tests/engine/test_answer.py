"""One answer's events where the model thinks or calls tools: what is told as what, what stop texts end, what counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moectl.engine.answer import Answer, read_prompt
from moectl.engine.protocol import Done, Token
from moectl.engine.request import Request
from moectl.engine.sampling import Sampler
from moectl.errors import BadField
from moectl.server.blocks import TEXT, Blocks
from moectl.shards.chat.tokenizer import Tokenizer
from tests.support.callers import STYLES, make_caller, make_tool
from tests.support.thinkers import ALWAYS, QWEN, make_thinker
from tests.support.words import ask_chat


@pytest.fixture(scope="module")
def always(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_thinker(tmp_path_factory.mktemp("always"), ALWAYS)


def start(request: Request, tokenizer: Tokenizer) -> Answer:
    answer = Answer(request, read_prompt(request, tokenizer, vocab_size=9999, max_seq_len=9999))
    answer.lead(tokenizer, Sampler(request, prompt_tokens=len(answer.prompt)))
    return answer


def tell(answer: Answer, tokens: list[int], end: str = "stop") -> tuple[str, str, Done]:
    """Return thinking, text and end of an answer of these tokens, which has nothing more to say."""
    events: list[Any] = []
    for token in tokens:
        events += answer.tell(token, None)
    if not answer.ended:
        events += answer.end(end)
    *told, done = events
    assert isinstance(done, Done)
    assert all(isinstance(event, Token) for event in told)
    thinking = "".join(event.thinking for event in told) + done.rest_thinking
    return thinking, "".join(event.text for event in told) + done.rest, done


def test_thinking_is_told_and_counted(always: Tokenizer) -> None:
    tokens = always.encode("2 + 2\n</think>\n\n4")
    thinking, text, done = tell(start(ask_chat(1, "2+2?", 99), always), tokens)
    assert (thinking, text, done.finish_reason) == ("2 + 2", "4", "stop")
    assert done.stats.completion_tokens == len(tokens)
    assert done.stats.thinking_tokens == len(always.encode("2 + 2\n</think>"))


def test_an_answer_that_is_cut_while_it_thinks(always: Tokenizer) -> None:
    thinking, text, done = tell(start(ask_chat(1, "2+2?", 5), always), always.encode("2 + 2"), "length")
    assert (thinking, text, done.finish_reason) == ("2 + 2", "", "length")
    assert done.stats.thinking_tokens == done.stats.completion_tokens


def test_stop_texts_end_the_answer_and_not_the_thinking(always: Tokenizer) -> None:
    request = ask_chat(1, "2+2?", 99, stop=("END", "inking"))
    thinking, text, done = tell(start(request, always), always.encode("thinking END</think>it is END of it"))
    assert (thinking, text, done.finish_reason) == ("thinking END", "it is ", "stop")
    # No stop text begins in the one and ends in the other.
    request = ask_chat(1, "2+2?", 99, stop=("ab",))
    assert tell(start(request, always), always.encode("a</think>b"))[:2] == ("a", "b")


@pytest.mark.parametrize("cut", [0, 2, 4, 6, 7])
def test_a_resumed_answer_goes_on_where_it_was(always: Tokenizer, cut: int) -> None:
    tokens = always.encode("2 + 2\n</think>\n\n4 😀!")
    whole = tell(start(ask_chat(1, "x", 99), always), tokens)
    first = start(ask_chat(1, "x", 99), always)
    before: list[Any] = [event for token in tokens[:cut] for event in first.tell(token, None)]
    rest = tell(start(ask_chat(2, "x", 99, answered=tuple(tokens[:cut])), always), tokens[cut:])
    assert "".join(event.thinking for event in before) + rest[0] == whole[0]
    assert "".join(event.text for event in before) + rest[1] == whole[1]
    assert rest[2].stats.thinking_tokens == whole[2].stats.thinking_tokens


def test_a_raw_text_is_continued_as_it_is(always: Tokenizer) -> None:
    thinking, text, done = tell(start(Request(1, "<think>", 99), always), always.encode("a</think>b"))
    assert (thinking, text, done.stats.thinking_tokens) == ("", "a</think>b", 0)


def test_a_request_says_whether_to_think(tmp_path: Path, always: Tokenizer) -> None:
    qwen = make_thinker(tmp_path, QWEN)
    limits = {"vocab_size": 9999, "max_seq_len": 9999}
    for request in (
        ask_chat(1, "x", 9, think=False),
        ask_chat(1, "x", 9, template_options={"enable_thinking": False}),
        ask_chat(1, "x", 9, template_options={"reasoning_effort": "none"}),
    ):
        assert qwen.decode(read_prompt(request, qwen, **limits)).endswith("</think>\n\n")
    with pytest.raises(BadField, match="cannot be turned off"):
        read_prompt(ask_chat(1, "x", 9, think=False), always, **limits)


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_caller(tmp_path_factory.mktemp("caller"), STYLES["json_tools"])


def call(caller: Tokenizer, text: str, end: str = "stop", **more: Any) -> tuple[str, list[tuple[str, Any]], Done]:
    """Return text, whole calls and end of an answer of this text to a request with a tool."""
    answer = start(ask_chat(1, "x", 99, tools=(make_tool(),), **more), caller)
    tokens = encode(caller, text) + encode(caller, "<|im_end|>") * (end == "stop")
    events = [event for token in tokens[:-1] for event in answer.tell(token, None)]
    if not answer.ended:
        events += answer.tell(tokens[-1], end)
    return gather(events)


def encode(caller: Tokenizer, text: str) -> list[int]:
    return caller._tokens.encode(text, add_special_tokens=False).ids


def gather(events: list[Any]) -> tuple[str, list[tuple[str, Any]], Done]:
    done = events[-1]
    assert isinstance(done, Done)
    answer = Blocks()
    for event in events:
        for _ in answer.take(event):
            pass
    assert all(each.is_whole for each in answer.calls)
    return answer.text(TEXT), [(each.name, json.loads(each.text)) for each in answer.calls], done


ONE = '<tool_call>{"name": "f", "arguments": {"p": "STOP"}}</tool_call>'


def test_an_answer_that_calls_tools(caller: Tokenizer) -> None:
    text, calls, done = call(caller, f"Sure: {ONE}\n{ONE}")
    assert (text, calls, done.finish_reason) == ("Sure: ", [("f", {"p": "STOP"})] * 2, "tool_calls")
    assert call(caller, "Sure.")[2].finish_reason == "stop"
    text, calls, done = call(caller, f"Sure: {ONE}", parallel_calls=False)
    assert (text, calls, done.finish_reason) == ("Sure: ", [("f", {"p": "STOP"})], "tool_calls")
    text, calls, done = call(caller, f"{ONE}\n{ONE}", parallel_calls=False)
    assert (len(calls), done.finish_reason, done.stop_text) == (1, "tool_calls", None)
    assert done.stats.completion_tokens < len(encode(caller, ONE))  # it ends with the call's arguments


def test_a_cut_answer_calls_only_what_is_whole(caller: Tokenizer) -> None:
    half = ONE[: len(ONE) // 2]
    text, calls, done = call(caller, ONE + half, "length")
    assert (calls, done.finish_reason) == ([("f", {"p": "STOP"})], "length")
    assert text == half
    assert call(caller, ONE, "length")[2].finish_reason == "length"


def test_stop_texts_end_text_and_no_call(caller: Tokenizer) -> None:
    text, calls, done = call(caller, f"ST {ONE} a STOP b", stop=("STOP", "tool_call>"))
    assert (text, calls, done.stop_text) == ("ST a ", [("f", {"p": "STOP"})], "STOP")
    assert done.finish_reason == "tool_calls"
    # What is held back as the beginning of a stop text is told before a call that follows it.
    assert call(caller, f"a ST{ONE}OP", stop=("STOP",))[:2] == ("a STOP", [("f", {"p": "STOP"})])
    text, calls, done = call(caller, f"a STOP {ONE}", stop=("STOP",))
    assert (text, calls, done.finish_reason, done.stop_text) == ("a ", [], "stop", "STOP")
    broken = "<tool_call>STOP</tool_call>"
    assert call(caller, f"a {broken}", stop=("STOP",))[0] == "a <tool_call>"


def test_a_resumed_answer_calls_what_was_not_called(caller: Tokenizer) -> None:
    tokens = encode(caller, f"Sure: {ONE}\n{ONE}")
    end = caller.encode("<|im_end|>")[0]
    for cut in range(0, len(tokens) + 1, 5):
        first = start(ask_chat(1, "x", 99, tools=(make_tool(),)), caller)
        events = [event for token in tokens[:cut] for event in first.tell(token, None)]
        again = start(ask_chat(2, "x", 99, tools=(make_tool(),), answered=tuple(tokens[:cut])), caller)
        events += [event for token in tokens[cut:] for event in again.tell(token, None)]
        text, calls, done = gather([*events, *again.tell(end, "stop")])
        assert (text, calls, done.finish_reason) == ("Sure: ", [("f", {"p": "STOP"})] * 2, "tool_calls")
    ended = start(
        ask_chat(3, "x", 99, tools=(make_tool(),), parallel_calls=False, answered=tuple(encode(caller, ONE))), caller
    )
    assert ended.has_stop
    assert gather(list(ended.end("stop")))[2].finish_reason == "tool_calls"
