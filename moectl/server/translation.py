"""A body of another protocol as one of OpenAI's chat: `openai` alone knows fields' limits, defaults and refusals.

Only names and places change, back again in the errors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from moectl.engine.protocol import Ready
from moectl.errors import BadField
from moectl.server import openai
from moectl.server.fields import Fields, refuse, show

_OF_CHAT = ("n", "logprobs", "top_logprobs", "stream_options", "functions", "function_call")  # no other protocol's


@dataclass(slots=True)
class Translation:
    """A chat's body, where each of its messages comes from, and what its fields are called in their own protocol."""

    fields: Fields
    names: Mapping[str, str]  # of a chat's fields → their own
    parts: Mapping[str, str]  # of the fields of its messages and tools → their own
    _places: list[str] = field(default_factory=list)  # of each message
    _calls: list[list[str]] = field(default_factory=list)  # the places of each message's calls
    _tools: list[str] = field(default_factory=list)  # the place of each tool

    def __post_init__(self) -> None:
        self.fields |= {"messages": [], "tools": []}

    @property
    def last(self) -> Fields:
        """The last message, which may still be added to."""
        return self.fields["messages"][-1] if self.fields["messages"] else {}

    def say(self, place: str, role: str, **parts: Any) -> None:
        """Add a message that comes from this place."""
        self.fields["messages"].append({"role": role, **parts})
        self._places.append(place)
        self._calls.append([])

    def call(self, place: str, call_id: Any, name: Any, arguments: Any) -> None:
        """Add a call that comes from this place to the last message."""
        function = {"name": name, "arguments": arguments}
        self.last.setdefault("tool_calls", []).append({"id": call_id, "type": "function", "function": function})
        self._calls[-1].append(place)

    def offer(self, place: str, **function: Any) -> None:
        """Add a tool that comes from this place; what is None is not said."""
        told = {name: value for name, value in function.items() if value is not None}
        self.fields["tools"].append({"type": "function", "function": told})
        self._tools.append(place)

    def read(self, name: str, model: Ready) -> openai.ApiRequest:
        """Return what it asks of the model of this name; raise UsageError in the protocol's own words."""
        try:
            return openai.read_chat(self.fields, name, model)
        except BadField as error:
            raise self._tell_back(error) from None

    def _tell_back(self, error: BadField) -> BadField:
        param = error.param or ""
        own = param
        if found := re.match(r"messages\[(\d+)\](?:\.tool_calls\[(\d+)\](?:\.function)?)?", param):
            message, call = int(found[1]), found[2]
            place = self._places[message] if call is None else self._calls[message][int(call)]
            own = place + self._name_parts(param[found.end() :])
        elif found := re.match(r"tools\[(\d+)\](?:\.function)?", param):
            own = self._tools[int(found[1])] + self._name_parts(param[found.end() :])
        elif chat := next((chat for chat in self.names if re.match(rf"{chat}\b", param)), None):
            own = self.names[chat] + param[len(chat) :]
        text = own + error.message[len(param) :] if error.message.startswith(param) else error.message
        return BadField(text, param=own or None, code=error.code, hint=error.hint)

    def _name_parts(self, place: str) -> str:
        return re.sub(r"(?<=\.)\w+", lambda name: self.parts.get(name[0], name[0]), place)


def pass_on(fields: Fields, consumed: tuple[str, ...]) -> Fields:
    """Return the fields that have the same name and meaning in a chat, without those that are consumed."""
    return {name: value for name, value in fields.items() if name not in (*consumed, *_OF_CHAT)}


def refuse_kind(place: str, kind: Any, *known: str) -> NoReturn:
    """Raise the error of an object of another type than the known ones."""
    refuse(f"{place}.type", f"should be one of {', '.join(known)}, it is {show(kind)}")
