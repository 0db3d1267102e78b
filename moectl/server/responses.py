"""OpenAI's Responses API: a body read as one of the chat, an answer written as items.

Nothing is stored: a conversation comes whole with each request. Fields are those of OpenAI's API reference. It knows no
HTTP library, no clock and no cluster.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from moectl.engine.protocol import Done, Ready, Token
from moectl.errors import MoectlError
from moectl.server import blocks, replies
from moectl.server.blocks import AnswerBlock, Blocks, Step
from moectl.server.fields import Fields, read_boolean, read_typed, refuse
from moectl.server.openai import ApiRequest
from moectl.server.translation import Translation, pass_on, read_list, read_texts, refuse_kind

PATH = "/v1/responses"
_NAMES = {
    "max_completion_tokens": "max_output_tokens",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}
_CONSUMED = ("input", "instructions", "max_output_tokens", "tools", "text", "reasoning", "messages")
_TEXTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}  # type → its text
_THOUGHTS = {"reasoning_text": "text", "summary_text": "text"}
# The order of an assistant's doings in one message of a chat; a later one joins the message of an earlier one.
_ORDER = ("reasoning_content", "content", "tool_calls")
# What only a server that stores responses has.
_STORED = {"previous_response_id": "input", "conversation": "input", "prompt": "instructions and input"}
_STATELESS = "moectl stores no responses"


def read_responses(fields: Fields, name: str, model: Ready) -> ApiRequest:
    """Return what a body of /v1/responses asks of the model of this name; raise UsageError."""
    for stored, instead in _STORED.items():
        if fields.get(stored) is not None:
            refuse(stored, f"is not supported: {_STATELESS}", hint=f"send the whole conversation as {instead}")
    if read_boolean(fields, "background"):
        refuse("background", f"is not supported: {_STATELESS}", hint="leave it out")
    if fields.get("top_logprobs"):
        refuse("top_logprobs", "is not supported here", hint="ask /v1/chat/completions for log-probabilities")
    asked = Translation({**pass_on(fields, _CONSUMED), "messages": []}, _NAMES)
    if instructions := read_typed(fields, "instructions", str):
        asked.say("instructions", "system", content=instructions)
    _read_input(asked, fields.get("input"))
    text = read_typed(fields, "text", dict) or {}
    asked.fields |= {
        "max_completion_tokens": fields.get("max_output_tokens"),
        "reasoning_effort": (read_typed(fields, "reasoning", dict) or {}).get("effort"),
        "response_format": _read_form(read_typed(text, "format", dict) or {}),
        "tools": [_read_tool(each) for each, _ in read_list(fields.get("tools") or [], "tools") if _is_function(each)],
    }
    return dataclasses.replace(asked.read(name, model), fields=fields)


def _read_input(asked: Translation, given: Any) -> None:
    if isinstance(given, str):
        asked.say("input", "user", content=given)
        return
    for item, place in read_list(given, "input"):
        match item.get("type", "message"):
            case "message":
                content = read_texts(item.get("content"), f"{place}.content", _TEXTS)
                if item.get("role") == "assistant":
                    _say_assistant(asked, place, "content", content)
                else:
                    asked.say(place, item.get("role") or "user", content=content)
            case "reasoning":
                _read_reasoning(asked, item, place)
            case "function_call":
                function = {"name": item.get("name"), "arguments": item.get("arguments")}
                call = {"id": item.get("call_id"), "type": "function", "function": function}
                _say_assistant(asked, place, "tool_calls", [call])
            case "function_call_output":
                output = read_texts(item.get("output"), f"{place}.output", _TEXTS)
                asked.say(place, "tool", tool_call_id=item.get("call_id"), content=output)
            case "item_reference":
                refuse(f"{place}.type", f"is item_reference: {_STATELESS}", hint="send the item itself")
            case kind:
                refuse_kind(place, kind, "message", "reasoning", "function_call", "function_call_output")


def _read_reasoning(asked: Translation, item: Fields, place: str) -> None:
    """Add what an assistant thought, or its summary; what only another server can decrypt is left out."""
    for name in ("content", "summary"):
        if thinking := read_texts(item.get(name), f"{place}.{name}", _THOUGHTS):
            _say_assistant(asked, place, "reasoning_content", thinking)
            return


def _say_assistant(asked: Translation, place: str, name: str, value: Any) -> None:
    """Add what an assistant did: to the message before where that is an assistant's and has come less far."""
    last = asked.fields["messages"][-1] if asked.fields["messages"] else {}
    reached = max((_ORDER.index(part) for part in _ORDER if part in last), default=0)
    if last.get("role") != "assistant" or not (name == "tool_calls" or _ORDER.index(name) > reached):
        asked.say(place, "assistant", **{name: value})
    elif name in last:
        last[name] += value  # calls
    else:
        last[name] = value


def _read_form(form: Fields) -> Fields | None:
    if form.get("type") != "json_schema":
        return form or None
    return {"type": "json_schema", "json_schema": {name: value for name, value in form.items() if name != "type"}}


def _is_function(tool: Fields) -> bool:
    return tool.get("type") == "function"  # what OpenAI's servers or a namespace would run is left out


def _read_tool(tool: Fields) -> Fields:
    names = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {name: tool[name] for name in names if tool.get(name) is not None}}


# Written.


