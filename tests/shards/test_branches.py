"""Where the next turn branches off from a prompt, and where another agent does, in the templates of many families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moectl.shards.chat.branches import count_system, count_tail
from moectl.shards.chat.tokenizer import Tokenizer, open_tokenizer
from tests.support.chats import FAMILIES, write_family
from tests.support.thinkers import ALWAYS, PLAIN, QWEN, make_thinker

ASKED = {"role": "user", "content": "Which files are here?"}
CALLED = {
    "role": "assistant",
    "content": "I look.",
    "reasoning_content": "A tool can tell.",
    "tool_calls": [{"id": "abcdefghi", "type": "function", "function": {"name": "ls", "arguments": {"path": "."}}}],
}
TOLD = {"role": "tool", "tool_call_id": "abcdefghi", "name": "ls", "content": "made.txt"}
ANSWERED = {"role": "assistant", "content": "One: made.txt.", "reasoning_content": "It is one."}
TOOLS = ({"type": "function", "function": {"name": "ls", "description": "List.", "parameters": {"type": "object"}}},)


@pytest.fixture(params=[*FAMILIES, "qwen", "always", "plain"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    if request.param in FAMILIES:
        return open_tokenizer(write_family(tmp_path, request.param))
    return make_thinker(tmp_path, {"qwen": QWEN, "always": ALWAYS, "plain": PLAIN}[request.param])


@pytest.mark.parametrize("options", [{}, {"enable_thinking": False, "thinking": True}])
def test_all_but_a_short_tail_of_a_prompt_begins_the_next_turn(tokenizer: Tokenizer, options: dict[str, Any]) -> None:
    talks: Any = (
        ([ASKED], [ANSWERED, ASKED], ()),
        ([ASKED, ANSWERED, ASKED], [CALLED, TOLD], TOOLS),
        ([ASKED, CALLED, TOLD], [CALLED, TOLD], TOOLS),
    )
    for turn, more, tools in talks:
        prompt = tokenizer.encode_chat(turn, None, options, tools)
        firm = len(prompt) - count_tail(tokenizer, turn, None, options)
        assert prompt[:firm] == tokenizer.encode_chat([*turn, *more], None, options, tools)[:firm]
        assert 1 <= len(prompt) - firm < 12


def test_a_wish_to_call_is_of_the_answer(tmp_path: Path) -> None:
    tokenizer = make_thinker(tmp_path, PLAIN)
    prompt = tokenizer.encode_chat([ASKED], tools=TOOLS, must_call=["ls"])
    firm = len(prompt) - count_tail(tokenizer, [ASKED], must_call=["ls"])
    after = tokenizer.encode_chat([ASKED, CALLED, TOLD], tools=TOOLS)
    assert prompt[:firm] == after[:firm]
    assert tokenizer.decode(prompt[:firm]).endswith(ASKED["content"])


def test_agents_with_the_same_system_message_branch_off_behind_it(tokenizer: Tokenizer) -> None:
    messages = [{"role": "system", "content": "Be brief."}, ASKED]
    prompt = tokenizer.encode_chat(messages, tools=TOOLS)
    common = count_system(tokenizer, prompt, messages, tools=TOOLS)
    other = tokenizer.encode_chat([messages[0], {"role": "user", "content": "Say hello"}], tools=TOOLS)
    assert prompt[:common] == other[:common]
    said = tokenizer.decode(prompt[:common])
    assert "system" in said or "Be brief." in said  # where the template tells it
    assert "Which" not in said
    assert count_system(tokenizer, prompt, [ASKED]) == 0


def test_a_template_that_takes_no_such_conversation_leaves_one_token(tmp_path: Path) -> None:
    alone = (
        "{% if messages | length > 1 %}{{ raise_exception('one question only') }}{% endif %}{{ messages[0].content }}"
    )
    tokenizer = make_thinker(tmp_path, alone)
    assert count_tail(tokenizer, [ASKED]) == 1
    assert count_system(tokenizer, [1, 2], [{"role": "system", "content": "Be brief."}, ASKED]) == 0
