"""The settings of answers: what `/set` changes and a saved chat remembers."""

from __future__ import annotations

import shlex
import textwrap
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from moectl.errors import UsageError
from moectl.model.parameters import EFFORTS, PARAMETERS

# Names that people bring from ollama and mlx_lm.
ALIASES = {"num_predict": "max_tokens", "temp": "temperature", "repeat_penalty": "repetition_penalty"}
NO_LIMIT = -1  # of max_tokens in a request: as far as the context goes
_CHOSEN: dict[str, dict[str, Any]] = {
    "think": {"true": True, "false": False},
    "reasoning_effort": {name: name for name in EFFORTS[1:]},
}
_TEXTS = {
    "system": 'a text, or "" for none',
    "stop": 'texts that end an answer, or "" for none',
    **{name: f"{', '.join(values)}, or none" for name, values in _CHOSEN.items()},
}


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """The parameters of a chat's answers, named as in `moectl.engine.request.Request`. Raises UsageError."""

    max_tokens: int | None = None  # None: what the context leaves
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
    think: bool | None = None  # None: what the model does by itself
    reasoning_effort: str | None = None

    def __post_init__(self) -> None:
        for name in _NUMBERS:
            value = getattr(self, name)
            if not (PARAMETERS[name].allows(value) or (value is None and _may_be_none(name))):
                raise UsageError(f"{name} should be {_allowed_text(name)}: it is {value!r}")
        if self.reasoning_effort not in (None, *EFFORTS[1:]):
            allowed = _TEXTS["reasoning_effort"]
            raise UsageError(f"reasoning_effort should be {allowed}: it is {self.reasoning_effort!r}")
        if not all(self.stop):
            raise UsageError(f"stop should be {_TEXTS['stop']}: it is {self.stop!r}")

    def api_fields(self) -> dict[str, Any]:
        """Return the settings as fields of an API request; the system message is one of its messages."""
        given = {name: value for name, value in asdict(self).items() if name != "system" and value is not None}
        return {"max_tokens": NO_LIMIT, **given}


_NUMBERS = [field.name for field in fields(ChatSettings) if field.name not in _TEXTS]


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
    if name in _CHOSEN:
        return replace(settings, **{name: _read_choice(name, value)})
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
    return str(value).lower() if isinstance(value, bool) else str(value)


def sampling_text(settings: ChatSettings) -> str:
    """Return how tokens are chosen: what differs from the plain choice."""
    plain = ChatSettings()
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    told = [f"{name} {value:g}" for name in names if (value := getattr(settings, name)) != getattr(plain, name)]
    return ", ".join(told if settings.temperature else ["greedy", *told])


def split_words(text: str) -> list[str]:
    """Split what follows a command into words, quoted ones as in a shell. Raises UsageError."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UsageError(f"{str(error).lower()} in {text}") from None


def _allowed_text(name: str) -> str:
    if name in _TEXTS:
        return _TEXTS[name]
    number = PARAMETERS[name]
    return f"a{' whole' if number.kind is int else ''} number, {number.text}{', or none' if _may_be_none(name) else ''}"


def _may_be_none(name: str) -> bool:
    return PARAMETERS[name].optional or name == "max_tokens"


def _read_choice(name: str, value: str) -> Any:
    known = _CHOSEN[name] | {"none": None}
    if value.lower() not in known:
        raise UsageError(f"{name} should be {_allowed_text(name)}: it is {value!r}")
    return known[value.lower()]


def _read_number(name: str, value: str) -> float | None:
    number = PARAMETERS[name]
    if _may_be_none(name) and value.lower() == "none":
        return None
    try:
        return number.kind(value)
    except ValueError:
        raise UsageError(f"{name} should be {_allowed_text(name)}: it is {value!r}") from None


def _unquote(text: str) -> str:
    # Not shlex: a system prompt may hold any quotes and backslashes.
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "\"'":
        return text[1:-1]
    return text
