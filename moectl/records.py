"""Turn parsed JSON into dataclasses, every value checked against its field's annotation.

Data of a file or of another machine is checked here, so that a wrong type is found before anything uses it. The
dataclass itself checks what its values mean. It reads no file.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from pydantic import TypeAdapter

_T = TypeVar("_T")


def build(kind: Callable[..., _T], raw: object) -> _T:
    """Return a dataclass of this kind from a JSON object; lists become tuples where its fields are tuples.

    Raises ValueError for a missing, unknown or mistyped field, and what `kind` itself raises for values.
    """
    from pydantic import ValidationError  # slow to import, and --help needs no record

    try:
        # In pydantic's strict mode, only JSON may hold a list for a tuple and text for a number as a key.
        made: _T = _adapter(kind).validate_json(json.dumps(raw), strict=True, extra="forbid")
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValidationError as error:
        # Not the value: it may be long, deep, or a prompt.
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise ValueError(": ".join(filter(None, [".".join(map(str, first["loc"])), first["msg"]]))) from None
    return made


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)
