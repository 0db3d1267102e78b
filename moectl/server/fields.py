"""Read the fields of a request's JSON object by type, and refuse those that moectl does not have.

It knows no endpoint and no model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

from moectl.errors import BadField

Fields = dict[str, Any]

TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}  # type → its text
_KINDS = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
_EMPTY: tuple[Any, ...] = (None, "", [], {})
# Fields of other servers that moectl does not have, with the values beside _EMPTY that change nothing. Other values
# would change the answer, so they are refused.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("echo", "use_beam_search", "include_stop_str_in_output", "continue_final_message"), (False,)),
    **dict.fromkeys(("suffix", "audio", "web_search_options", "chat_template", "truncate_prompt_tokens"), ()),
    **dict.fromkeys(("grammar", "json_schema", "structured_outputs", "guided_json", "guided_regex"), ()),
    **dict.fromkeys(("guided_choice", "guided_grammar", "stop_token_ids", "allowed_token_ids", "bad_words"), ()),
    **dict.fromkeys(("min_tokens", "mirostat", "mirostat_mode", "dynatemp_range", "dry_multiplier"), (0,)),
    **dict.fromkeys(("xtc_probability", "top_a", "no_repeat_ngram_size", "prompt_logprobs"), (0,)),
    **dict.fromkeys(("typical_p", "tfs_z", "length_penalty"), (1,)),
    "top_n_sigma": (-1, 0),
    "add_generation_prompt": (True,),
    "modalities": (["text"],),
}


def refuse_unsupported(fields: Fields) -> None:
    """Raise BadField for a field that would change the answer and cannot be obeyed."""
    for field in ("functions", "function_call"):
        if fields.get(field) not in (*_EMPTY, "none", "auto"):
            refuse(field, "is not supported: it is an older form", hint="send tools and tool_choice")
    for name, harmless in _UNSUPPORTED.items():
        if fields.get(name) not in (*_EMPTY, *harmless):
            usual = f", except {show(harmless[0])}" if harmless else ""
            refuse(name, f"is not supported{usual}: it would change the answer", hint="leave it out")


# Fields by type. None is the same as absent.


def read_typed(fields: Fields, name: str, kind: type[Any], place: str | None = None) -> Any:
    """Return a field of this type, or None; an error calls it `place`."""
    value = fields.get(name)
    if kind is dict and value == []:  # how PHP writes an empty object
        return {}
    if value is not None and not isinstance(value, kind):
        refuse(place or name, f"should be {_KINDS[kind]}, it is {kind_of(value)}")
    return value


def read_boolean(fields: Fields, name: str, place: str | None = None) -> bool:
    """Return a field that is true or false; an error calls it `place`."""
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        refuse(place or name, f"should be true or false, it is {kind_of(value)}")
    return bool(value)


def read_number(
    fields: Fields, name: str, least: float = -math.inf, most: float = math.inf, place: str | None = None
) -> float | None:
    """Return a field that is a finite number in these bounds, or None."""
    value = fields.get(name)
    if value is None:
        return None
    place = place or name
    if isinstance(value, bool) or not isinstance(value, int | float):
        refuse(place, f"should be a number, it is {kind_of(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        refuse(place, "is too large a number: it should fit into 64 bits")
    if not least <= number <= most:
        refuse(place, f"should be between {least:g} and {most:g}, it is {number:g}")
    return number


def read_integer(fields: Fields, name: str, least: int, most: int | None = None) -> int | None:
    """Return a field that is a whole number in these bounds, or None."""
    value = fields.get(name)
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        refuse(name, f"should be a whole number, it is {show(value) if isinstance(value, float) else kind_of(value)}")
    if value < least or (most is not None and value > most):
        allowed = f"{least} or more" if most is None else f"between {least} and {most}"
        refuse(name, f"should be {allowed}, it is {show(value)}")
    return int(value)


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


def read_string(fields: Fields, name: str, place: str) -> str:
    """Return a field of the object at a place that should be a text of at least one letter."""
    value = fields.get(name)
    if not isinstance(value, str) or not value:
        refuse(f"{place}.{name}", f"should be a text, it is {'empty' if value == '' else kind_of(value)}")
    return value


def read_texts(value: Any, place: str, kinds: Mapping[str, str], between: str = "") -> str:
    """Return a text that is a string, or a list of strings and of objects of these types; null is an empty one."""
    if isinstance(value, str | None):
        return value or ""
    if not isinstance(value, list):
        refuse(place, f"should be a string or a list of text parts, it is {kind_of(value)}")
    parts = ((part, f"{place}[{i}]") for i, part in enumerate(value))
    return between.join(part if isinstance(part, str) else read_text(part, at, kinds) for part, at in parts)


def read_text(part: Any, place: str, kinds: Mapping[str, str]) -> str:
    """Return the text of an object of these types, each with the field of its text; without a type it is "text"."""
    kind = read_object(part, place).get("type", "text")
    if not isinstance(kind, str) or kind not in kinds:
        refuse(f"{place}.type", f'should be "text", it is {show(kind)}: this model reads text only')
    text = part.get(kinds[kind])
    if not isinstance(text, str):
        refuse(f"{place}.{kinds[kind]}", f"should be a string, it is {kind_of(text)}")
    return text


def load_json(text: str | bytes) -> Any:
    """Return a JSON value. Raises ValueError for what is none, NaN among it, RecursionError for what is too deep."""
    return json.loads(text, parse_constant=_refuse_constant)


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")


def refuse(param: str, reason: str, *, hint: str | None = None) -> NoReturn:
    """Raise the error of one field, by its name."""
    raise BadField(f"{param} {reason}", hint=hint, param=param)


def kind_of(value: Any) -> str:
    """Return a JSON value's type for a message."""
    return "null" if value is None else _KINDS[type(value)]


def show(value: Any) -> str:
    """Return a value of the client's for a message, short."""
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:36]} …"
