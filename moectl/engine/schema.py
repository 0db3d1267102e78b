"""What a JSON schema may be that an answer is held to: within bounds, obeyed as a whole, and possible to fulfil.

It is asked before anything runs. What a grammar cannot promise is refused by the path of its keyword. Only tools that
are not strict may have such keywords: there they have no effect.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NoReturn

from moectl.engine.request import Request
from moectl.errors import BadField

Json = dict[str, Any]

MAX_SCHEMA_BYTES = 256 * 1024
MAX_SCHEMA_DEPTH = 64  # objects and lists within each other
MAX_SCHEMA_PARTS = 4096  # objects and lists
MAX_TOOL_PARTS = 2 * MAX_SCHEMA_PARTS  # in the schemas of all tools together
MAX_PATTERN = 4096  # letters of a regular expression
_MOST_PASSES = 64  # over references that refer to each other
_MOST_PROBES = 64  # of parts of a schema that is refused, to say where
_BY_NAME = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_SINGLE = ("items", "additionalProperties", "additionalItems")
# Keywords of JSON Schema that no grammar obeys, with the value that changes nothing.
_UNOBEYED: Json = {
    **dict.fromkeys(("not", "if", "then", "else", "contains", "propertyNames", "$dynamicRef", "$recursiveRef")),
    **dict.fromkeys(("minContains", "maxContains")),
    **{keyword: {} for keyword in ("dependentRequired", "dependentSchemas", "dependencies")},
    **dict.fromkeys(("unevaluatedProperties", "unevaluatedItems"), True),
    "uniqueItems": False,
}
_FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")


def check_schema(schema: Json, place: str, *, strict: bool = True) -> None:
    """Refuse a schema that is too large, that cannot be obeyed or that no answer fulfils; an error names the `place`.

    Without `strict` keywords that cannot be obeyed are passed over. Raises BadField.
    """
    _measure(schema, place)
    for part, where in walk(schema, place) if strict else ():
        for keyword, harmless in _UNOBEYED.items():
            if keyword in part and (harmless is None or part[keyword] != harmless):
                _refuse(f"{where}.{keyword}", "cannot be enforced: no grammar knows this keyword", hint="leave it out")
        if isinstance(form := part.get("format"), str) and form not in _FORMATS:
            _refuse(f"{where}.format", f"should be one of {', '.join(_FORMATS)}", hint="leave it out")
    try:
        has_end = _has_end(schema)
    except RecursionError:
        _refuse(place, "has references that refer to each other too often")
    if not has_end:
        _refuse(place, "needs itself within itself: no answer that ends can fulfil it")
    if why := _find_fault(close(schema), strict=strict):
        _refuse(_place_fault(schema, place, why, strict=strict), f"cannot be enforced: {why}")


def check_calls(request: Request) -> None:
    """Refuse tools whose calls a request holds to their schemas, where that cannot be. Raises BadField."""
    if not request.holds_calls:
        return
    parts = 0
    for i, tool in enumerate(request.tools):
        function = tool["function"]
        parts += _measure(function["parameters"], place := f"tools[{i}].function.parameters")
        if parts > MAX_TOOL_PARTS:
            _refuse("tools", f"should have at most {MAX_TOOL_PARTS} objects and lists in their schemas")
        if not request.must_call or function["name"] in request.must_call:
            check_schema(function["parameters"], place, strict=bool(function.get("strict")))


def make_limits() -> Any:
    """Return llguidance's limits for one schema: some 20 ms of work and 100 MB at most, and for each token 15 ms."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=1_000_000, step_lexer_fuel=200_000, max_lexer_states=50_000, verbose_errors=False
    )


def close(schema: Json) -> Json:
    """Return a schema whose objects have the named properties only, unless it says something of others.

    A weak model would never end an object. What joins several schemas stays as it is: it would become impossible.
    """
    joins = False
    for part, _ in walk(schema, ""):
        chooses = any(key in part for key in ("$ref", "anyOf", "oneOf"))
        joins |= "allOf" in part or (chooses and any(key in part for key in ("properties", "required")))
    closed: Json = _close(schema, joins)
    return closed


def _close(part: Any, joins: bool) -> Any:
    if not isinstance(part, dict):
        return part
    closed = {}
    for keyword, value in part.items():
        if keyword in _UNOBEYED and value is not None and value == _UNOBEYED[keyword]:
            continue
        if keyword in _BY_NAME and isinstance(value, dict):
            value = {name: _close(inner, joins) for name, inner in value.items()}
        elif keyword in _LISTS and isinstance(value, list):
            value = [_close(inner, joins) for inner in value]
        elif keyword in _SINGLE:
            value = _close(value, joins)
        closed[keyword] = value
    named, required = part.get("properties"), part.get("required", [])
    is_open = {"additionalProperties", "patternProperties", "minProperties"} & part.keys()
    names_all = (
        isinstance(named, dict)
        and isinstance(required, list)
        and all(isinstance(n, str) and n in named for n in required)
    )
    if names_all and not is_open and not joins:
        closed["additionalProperties"] = False
    return closed


