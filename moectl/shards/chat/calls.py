"""An answer's tool calls: the format in which a model writes them, and a reader of what stands between its markers.

mlx-lm has the formats and their parsers; gpt-oss's is here. What cannot be read as calls stays text.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

Refuse = Callable[[str, str], NoReturn]  # key, why
TEXT_FORMAT = "json_tools"  # mlx-lm's name of the format that models without one of their own are told of
MAX_CALL_CHARS = 1 << 20  # between two markers: a parser's time may grow with the square of it
CHANNELS = frozenset(
    ("<|start|>", "<|channel|>", "<|message|>", "<|end|>")
)  # gpt-oss writes a message for each channel
_CHANNEL_CALL = re.compile(r"\s*(?:functions\.)?([^\s<]+)[^{]*<\|message\|>(.*)", re.DOTALL)


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

    start: str
    end: str
    parse: Callable[[str, Any], Any]
    ends_with_answer: bool  # a call may lack its end where the model ends its answer; never where the answer is cut


def find_format(
    renderer: Any, added: Mapping[str, int], config: Mapping[str, Any], defaults: Mapping[str, Any], refuse: Refuse
) -> CallFormat | None:
    """Return the format of a model's own calls, None where mlx-lm knows none.

    `renderer` has the model's template and vocabulary, `added` are the tokens that ordinary text does not have.
    """
    from mlx_lm import tool_parsers
    from mlx_lm.tokenizer_utils import _infer_tool_parser

    if added.keys() >= CHANNELS | {"<|call|>"}:
        return CallFormat(" to=", "<|call|>", parse_channel_call, ends_with_answer=True)
    name = config.get("tool_parser_type", defaults.get("tool_parser_type"))
    if name is None:
        name = _infer_tool_parser(renderer)
    if name is None:
        return None
    known = sorted(module.name for module in pkgutil.iter_modules(tool_parsers.__path__))
    if name not in known:  # else a file could name any module
        refuse("tool_parser_type", f"is {name!r}, and moectl knows {' and '.join(known)}")
    return open_format(name)


def open_format(name: str) -> CallFormat:
    """Return one of mlx-lm's formats."""
    module = importlib.import_module(f"mlx_lm.tool_parsers.{name}")
    # JSON is whole or it is none; the other formats can be read, wrongly, from a part of a call.
    ends_with_answer = name == TEXT_FORMAT or not module.tool_call_end
    return CallFormat(module.tool_call_start, module.tool_call_end, module.parse_tool_call, ends_with_answer)


def parse_channel_call(text: str, tools: Any = None) -> dict[str, Any]:
    """Return the call in a message of gpt-oss to a function, after "to=". Raises ValueError.

    Source: https://developers.openai.com/cookbook/articles/openai-harmony
    """
    found = _CHANNEL_CALL.match(text)
    if found is None:
        raise ValueError("it names no function")
    return {"name": found[1], "arguments": json.loads(found[2])}


class CallReader:
    """Reads one answer's calls, segment by segment."""

    def __init__(self, form: CallFormat, tools: Sequence[Mapping[str, Any]]) -> None:
        self.count = 0  # of calls told
        self._form = form
        self._tools = tools
        self._body: list[str] = []
        self._is_open = False

    def feed(self, text: str) -> None:
        """Add text between the markers."""
        self._is_open = True
        self._body.append(text)

    def close(self) -> tuple[list[CallPart], str]:
        """Return the calls of a segment that has ended, or its text as it was written."""
        body = self._take()
        if calls := self._read(body):
            return calls, ""
        return [], self._form.start + body + self._form.end

    def finish(self, *, by_itself: bool) -> tuple[list[CallPart], str]:
        """Return what an open segment is at the end of the answer, which the model has ended `by_itself` or not."""
        if not self._is_open:
            return [], ""
        body = self._take()
        if by_itself and self._form.ends_with_answer and (calls := self._read(body)):
            return calls, ""
        return [], self._form.start + body

    def _take(self) -> str:
        body, self._body, self._is_open = "".join(self._body), [], False
        return body

    def _read(self, body: str) -> list[CallPart]:
        if len(body) > MAX_CALL_CHARS:
            return []
        try:
            found = self._form.parse(body, self._tools)
            calls = [_check(call) for call in (found if isinstance(found, list) else [found])]
        except Exception:  # a parser meets any text, and each fails in its own way
            return []
        parts = [
            CallPart(self.count + i, call_id or f"call_{uuid.uuid4().hex[:24]}", name, arguments, ended=True)
            for i, (call_id, name, arguments) in enumerate(calls)
        ]
        self.count += len(parts)
        return parts


def _check(call: Any) -> tuple[str | None, str, str]:
    """Return a parsed call's id, name and arguments as JSON. Raises ValueError, TypeError or KeyError for no call."""
    name, arguments, call_id = call["name"], call["arguments"], call.get("id")
    if not (isinstance(name, str) and name and isinstance(arguments, dict)):
        raise ValueError("a call has a name and an object of arguments")
    told = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    told.encode()  # a lone surrogate cannot be sent
    return call_id if isinstance(call_id, str) and call_id else None, name, told
