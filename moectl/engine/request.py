"""What is asked of the model: text and parameters, as they travel from the command line to every rank.

It holds tokens only where a measurement needs an exact number: the worker tokenizes. Defaults for users are in the
command line.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any, NoReturn

from moectl.errors import BadField
from moectl.model.parameters import PARAMETERS

MAX_PROMPT_BYTES = 4 * 1024 * 1024
MAX_STOPS = 64  # OpenAI takes 4, editors send up to 14
MAX_STOP_BYTES = 1024
MAX_BIASES = 1024
MAX_OPTION_BYTES = 64 * 1024  # of the chat template's options
MAX_MESSAGES = 8192  # with the calls in them: each costs time on every rank, also an empty one
MAX_TOOLS = 512
MAX_DEPTH = 32  # lists and objects within each other, in a tool, a call or an option
TOO_LONG = "context_length_exceeded"  # OpenAI's code; clients shorten a conversation when they meet it
LEAST_TOP_P = 1e-6  # at or below this only the most probable token is left; float32 knows no less
_TOOL_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")


@dataclass(frozen=True, slots=True)
class Request:
    """One completion; `id` counts up from 1 within a session."""

    id: int
    prompt: str  # as it is, without the chat template
    max_tokens: int  # of the answer; 0: only the prompt's are counted
    temperature: float = 0.0  # 0 = greedy
    top_p: float = 1.0
    seed: int | None = None
    prompt_tokens: tuple[int, ...] | None = None  # token ids instead of `prompt`
    ignore_eos: bool = False  # go on to max_tokens
    # A conversation instead of `prompt`, in the form that chat templates take: objects with `role` (system, user,
    # assistant or tool) and `content`; an assistant's may have `reasoning_content` and `tool_calls`, a tool's has
    # `tool_call_id` and `name`. `moectl.server.conversation` makes them.
    messages: tuple[dict[str, Any], ...] | None = None
    top_k: int = 0  # 0 = all
    min_p: float = 0.0
    presence_penalty: float = 0.0  # these two as OpenAI defines them, over the tokens generated so far
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and answer, as vLLM has it
    logit_bias: tuple[tuple[int, float], ...] = ()  # token id → what is added to its logit
    logprobs: int | None = None  # None: none; k: each chosen token's, and of the k most probable
    stop: tuple[str, ...] = ()  # texts that end the answer; they are not part of it
    # Tokens of the answer that were sent before a restart; it goes on after them. `max_tokens` and the completion
    # tokens of the statistics count them too.
    answered: tuple[int, ...] = ()
    think: bool | None = None  # think before the answer; None: what the model does by itself
    template_options: dict[str, Any] = field(default_factory=dict)  # for the chat template, which may know them
    # Functions that the model may call, in the form that chat templates take; (): an answer is text alone.
    tools: tuple[dict[str, Any], ...] = ()
    must_call: tuple[str, ...] = ()  # names of tools, one of which has to be called; (): the model may choose
    parallel_calls: bool = True  # several calls in one answer
    space: int = 0  # of the prompt cache: prompts of other spaces are not found
    # JSON schema of the answer's text, None for any text. Calls of tools may come instead of it.
    schema: dict[str, Any] | None = None
    cache_prompt: bool = True  # look for it in the prompt cache, and keep it there; a measurement wants neither

    @property
    def chars(self) -> int:
        """How many characters of text have to be turned into tokens."""
        return sum(map(len, self._texts))

    @property
    def _texts(self) -> list[str]:
        parts = [value for message in self.messages or () for value in message.values()]
        return [self.prompt, *(part if isinstance(part, str) else to_text(part) for part in (*parts, *self.tools))]

    @property
    def tool_names(self) -> tuple[str, ...]:
        """The names of its tools."""
        return tuple(tool["function"]["name"] for tool in self.tools)

    @property
    def holds_calls(self) -> bool:
        """Whether its answer's calls are held to their tools' schemas."""
        is_strict = any(tool["function"].get("strict") for tool in self.tools)
        return bool(self.tools) and (is_strict or bool(self.must_call) or self.schema is not None)

    @property
    def is_held(self) -> bool:
        """Whether a grammar holds its answer to a form."""
        return self.schema is not None or self.holds_calls

    @property
    def source(self) -> str:
        """The field of an API request that the prompt came from."""
        return "prompt" if self.messages is None else "messages"

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is always chosen."""
        return self.temperature == 0 or self.top_p <= LEAST_TOP_P

    def __post_init__(self) -> None:
        self._check_messages()
        self._check_depths()
        self._check_texts()
        self._check_tools()
        self._check_biases()
        if self.is_held and self.ignore_eos:
            _bad("ignore_eos", "goes on after the end, and an answer that is held to a form ends with it")
        for name, parameter in PARAMETERS.items():
            is_count = name == "max_tokens" and self.max_tokens == 0
            if not (is_count or parameter.allows(value := getattr(self, name))):
                _bad(name, f"should be {parameter.text}, it is {value}")

    def _check_messages(self) -> None:
        count = sum(1 + len(message.get("tool_calls") or ()) for message in self.messages or ())
        if count > MAX_MESSAGES:
            reason = f"should be shorter: it has {count} messages and calls, more than {MAX_MESSAGES}"
            raise too_long(f"messages {reason}", "messages")

    def _check_depths(self) -> None:
        """Before anything walks them: what is deep cannot be written as JSON."""
        calls = [call for message in self.messages or () for call in message.get("tool_calls") or ()]
        checked = {"chat_template_kwargs": self.template_options, "messages": calls, "tools": self.tools}
        for name, value in checked.items():
            if is_deeper(value, MAX_DEPTH):
                _bad(name, f"should have at most {MAX_DEPTH} objects and lists within each other")

    def _check_tools(self) -> None:
        if self.tools and self.messages is None:
            _bad("tools", "need a conversation: a raw text calls no functions")
        if len(self.tools) > MAX_TOOLS:
            _bad("tools", f"should be at most {MAX_TOOLS}, here are {len(self.tools)}")
        seen: set[str] = set()
        for name in self.tool_names:
            if not _TOOL_NAME.fullmatch(name):
                _bad("tools", "should have names of 1 to 128 letters, digits and _ . : / -, one has another")
            if name in seen:
                _bad("tools", f"should have names that differ, {name!r} is there twice")
            seen.add(name)
        for name in self.must_call:
            if name not in seen:
                _bad("tool_choice", f"should name one of the tools, {name[:128]!r} is none of them")

    def _check_texts(self) -> None:
        size = sum(_count_bytes(text, self.source, "the prompt") for text in self._texts)
        if size > MAX_PROMPT_BYTES:
            raise too_long(
                f"the prompt has {size} bytes, more than {MAX_PROMPT_BYTES}: no context holds it", self.source
            )
        told = to_text(self.template_options)
        if (size := _count_bytes(told, "chat_template_kwargs", "an option")) > MAX_OPTION_BYTES:
            _bad("chat_template_kwargs", f"should have at most {MAX_OPTION_BYTES} bytes, it has {size}")
        if len(self.stop) > MAX_STOPS:
            _bad("stop", f"should be at most {MAX_STOPS} texts, here are {len(self.stop)}")
        for text in self.stop:
            if not 0 < (size := _count_bytes(text, "stop", "a stop text")) <= MAX_STOP_BYTES:
                _bad("stop", f"should be texts of 1 to {MAX_STOP_BYTES} bytes, one has {size}")

    def _check_biases(self) -> None:
        if len(self.logit_bias) > MAX_BIASES:
            _bad("logit_bias", f"should name at most {MAX_BIASES} tokens, here are {len(self.logit_bias)}")
        for token, value in self.logit_bias:
            if not (token >= 0 and -100 <= value <= 100):
                _bad("logit_bias", f"should be between -100 and 100, of token {token} it is {value}")


