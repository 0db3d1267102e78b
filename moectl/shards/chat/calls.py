"""An answer's tool calls: the format in which a model writes them, and a reader of what stands between its markers.

mlx-lm has the formats and their parsers; gpt-oss's is here. What cannot be read as calls stays text.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

TEXT_FORMAT = "json_tools"  # mlx-lm's name of the format that models without one of their own are told of
MAX_CALL_CHARS = 1 << 20  # between two markers: a parser's time may grow with the square of it
CHANNEL_FORMAT = "gpt_oss"
CHANNELS = frozenset(("<|start|>", "<|channel|>", "<|message|>", "<|end|>"))  # of gpt-oss, one message for each
_CHANNEL_CALL = re.compile(r"\s*(?:functions\.)?([^\s<]+)[^{]*<\|message\|>(.*)", re.DOTALL)
_BLANKS = re.compile(r"\s*")
_MOST_HEADER = 1024  # letters before a call's arguments
_CHANNEL_HEADER = re.compile(r"\s*(?:functions\.)?(?P<name>[^\s<]+)[^{]*<\|message\|>\s*(?=\{)")
_JSON_HEADERS = {
    "json_tools": (
        re.compile(r'\s*\{\s*"name"\s*:\s*(?P<name>"(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)'),
        re.compile(r"\s*\}?\s*"),
    ),
    "mistral": (re.compile(r"\s*(?:\[TOOL_CALLS\])?\s*(?P<name>[\w-]+)\s*\[ARGS\]\s*(?=\{)"),),
    "kimi_k2": (
        re.compile(
            r"(?:<\|tool_call_end\|>)?\s*<\|tool_call_begin\|>\s*(?P<id>(?:functions\.)?(?P<name>[^<]+?):\d+)\s*"
            r"<\|tool_call_argument_begin\|>\s*(?=\{)"
        ),
        re.compile(r"\s*(?:<\|tool_call_end\|>)?\s*"),
    ),
}


@dataclass(frozen=True, slots=True)
class CallPart:
    """A piece of a tool call: the first has its id and name, `arguments` adds to the text of its JSON object.

    `index` counts the calls of an answer from 0. Calls do not overlap. One without an end was broken off.
    """

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""
    ended: bool = False


@dataclass(frozen=True, slots=True)
class CallFormat:
    """How a model writes calls: between these texts, and what reads them (text, tools → one call or a list of them)."""

    name: str  # mlx-lm's, or CHANNEL_FORMAT
    start: str
    end: str
    parse: Callable[[str, Any], Any]
    ends_with_answer: bool  # a call may lack its end where the model ends its answer; never where the answer is cut
    # Where the arguments are written as JSON: what leads to them, with the call's `name` and `id`, and what may follow.
    header: re.Pattern[str] | None = None
    trailer: re.Pattern[str] = _BLANKS


def find_format(
    renderer: Any, added: Mapping[str, int], config: Mapping[str, Any], defaults: Mapping[str, Any]
) -> CallFormat | None:
    """Return the format of a model's own calls, None where mlx-lm has no parser for it.

    `renderer` has the model's template and vocabulary, `added` are the tokens that ordinary text does not have.
    """
    from mlx_lm import tool_parsers
    from mlx_lm.tokenizer_utils import _infer_tool_parser

    if added.keys() >= CHANNELS | {"<|call|>"}:
        return CallFormat(CHANNEL_FORMAT, " to=", "<|call|>", parse_channel_call, True, _CHANNEL_HEADER)
    name = config.get("tool_parser_type", defaults.get("tool_parser_type"))
    if name is None:
        name = _infer_tool_parser(renderer)
    known = [module.name for module in pkgutil.iter_modules(tool_parsers.__path__)]
    return open_format(name) if name in known else None  # a file could name any module


def open_format(name: str) -> CallFormat:
    """Return one of mlx-lm's formats."""
    module = importlib.import_module(f"mlx_lm.tool_parsers.{name}")
    # JSON is whole or it is none; the other formats can be read, wrongly, from a part of a call.
    ends_with_answer = name == TEXT_FORMAT or not module.tool_call_end
    leads = _JSON_HEADERS.get(name, ())
    start, end = module.tool_call_start, module.tool_call_end
    return CallFormat(name, start, end, module.parse_tool_call, ends_with_answer, *leads)


def parse_channel_call(text: str, tools: Any = None) -> dict[str, Any]:
    """Return the call in a message of gpt-oss to a function, after "to=". Raises ValueError.

    Source: https://developers.openai.com/cookbook/articles/openai-harmony
    """
    found = _CHANNEL_CALL.match(text)
    if found is None:
        raise ValueError("it names no function")
    return {"name": found[1], "arguments": json.loads(found[2])}


