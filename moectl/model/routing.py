"""How often a model's routers choose each expert, counted per layer, and the file of these counts.

`bench` measures and writes them; the placement of experts may use them. It knows no ranks.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from moectl.errors import UsageError
from moectl.files import write_whole
from moectl.records import build

SCHEMA = "moectl.routing/1"


@dataclass(frozen=True, slots=True)
class Routing:
    """How often each expert was chosen: a layer's counts add up to tokens × top_k; without experts it has none."""

    model: str
    tokens: int
    top_k: int
    counts: tuple[tuple[int, ...], ...]  # [layer][expert]

    def __post_init__(self) -> None:
        widths = {len(layer) for layer in self.counts if layer}
        if len(widths) != 1 or not 0 < self.top_k <= min(widths) or self.tokens < 1:
            raise ValueError("layers with experts need the same ones, and more of them than work on one token")
        for number, layer in enumerate(self.counts):
            if not layer:
                continue
            if min(layer) < 0 or sum(layer) != self.tokens * self.top_k:
                raise ValueError(f"layer {number} does not add up to tokens × top_k = {self.tokens * self.top_k}")

    @property
    def frequencies(self) -> tuple[tuple[float, ...], ...]:
        """The part of the tokens that chose each expert, [layer][expert]; top_k / experts where all are equal."""
        return tuple(tuple(count / self.tokens for count in layer) for layer in self.counts)

    @property
    def overall(self) -> tuple[float, ...]:
        """The mean over the layers with experts of the part of the tokens that chose each expert."""
        rows = [row for row in self.frequencies if row]
        return tuple(sum(column) / len(rows) for column in zip(*rows, strict=True))


def write_routing(path: Path, routing: Routing) -> None:
    """Write the counts as JSON, complete or not at all. Raises StateError."""
    document = {"schema": SCHEMA, **asdict(routing)}
    write_whole(path, (json.dumps(document) + "\n").encode())


def read_routing(path: Path) -> Routing:
    """Read what `write_routing` wrote. Raises UsageError."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document.pop("schema") != SCHEMA:
            raise ValueError("another schema")
        return build(Routing, document)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", hint=_HINT) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UsageError(f"{path} does not hold routing statistics", hint=_HINT) from None


_HINT = "moectl bench --routing-stats FILE writes one"
