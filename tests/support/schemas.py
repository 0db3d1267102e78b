"""Random JSON schemas whose answers come to an end within some hundred tokens."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

Json = dict[str, Any]

_FORMATS = ("date", "time", "ipv4", "uuid")
_PATTERNS = ("^[a-z]{2,5}$", "^[A-Z][0-9]{3}$", "^(on|off|auto)$", "^\\d{4}-\\d{2}$")


def make_schema(rng: random.Random) -> Json:
    """Return a schema of an object, with a definition that some of its parts refer to."""
    schema = _make_object(rng, 3)
    return {"$defs": {"shared": _make_leaf(rng)}, **schema}


def _make(rng: random.Random, depth: int) -> Json:
    kinds: list[Callable[[random.Random], Json]] = [_make_leaf, _make_leaf, _refer]
    if depth:
        kinds += [lambda r: _make_object(r, depth - 1), lambda r: _make_list(r, depth - 1), lambda r: _choose(r, depth)]
    return rng.choice(kinds)(rng)


def _make_object(rng: random.Random, depth: int) -> Json:
    names = rng.sample(("name", "age", "tags", "note", "état", 'a "b"', "x_1"), rng.randint(1, 4))
    required = rng.sample(names, rng.randint(0, len(names)))
    schema: Json = {"type": "object", "properties": {name: _make(rng, depth) for name in names}}
    return schema | ({"required": required} if required else {})


def _make_list(rng: random.Random, depth: int) -> Json:
    least = rng.randint(0, 2)
    return {"type": "array", "items": _make(rng, depth), "minItems": least, "maxItems": least + rng.randint(0, 2)}


def _choose(rng: random.Random, depth: int) -> Json:
    return {"anyOf": [_make(rng, depth - 1), {"type": "null"}]}


def _refer(rng: random.Random) -> Json:
    return {"$ref": "#/$defs/shared"}


def _make_leaf(rng: random.Random) -> Json:
    low = rng.randint(-50, 50)
    return rng.choice(
        (
            {"type": "boolean"},
            {"type": "null"},
            {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 1000)},
            {"type": "number", "minimum": 0, "maximum": 10, "multipleOf": 0.25},
            {"type": "string", "minLength": rng.randint(0, 3), "maxLength": rng.randint(3, 12)},
            {"type": "string", "pattern": rng.choice(_PATTERNS)},
            {"type": "string", "format": rng.choice(_FORMATS)},
            {"enum": rng.sample(["a", "b", 3, None, True, 'c"d', {"e": [1]}], 3)},
            {"const": rng.choice(("fixed", 7, [1, 2]))},
        )
    )
