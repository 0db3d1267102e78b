"""OpenAI's JSON, written: from tokens to a reply, from an error to its body and status.

It knows no HTTP library, no clock and no cluster; `openai` reads requests.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator

from moectl import __version__
from moectl.engine.protocol import Done, Ready, Token
from moectl.errors import BadField, HostError, MoectlError, QueueFull, RemoteError, StateError, UsageError
from moectl.server.blocks import TEXT, THINKING, Blocks
from moectl.server.contracts import Listed, Thinking
from moectl.server.fields import Fields
from moectl.server.openai import ApiRequest
from moectl.server.stream import Part, read_parts, sum_usage
from moectl.shards.chat.calls import CallPart

_LEAST_LOGPROB = -9999.0  # JSON has no infinity; OpenAI's own stand-in


class Reply:
    """One HTTP reply, made of every choice's events: as chunks of a stream, or as a whole."""

    def __init__(self, asked: ApiRequest, *, reply_id: str, created: int, name: str, model: Ready) -> None:
        self._asked = asked
        self._head = {
            "id": f"{'chatcmpl' if asked.chat else 'cmpl'}-{reply_id}",
            "created": created,
            "model": name,
            "system_fingerprint": f"moectl-{__version__}-{model.split}-{model.bits or 16}bit",
        }
        self._answers = [Blocks() for _ in asked.requests]
        self._logprobs: list[list[Token]] = [[] for _ in asked.requests]

    def start(self) -> Iterator[Fields]:
        """Yield the chunks with which a stream begins."""
        if self._asked.chat:
            for index in range(len(self._answers)):
                yield self._chunk(index, {"delta": {"role": "assistant", "content": ""}})

    def take(self, index: int, event: Token | Done) -> Iterator[Fields]:
        """Note an event of a choice; yield its chunks of a stream."""
        for _ in self._answers[index].take(event):
            pass
        parts = list(read_parts(event))
        logprobs: list[Token] = []
        if isinstance(event, Token) and self._asked.logprobs is not None and event.logprob is not None:
            logprobs.append(event)
        self._logprobs[index] += logprobs
        if parts or logprobs:
            told = _tell_delta(parts)
            content: Fields = {"delta": told} if self._asked.chat else {"text": told.get("content", "")}
            yield self._chunk(index, {**content, "logprobs": self._tell_logprobs(logprobs)})
        if isinstance(event, Done):
            yield self._chunk(index, {"delta": {}} if self._asked.chat else {"text": ""}, event)

    def end(self) -> Iterator[Fields | None]:
        """Yield the chunk with the usage, if the request wants it, and the last one."""
        if self._asked.include_usage:
            yield {**self._head, "object": self._object(), "choices": [], "usage": self._usage()}
        yield None

    def fail(self, error: MoectlError) -> Iterator[Fields | None]:
        """Yield the chunks with which a stream ends in an error."""
        yield describe_error(error)[1]
        yield None

    def whole(self) -> Fields:
        """Return the whole reply, once every choice is done."""
        choices = [self._choice(i, self._whole_choice(i), answer.done) for i, answer in enumerate(self._answers)]
        kind = "chat.completion" if self._asked.chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": self._usage()}

    def _whole_choice(self, index: int) -> Fields:
        answer = self._answers[index]
        logprobs = self._tell_logprobs(self._logprobs[index])
        if not self._asked.chat:
            return {"text": answer.text(TEXT), "logprobs": logprobs}
        text, thinking = answer.text(TEXT), answer.text(THINKING)
        content = None if answer.calls and not text else text
        message: Fields = {"role": "assistant", "content": content, "refusal": None}
        if thinking:
            message["reasoning_content"] = thinking
        if answer.calls:
            message["tool_calls"] = [_tell_call(call.call_id, call.name, call.text) for call in answer.calls]
        return {"message": message, "logprobs": logprobs}

    def _chunk(self, index: int, content: Fields, done: Done | None = None) -> Fields:
        usage = {"usage": None} if self._asked.include_usage else {}
        return {**self._head, "object": self._object(), "choices": [self._choice(index, content, done)], **usage}

    def _choice(self, index: int, content: Fields, done: Done | None) -> Fields:
        choice = {"index": index, "logprobs": None, **content, "finish_reason": done.finish_reason if done else None}
        if done:  # moectl's own addition, as llama.cpp has its timings
            choice["stats"] = dataclasses.asdict(done.stats)
        return choice

    def _object(self) -> str:
        return "chat.completion.chunk" if self._asked.chat else "text_completion"

    def _usage(self) -> Fields:
        usage = sum_usage([answer.done.stats for answer in self._answers if answer.done], self._asked.n)
        return {
            "prompt_tokens": usage.prompt,
            "completion_tokens": usage.completion,
            "total_tokens": usage.prompt + usage.completion,
            "prompt_tokens_details": {"cached_tokens": usage.cached},
            **({"completion_tokens_details": {"reasoning_tokens": usage.thinking}} if usage.thinking else {}),
        }

    def _tell_logprobs(self, tokens: list[Token]) -> Fields | None:
        if self._asked.logprobs is None:
            return None
        if self._asked.chat:
            return {"content": [tell_token(token, self._asked.logprobs) for token in tokens], "refusal": None}
        return _tell_legacy(tokens, self._asked.logprobs)