def is_deeper(value: Any, levels: int) -> bool:
    """Return whether a JSON value has more than `levels` objects and lists within each other."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else None
    return inner is not None and (levels == 0 or any(is_deeper(each, levels - 1) for each in inner))


def to_text(value: Any) -> str:
    """Return a JSON value as text: the form in which its size counts."""
    return json.dumps(value, ensure_ascii=False)


def too_long(reason: str, param: str) -> BadField:
    """Return the error of a prompt that the context cannot hold."""
    return BadField(reason, hint="shorten the prompt", param=param, code=TOO_LONG)


def _bad(param: str, reason: str) -> NoReturn:
    raise BadField(f"{param} {reason}", param=param)


def _count_bytes(text: str, param: str, what: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        raise BadField(f"{what} is not UTF-8 text", hint="send whole characters", param=param) from None


@dataclass(frozen=True, slots=True)
class Stats:
    """What a completion took; times in seconds, memory in bytes (the peak of rank 0's arrays)."""

    prompt_tokens: int
    completion_tokens: int
    prompt_s: float  # from admission to the first token
    decode_s: float  # from the first token to the last
    ttft_s: float  # from the request's arrival at rank 0 to the first token
    peak_memory_bytes: int
    cached_tokens: int = 0  # of the prompt: found in the prompt cache, not computed again
    drafted_tokens: int = 0  # proposed by prompt lookup
    accepted_tokens: int = 0  # of those: confirmed by the model
    thinking_tokens: int = 0  # of the completion's: before the answer