def walk(schema: Any, place: str) -> Iterator[tuple[Json, str]]:
    """Yield the schemas in a schema with their places, itself first."""
    if isinstance(schema, dict):
        yield schema, place
        for inner, name in _inner(schema):
            yield from walk(inner, place + name)


def _inner(schema: Json) -> Iterator[tuple[Any, str]]:
    for keyword, value in schema.items():
        if keyword in _BY_NAME and isinstance(value, dict):
            yield from ((inner, f".{keyword}.{name[:64]}") for name, inner in value.items())
        elif keyword in _LISTS and isinstance(value, list):
            yield from ((inner, f".{keyword}[{i}]") for i, inner in enumerate(value))
        elif keyword in _SINGLE:
            yield value, f".{keyword}"


def _measure(schema: Json, place: str) -> int:
    """Return how many objects and lists a schema has; refuse one that is too large."""
    level: list[Any] = [schema]
    parts = depth = 0
    while level:
        parts, depth = parts + len(level), depth + 1
        if depth > MAX_SCHEMA_DEPTH:
            _refuse(place, f"should have at most {MAX_SCHEMA_DEPTH} objects and lists within each other")
        if parts > MAX_SCHEMA_PARTS:
            _refuse(place, f"should have at most {MAX_SCHEMA_PARTS} objects and lists")
        inner = [value for each in level for value in (each.values() if isinstance(each, dict) else each)]
        level = [value for value in inner if isinstance(value, dict | list)]
    try:
        size = len(json.dumps(schema, ensure_ascii=False, allow_nan=False).encode())
    except ValueError:
        _refuse(place, "has a number or a letter that JSON cannot have")
    if size > MAX_SCHEMA_BYTES:
        _refuse(place, f"should have at most {MAX_SCHEMA_BYTES} bytes, it has {size}")
    for part, where in walk(schema, place):
        named = part.get("patternProperties")
        for pattern in (part.get("pattern"), *(named if isinstance(named, dict) else ())):
            if isinstance(pattern, str) and len(pattern) > MAX_PATTERN:
                _refuse(f"{where}.pattern", f"should have at most {MAX_PATTERN} letters, it has {len(pattern)}")
    return parts


# Whether an answer to it can end.


def _has_end(schema: Json) -> bool:
    ended: set[str] = set()  # references to what has an end
    for _ in range(_MOST_PASSES):
        before = len(ended)
        if _ends(schema, schema, ended, set()):
            return True
        if len(ended) == before:
            return False
    return False


def _ends(part: Any, root: Json, ended: set[str], seen: set[str]) -> bool:
    if not isinstance(part, dict):
        return True

    def end(inner: Any) -> bool:
        return _ends(inner, root, ended, seen)

    reference = part.get("$ref")
    if isinstance(reference, str) and reference.startswith("#") and reference not in ended:
        if reference in seen:
            return False
        seen.add(reference)
        if not end(_resolve(root, reference)):
            return False
        ended.add(reference)
    choices = [part[key] for key in ("anyOf", "oneOf") if isinstance(part.get(key), list) and part[key]]
    return all(any(map(end, each)) for each in choices) and all(map(end, _needs(part)))


def _needs(part: Json) -> Iterator[Any]:
    """Yield the schemas in a schema that each of its values has to fulfil or to contain."""
    yield from part["allOf"] if isinstance(part.get("allOf"), list) else ()
    named, required = part.get("properties"), part.get("required")
    if part.get("type") == "object" and isinstance(named, dict) and isinstance(required, list):
        yield from (named[name] for name in required if isinstance(name, str) and name in named)
    least = part.get("minItems")
    if part.get("type") == "array" and isinstance(least, int | float) and least > 0:
        first = part.get("prefixItems")
        first = first[: int(least)] if isinstance(first, list) else []
        yield from first
        if len(first) < least:
            yield part.get("items")


def _resolve(root: Json, reference: str) -> Any:
    """Return what a reference within a schema refers to, None where there is none."""
    found: Any = root
    for name in reference[1:].split("/")[1:]:
        name = name.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        else:
            found = found.get(name) if isinstance(found, dict) else None
    return found


# What llguidance says of it.


def _find_fault(schema: Json, *, strict: bool) -> str:
    """Return why llguidance cannot make a grammar of a schema, "" where it can."""
    from llguidance import LLMatcher

    lenient: Any = {} if strict else {"lenient": True}
    try:
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=lenient)
    except ValueError as error:
        return str(error)[:200]
    is_error, said = LLMatcher.validate_grammar_with_warnings(grammar, limits=make_limits())
    return " ".join(said[0].split())[:200] if is_error else ""


def _place_fault(schema: Json, place: str, why: str, *, strict: bool) -> str:
    """Return the place of the smallest schema in a schema of which llguidance says the same."""
    shared: Json = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    probes = 0
    inner = list(_inner(schema))
    while inner and probes < _MOST_PROBES:
        part, name = inner.pop(0)
        probes += 1
        if isinstance(part, dict) and _find_fault({**shared, **close(part)}, strict=strict) == why:
            place, inner = place + name, list(_inner(part))
    return place


def _refuse(param: str, reason: str, *, hint: str = "change the schema") -> NoReturn:
    raise BadField(f"{param} {reason}", hint=hint, param=param)
