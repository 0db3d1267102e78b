"""Tools for a model whose chat template knows none: a convention of plain text, the one that Hermes models learned.

The system message describes the tools, a call is JSON between <tool_call> and </tool_call>, a result comes from the
user between <tool_response> and </tool_response>.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Json = dict[str, Any]

_GUIDE = """# Tools

You can call functions. These are their signatures, one JSON object per line:
<tools>
{tools}
</tools>

To call a function, write a JSON object with its name and its arguments between <tool_call> and </tool_call>:
<tool_call>
{{"name": "the function's name", "arguments": {{"an argument's name": "its value"}}}}
</tool_call>
You can write several calls one after the other. Then end your answer: the user will send each call's result between \
<tool_response> and </tool_response>."""


def tell_as_text(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[Json]:
    """Return a conversation of system, user and assistant alone, its tools, calls and results told as text."""
    told: list[Json] = []
    before = ""  # the role of the last message
    for message in messages:
        if message["role"] == "tool":
            result = f"<tool_response>\n{message['content']}\n</tool_response>"
            if before == "tool":
                _join(told, "user", result, "\n")
            else:
                told.append({"role": "user", "content": result})
        elif message.get("tool_calls"):
            kept = {key: value for key, value in message.items() if key != "tool_calls"}
            told.append({**kept, "content": "\n".join(filter(None, (message["content"], *_tell_calls(message))))})
        elif before == "tool" and message["role"] == "user":
            _join(told, "user", message["content"], "\n\n")
        else:
            told.append(dict(message))
        before = message["role"]
    if tools:
        guide = _GUIDE.format(tools="\n".join(_dump(tool) for tool in tools))
        if told and told[0]["role"] == "system":
            told[0] = {**told[0], "content": "\n\n".join(filter(None, (told[0]["content"], guide)))}
        else:
            told.insert(0, {"role": "system", "content": guide})
    return told


def urge(messages: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[Json]:
    """Return a conversation that ends with the wish that one of these tools is called."""
    told = [dict(message) for message in messages]
    if names:
        _join(told, "user", f"Answer with a call of {' or '.join(names)}, and with no other text.", "\n\n")
    return told


def mend_systems(messages: Sequence[Mapping[str, Any]]) -> list[Json]:
    """Return a conversation with at most one system message, at its beginning: a later one becomes the user's text."""
    told: list[Json] = []
    if all(message["role"] != "system" for message in messages[1:]):
        return [dict(message) for message in messages]
    for message in messages:
        first = all(earlier["role"] == "system" for earlier in told)
        if message["role"] == "system":
            _join(told, "system" if first else "user", message["content"], "\n\n")
        elif message["role"] == "user":
            _join(told, "user", message["content"], "\n\n")
        else:
            told.append(dict(message))
    return told


def _join(told: list[Json], role: str, text: str, between: str) -> None:
    """Add a text to the last message where it has this role, else as a message."""
    if told and told[-1]["role"] == role:
        told[-1] = {**told[-1], "content": between.join(filter(None, (told[-1]["content"], text)))}
    else:
        told.append({"role": role, "content": text})


def _tell_calls(message: Mapping[str, Any]) -> Iterator[str]:
    for call in message["tool_calls"]:
        function = call["function"]
        yield f"<tool_call>\n{_dump({key: function[key] for key in ('name', 'arguments')})}\n</tool_call>"


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
