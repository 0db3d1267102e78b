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
from moectl.server.fields import Fields, kind_of, refuse, show

_OF_CHAT = ("n", "logprobs", "top_logprobs", "stream_options", "functions", "function_call")  # no other protocol's


@dataclass(slots=True)
class Translation:
    """A chat's body, where each of its messages comes from, and what its fields are called in their own protocol."""

    fields: Fields
    names: Mapping[str, str]  # of chat → their own
    places: list[str] = field(default_factory=list)  # of each message

    def say(self, place: str, role: str, **parts: Any) -> None:
        """Add a message that comes from this place."""
        self.fields["messages"].append({"role": role, **parts})
        self.places.append(place)

    def read(self, name: str, model: Ready) -> openai.ApiRequest:
        """Return what it asks of the model of this name; raise UsageError in the protocol's own words."""
        try:
            return openai.read_chat(self.fields, name, model)
        except BadField as error:
            raise self._tell_back(error) from None

    def _tell_back(self, error: BadField) -> BadField:
        param = error.param or ""
        own = param
        if found := re.match(r"messages\[(\d+)\]", param):
            own = self.places[int(found[1])] + param[found.end() :]
        elif chat := next((chat for chat in self.names if re.match(rf"{chat}\b", param)), None):
            own = self.names[chat] + param[len(chat) :]
        message = own + error.message[len(param) :] if error.message.startswith(param) else error.message
        return BadField(message, param=own or None, code=error.code, hint=error.hint)


def pass_on(fields: Fields, consumed: tuple[str, ...]) -> Fields:
    """Return the fields that have the same name and meaning in a chat, without those that are consumed."""
    return {name: value for name, value in fields.items() if name not in (*consumed, *_OF_CHAT)}


def read_object(value: Any, place: str) -> Fields:
    """Return a value that should be an object."""
    if not isinstance(value, dict):
        refuse(place, f"should be an object, it is {kind_of(value)}")
    return value


def read_list(value: Any, place: str) -> list[tuple[Fields, str]]:
    """Return the objects of a list, each with its place."""
    if not isinstance(value, list):
        refuse(place, f"should be a list, it is {kind_of(value)}")
    return [(read_object(each, f"{place}[{i}]"), f"{place}[{i}]") for i, each in enumerate(value)]


def refuse_kind(place: str, kind: Any, *known: str) -> NoReturn:
    """Raise the error of an object of another type than the known ones."""
    refuse(f"{place}.type", f"should be one of {', '.join(known)}, it is {show(kind)}")


def read_texts(value: Any, place: str, kinds: Mapping[str, str], between: str = "") -> str:
    """Return a text that is a string, or a list of objects of these types, each with the field of its text."""
    if isinstance(value, str | None):
        return value or ""
    return between.join(read_text(part, at, kinds) for part, at in read_list(value, place))


def read_text(part: Fields, place: str, kinds: Mapping[str, str]) -> str:
    """Return the text of an object of these types, each with the field of its text."""
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in kinds:
        names = " or ".join(map(show, kinds))
        refuse(f"{place}.type", f"should be {names}, it is {show(kind)}: this model reads text only")
    text = part.get(kinds[kind])
    if not isinstance(text, str):
        refuse(f"{place}.{kinds[kind]}", f"should be a string, it is {kind_of(text)}")
    return text
