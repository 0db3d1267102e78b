"""How answers are to be made: what `/set` changes and a saved chat remembers. It samples nothing and asks nobody.

Which values a model refuses for other reasons (a context too long, say) is for the model to tell.
"""

from __future__ import annotations

import math
import shlex
import textwrap
from dataclasses import dataclass, fields, replace
from typing import Any

from moectl.errors import UsageError

# Names that people bring from ollama and mlx_lm.
ALIASES = {"num_predict": "max_tokens", "temp": "temperature", "repeat_penalty": "repetition_penalty"}


@dataclass(frozen=True, slots=True)
class _Number:
    """What a number may be; `optional` ones may also be None."""

    kind: type[int] | type[float]
    low: float
    high: float
    text: str
    above: bool = False  # `low` itself is not allowed
    optional: bool = False

    def allows(self, value: object) -> bool:
        if value is None:
            return self.optional
        if isinstance(value, bool) or not isinstance(value, int if self.kind is int else int | float):
            return False
        return math.isfinite(value) and self.low <= value <= self.high and not (self.above and value == self.low)


_PENALTY = _Number(float, -2, 2, "a number from -2 to 2")
_NUMBERS = {
    "max_tokens": _Number(int, 1, 2**31 - 1, "a whole number, 1 or more"),
    "temperature": _Number(float, 0, math.inf, "a number, 0 (greedy) or more"),
    "top_p": _Number(float, 0, 1, "a number from 0 to 1"),
    "top_k": _Number(int, 0, 2**31 - 1, "a whole number, 0 (all) or more"),
    "min_p": _Number(float, 0, 1, "a number from 0 to 1"),
    "seed": _Number(int, 0, 2**64 - 1, "a whole number from 0 to 2^64-1, or none", optional=True),
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "repetition_penalty": _Number(float, 0, math.inf, "a number above 0", above=True),
}
_TEXTS = {"system": 'a text, or "" for none', "stop": 'texts that end an answer, or "" for none'}


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """The parameters of a chat's answers, named as in `moectl.engine.request.Request`. Raises UsageError."""

    max_tokens: int
    system: str | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.stop, list):  # JSON has no tuples
            object.__setattr__(self, "stop", tuple(self.stop))
        for name, number in _NUMBERS.items():
            value = getattr(self, name)
            if not number.allows(value):
                raise UsageError(f"{name} should be {number.text}: it is {value!r}")
        if not (self.system is None or isinstance(self.system, str)):
            raise UsageError(f"system should be {_TEXTS['system']}: it is {self.system!r}")
        if not (isinstance(self.stop, tuple) and all(isinstance(text, str) and text for text in self.stop)):
            raise UsageError(f"stop should be {_TEXTS['stop']}: it is {self.stop!r}")


def change_setting(settings: ChatSettings, name: str, value: str) -> ChatSettings:
    """Return the settings with one of them read from what was typed after its name. Raises UsageError in one line."""
    name = ALIASES.get(name, name)
    if name not in (field.name for field in fields(ChatSettings)):
        raise UsageError(f"there is no setting '{name}': /set lists them")
    if not value:
        raise UsageError(f"no value is given: {name} should be {_allowed_text(name)}")
    if name == "system":
        return replace(settings, system=_unquote(value) or None)
    if name == "stop":
        return replace(settings, stop=tuple(word for word in split_words(value) if word))
    number: Any = _read_number(name, value)
    return replace(settings, **{name: number})


def settings_table(settings: ChatSettings) -> list[tuple[str, str, str]]:
    """Return (name, value, what it may be) for each setting; of a long value the beginning."""
    values = ((f.name, " ".join(value_text(getattr(settings, f.name)).split())) for f in fields(ChatSettings))
    return [(name, textwrap.shorten(value, 40, placeholder=" …"), _allowed_text(name)) for name, value in values]


def value_text(value: Any) -> str:
    """Return a setting's value as it could be typed after its name."""
    if value is None or value == ():
        return "none"
    if isinstance(value, tuple):
        return " ".join(map(shlex.quote, value))
    return str(value)


def split_words(text: str) -> list[str]:
    """Split what follows a command into words, quoted ones as in a shell. Raises UsageError."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UsageError(f"{str(error).lower()} in {text}") from None


def _allowed_text(name: str) -> str:
    return _NUMBERS[name].text if name in _NUMBERS else _TEXTS[name]


def _read_number(name: str, value: str) -> float | None:
    number = _NUMBERS[name]
    if number.optional and value.lower() == "none":
        return None
    try:
        return number.kind(value)
    except ValueError:
        raise UsageError(f"{name} should be {number.text}: it is {value!r}") from None


def _unquote(text: str) -> str:
    # Not shlex: a system prompt may hold any quotes and backslashes.
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "\"'":
        return text[1:-1]
    return text
