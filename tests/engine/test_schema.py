"""Schemas from anywhere: what is refused, and that no schema takes time or memory without limit."""

from __future__ import annotations

import contextlib
import queue
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from moectl.demo import demo_dir
from moectl.engine.grammar import Grammars, Matcher
from moectl.engine.schema import MAX_SCHEMA_PARTS, check_schema, close
from moectl.errors import BadField, MoectlError
from moectl.shards.chat.answer_grammar import HeldForm
from moectl.shards.chat.tokenizer import open_tokenizer
from tests.support.tiny import json_values


def nest(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def chain(links: int, link: Any) -> dict[str, Any]:
    definitions = {f"d{i}": link({"$ref": f"#/$defs/d{i + 1}"}) for i in range(links)}
    return {"$defs": {**definitions, f"d{links}": {"type": "null"}}, "$ref": "#/$defs/d0"}


REFUSED: list[tuple[Any, str]] = [
    (nest(500), "at most 64 objects and lists within each other"),
    ({"enum": ["x" * 300_000]}, "at most 262144 bytes"),
    ({"properties": {f"p{i}": {} for i in range(MAX_SCHEMA_PARTS)}}, "at most 4096 objects and lists"),
    ({"pattern": "a" * 5000}, "at most 4096 letters"),
    ({"patternProperties": {"a" * 5000: {}}}, "at most 4096 letters"),
    ({"pattern": "(?=a)b"}, "look-around"),
    ({"type": "string", "pattern": "^" + "(a|b|ab)*c" * 200 + "$", "minLength": 500}, "cannot be enforced"),
    ({"multipleOf": 1e-300, "type": "number"}, "too many digits"),
    ({"minimum": float("inf")}, "a number or a letter that JSON cannot have"),
    ({"const": "\ud800"}, "a number or a letter that JSON cannot have"),
    ({"$ref": "#"}, "needs itself within itself"),
    ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "needs itself within itself"),
    ({"type": "array", "minItems": 1, "items": {"$ref": "#"}}, "needs itself within itself"),
    (chain(900, lambda link: link), "refer to each other too often"),
    ({"$ref": "http://example.com/schema"}, "cannot be enforced"),
    ({"$ref": "#/$defs/none"}, "does not exist"),
    ({"allOf": [{"anyOf": [{"properties": {f"p{i}{j}": {}}} for i in range(12)]} for j in range(8)]}, "too large"),
    ({"type": {"a": 1}, "properties": 3, "required": "x", "anyOf": {}, "enum": {}, "minItems": "x"}, "cannot be"),
    ({"type": "array", "items": {"type": "array", "uniqueItems": True}}, "schema.items.uniqueItems cannot be enforced"),
    ({"anyOf": [{"type": "string"}, {"format": "phone"}]}, r"schema.anyOf\[1\].format should be one of"),
    ({"properties": {"a": {"items": {"type": "int"}}}}, "schema.properties.a.items cannot be enforced: Invalid type"),
]
TAKEN: list[Any] = [
    chain(40, lambda link: {"type": "array", "items": link, "minItems": 1}),
    chain(60, lambda link: {"anyOf": [link, link]}),
    {"type": "array", "minItems": 1_000_000, "items": {"type": "string", "minLength": 1_000_000}},
    {"type": "string", "pattern": "((((a{1,50}){1,50}){1,50}){1,50})"},
    {"type": "string", "pattern": "[ab]*a[ab]{25}"},
    {"enum": [f"x{i}" for i in range(10_000)]},
    {"type": "object", "minProperties": 100_000},
    {"oneOf": [{"type": "object", "properties": {f"p{i}": {"const": i}}, "required": [f"p{i}"]} for i in range(300)]},
]


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(open_tokenizer(demo_dir()), 1536)


def make(grammars: Grammars, schema: Any) -> Matcher | MoectlError:
    done: queue.SimpleQueue[Matcher | MoectlError] = queue.SimpleQueue()
    grammars.make(open_tokenizer(demo_dir()).write_grammar(HeldForm(close(schema)), None), (), done.put)
    return done.get()


def walk(made: Matcher | MoectlError, steps: int) -> None:
    """Go on with one of the allowed tokens, until a limit ends the answer."""
    if isinstance(made, MoectlError):
        raise made
    for step in range(steps):
        allowed = [i for i, may in enumerate(made.find_allowed(1536).tolist()) if may]  # type: ignore[arg-type]
        assert allowed
        made.take(allowed[step % len(allowed)])


@pytest.mark.parametrize(("schema", "said"), REFUSED, ids=range(len(REFUSED)))
def test_hostile_schemas_are_refused(schema: Any, said: str) -> None:
    with pytest.raises(BadField, match=said):
        check_schema(schema, "schema")


@pytest.mark.parametrize("schema", TAKEN, ids=range(len(TAKEN)))
def test_large_schemas_stay_within_the_limits(grammars: Grammars, schema: Any) -> None:
    check_schema(schema, "schema")
    with contextlib.suppress(BadField):  # "too complex", in the middle of the answer
        walk(make(grammars, schema), 40)


_words = st.sampled_from(
    [
        *("type", "properties", "items", "anyOf", "allOf", "oneOf", "required", "enum", "const", "$ref", "$defs"),
        *(
            "minItems",
            "pattern",
            "format",
            "not",
            "minimum",
            "additionalProperties",
            "patternProperties",
            "prefixItems",
        ),
    ]
)
_values = st.sampled_from(["object", "array", "string", "#", "#/$defs/a", "^a*$", "date", ["a"], 3, -1, 1e300, True])
_schemas = st.recursive(
    st.dictionaries(_words, _values | json_values, max_size=3),
    lambda inner: st.dictionaries(
        _words, inner | st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner), max_size=4
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(_schemas)
def test_any_schema_is_taken_or_refused(grammars: Grammars, schema: dict[str, Any]) -> None:
    for strict in (True, False):
        with contextlib.suppress(BadField):
            check_schema(schema, "schema", strict=strict)
            walk(make(grammars, schema), 3)


def test_what_a_schema_closes() -> None:
    def properties(schema: dict[str, Any]) -> Any:
        return close(schema).get("additionalProperties")

    named = {"a": {"type": "object", "properties": {}}}
    assert properties({"properties": named}) is False
    assert close({"properties": named})["properties"]["a"]["additionalProperties"] is False
    assert properties({"properties": named, "additionalProperties": True}) is True
    joined: Any = {"required": ["b"], "patternProperties": {}, "minProperties": 2, "allOf": [{}], "anyOf": [{}]}
    for key, value in joined.items():
        assert properties({"properties": named, key: value}) is None
    assert close({"type": "array", "uniqueItems": False}) == {"type": "array"}
