"""Anthropic's Messages: a body read as one of OpenAI's chat, an answer written as blocks, errors in Anthropic's form.

Fields are those of Anthropic's API reference. It knows no HTTP library, no clock and no cluster.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moectl.engine.protocol import Done, Ready, Token
from moectl.engine.request import TOO_LONG
from moectl.errors import MoectlError
from moectl.model.parameters import THINKING_SWITCHES
from moectl.server import blocks, replies
from moectl.server.blocks import AnswerBlock, Blocks, Step
from moectl.server.conversation import parse_arguments
from moectl.server.fields import (
    Fields,
    kind_of,
    read_boolean,
    read_list,
    read_object,
    read_text,
    read_texts,
    read_typed,
    refuse,
    show,
)
from moectl.server.openai import ApiRequest
from moectl.server.stream import sum_usage
from moectl.server.translation import Translation, pass_on, refuse_kind

PATH = "/v1/messages"
_NAMES = {
    "stop": "stop_sequences",
    "response_format.json_schema": "output_config.format",
    "response_format": "output_config.format",
    "reasoning_effort": "output_config.effort",
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
}
_PARTS = {"tool_call_id": "tool_use_id", "arguments": "input", "parameters": "input_schema"}
_CONSUMED = ("system", "messages", "stop_sequences", "tools", "tool_choice", "thinking", "output_config")
_TEXT = {"text": "text"}
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_FAILED = "The tool failed:"  # no chat template has a field for it
# Claude Code's first system block. It differs between sessions: with it no prompt would begin as another one does, and
# none would be found in the prompt cache.
_BILLING = "x-anthropic-billing-header"


def read_messages(fields: Fields, name: str, model: Ready) -> ApiRequest:
    """Return what a body of /v1/messages asks of the model of this name; raise UsageError."""
    if fields.get("mcp_servers"):
        refuse("mcp_servers", "is not supported: moectl calls no tools itself", hint="leave it out")
    asked = Translation(pass_on(fields, _CONSUMED), _NAMES, _PARTS)
    if system := _read_system(fields.get("system"), "system"):
        asked.say("system", "system", content=system)
    for message, place in read_list(fields.get("messages"), "messages"):
        _read_message(asked, message, place)
    for tool, place in read_list(fields.get("tools") or [], "tools"):
        _read_tool(asked, tool, place)
    asked.fields |= {
        "stop": fields.get("stop_sequences"),
        **_read_choice(fields),
        **_read_output(fields),
        **_read_thinking(fields),
    }
    return asked.read(name, model)


def _read_system(value: Any, place: str) -> str:
    if isinstance(value, list):
        value = [block for block in value if not _is_billing(block)]
    return read_texts(value, place, _TEXT, "\n")


def _is_billing(block: Any) -> bool:
    return isinstance(block, dict) and str(block.get("text")).startswith(_BILLING)


def _read_message(asked: Translation, message: Fields, place: str) -> None:
    role, content = message.get("role"), message.get("content")
    place = f"{place}.content"
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if role == "system":
        asked.say(place, "system", content=_read_system(content, place))
    elif role == "user":
        _read_user(asked, read_list(content, place), place)
    elif role == "assistant":
        _read_assistant(asked, read_list(content, place), place)
    else:
        refuse(f"{place.removesuffix('.content')}.role", f"should be user, assistant or system, it is {show(role)}")


def _read_user(asked: Translation, blocks: list[tuple[Fields, str]], place: str) -> None:
    texts: list[str] = []
    for block, at in blocks:
        if block.get("type") == "tool_result":
            _say_texts(asked, place, texts)
            result = read_texts(block.get("content"), f"{at}.content", _TEXT, "\n")
            if read_boolean(block, "is_error", f"{at}.is_error"):
                result = f"{_FAILED}\n{result}".rstrip()
            asked.say(at, "tool", tool_call_id=block.get("tool_use_id"), content=result)
        else:
            texts.append(read_text(block, at, _TEXT))
    _say_texts(asked, place, texts)


def _say_texts(asked: Translation, place: str, texts: list[str]) -> None:
    if texts:
        asked.say(place, "user", content="\n".join(texts))
        texts.clear()


def _read_assistant(asked: Translation, blocks: list[tuple[Fields, str]], place: str) -> None:
    said: dict[str, list[str]] = {"text": [], "thinking": []}
    calls: list[tuple[Fields, str]] = []
    for block, at in blocks:
        match block.get("type"):
            case "text" | "thinking" as kind:
                said[kind].append(read_text(block, at, {kind: kind}))
            case "tool_use":
                calls.append((block, at))
            case "redacted_thinking":  # of another model: only Anthropic can read it
                pass
            case kind:
                refuse_kind(at, kind, "text", "thinking", "tool_use")
    thinking = {"reasoning_content": "".join(said["thinking"])} if said["thinking"] else {}
    asked.say(place, "assistant", content="\n".join(said["text"]), **thinking)
    for block, at in calls:
        asked.call(at, block.get("id"), block.get("name"), read_object(block.get("input"), f"{at}.input"))


def _read_tool(asked: Translation, tool: Fields, place: str) -> None:
    if tool.get("type") not in (None, "custom"):
        return  # one that Anthropic's servers would run
    if not isinstance(tool.get("input_schema"), dict):
        refuse(f"{place}.input_schema", f"should be an object, it is {kind_of(tool.get('input_schema'))}")
    told = {name: tool.get(name) for name in ("name", "description", "strict")}
    asked.offer(place, **told, parameters=tool["input_schema"])


def _read_choice(fields: Fields) -> Fields:
    choice = read_typed(fields, "tool_choice", dict)
    if not choice:
        return {}
    alone = read_boolean(choice, "disable_parallel_tool_use", "tool_choice.disable_parallel_tool_use")
    read: Fields = {"parallel_tool_calls": False} if alone else {}
    kind = choice.get("type")
    if kind == "tool":
        return {**read, "tool_choice": {"type": "function", "function": {"name": choice.get("name")}}}
    if not isinstance(kind, str) or kind not in _CHOICES:
        refuse_kind("tool_choice", kind, *_CHOICES, "tool")
    return {**read, "tool_choice": _CHOICES[kind]}


def _read_output(fields: Fields) -> Fields:
    config = read_typed(fields, "output_config", dict) or {}
    read: Fields = {"reasoning_effort": config.get("effort")}
    form = read_typed(config, "format", dict)
    if form:
        if form.get("type") != "json_schema":
            refuse_kind("output_config.format", form.get("type"), "json_schema")
        schema = {"name": "answer", "schema": form.get("schema"), "strict": True}
        read["response_format"] = {"type": "json_schema", "json_schema": schema}
    return read


def _read_thinking(fields: Fields) -> Fields:
    """Return thinking as options of the template: where a model has no such switch, they have no effect."""
    kind = (read_typed(fields, "thinking", dict) or {"type": "adaptive"}).get("type")
    if kind not in ("enabled", "disabled", "adaptive"):
        refuse_kind("thinking", kind, "enabled", "disabled", "adaptive")
    chosen = {} if kind == "adaptive" else dict.fromkeys(THINKING_SWITCHES, kind == "enabled")
    return {"chat_template_kwargs": {**chosen, **(read_typed(fields, "chat_template_kwargs", dict) or {})}}


# Written.


class MessageReply:
    """One HTTP reply: a message of blocks, as a stream or as a whole."""

    def __init__(self, asked: ApiRequest, *, reply_id: str, created: int, name: str, model: Ready) -> None:
        self._head = {"id": f"msg_{reply_id}", "type": "message", "role": "assistant", "model": name}
        self._blocks = Blocks()

    def start(self) -> Iterator[Fields]:
        """Yield the beginning of the message; how many tokens the prompt has is known at its end only."""
        empty: Fields = {"content": [], "stop_reason": None, "stop_sequence": None}
        usage = {"input_tokens": 0, "output_tokens": 0}
        yield {"type": "message_start", "message": {**self._head, **empty, "usage": usage}}

    def take(self, index: int, event: Token | Done) -> Iterator[Fields]:
        """Note an event; yield what it does to the blocks."""
        yield from map(_tell_step, self._blocks.take(event))

    def end(self) -> Iterator[Fields]:
        """Yield why the message ended and what it took."""
        end = self._end()
        yield {"type": "message_delta", "delta": end, "usage": self._usage()}
        yield {"type": "message_stop"}

    def fail(self, error: MoectlError) -> Iterator[Fields]:
        """Yield the error that breaks the message off."""
        yield describe_error(*replies.describe_error(error))

    def whole(self) -> Fields:
        """Return the whole message, once it is done."""
        content = [_tell_block(block, block.text) for block in self._blocks.all]
        return {**self._head, "content": content, **self._end(), "usage": self._usage()}

    def _end(self) -> Fields:
        done = self._blocks.done
        assert done is not None
        reason = {"length": "max_tokens", "tool_calls": "tool_use"}.get(done.finish_reason, "end_turn")
        if done.stop_text is not None and reason == "end_turn":
            reason = "stop_sequence"
        return {"stop_reason": reason, "stop_sequence": done.stop_text if reason == "stop_sequence" else None}

    def _usage(self) -> Fields:
        assert self._blocks.done is not None
        usage = sum_usage([self._blocks.done.stats])
        return {
            "input_tokens": usage.prompt - usage.cached,  # Anthropic counts these apart
            "cache_read_input_tokens": usage.cached,
            "cache_creation_input_tokens": 0,
            "output_tokens": usage.completion,
        }


def _tell_step(step: Step) -> Fields:
    what, block, piece = step
    if what == blocks.BEGIN:
        return {"type": "content_block_start", "index": block.index, "content_block": _tell_block(block, "")}
    if what == blocks.END:
        return {"type": "content_block_stop", "index": block.index}
    delta = {
        blocks.TEXT: {"type": "text_delta", "text": piece},
        blocks.THINKING: {"type": "thinking_delta", "thinking": piece},
        blocks.CALL: {"type": "input_json_delta", "partial_json": piece},
    }
    return {"type": "content_block_delta", "index": block.index, "delta": delta[block.kind]}


def _tell_block(block: AnswerBlock, text: str) -> Fields:
    if block.kind == blocks.THINKING:
        return {"type": "thinking", "thinking": text, "signature": ""}  # moectl signs nothing, clients want the field
    if block.kind == blocks.TEXT:
        return {"type": "text", "text": text}
    return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": parse_arguments(text)}


_ERRORS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
}


def describe_error(status: int, body: Fields) -> Fields:
    """Return the body of an error in Anthropic's form, from its status and its body in OpenAI's."""
    error = body["error"]
    kind = _ERRORS.get(status, "invalid_request_error" if status < 500 else "api_error")
    # Anthropic's words, at which agents shorten a conversation.
    begin = "prompt is too long: " if error["code"] == TOO_LONG else ""
    return {"type": "error", "error": {**error, "type": kind, "message": begin + error["message"]}}
