"""An answer's text is what its tokens say: told in pieces, it equals what tokenizers decodes of all at once."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders

from moectl.engine.answer import Answer
from moectl.engine.protocol import Done, Event, Token
from moectl.engine.request import Request
from moectl.shards.chat.tokenizer import Tokenizer as Reader
from tests.support import vocabularies

DEMO = Path(__file__).parent.parent.parent / "moectl/demo/moectl-demo/tokenizer.json"
MAKERS: dict[str, Callable[[], Tokenizer]] = {
    "demo": lambda: Tokenizer.from_file(str(DEMO)),
    "cl100k": vocabularies.make_cl100k,
    "llama": vocabularies.make_llama,
    "metaspace": vocabularies.make_metaspace,
    "wordpiece": vocabularies.make_wordpiece,
    "word ends": vocabularies.make_word_ends,
    "words": vocabularies.make_words,
}


@pytest.fixture(scope="module", params=MAKERS)
def tokens(request: pytest.FixtureRequest) -> Tokenizer:
    return MAKERS[request.param]()


def stream(tokens: Tokenizer, answer: list[int]) -> list[str]:
    """Return the pieces of an answer as they are told, what was held back last."""
    text = Reader(tokens, eos_token_ids=set()).stream_text()
    return [*map(text.feed, answer), text.finish()]


def decode(tokens: Tokenizer, answer: list[int]) -> str:
    """Return the text of an answer after other text: some decoders drop the first blank of all."""
    [before] = tokens.encode("a", add_special_tokens=False).ids[-1:]
    said = tokens.decode([before], skip_special_tokens=False)
    whole = tokens.decode([before, *answer], skip_special_tokens=False)
    assert whole.startswith(said)
    return whole[len(said) :]


def numbers(tokens: Tokenizer) -> range:
    """Return all numbers of a vocabulary, those without a token too, and some beyond it."""
    return range(max(tokens.get_vocab().values()) + 30)


def test_every_token_alone(tokens: Tokenizer) -> None:
    reader = Reader(tokens, eos_token_ids=set())
    for number in numbers(tokens):
        assert "".join(stream(tokens, [number])) == reader.tell(number) == decode(tokens, [number]), number


def test_any_sequence(tokens: Tokenizer, request: pytest.FixtureRequest) -> None:
    draw, often = random.Random(7), 5 if request.config.getoption("--long") else 1
    for _ in range(often * (2000 if isinstance(tokens.decoder, decoders.ByteLevel) else 200)):
        answer = draw.choices(numbers(tokens), k=draw.randint(1, 12))
        assert "".join(stream(tokens, answer)) == decode(tokens, answer), answer


def test_long_answers(tokens: Tokenizer) -> None:
    """Of bytes too that make no characters: what is held back stays short."""
    draw = random.Random(7)
    some = [number for number in numbers(tokens) if "\ufffd" in tokens.decode([number], skip_special_tokens=False)]
    for choice in (list(numbers(tokens)), some or [0], (some or [0])[:1]):
        answer = draw.choices(choice, k=400)
        assert "".join(stream(tokens, answer)) == decode(tokens, answer)


@pytest.mark.parametrize("name", ["demo", "cl100k"])
def test_text_of_byte_level_tokens_is_that_of_the_answer_alone(name: str) -> None:
    tokens = MAKERS[name]()
    for text in vocabularies.TEXTS:
        answer = tokens.encode(text).ids
        assert "".join(stream(tokens, answer)) == tokens.decode(answer, skip_special_tokens=False) == text


def test_the_first_blank_is_told_at_once() -> None:
    tokens = MAKERS["cl100k"]()
    assert stream(tokens, tokens.encode("    return").ids)[0].startswith(" ")
    llama = MAKERS["llama"]()
    assert "".join(stream(llama, llama.encode("return 42", add_special_tokens=False).ids)) == " return 42"


def test_no_half_character_is_told() -> None:
    tokens = MAKERS["cl100k"]()
    pieces = stream(tokens, [number for byte in "😀é" for number in tokens.encode(byte).ids])
    assert "".join(pieces) == "😀é"
    assert not any("\ufffd" in piece for piece in pieces)
    llama = MAKERS["llama"]()
    pieces = stream(llama, [llama.get_vocab()[f"<0x{byte:02X}>"] for byte in "😀".encode()])
    assert "".join(pieces) == "😀"


def test_work_per_token_stays_the_same() -> None:
    """However long the answer: a window of tokens is decoded, also while nothing makes a character."""
    tokens = MAKERS["cl100k"]()
    text = Reader(tokens, eos_token_ids=set()).stream_text()
    broken = next(n for n in numbers(tokens) if tokens.decode([n]) == "\ufffd")
    told = "".join(text.feed(number) for number in [broken] * 2000)
    assert len(told) == 1999
    assert len(text._window) < 50


class Greedy:
    """A sampler that says nothing of odds."""

    def take_odds(self) -> None:
        return None


def tell(tokens: Tokenizer, numbers: list[int], **more: Any) -> list[Event]:
    """Return what is told of an answer of these tokens."""
    answer = Answer(Request(1, "x", 99, **more))
    answer.lead(Reader(tokens, eos_token_ids=set()), Greedy())  # type: ignore[arg-type]
    reasons = [None] * (len(numbers) - 1) + ["length"]
    return [event for number, why in zip(numbers, reasons, strict=True) for event in answer.tell(number, why)]


def test_an_answer_tells_numbers_without_a_token() -> None:
    tokens = MAKERS["cl100k"]()
    gap = next(number for number in numbers(tokens) if tokens.id_to_token(number) is None)
    answer = [gap, *tokens.encode(" a b").ids, 99_999, *tokens.encode("c").ids]
    events = tell(tokens, answer)
    assert "".join(event.text for event in events if isinstance(event, Token)) == " a bc"
    assert [event.token for event in events if isinstance(event, Token)] == answer


def test_offsets_count_what_is_held_back() -> None:
    """Each token begins where the answer's text says, whatever a stop text holds back meanwhile."""
    tokens = MAKERS["cl100k"]()
    answer = tokens.encode(" return 42, then é").ids
    *told, done = tell(tokens, answer, stop=(" return 42; ",))
    assert isinstance(done, Done)
    tokens_told = [event for event in told if isinstance(event, Token)]
    text = "".join(token.text for token in tokens_told) + done.rest
    assert text == " return 42, then é"
    for token in tokens_told:
        said = tokens.decode([token.token])
        assert text[token.offset : token.offset + len(said)] == said


def test_a_stop_text_may_begin_with_the_first_blank() -> None:
    tokens = MAKERS["cl100k"]()
    *_, token, done = tell(tokens, tokens.encode(" return").ids, stop=(" re",))
    assert isinstance(token, Token)
    assert (token.text, token.offset) == ("", 0)
    assert isinstance(done, Done)
    assert done.finish_reason == "stop"
