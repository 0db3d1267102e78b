"""Make the catalog, moectl/model/catalog.json, from the sizes of published models in tests/golden/sizes.json.

`python -m tests.support.make_catalog`; tests/model/test_catalog.py keeps both equal. The sizes are those of each
repository's config.json, as far as they decide shapes.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.nn as nn

from moectl.model.structure import Structure
from moectl.shards.outline import outline
from moectl.shards.skeleton import make_skeleton
from moectl.shards.ways import look

_EMPTY: tuple[Any, ...] = (None, 0, (), [], {})
PUBLISHED = Path(__file__).parent.parent / "golden" / "sizes.json"
CATALOG = Path(__file__).parent.parent.parent / "moectl" / "model" / "catalog.json"


def read_published() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    return found


def find_structure(entry: dict[str, Any]) -> Structure:
    """Return the structure of a published model, with what its files have packed already."""
    skeleton = make_skeleton(entry["config"])
    found = look(skeleton)
    for part, (bits, group_size, mode) in entry.get("packed", {}).items():
        nn.quantize(
            skeleton.model,
            group_size,
            bits,
            mode=mode,
            class_predicate=lambda path, module, part=part: f".{part}." in path and hasattr(module, "to_quantized"),
        )
    if entry.get("tied"):  # mlx-lm sees that only where a checkpoint has no head
        skeleton.model.sanitize({name: array for name, array in skeleton.parameters.items() if "lm_head" not in name})
    return outline(skeleton, found, entry["config"])


def make_catalog(entries: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "names": [name, *entry.get("also", [])],
            "quantised": entry.get("quantised", {}),
            "structure": strip(asdict(find_structure(entry))),
        }
        for name, entry in entries.items()
    ]


def strip(value: Any) -> Any:
    """Return a document without what is empty: those are the types' defaults."""
    if isinstance(value, dict):
        return {key: strip(inner) for key, inner in value.items() if inner is False or inner not in _EMPTY}
    return [strip(inner) for inner in value] if isinstance(value, list | tuple) else value


if __name__ == "__main__":
    lines = ",\n".join(json.dumps(entry, separators=(",", ":")) for entry in make_catalog(read_published()))
    CATALOG.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
