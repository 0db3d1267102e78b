"""The grammars of answers: each kind of model writes what it learned, thinks first where it does, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLMatcher

from moectl.engine.grammar import Grammars
from moectl.shards.chat.answer_grammar import HeldForm, can_describe
from moectl.shards.chat.tokenizer import Tokenizer
from tests.support.callers import STYLES, make_caller, make_tool
from tests.support.thinkers import ALWAYS, CHANNELS, HARMONY, PLAIN, QWEN, make_thinker
from tests.support.words import ask_chat

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
JSON = HeldForm(SCHEMA)


def read(tokenizer: Tokenizer, form: HeldForm, text: str, *, prompt: list[int] | None = None) -> str:
    """Return "whole" for a text that fulfils the form, "part" for its beginning, else what is left of it."""
    if prompt is None:
        prompt = tokenizer.encode_chat(ask_chat(1, "hi", 9).messages or ())
    grammars = Grammars(tokenizer, 4000)
    vocabulary = grammars._read_vocabulary()
    assert not grammars._head
    matcher = LLMatcher(vocabulary, tokenizer.write_grammar(form, prompt))
    assert not matcher.is_error(), matcher.get_error()
    tokens = tokenizer.encode(text)
    taken = matcher.try_consume_tokens(tokens)
    if taken < len(tokens):
        return tokenizer.decode(tokens[taken:])
    return "whole" if matcher.is_accepting() else "part"


def test_json_alone(tmp_path: Path) -> None:
    tokenizer = make_thinker(tmp_path, PLAIN, ())
    assert read(tokenizer, JSON, '{"a": 5}') == "whole"
    assert read(tokenizer, JSON, '{\n  "a": 5\n}') == "whole"
    assert read(tokenizer, JSON, '{"a":') == "part"
    assert read(tokenizer, JSON, 'Sure: {"a": 5}').startswith("Sure")
    assert read(tokenizer, JSON, '{"a": 5}', prompt=[]) == "whole"


def test_thinking_comes_first(tmp_path: Path) -> None:
    always = make_thinker(tmp_path, ALWAYS)
    assert read(always, JSON, 'It is {5}.\n</think>\n\n{"a": 5}') == "whole"
    assert read(always, JSON, '{"a": 5}') == "part"  # of what it thinks
    may = make_thinker(tmp_path, QWEN)
    assert read(may, JSON, '<think>\nIt is 5.\n</think>\n\n{"a": 5}') == "whole"
    assert read(may, JSON, '{"a": 5}') == "whole"
    assert read(may, JSON, '{"a": 5}<think>') == "<think>"


def test_channels(tmp_path: Path) -> None:
    tokenizer = make_thinker(tmp_path, HARMONY, (*CHANNELS, "<|constrain|>"), eos_token="<|return|>")
    thought = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    final = '<|channel|>final<|message|>{"a": 5}'
    assert read(tokenizer, JSON, thought + final) == "whole"
    assert read(tokenizer, JSON, final.replace("final<", "final <|constrain|>json<")) == "whole"
    assert read(tokenizer, JSON, thought + '{"a": 5}').startswith('{"a"')


@pytest.mark.parametrize("name", sorted(STYLES))
def test_calls_in_a_models_own_format_or_as_text(tmp_path: Path, name: str) -> None:
    style: Any = STYLES[name]
    tokenizer = make_caller(tmp_path, style)
    assert tokenizer._chat is not None
    tool = make_tool()
    tool["function"]["parameters"] = SCHEMA
    form = HeldForm(None, (tool,), must_call=True)
    call = {"name": tool["function"]["name"], "arguments": {"a": 5}}
    if can_describe(tokenizer._chat.calls):
        assert tokenizer._chat.held_calls is tokenizer._chat.calls
    else:
        assert read(tokenizer, form, f"<tool_call>\n{json.dumps(call)}\n</tool_call>") == "whole"
    assert read(tokenizer, form, "No.") == "No."


def test_several_calls_and_text_around_strict_ones(tmp_path: Path) -> None:
    tokenizer = make_thinker(tmp_path, PLAIN, ())
    tool = {"function": {"name": "f", "parameters": SCHEMA, "strict": True}}
    call = '<tool_call>\n{"name": "f", "arguments": {"a": 5}}\n</tool_call>'
    must = HeldForm(None, (tool,), must_call=True)
    assert read(tokenizer, must, f"{call}\n{call}") == "whole"
    assert read(tokenizer, HeldForm(None, (tool,), must_call=True, parallel_calls=False), f"{call}\n{call}") != "whole"
    free = HeldForm(None, (tool,))
    assert read(tokenizer, free, "Nothing to call.") == "whole"
    assert read(tokenizer, free, f"I look. {call}\n{call}") == "whole"
    assert read(tokenizer, free, call.replace('"a": 5', '"b": 5')) != "whole"
    either = HeldForm(SCHEMA, (tool,))
    assert [read(tokenizer, either, text) for text in (call, '{"a": 5}')] == ["whole", "whole"]
    assert read(tokenizer, either, "Nothing") == "Nothing"