def _tell_delta(parts: list[Part]) -> Fields:
    """Return what parts of an answer add to a message of a stream."""
    delta: Fields = {}
    if thinking := "".join(part.text for part in parts if isinstance(part, Thinking)):
        delta["reasoning_content"] = thinking
    calls = [part for part in parts if isinstance(part, CallPart)]
    text = "".join(part for part in parts if isinstance(part, str))
    if text or not (thinking or calls):
        delta["content"] = text
    if told := [_tell_call_part(part) for part in calls if part.id or part.arguments]:
        delta["tool_calls"] = told
    return delta


def _tell_call_part(part: CallPart) -> Fields:
    if not part.id:
        return {"index": part.index, "function": {"arguments": part.arguments}}
    return {"index": part.index, **_tell_call(part.id, part.name, part.arguments)}


def _tell_call(call_id: str, name: str, arguments: str) -> Fields:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def tell_token(token: Token, k: int) -> Fields:
    """Return a token's log-probability and those of the `k` most probable ones, as chats and responses have them."""
    top = [_tell_text(text, logprob) for _, text, logprob in token.top[:k]]
    return {**_tell_text(_own_text(token), token.logprob or 0.0), "top_logprobs": top}


def _tell_text(text: str, logprob: float) -> Fields:
    exact = "\ufffd" not in text  # else it is a part of a character, whose bytes are not in the text
    return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode()) if exact else None}


def _tell_legacy(tokens: list[Token], k: int) -> Fields:
    return {
        "tokens": [_own_text(token) for token in tokens],
        "token_logprobs": [_finite(token.logprob or 0.0) for token in tokens],
        "top_logprobs": [{text: _finite(logprob) for _, text, logprob in token.top[:k]} for token in tokens] or None,
        "text_offset": [token.offset for token in tokens],
    }


def _own_text(token: Token) -> str:
    # The text that became final with a token may be less or more than its own: a stop text may be held back.
    return next((text for number, text, _ in token.top if number == token.token), token.text)


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB) if logprob == logprob else _LEAST_LOGPROB


def describe_model(listed: Listed) -> Fields:
    """Return one entry of /v1/models.

    `max_model_len` is vLLM's, `context_length` the name that most others have. The rest is moectl's own: see `Listed`.
    `tools` and `thinking` are known once the model was loaded; null before.
    """
    model = listed.model
    return {
        "id": listed.name,
        "object": "model",
        "created": listed.created,
        "owned_by": "moectl",
        "loaded": listed.loaded,
        "aliases": list(listed.aliases),
        "max_model_len": model.max_seq_len,
        "context_length": model.max_seq_len,
        "tools": model.tools or None,
        "thinking": model.thinks if model.tools else None,
        "quantization": listed.quantization,
        "size_bytes": listed.bytes,
        "shard_set": listed.set_name,
        "pinned": listed.pinned,
        "demo": listed.demo,
    }


# Errors.

_STATUS: dict[type[MoectlError], tuple[int, str]] = {
    QueueFull: (429, "rate_limit_error"),
    UsageError: (400, "invalid_request_error"),
    StateError: (503, "server_error"),
    RemoteError: (503, "server_error"),
    HostError: (503, "server_error"),
    MoectlError: (500, "server_error"),
}
_CODES = {"rate_limit_error": "rate_limit_exceeded"}


def describe_error(error: MoectlError) -> tuple[int, Fields]:
    """Return the HTTP status and the body of an error."""
    status, kind = next(entry for cls in type(error).__mro__ if (entry := _STATUS.get(cls)))
    param, code = (error.param, error.code) if isinstance(error, BadField) else (None, _CODES.get(kind))
    if code == "model_not_found":
        status = 404
    own = type(error).__name__
    return status, error_body(str(error), kind, param=param, code=code, kind=own, hint=error.hint, host=error.host)


def error_body(
    message: str,
    type_: str,
    *,
    param: str | None = None,
    code: str | None = None,
    kind: str = MoectlError.__name__,
    hint: str | None = None,
    host: str | None = None,
) -> Fields:
    """Return the body of an error in OpenAI's shape; kind, hint and host are moectl's own.

    The hint is in the message as well: most clients show nothing else.
    """
    own = {"kind": kind, "hint": hint, "host": host}
    return {"error": {"message": message + hint_suffix(hint), "type": type_, "param": param, "code": code, **own}}


def hint_suffix(hint: str | None) -> str:
    """Return how an error's message ends where it has a hint."""
    return f" (hint: {hint})" if hint else ""


def encode_json(value: Fields) -> bytes:
    """Return JSON in ASCII, so that clients which split a stream at every Unicode line end can read it."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def encode_event(value: Fields | None) -> bytes:
    """Return a server-sent event, named by its type where it has one; None is [DONE], the last one of OpenAI's chat."""
    name = f"event: {value['type']}\n".encode() if value and "type" in value else b""
    return name + b"data: " + (b"[DONE]" if value is None else encode_json(value)) + b"\n\n"
