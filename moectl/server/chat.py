"""The conversation and the tools in a body of /v1/chat/completions, read into the form that the model is told.

Past calls and results, definitions and the choice of tools are those of OpenAI's API reference; `conversation` makes
the messages, `Request` has the limits.
"""

from __future__ import annotations

from typing import Any

from moectl.server import conversation
from moectl.server.fields import (
    TEXT_PARTS,
    Fields,
    kind_of,
    read_boolean,
    read_object,
    read_string,
    read_texts,
    read_typed,
    refuse,
    show,
)

_ROLES = {role: role for role in ("system", "user", "assistant", "tool")} | {"developer": "system"}
_REASONING = ("reasoning_content", "reasoning")  # what an assistant thought: DeepSeek's and vLLM's name, OpenRouter's
_CHOICES = ("auto", "none", "required")


def read_messages(fields: Fields) -> tuple[Fields, ...]:
    """Return the conversation; raise BadField."""
    messages = read_typed(fields, "messages", list)
    if not messages:
        refuse("messages", "should be a list of at least one message")
    read = conversation.name_results([_read_message(each, f"messages[{i}]") for i, each in enumerate(messages)])
    if not any(message["content"] for message in read):
        refuse("messages", "should have some text, every content is empty")
    return read


def _read_message(message: Any, place: str) -> Fields:
    role = read_object(message, place).get("role")
    if not isinstance(role, str) or role not in _ROLES:
        refuse(f"{place}.role", f"should be one of {', '.join(_ROLES)}, it is {show(role)}")
    text = read_texts(message.get("content"), f"{place}.content", TEXT_PARTS)
    if role == "tool":
        return conversation.give_result(read_string(message, "tool_call_id", place), text)
    reasoning = ""
    for name in _REASONING:
        thinking = message.get(name)
        if not isinstance(thinking, str | None):
            refuse(f"{place}.{name}", f"should be a string, it is {kind_of(thinking)}")
        reasoning = reasoning or thinking or ""
    if role != "assistant":
        return conversation.say(_ROLES[role], text)
    if message.get("function_call") is not None:
        refuse(f"{place}.function_call", "is not supported: it is an older form", hint="send tool_calls")
    calls = read_typed(message, "tool_calls", list, f"{place}.tool_calls") or []
    return conversation.answer(
        text, reasoning, [_read_call(c, f"{place}.tool_calls[{i}]") for i, c in enumerate(calls)]
    )


def _read_call(call: Any, place: str) -> Fields:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        refuse(place, "should be an object with a function")
    arguments = conversation.read_arguments(function.get("arguments", ""), f"{place}.function.arguments")
    name = read_string(function, "name", f"{place}.function")
    return conversation.call(read_string(call, "id", place), name, arguments)


def read_tools(fields: Fields) -> Fields:
    """Return the tools and the choice among them, as keyword arguments of a Request; raise BadField.

    With the choice "none" the model is told of no tools.
    """
    given = read_typed(fields, "tools", list) or []
    choice = fields.get("tool_choice") or None
    if choice == "none":
        return {}
    tools = [_read_tool(tool, f"tools[{i}]") for i, tool in enumerate(given)]
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        # Responses has the list without an object of its own.
        allowed = read_typed(choice, "allowed_tools", dict, "tool_choice.allowed_tools") or choice
        names = {_read_choice(each) for each in read_typed(allowed, "tools", list, "tool_choice.tools") or []}
        tools = [tool for tool in tools if tool["function"]["name"] in names]
        choice = allowed.get("mode", "auto")
    must_call: tuple[str, ...] = ()
    if isinstance(choice, dict):
        must_call = (_read_choice(choice),)
    elif choice == "required":
        must_call = tuple(tool["function"]["name"] for tool in tools)
    elif choice not in (None, *_CHOICES):
        refuse("tool_choice", f"should be {', '.join(_CHOICES)} or name a function, it is {show(choice)}")
    if choice not in (None, "auto") and not tools:
        refuse("tool_choice", "needs tools, and there are none", hint="send tools, or leave it out")
    return {
        "tools": tuple(tools),
        "must_call": must_call,
        "parallel_calls": fields.get("parallel_tool_calls") is None or read_boolean(fields, "parallel_tool_calls"),
    }


def _read_tool(tool: Any, place: str) -> Fields:
    function = tool.get("function") if isinstance(tool, dict) and tool.get("type", "function") == "function" else None
    if not isinstance(function, dict):
        refuse(place, 'should be an object of the type "function", with a function', hint="leave out other tools")
    return conversation.define_tool(
        read_string(function, "name", f"{place}.function"),
        read_typed(function, "description", str, f"{place}.function.description"),
        read_typed(function, "parameters", dict, f"{place}.function.parameters"),
        strict=read_boolean(function, "strict", f"{place}.function.strict"),
        place=f"{place}.function",
    )


def _read_choice(choice: Any) -> str:
    function = choice.get("function", choice) if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        refuse("tool_choice", f"should name a function, it is {show(choice)}")
    return name
