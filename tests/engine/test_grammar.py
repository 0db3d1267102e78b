"""Answers that are held to a form: always valid, whatever the model wants, and without an effect on the other rows."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import pytest

from moectl.demo import demo_dir
from moectl.engine.network.load import load_rank
from moectl.engine.protocol import Refused, Token
from moectl.engine.schema import check_schema
from moectl.model.manifest import read_manifest
from moectl.shards.chat.tokenizer import open_tokenizer
from tests.support.cutting import cut
from tests.support.driven import Driven
from tests.support.schemas import make_schema

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    out = tmp_path_factory.mktemp("grammar") / "shards"
    cut(demo_dir(), out, split="hidden", nodes=1)
    return load_rank(out, read_manifest(out), 0), open_tokenizer(out)


def check_answers(parts: tuple[Any, Any], numbers: range) -> None:
    """Answer random schemas in batches, each with its own seed and temperature, and validate each answer."""
    driven = Driven(parts, max_seq_len=2048)
    schemas = {}
    for number in numbers:
        schema = make_schema(random.Random(number))
        check_schema(schema, "schema")
        temperature = (0.0, 0.4, 0.8, 1.2, 1.5)[number % 5]
        asked = driven.ask("Tell me.", 1900, raw=False, schema=schema, seed=number, temperature=temperature)
        schemas[asked] = schema
    driven.run()
    for asked, schema in schemas.items():
        assert driven.reason(asked) == "stop", schema
        jsonschema.validate(json.loads(driven.text(asked)), schema)


def test_answers_to_random_schemas_are_valid(parts: tuple[Any, Any]) -> None:
    check_answers(parts, range(5))


@pytest.mark.long
def test_answers_to_a_hundred_random_schemas_are_valid(parts: tuple[Any, Any]) -> None:
    check_answers(parts, range(100))


def test_other_rows_of_the_batch_stay_the_same(parts: tuple[Any, Any]) -> None:
    def answer(*, held: bool) -> tuple[Driven, list[int], list[int]]:
        driven = Driven(parts)
        greedy = driven.ask("Who are you?", 24, raw=False)
        if held:
            driven.ask("Who are you?", 99, raw=False, schema=PERSON)
        sampled = driven.ask("Why?", 24, raw=False, temperature=0.9, seed=3)
        driven.run()
        return driven, driven.tokens(greedy), driven.tokens(sampled)

    driven, *together = answer(held=True)
    _, *apart = answer(held=False)
    assert together == apart
    jsonschema.validate(json.loads(driven.text(2)), PERSON)


def test_an_answer_that_is_resumed_keeps_its_form(parts: tuple[Any, Any]) -> None:
    whole = Driven(parts)
    whole.ask("Who?", 99, raw=False, schema=PERSON, seed=1, temperature=1.2)
    whole.run()
    tokens = whole.tokens(1)
    for cut_at in (1, len(tokens) // 2, len(tokens)):
        resumed = Driven(parts)
        resumed.ask("Who?", 99, raw=False, schema=PERSON, seed=1, temperature=1.2, answered=tuple(tokens[:cut_at]))
        resumed.run()
        assert tokens[:cut_at] + resumed.tokens(1) == tokens
        assert resumed.reason(1) == "stop"


def test_a_limit_cuts_the_form(parts: tuple[Any, Any]) -> None:
    driven = Driven(parts)
    driven.ask("Who?", 3, raw=False, schema=PERSON)
    driven.run()
    assert driven.reason(1) == "length"
    assert driven.text(1).startswith("{")


def test_a_prompt_without_a_conversation_has_a_form_too(parts: tuple[Any, Any]) -> None:
    driven = Driven(parts)
    driven.ask("A person: ", 99, schema=PERSON, logprobs=2, top_k=1, presence_penalty=1.0)
    driven.run()
    jsonschema.validate(json.loads(driven.text(1)), PERSON)


def test_what_has_no_grammar_is_refused_and_the_others_go_on(parts: tuple[Any, Any]) -> None:
    driven = Driven(parts)
    driven.ask("a", 8)
    refused = driven.ask("b", 8, schema={"type": "integer", "minimum": 2, "maximum": 1})
    driven.ask("c", 8)
    cancelled = driven.ask("d", 8, schema=PERSON)
    driven.cancel(cancelled)
    driven.run()
    [error] = [e.to_error() for e in driven.events if isinstance(e, Refused)]
    assert "Unsatisfiable" in str(error)
    assert not driven.tokens(refused)
    assert [len(driven.tokens(i)) for i in (1, 3)] == [8, 8]
    assert driven.reason(cancelled) == "cancelled"
    assert not any(isinstance(e, Token) and e.id == cancelled for e in driven.events)
