"""How a model is told of tools: by its own template where it knows them, else as text; and where systems may stand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moectl.shards.chat.tools_as_text import mend_systems, tell_as_text, urge
from tests.support.callers import STYLES, TOOLED, make_caller, make_tool
from tests.support.thinkers import PLAIN, make_thinker

CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"p": "ü"}}}
ROUND: list[dict[str, Any]] = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "Sure.", "tool_calls": [CALL, CALL]},
    {"role": "tool", "tool_call_id": "1", "name": "f", "content": "one"},
    {"role": "tool", "tool_call_id": "1", "name": "f", "content": "two"},
    {"role": "user", "content": "go on"},
]
STRICT = (  # as Qwen3.5 and Gemma: a system message at the beginning, then turns of the two
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('system') }}{% endif %}"
    "{% if not loop.first and m.role == loop.previtem.role %}{{ raise_exception('alternate') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)


def test_a_template_that_knows_tools_is_told_of_them(tmp_path: Path) -> None:
    tokenizer = make_caller(tmp_path, STYLES["json_tools"])
    strict = make_tool()
    strict["function"]["strict"] = True
    text = tokenizer.decode(tokenizer.encode_chat(ROUND[:1], tools=[strict]))
    assert text.startswith(json.dumps([make_tool()]).replace("<", "\\u003c"))
    assert "strict" not in text
    assert "<|im_start|>user\nhello\n\nAnswer with a call of f, and with no other text.<|im_end|>" in tokenizer.decode(
        tokenizer.encode_chat(ROUND[:1], tools=[strict], must_call=["f"])
    )


def test_tools_calls_and_results_as_text() -> None:
    system, user, answer, last = tell_as_text([{"role": "system", "content": "Be brief."}, *ROUND], [make_tool()])
    assert system["content"].startswith("Be brief.\n\n# Tools\n")
    assert json.dumps(make_tool()) in system["content"].splitlines()
    assert (system["role"], user) == ("system", ROUND[0])
    called = '<tool_call>\n{"name": "f", "arguments": {"p": "ü"}}\n</tool_call>'
    assert answer == {"role": "assistant", "content": f"Sure.\n{called}\n{called}"}
    results = "<tool_response>\none\n</tool_response>\n<tool_response>\ntwo\n</tool_response>"
    assert last == {"role": "user", "content": f"{results}\n\ngo on"}
    assert tell_as_text(ROUND[:1], [make_tool()])[0]["role"] == "system"
    assert tell_as_text(ROUND[:1], []) == ROUND[:1]


def test_a_wish_for_a_call() -> None:
    assert urge(ROUND, []) == ROUND
    assert urge(ROUND[:1], ["f", "g"])[-1]["content"].startswith("hello\n\nAnswer with a call of f or g")
    assert [m["role"] for m in urge(ROUND[:4], ["f"])] == ["user", "assistant", "tool", "tool", "user"]


@pytest.mark.parametrize("template", [STRICT, STRICT + "{{ tools | tojson }}"])
def test_system_messages_where_a_template_takes_none(tmp_path: Path, template: str) -> None:
    tokenizer = make_thinker(tmp_path, template + "<|im_start|>assistant\n")
    systems = [{"role": "system", "content": text} for text in ("one", "two")]
    talk = [*systems, ROUND[0], {"role": "system", "content": "three"}, {"role": "user", "content": "four"}]
    assert mend_systems(talk) == [
        {"role": "system", "content": "one\n\ntwo"},
        {"role": "user", "content": "hello\n\nthree\n\nfour"},
    ]
    assert "user\nhello\n\nthree\n\nfour<" in tokenizer.decode(tokenizer.encode_chat(talk))


def test_a_template_of_tools_without_a_format_that_is_known(tmp_path: Path) -> None:
    tokenizer = make_thinker(tmp_path, TOOLED)
    assert tokenizer.tells_tools == "text"
    assert "<tools>" in tokenizer.decode(tokenizer.encode_chat(ROUND, tools=[make_tool()]))
    plain = make_thinker(tmp_path, PLAIN)
    assert "<tool_response>\none\n" in plain.decode(plain.encode_chat(ROUND))  # although no tools are offered now
