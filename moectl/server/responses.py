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
from moectl.server.fields import TEXT_PARTS, Fields, read_boolean, read_list, read_texts, read_typed, refuse
from moectl.server.openai import ApiRequest
from moectl.server.stream import sum_usage
from moectl.server.translation import Translation, pass_on, refuse_kind

PATH = "/v1/responses"
_NAMES = {
    "max_completion_tokens": "max_output_tokens",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "messages": "input",
}
_PARTS = {"tool_call_id": "call_id", "id": "call_id"}
_CONSUMED = ("input", "instructions", "max_output_tokens", "tools", "text", "reasoning", "messages")
_THOUGHTS = {"reasoning_text": "text", "summary_text": "text"}
# The order of an assistant's doings in one message of a chat; a later one joins the message of an earlier one.
_ORDER = ("reasoning_content", "content", "tool_calls")
# What only a server that stores responses has.
_STORED = {"previous_response_id": "input", "conversation": "input", "prompt": "instructions and input"}
_LOGPROBS = "message.output_text.logprobs"  # in `include`
_STATELESS = "moectl stores no responses"


def read_responses(fields: Fields, name: str, model: Ready) -> ApiRequest:
    """Return what a body of /v1/responses asks of the model of this name; raise UsageError."""
    for stored, instead in _STORED.items():
        if fields.get(stored) is not None:
            refuse(stored, f"is not supported: {_STATELESS}", hint=f"send the whole conversation as {instead}")
    if read_boolean(fields, "background"):
        refuse("background", f"is not supported: {_STATELESS}", hint="leave it out")
    asked = Translation(pass_on(fields, _CONSUMED), _NAMES, _PARTS)
    if instructions := read_typed(fields, "instructions", str):
        asked.say("instructions", "system", content=instructions)
    _read_input(asked, fields.get("input"))
    text = read_typed(fields, "text", dict) or {}
    asked.fields |= {
        "max_completion_tokens": fields.get("max_output_tokens"),
        **_read_logprobs(fields),
        "reasoning_effort": (read_typed(fields, "reasoning", dict) or {}).get("effort"),
        "response_format": _read_form(read_typed(text, "format", dict) or {}),
    }
    for tool, place in read_list(fields.get("tools") or [], "tools"):
        if tool.get("type") == "function":  # what OpenAI's servers or a namespace would run is left out
            told = {name: tool.get(name) for name in ("name", "description", "parameters", "strict")}
            asked.offer(place, **told)
    return dataclasses.replace(asked.read(name, model), fields=fields)


def _read_input(asked: Translation, given: Any) -> None:
    if isinstance(given, str):
        asked.say("input", "user", content=given)
        return
    for item, place in read_list(given, "input"):
        match item.get("type", "message"):
            case "message":
                content = read_texts(item.get("content"), f"{place}.content", TEXT_PARTS)
                if item.get("role") == "assistant":
                    _say_assistant(asked, place, "content", content)
                else:
                    asked.say(place, item.get("role") or "user", content=content)
            case "reasoning":
                _read_reasoning(asked, item, place)
            case "function_call":
                if asked.last.get("role") != "assistant":
                    asked.say(place, "assistant")
                asked.call(place, item.get("call_id"), item.get("name"), item.get("arguments"))
            case "function_call_output":
                output = read_texts(item.get("output"), f"{place}.output", TEXT_PARTS)
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


def _say_assistant(asked: Translation, place: str, name: str, value: str) -> None:
    """Add what an assistant said or thought: to the message before where that is its own and has come less far."""
    reached = max((_ORDER.index(part) for part in _ORDER if part in asked.last), default=0)
    if asked.last.get("role") != "assistant" or _ORDER.index(name) <= reached:
        asked.say(place, "assistant", **{name: value})
    else:
        asked.last[name] = value


def _read_logprobs(fields: Fields) -> Fields:
    count = fields.get("top_logprobs") or 0
    wanted = count or _LOGPROBS in (read_typed(fields, "include", list) or [])
    return {"logprobs": True, "top_logprobs": count} if wanted else {}


def _read_form(form: Fields) -> Fields | None:
    if form.get("type") != "json_schema":
        return form or None
    return {"type": "json_schema", "json_schema": {name: value for name, value in form.items() if name != "type"}}


# Written.


class ResponseReply:
    """One HTTP reply: a response of items, as a stream or as a whole."""

    def __init__(self, asked: ApiRequest, *, reply_id: str, created: int, name: str, model: Ready) -> None:
        self._id = reply_id
        self._top = asked.logprobs  # most probable tokens to tell of each; None: no log-probabilities
        self._odds: list[Fields] = []  # of tokens whose text has not come yet
        self._told: dict[int, list[Fields]] = {}  # the odds of each message, by its index
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
        if isinstance(event, Token) and self._top is not None and not (event.thinking or event.calls):
            self._odds.append(replies.tell_token(event, self._top))
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
            if block.kind != blocks.TEXT:
                self._odds.clear()
            yield {"type": "response.output_item.added", **item, "item": self._item(block, is_new=True)}
            if block.kind != blocks.CALL:
                yield {"type": "response.content_part.added", **content, "part": self._content(block, "")}
            return
        name = f"response.{_DELTAS[block.kind]}"
        place = inside if block.kind == blocks.CALL else content
        is_text = block.kind == blocks.TEXT
        if what == blocks.MORE:
            odds: Fields = {"logprobs": self._take_odds(block)} if is_text else {}
            yield {"type": f"{name}.delta", **place, "delta": piece, **odds}
            return
        if block.kind == blocks.CALL:
            yield {"type": f"{name}.done", **place, "arguments": block.text, "name": block.name}
        else:
            odds = {"logprobs": self._told.get(block.index, [])} if is_text else {}
            yield {"type": f"{name}.done", **place, "text": block.text, **odds}
            yield {"type": "response.content_part.done", **content, "part": self._content(block, block.text)}
        yield {"type": "response.output_item.done", **item, "item": self._item(block)}

    def _take_odds(self, block: AnswerBlock) -> list[Fields]:
        odds, self._odds = self._odds, []
        self._told.setdefault(block.index, []).extend(odds)
        return odds

    def _content(self, block: AnswerBlock, text: str) -> Fields:
        if block.kind == blocks.THINKING:
            return {"type": "reasoning_text", "text": text}
        odds = self._told.get(block.index, [])
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": odds}

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
        content = [] if is_new else [self._content(block, block.text)]
        if block.kind == blocks.THINKING:
            return {"type": "reasoning", **head, "summary": [], "content": content}
        return {"type": "message", **head, "role": "assistant", "content": content}


_DELTAS = {
    blocks.THINKING: "reasoning_text",
    blocks.TEXT: "output_text",
    blocks.CALL: "function_call_arguments",
}
_PREFIXES = {blocks.THINKING: "rs", blocks.TEXT: "msg", blocks.CALL: "fc"}


def _tell_usage(done: Done) -> Fields:
    usage = sum_usage([done.stats])
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": usage.thinking},
        "total_tokens": usage.prompt + usage.completion,
    }


def _echo(fields: Fields) -> Fields:
    """Return what a response repeats of its request, with the defaults."""
    defaults: Fields = {
        "instructions": None,
        "max_output_tokens": None,
        "metadata": {},
        "parallel_tool_calls": True,
        "reasoning": {"effort": None, "summary": None},
        "temperature": 0.0,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": 0,
        "top_p": 1.0,
        "truncation": "disabled",
    }
    told = {name: default if fields.get(name) is None else fields[name] for name, default in defaults.items()}
    return {**told, "background": False, "previous_response_id": None, "store": False}
