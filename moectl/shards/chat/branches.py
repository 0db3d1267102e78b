"""Where later prompts may branch off from a conversation's prompt: after its system message, and before its answer.

The end of a prompt belongs to the answer that follows it, as the beginning of its thinking does: the next turn may tell
that answer in another way. How much that is depends on the template and the kind of the last message only. So it is
found with a short conversation of the same kind, and no long text is read twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moectl.shards.chat.tokenizer import Tokenizer

_Messages = Sequence[Mapping[str, Any]]
_NAME = "moectl"
_TOOL = {"type": "function", "function": {"name": _NAME, "description": "", "parameters": {"type": "object"}}}
_QUESTION: Mapping[str, Any] = {"role": "user", "content": _NAME}
_ANSWER: Mapping[str, Any] = {"role": "assistant", "content": _NAME}
_CALL_ID = "moectl000"  # nine letters and digits, as Mistral's template wants it
_CALL: Mapping[str, Any] = {
    "role": "assistant",
    "content": _NAME,  # which begins as no marker does
    "tool_calls": [{"id": _CALL_ID, "type": "function", "function": {"name": _NAME, "arguments": {}}}],
}
_RESULT: Mapping[str, Any] = {"role": "tool", "tool_call_id": _CALL_ID, "name": _NAME, "content": _NAME}


def count_tail(
    tokenizer: Tokenizer,
    messages: _Messages,
    think: bool | None = None,
    options: Mapping[str, Any] | None = None,
    must_call: Sequence[str] = (),
) -> int:
    """Return how many of a prompt's last tokens the next turn may lack; 1 where the template does not tell."""
    if messages[-1]["role"] == "tool":
        turn, more, tools = [_QUESTION, _CALL, _RESULT], [_CALL, _RESULT], [_TOOL]
    else:
        turn, more, tools = [_QUESTION], [_ANSWER, _QUESTION], []
    try:
        prompt = tokenizer.encode_chat(turn, think, options, tools, must_call)
        later = tokenizer.encode_chat([*turn, *more], think, options, tools)
    except Exception:  # the template is a program of the model, and need not take such a conversation
        return 1
    return max(1, len(prompt) - _count_common(prompt, later))


def count_system(
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    messages: _Messages,
    think: bool | None = None,
    options: Mapping[str, Any] | None = None,
    tools: _Messages = (),
) -> int:
    """Return how many of a prompt's tokens come of its first system messages and its tools; 0 where there are none."""
    first = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    if not first and not tools:
        return 0
    try:
        other = tokenizer.encode_chat([*messages[:first], _QUESTION], think, options, tools)
    except Exception:  # see count_tail
        return 0
    return _count_common(prompt, other)


def _count_common(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