class CallReader:
    """Reads one answer's calls, segment by segment: arguments as they come where the format is JSON, else whole."""

    def __init__(self, form: CallFormat, tools: Sequence[Mapping[str, Any]]) -> None:
        self._form = form
        self._tools = tools
        self._count = 0  # of calls begun
        self._begin()

    def _begin(self) -> None:
        self._is_open = False
        self._body = ""
        self._at = 0  # of it: how much has been told as calls
        self._object: JsonObject | None = None  # the arguments that are coming

    def feed(self, text: str) -> list[CallPart]:
        """Add text between the markers; return what it adds to a call."""
        self._is_open = True
        self._body += text
        parts: list[CallPart] = []
        for part in self._stream() if self._form.header is not None else ():
            if parts and parts[-1].index == part.index:
                last = parts.pop()
                part = replace(last, arguments=last.arguments + part.arguments, ended=part.ended)
            parts.append(part)
        return parts

    def close(self) -> tuple[list[CallPart], str]:
        """Return the calls of a segment that has ended, or its text as it was written."""
        return self._end(self._form.end, is_whole=True)

    def finish(self, *, by_itself: bool) -> tuple[list[CallPart], str]:
        """Return what an open segment is at the end of the answer, which the model has ended `by_itself` or not."""
        return self._end("", is_whole=by_itself and self._form.ends_with_answer) if self._is_open else ([], "")

    def _end(self, marker: str, *, is_whole: bool) -> tuple[list[CallPart], str]:
        body, at, is_cut = self._body, self._at, self._object is not None
        self._begin()
        if at:  # a call that was broken off has been told as far as it went
            rest = "" if is_cut or self._form.trailer.fullmatch(body, at) else body[at:] + marker
            return [], rest
        if is_whole and (calls := self._read(body)):
            return calls, ""
        return [], self._form.start + body + marker

    def _stream(self) -> Iterator[CallPart]:
        assert self._form.header is not None
        while True:
            if self._object is None:
                found = self._form.header.match(self._body, self._at, self._at + _MOST_HEADER)
                if found is None or (name := _unquote(found["name"])) is None:
                    return
                self._object = JsonObject()
                self._at = found.end()
                self._count += 1
                yield CallPart(self._count - 1, found.groupdict().get("id") or _make_id(), name)
            piece = self._object.take(self._body[self._at :])
            self._at += len(piece)
            yield CallPart(self._count - 1, arguments=piece, ended=self._object.is_valid)
            if not self._object.has_ended:
                return
            self._object = None

    def _read(self, body: str) -> list[CallPart]:
        if len(body) > MAX_CALL_CHARS:
            return []
        try:
            found = self._form.parse(body, self._tools)
            calls = [_check(call) for call in (found if isinstance(found, list) else [found])]
        except Exception:  # a parser meets any text, and each fails in its own way
            return []
        parts = [
            CallPart(self._count + i, call_id or _make_id(), name, arguments, ended=True)
            for i, (call_id, name, arguments) in enumerate(calls)
        ]
        self._count += len(parts)
        return parts


class JsonObject:
    """Finds the end of a JSON object that comes in pieces."""

    def __init__(self) -> None:
        self.has_ended = False
        self._text: list[str] = []
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def take(self, text: str) -> str:
        """Return the part of a text that belongs to the object."""
        for i, letter in enumerate(text):
            if self._in_string:
                self._in_string = self._escaped or letter != '"'
                self._escaped = not self._escaped and letter == "\\"
            elif letter == '"':
                self._in_string = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.has_ended = True
                    text = text[: i + 1]
                    break
        self._text.append(text)
        return text

    @property
    def is_valid(self) -> bool:
        """Whether it has ended and is JSON."""
        if not self.has_ended:
            return False
        try:
            _dump(json.loads("".join(self._text)))
        except (ValueError, RecursionError):
            return False
        return True


def _make_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


def _unquote(name: str) -> str | None:
    """Return a name, which may be a JSON string; None for none."""
    try:
        told = json.loads(name) if name.startswith('"') else name
        told.encode()
    except ValueError:
        return None
    return str(told) or None


def _check(call: Any) -> tuple[str | None, str, str]:
    """Return a parsed call's id, name and arguments as JSON. Raises ValueError, TypeError or KeyError for no call."""
    name, arguments, call_id = call["name"], call["arguments"], call.get("id")
    if not (isinstance(name, str) and name and isinstance(arguments, dict)):
        raise ValueError("a call has a name and an object of arguments")
    name.encode()
    return call_id if isinstance(call_id, str) and call_id else None, name, _dump(arguments)


def _dump(arguments: dict[str, Any]) -> str:
    """Return JSON that can be sent. Raises ValueError for a number or a letter that cannot."""
    told = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    told.encode()
    return told
