"""The form of an answer in a body: `response_format` of OpenAI's chat, for all protocols.

Whether a schema is strict makes no difference: an answer is held to it, or the schema is refused. Names of schemas, and
what they describe, are for people: the model is told of a form only by the prompt.
"""

from __future__ import annotations

from moectl.engine.schema import check_schema
from moectl.server.fields import Fields, kind_of, read_typed, refuse, show

_ANY_OBJECT: Fields = {"type": "object"}
_KINDS = ("text", "json_object", "json_schema")


def read_form(fields: Fields) -> Fields | None:
    """Return the JSON schema that an answer's text has to fulfil, None for any text.

    Raises BadField for one that cannot be enforced, or that no answer fulfils.
    """
    form = read_typed(fields, "response_format", dict)
    if not form:
        return None
    match form.get("type"):
        case "text":
            return None
        case "json_object":  # llama.cpp's may have a schema
            schema, place = form.get("schema", _ANY_OBJECT), "response_format.schema"
        case "json_schema":
            told = read_typed(form, "json_schema", dict, "response_format.json_schema") or {}
            schema, place = told.get("schema"), "response_format.json_schema.schema"
        case kind:
            refuse("response_format.type", f"should be one of {', '.join(_KINDS)}, it is {show(kind)}")
    if not isinstance(schema, dict):
        refuse(place, f"should be an object, it is {kind_of(schema)}")
    # There it would be llguidance's options, which are moectl's. In JSON Schema the word has no meaning, so an
    # answer does not change without it.
    schema = {name: value for name, value in schema.items() if name != "x-guidance"}
    check_schema(schema, place)
    return schema