class ResponseReply:
    """One HTTP reply: a response of items, as a stream or as a whole."""

    def __init__(self, asked: ApiRequest, *, reply_id: str, created: int, name: str, model: Ready) -> None:
        self._id = reply_id
        self._head = {"id": f"resp_{reply_id}", "object": "response", "created_at": created, "model": name}
        self._echo = _echo(asked.fields)
        self._blocks = Blocks()
        self._numbers = itertools.count()

    def start(self) -> Iterator[Fields]:
        """Yield the response that is about to come."""
        for kind in ("response.created", "response.in_progress"):
            yield self._number({"type": kind, "response": self._response("in_progress")})

    def take(self, index: int, event: Token | Done) -> Iterator[Fields]:
        """Note an event; yield what it does to the items."""
        for step in self._blocks.take(event):
            yield from map(self._number, self._tell_step(step))

    def end(self) -> Iterator[Fields]:
        """Yield the whole response."""
        response = self.whole()
        yield self._number({"type": f"response.{response['status']}", "response": response})

    def fail(self, error: MoectlError) -> Iterator[Fields]:
        """Yield the response that an error has broken off."""
        told = replies.describe_error(error)[1]["error"]
        failure = {**told, "code": told["code"] or "server_error"}
        yield self._number({"type": "response.failed", "response": self._response("failed", error=failure)})

    def whole(self) -> Fields:
        """Return the whole response, once it is done."""
        done = self._blocks.done
        assert done is not None
        if done.finish_reason == "length":
            reason = {"incomplete_details": {"reason": "max_output_tokens"}}
            return self._response("incomplete", **reason, usage=_tell_usage(done))
        return self._response("completed", usage=_tell_usage(done))

    def _response(self, status: str, **more: Any) -> Fields:
        output = [self._item(block) for block in self._blocks.all] if status != "in_progress" else []
        nothing = {"error": None, "incomplete_details": None, "usage": None}
        return {**self._head, "status": status, **self._echo, "output": output, **nothing, **more}

    def _number(self, event: Fields) -> Fields:
        return {**event, "sequence_number": next(self._numbers)}

    def _tell_step(self, step: Step) -> Iterator[Fields]:
        what, block, piece = step
        item = {"output_index": block.index}
        inside = {**item, "item_id": self._item_id(block)}
        content = {**inside, "content_index": 0}
        if what == blocks.BEGIN:
            yield {"type": "response.output_item.added", **item, "item": self._item(block, is_new=True)}
            if block.kind != blocks.CALL:
                yield {"type": "response.content_part.added", **content, "part": _tell_content(block, "")}
            return
        name = f"response.{_DELTAS[block.kind]}"
        place = inside if block.kind == blocks.CALL else content
        logprobs: Fields = {"logprobs": []} if block.kind == blocks.TEXT else {}
        if what == blocks.MORE:
            yield {"type": f"{name}.delta", **place, "delta": piece, **logprobs}
            return
        if block.kind == blocks.CALL:
            yield {"type": f"{name}.done", **place, "arguments": block.text, "name": block.name}
        else:
            yield {"type": f"{name}.done", **place, "text": block.text, **logprobs}
            yield {"type": "response.content_part.done", **content, "part": _tell_content(block, block.text)}
        yield {"type": "response.output_item.done", **item, "item": self._item(block)}

    def _item_id(self, block: AnswerBlock) -> str:
        return f"{_PREFIXES[block.kind]}_{self._id}_{block.index}"

    def _item(self, block: AnswerBlock, *, is_new: bool = False) -> Fields:
        """Return an item as it is at its beginning, or as far as it has come."""
        status = "in_progress" if is_new else "completed" if block.is_whole else "incomplete"
        head = {"id": self._item_id(block), "status": status}
        if block.kind == blocks.CALL:
            arguments = "" if is_new else block.text
            call = {"call_id": block.call_id, "name": block.name, "arguments": arguments}
            return {"type": "function_call", **head, **call}
        content = [] if is_new else [_tell_content(block, block.text)]
        if block.kind == blocks.THINKING:
            return {"type": "reasoning", **head, "summary": [], "content": content}
        return {"type": "message", **head, "role": "assistant", "content": content}


_DELTAS = {
    blocks.THINKING: "reasoning_text",
    blocks.TEXT: "output_text",
    blocks.CALL: "function_call_arguments",
}
_PREFIXES = {blocks.THINKING: "rs", blocks.TEXT: "msg", blocks.CALL: "fc"}


def _tell_content(block: AnswerBlock, text: str) -> Fields:
    if block.kind == blocks.THINKING:
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _tell_usage(done: Done) -> Fields:
    stats = done.stats
    return {
        "input_tokens": stats.prompt_tokens,
        "input_tokens_details": {"cached_tokens": stats.cached_tokens},
        "output_tokens": stats.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": stats.thinking_tokens},
        "total_tokens": stats.prompt_tokens + stats.completion_tokens,
    }


def _echo(fields: Fields) -> Fields:
    """Return what a response repeats of its request, with OpenAI's defaults."""
    defaults: Fields = {
        "instructions": None,
        "max_output_tokens": None,
        "metadata": {},
        "parallel_tool_calls": True,
        "reasoning": {"effort": None, "summary": None},
        "temperature": 1.0,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
        "truncation": "disabled",
    }
    told = {name: default if fields.get(name) is None else fields[name] for name, default in defaults.items()}
    return {**told, "background": False, "previous_response_id": None, "store": False}
