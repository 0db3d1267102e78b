"""One answer's events where the model thinks first: what is told as thinking, what stop texts end, what is counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moectl.engine.answer import Answer, read_prompt
from moectl.engine.protocol import Done, Token
from moectl.engine.request import Request
from moectl.engine.sampling import Sampler
from moectl.errors import BadField
from moectl.shards.chat.tokenizer import Tokenizer
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
