"""Turn parsed JSON into dataclasses, every value checked against its field's annotation.

What comes from a file or from another machine goes through here, so that wrong types are found at the border and not
as a TypeError somewhere inside. What values mean is for the dataclass itself to check. It reads no file.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

_T = TypeVar("_T")
_Check = Callable[[Any], Any]


def build(kind: Callable[..., _T], raw: object) -> _T:
    """Return a dataclass of this kind made of a JSON object; lists become tuples where its fields are tuples.

    Raises ValueError for a missing, unknown or mistyped field, and whatever `kind` itself raises for values.
    """
    made: _T = _check_of(kind)(raw)
    return made


@functools.cache
def _check_of(annotation: Any) -> _Check:
    if dataclasses.is_dataclass(annotation):
        return _object(annotation)  # type: ignore[arg-type]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        return _any_of([_check_of(argument) for argument in arguments])
    if origin is list:
        return _sequence(_check_of(arguments[0]), list)
    if origin is tuple and arguments[1:] == (...,):
        return _sequence(_check_of(arguments[0]), tuple)
    if origin is tuple:
        return _fixed([_check_of(argument) for argument in arguments])
    if origin in (dict, Mapping):
        return _mapping(*map(_check_of, arguments))
    return _SCALARS[annotation]


def _object(kind: type[Any]) -> _Check:
    # Filled at the first use: hints of a class can only be read once its module is complete.
    checks: dict[str, _Check] = {}

    def check(raw: Any) -> Any:
        if not isinstance(raw, dict):
            raise ValueError(f"{kind.__name__} should be an object")
        if not checks:
            checks.update((name, _check_of(hint)) for name, hint in typing.get_type_hints(kind).items())
        try:
            return kind(**{name: checks[name](value) for name, value in raw.items()})
        except KeyError as error:
            raise ValueError(f"{kind.__name__} has no {error}") from None
        except TypeError as error:  # a field is missing
            raise ValueError(str(error)) from None

    return check


def _any_of(checks: list[_Check]) -> _Check:
    def check(raw: Any) -> Any:
        for each in checks:
            try:
                return each(raw)
            except ValueError:
                continue
        raise ValueError(f"{_name(raw)} is not allowed here")

    return check


def _sequence(item: _Check, kind: type[list[Any]] | type[tuple[Any, ...]]) -> _Check:
    def check(raw: Any) -> Any:
        if not isinstance(raw, list):
            raise ValueError(f"{_name(raw)} should be a list")
        return kind([item(value) for value in raw])

    return check


def _fixed(items: list[_Check]) -> _Check:
    def check(raw: Any) -> Any:
        if not isinstance(raw, list) or len(raw) != len(items):
            raise ValueError(f"{_name(raw)} should be a list of {len(items)}")
        return tuple(item(value) for item, value in zip(items, raw, strict=True))

    return check


def _mapping(key: _Check, item: _Check) -> _Check:
    def check(raw: Any) -> Any:
        if not isinstance(raw, dict):
            raise ValueError(f"{_name(raw)} should be an object")
        # JSON has no other keys than texts.
        return {(int(k) if key is _whole else key(k)): item(value) for k, value in raw.items()}

    return check


def _name(raw: object) -> str:
    # Not the value: it may be long, deep, or somebody's prompt.
    return _NAMES.get(type(raw), "this")


def _whole(raw: Any) -> Any:
    if type(raw) is not int:  # a bool is one of Python's, not of JSON's
        raise ValueError(f"{_name(raw)} should be a whole number")
    return raw


def _number(raw: Any) -> Any:
    if type(raw) is not float and type(raw) is not int:
        raise ValueError(f"{_name(raw)} should be a number")
    try:
        return float(raw)
    except OverflowError:
        raise ValueError("a number is too large") from None


def _exactly(kind: type[Any], name: str) -> _Check:
    def check(raw: Any) -> Any:
        if type(raw) is not kind:
            raise ValueError(f"{_name(raw)} should be {name}")
        return raw

    return check


_NAMES = {
    dict: "an object",
    list: "a list",
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    types.NoneType: "null",
}
_SCALARS: dict[Any, _Check] = {
    Any: lambda raw: raw,
    int: _whole,
    float: _number,
    str: _exactly(str, "a text"),
    bool: _exactly(bool, "true or false"),
    types.NoneType: _exactly(types.NoneType, "null"),
}
