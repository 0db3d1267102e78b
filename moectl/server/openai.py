"""OpenAI's JSON, read: from the body of an HTTP request to what the model is asked.

It knows no HTTP library, no clock and no cluster. Fields and their limits are those of OpenAI's API reference, with the
additions that vLLM and llama.cpp share (top_k, min_p, repetition_penalty, ignore_eos, chat_template_kwargs), moectl's
own `think`, and the values that only those two accept: -1 for no limit and for any seed, empty stop texts, messages
without content. Unknown fields are ignored. Known fields that moectl does not have, and that would change the answer,
are refused. Where nothing is said the model's own defaults hold, then those of a Request: greedy, as `moectl run` is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from moectl.engine.protocol import Ready
from moectl.engine.request import MAX_DEPTH, Request, is_deeper, too_long
from moectl.engine.schema import check_calls
from moectl.errors import BadField, UsageError
from moectl.model.parameters import EFFORTS, MAX_LOGPROBS, PARAMETERS
from moectl.server.chat import read_messages, read_tools
from moectl.server.fields import (
    Fields,
    kind_of,
    load_json,
    read_boolean,
    read_integer,
    read_number,
    read_typed,
    refuse,
    refuse_unsupported,
    show,
)
from moectl.server.form import read_form

MAX_CHOICES = 64  # prompts × n of one HTTP request
COMPLETION_TOKENS = 16  # of /v1/completions without max_tokens, as OpenAI
_GREEDY_BELOW = 1e-3  # a temperature below this differs from 0 only in how it overflows
# What transformers and moectl themselves give to a chat template.
_TAKEN = frozenset(
    ("messages", "conversation", "conversations", "tools", "documents", "chat_template", "tokenize", "return_dict")
).union(("add_generation_prompt", "continue_final_message", "return_assistant_tokens_mask"))
_NO_LIMITS = (-1, -2)  # LM Studio's and llama.cpp's; ollama's "the rest of the context"
_ANY_SEED = -1  # llama.cpp's and vLLM's
_MOST_LEVELS = 2 * MAX_DEPTH  # of lists and objects in a body: what was read can be written again
_BODY = 'send one JSON object, as {"messages": [{"role": "user", "content": "hello"}]}'


@dataclass(frozen=True, slots=True)
class ApiRequest:
    """One HTTP request: what to submit, and the form of the reply."""

    chat: bool
    requests: tuple[Request, ...]  # one per choice, the choices of a prompt beside each other; ids are 0
    n: int  # choices per prompt
    stream: bool
    include_usage: bool
    logprobs: int | None
    fields: Fields = field(default_factory=dict, compare=False)  # the body, where a reply repeats parts of it


Reader = Callable[[Fields, str, Ready], ApiRequest]


def parse_body(body: bytes) -> Fields:
    """Return the JSON object in a body; raise UsageError when it is none."""
    try:
        fields = load_json(body)
        if is_deeper(fields, _MOST_LEVELS):
            raise RecursionError
    except RecursionError:
        reason = f"it should have at most {_MOST_LEVELS} lists and objects within each other"
        raise UsageError(f"the body is nested too deeply: {reason}", hint=_BODY) from None
    except ValueError as error:
        raise UsageError(f"the body is not valid JSON: {error}", hint=_BODY) from None
    if not isinstance(fields, dict):
        raise UsageError(f"the body should be a JSON object, it is {kind_of(fields)}", hint=_BODY)
    return fields


def read_chat(fields: Fields, name: str, model: Ready) -> ApiRequest:
    """Return what a body of /v1/chat/completions asks of the model of this name; raise UsageError."""
    _check_model(fields, name)
    refuse_unsupported(fields)
    messages = read_messages(fields)
    logprobs = None
    top_logprobs = read_integer(fields, "top_logprobs", 0, MAX_LOGPROBS)
    if fields.get("logprobs") != 0 and read_boolean(fields, "logprobs"):
        logprobs = top_logprobs or 0
    elif top_logprobs:
        refuse("top_logprobs", "needs logprobs to be true")
    request = Request(
        0,
        "",
        _read_limit(fields, model, model.max_seq_len),
        messages=messages,
        logprobs=logprobs,
        think=read_typed(fields, "think", bool),
        template_options=_read_template_options(fields),
        **read_tools(fields),
        **_read_parameters(fields, model),
    )
    return _ask(fields, True, [request])


def read_completion(fields: Fields, name: str, model: Ready) -> ApiRequest:
    """Return what a body of /v1/completions asks of the model of this name; raise UsageError."""
    _check_model(fields, name)
    refuse_unsupported(fields)
    if fields.get("best_of") not in (None, fields.get("n") or 1):
        refuse("best_of", "is not supported beyond n", hint="leave it out")
    same = {
        "max_tokens": _read_limit(fields, model, COMPLETION_TOKENS),
        "logprobs": None if fields.get("logprobs") is False else read_integer(fields, "logprobs", 0, MAX_LOGPROBS),
        **_read_parameters(fields, model),
    }
    return _ask(fields, False, [Request(0, **prompt, **same) for prompt in _read_prompts(fields, model)])


def _read_template_options(fields: Fields) -> Fields:
    """Return what a chat template may know, by its names for it. Servers ignore what a template does not know."""
    given = read_typed(fields, "chat_template_kwargs", dict) or {}
    for name in given:
        if name in _TAKEN or not name.isidentifier():
            refuse(f"chat_template_kwargs.{name}", "is none of a chat template's options", hint="leave it out")
    effort = fields.get("reasoning_effort")
    if effort not in (None, *EFFORTS):
        refuse("reasoning_effort", f"should be one of {', '.join(EFFORTS)}, it is {show(effort)}")
    return {**({} if effort is None else {"reasoning_effort": effort}), **given}


def _read_limit(fields: Fields, model: Ready, default: int) -> int:
    """Return the most tokens that an answer may have, no more than the context."""
    limit = None
    for name in ("max_completion_tokens", "max_tokens", "n_predict"):
        value = read_integer(fields, name, min(_NO_LIMITS))
        if value == 0:
            refuse(name, "should be 1 or more, or -1 for no limit, it is 0")
        limit = value if limit is None else limit
    if limit is None:
        limit = default
    return model.max_seq_len if limit in _NO_LIMITS else min(limit, model.max_seq_len)


def _ask(fields: Fields, chat: bool, prompts: list[Request]) -> ApiRequest:
    n = read_integer(fields, "n", 1, MAX_CHOICES) or 1
    if n * len(prompts) > MAX_CHOICES:
        refuse("n", f"times the number of prompts should be at most {MAX_CHOICES}, it is {n * len(prompts)}")
    check_calls(prompts[0])
    options = read_typed(fields, "stream_options", dict) or {}
    return ApiRequest(
        chat,
        tuple(_reseed(request, i) for request in prompts for i in range(n)),
        n,
        stream=read_boolean(fields, "stream"),
        include_usage=read_boolean(options, "include_usage", "stream_options.include_usage"),
        logprobs=prompts[0].logprobs,
    )


def _reseed(request: Request, choice: int) -> Request:
    # The same seed would make n choices of one prompt the same; OpenAI promises only that a whole call repeats.
    if request.seed is None or choice == 0:
        return request
    return dataclasses.replace(request, seed=(request.seed + choice) % 2**64)


def _check_model(fields: Fields, name: str) -> None:
    model = read_typed(fields, "model", str)
    if model not in (None, "", name):
        raise no_such_model(model, name)


def no_such_model(asked: str, *names: str) -> BadField:
    """Return the error of a request for a model of another name than those that are served."""
    served = f"{', '.join(map(repr, names))} {'are' if len(names) > 1 else 'is'}"
    return BadField(
        f"model {show(asked)} is not served here, {served}",
        hint=f"ask for {names[0]!r}, or for no model",
        param="model",
        code="model_not_found",
    )


def _read_prompts(fields: Fields, model: Ready) -> list[Fields]:
    """Return each prompt as keyword arguments of a Request."""
    prompt = fields.get("prompt")
    if not isinstance(prompt, str | list) or not prompt:
        shown = "empty" if prompt in ("", []) else kind_of(prompt)
        refuse("prompt", f"should be a string, a list of strings, a list of tokens, or a list of those; it is {shown}")
    several = isinstance(prompt, list) and isinstance(prompt[0], str | list)
    if several and len(prompt) > MAX_CHOICES:
        refuse("prompt", f"should be at most {MAX_CHOICES} prompts, here are {len(prompt)}")
    return [_read_prompt(one, model) for one in prompt] if several else [_read_prompt(prompt, model)]


def _read_prompt(prompt: Any, model: Ready) -> Fields:
    if prompt in ("", []):
        refuse("prompt", "should not be empty")
    if isinstance(prompt, str):
        return {"prompt": prompt}
    if not isinstance(prompt, list):
        refuse("prompt", f"should have prompts of one kind, one of them is {kind_of(prompt)}")
    if not all(type(token) is int and 0 <= token < model.vocab_size for token in prompt):
        refuse("prompt", f"should have tokens, whole numbers from 0 to {model.vocab_size - 1}")
    if len(prompt) >= model.max_seq_len:
        raise too_long(f"the prompt has {len(prompt)} tokens, the model's context is {model.max_seq_len}", "prompt")
    return {"prompt": "", "prompt_tokens": tuple(prompt)}


def _read_parameters(fields: Fields, model: Ready) -> Fields:
    """Return what both endpoints share, as keyword arguments of a Request; the model's defaults, then its own."""
    limits = PARAMETERS["temperature"]
    temperature = read_number(fields, "temperature", limits.low, limits.high)
    seed = read_integer(fields, "seed", -(2**63), 2**64 - 1)
    read: Fields = {
        "seed": None if seed in (None, _ANY_SEED) else seed % 2**64,
        "ignore_eos": read_boolean(fields, "ignore_eos"),
        "stop": _read_stop(fields),
        "logit_bias": _read_bias(fields, model),
        "schema": read_form(fields),
    }
    top_k = read_integer(fields, "top_k", -1)
    repetition = read_number(fields, "repetition_penalty")
    if temperature is not None and temperature < _GREEDY_BELOW:
        temperature = 0.0
    optional = {
        "temperature": temperature,
        **{name: read_number(fields, name) for name in ("top_p", "min_p", "presence_penalty", "frequency_penalty")},
        "top_k": None if top_k is None else min(max(top_k, 0), 2**31 - 1),  # vLLM's -1 means all, too
        "repetition_penalty": read_number(fields, "repeat_penalty") if repetition is None else repetition,
    }
    given = {name: value for name, value in optional.items() if value is not None}
    return {**model.sampling, **read, **given}


def _read_stop(fields: Fields) -> tuple[str, ...]:
    stop = fields.get("stop")
    if stop is None:
        return ()
    texts = [stop] if isinstance(stop, str) else stop
    if not isinstance(texts, list):
        refuse("stop", f"should be a string or a list of strings, it is {kind_of(stop)}")
    for text in texts:
        if not isinstance(text, str | None):
            refuse("stop", f"should be a string or a list of strings, one of them is {kind_of(text)}")
    return tuple(dict.fromkeys(text for text in texts if text))  # forms send "" or null for none


def _read_bias(fields: Fields, model: Ready) -> tuple[tuple[int, float], ...]:
    read = []
    for key in (bias := read_typed(fields, "logit_bias", dict) or {}):
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < model.vocab_size):
            refuse("logit_bias", f"should name tokens from 0 to {model.vocab_size - 1}, here is {show(key)}")
        read.append((int(key), read_number(bias, key, -100, 100, f"logit_bias.{key}") or 0.0))
    return tuple(read)
