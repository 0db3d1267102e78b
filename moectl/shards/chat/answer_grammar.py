"""The grammar of an answer that is held to a form, in llguidance's Lark: thinking, then a JSON text or tool calls.

It only writes the grammar; `moectl.engine.grammar` obeys it. A marker that is one token stands as that token.
Source: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moectl.shards.chat.calls import CHANNEL_FORMAT, TEXT_FORMAT, CallFormat
from moectl.shards.chat.thinking import ANSWER, THINKING, Markers

Json = dict[str, Any]

_MOST_CALLS = 32  # in one answer: without a limit a weak model never ends
_TEXT = "/(?s:.*)/"
_BLANKS = r"/[ \n]{0,2}/"
# Blanks between the parts of JSON: one, or a new line with its indentation. A weak model would write them for ever.
_INDENTED = {"whitespace_pattern": r" |\n[ \t]{0,16}"}
_ONE_BLANK = {"whitespace_pattern": " "}  # as the models write their calls
_NUMBER = "/[0-9]{1,2}/"
# How a call stands between the markers of a format: what comes before its arguments, with _NUMBER between the parts,
# and what comes after them.
_AROUND_ARGUMENTS: dict[str, Callable[[str], tuple[tuple[str, ...], str]]] = {
    TEXT_FORMAT: lambda name: ((f'\n{{"name": {_quote(name)}, "arguments": ',), "}\n"),
    "mistral": lambda name: ((f"{name}[ARGS]",), ""),
    "kimi_k2": lambda name: (
        (f"<|tool_call_begin|>functions.{name}:", "<|tool_call_argument_begin|>"),
        "<|tool_call_end|>",
    ),
}


@dataclass(frozen=True, slots=True)
class HeldForm:
    """What an answer has to be: JSON of a schema, or calls of these tools, or one of both; without a schema also text.

    With `must_call` it is calls alone.
    """

    schema: Json | None = None
    tools: tuple[Json, ...] = ()
    must_call: bool = False
    parallel_calls: bool = True


def can_describe(calls: CallFormat) -> bool:
    """Return whether a grammar can describe calls in this format."""
    return calls.name in (*_AROUND_ARGUMENTS, CHANNEL_FORMAT)


def write_grammar(
    form: HeldForm,
    *,
    added: Mapping[str, int],
    ends: Collection[int] = (),
    markers: Markers | None = None,
    calls: CallFormat | None = None,
    thinks: bool = False,
) -> str:
    """Return the Lark grammar of an answer; `thinks` says that the prompt has begun its thinking.

    `added` are the tokens that ordinary text does not have, `ends` those that end an answer. Where there are tools,
    `calls` is a format that `can_describe`.
    """
    tokens = {**added, **(markers.tokens if markers else {})}
    return _Writer(form, tokens, ends, markers, calls, thinks).write()


@dataclass(slots=True)
class _Writer:
    form: HeldForm
    tokens: Mapping[str, int]
    ends: Collection[int]
    markers: Markers | None
    calls: CallFormat | None
    thinks: bool
    rules: dict[str, str] = field(default_factory=dict)

    def write(self) -> str:
        has_channels = self.markers is not None and self.markers.has_channels
        start = self._channels() if has_channels else self._answer()
        return "".join(f"{name}: {body}\n" for name, body in {"start": start, **self.rules}.items())

    def _answer(self) -> str:
        form, ways = self.form, []
        if form.schema is not None and not form.must_call:
            around = _any_of(map(self._spell, self._edges(ANSWER, ANSWER)))
            ways.append(f"{around} {self._json('answer', form.schema, _INDENTED)} {around}")
        if form.tools:
            ways.append(self._calls(with_text=not ways and not form.must_call))
        return f"{self._thinking()} ({' | '.join(ways)})"

    def _thinking(self) -> str:
        starts, ends = self._edges(ANSWER, THINKING), self._edges(THINKING, ANSWER)
        if not starts or not ends:
            return ""
        self.rules["thought"] = " | ".join(f"{self._until(end)} {_BLANKS}" for end in ends)
        # A model may begin again what its prompt has begun.
        start = _any_of(map(self._spell, starts))
        return f"{start} thought" if self.thinks else f"({start.removesuffix('?')} thought)?"

    def _calls(self, *, with_text: bool) -> str:
        """Return calls with the markers around each, after and before other text where that is allowed."""
        assert self.calls is not None
        ways = []
        for i, tool in enumerate(self.form.tools):
            before, after = _AROUND_ARGUMENTS[self.calls.name](tool["function"]["name"])
            begin = f" {_NUMBER} ".join(map(self._spell, before))
            ways.append(f"{begin} {self._arguments(i)} {self._spell(after)}")
        self.rules["call"] = f"({' | '.join(ways)}) {self._spell(self.calls.end)}"
        start = self._spell(self.calls.start)
        more = f"({_BLANKS} {start} call){{0,{_MOST_CALLS - 1}}}" if self.form.parallel_calls else ""
        return f"({self._until(self.calls.start)} call {more})? {_TEXT}" if with_text else f"{start} call {more}"

    def _channels(self) -> str:
        """Return gpt-oss's messages: its thinking, then the last one or a call."""
        form = self.form
        channel, message = self._spell("<|channel|>"), self._spell("<|message|>")
        is_json = f'(" "? {self._spell("<|constrain|>json")})?' if "<|constrain|>" in self.tokens else ""
        again = self._spell("<|end|><|start|>assistant")
        self.rules["thought"] = f'{channel} "analysis" {message} {_TEXT} {again}'
        ways = []
        if form.tools:
            end = "" if self.tokens["<|call|>"] in self.ends else self._spell("<|call|>")
            for i, tool in enumerate(form.tools):
                to = self._spell(f"commentary to=functions.{tool['function']['name']}")
                ways.append(f"{channel} {to} {is_json} {message} {self._arguments(i)} {end}")
        if not form.must_call:
            body = _TEXT if form.schema is None else self._json("answer", form.schema, _INDENTED)
            ways.append(f'{channel} "final" {is_json} {message} {body}')
        return f"thought{{0,8}} ({' | '.join(ways)})"

    def _arguments(self, i: int) -> str:
        function = self.form.tools[i]["function"]
        lenient = {} if function.get("strict") else {"lenient": True}
        return self._json(f"arguments_{i}", function["parameters"], {**_ONE_BLANK, **lenient})

    def _json(self, name: str, schema: Json, options: Json) -> str:
        self.rules[name] = f"%json {json.dumps({**schema, 'x-guidance': options})}"
        return name

    def _edges(self, here: str, there: str) -> list[str]:
        edges = self.markers.edges if self.markers else {}
        return [text for text, to in edges.get(here, ()) if to == there]

    def _until(self, marker: str) -> str:
        """Return any text up to a marker, with it."""
        if any(marker.startswith(token) for token in self.tokens):
            return f"{_TEXT} {self._spell(marker)}"
        name = f"until_{len(self.rules)}"
        letters = re.escape(marker).replace("/", r"\/")
        self.rules[f"{name}[lazy]"] = f"/(?s:.*){letters}/"
        return name

    def _spell(self, text: str) -> str:
        """Return a text for a rule, its markers as tokens."""
        known = sorted(self.tokens, key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, known))})", text) if known else [text]
        spelled = [f"<[{self.tokens[part]}]>" if part in self.tokens else _quote(part) for part in parts if part]
        return " ".join(spelled) or '""'


def _any_of(spelled: Sequence[str] | map[str]) -> str:
    """Return one of these or nothing."""
    ways = " | ".join(spelled)
    return f"({ways})?" if ways else ""


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
