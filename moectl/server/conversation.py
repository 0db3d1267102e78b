"""A conversation as it is told to the model: what each protocol's reader fills, in the form that chat templates take.

A reader makes messages and tools by these functions; `Request` carries them to every rank and has their limits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moectl.engine.request import MAX_DEPTH, is_deeper
from moectl.server.fields import Fields, kind_of, load_json, refuse, show

INVALID = "invalid_json"
_MOST_LEVELS = MAX_DEPTH - 3  # of arguments: a list, the call and its function are around them


def say(role: str, text: str) -> Fields:
    """Return what the system or the user says."""
    return {"role": role, "content": text}


def answer(text: str, reasoning: str = "", calls: Sequence[Fields] = ()) -> Fields:
    """Return a past answer of the model; `calls` are made by `call`."""
    message: Fields = {"role": "assistant", "content": text}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = list(calls)
    return message


def call(call_id: str, name: str, arguments: Fields) -> Fields:
    """Return one tool call of a past answer."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def give_result(call_id: str, text: str) -> Fields:
    """Return what a tool has answered."""
    return {"role": "tool", "tool_call_id": call_id, "content": text}


def define_tool(
    name: str, description: str | None, parameters: Fields | None, *, strict: bool = False, place: str = "tools"
) -> Fields:
    """Return a tool that the model may call; `parameters` is a JSON schema of an object.

    Raises BadField, which names `place`, where the schema is of another type.
    """
    schema = parameters or {"type": "object", "properties": {}}
    if schema.get("type", "object") != "object":
        refuse(f"{place}.parameters.type", f'should be "object", it is {show(schema["type"])}')
    function: Fields = {"name": name, "description": description or "", "parameters": schema}
    if strict:
        function["strict"] = True
    return {"type": "function", "function": function}


def parse_arguments(text: str) -> Fields:
    """Return the object in a call's arguments; "" is an empty one.

    Clients send a call back as it came, also one that was cut, or is too deep for a request: its text then stands under
    `INVALID`.
    """
    try:
        value = load_json(text) if text.strip() else {}
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) and not is_deeper(value, _MOST_LEVELS) else {INVALID: text}


def read_arguments(value: Any, place: str) -> Fields:
    """Return a past call's arguments, given as an object or as its text; see `parse_arguments`. Raises BadField."""
    if isinstance(value, str):
        return parse_arguments(value)
    if not isinstance(value, dict):
        refuse(place, f"should be a JSON object, it is {kind_of(value)}")
    return value


def name_results(messages: Sequence[Fields]) -> tuple[Fields, ...]:
    """Return a conversation in which each result has the name of its tool, which some templates show.

    Raises BadField for a result of a call that is nowhere before it.
    """
    names: dict[str, str] = {}
    told = []
    for i, message in enumerate(messages):
        names |= {each["id"]: each["function"]["name"] for each in message.get("tool_calls", ())}
        if message["role"] == "tool":
            if (call_id := message["tool_call_id"]) not in names:
                refuse(f"messages[{i}].tool_call_id", f"should name a call before it, {show(call_id)} is none")
            message = {**message, "name": names[call_id]}
        told.append(message)
    return tuple(told)
