"""Make moectl/model/catalog.json and families.json, what moectl knows of published models and of mlx-lm's families.

`python -m tests.support.make_catalog`; tests/model/test_catalog.py keeps them equal to what they are made of. The
catalog comes from tests/golden/sizes.json, the sizes of each repository's config.json as far as they decide shapes. The
families come from what tests compare: ways.json, the splits that mlx-lm's model files can have, and transformers.json.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.utils import MODEL_REMAPPING

from moectl.model.structure import Structure
from moectl.shards.look.outline import outline
from moectl.shards.look.skeleton import make_skeleton
from moectl.shards.look.ways import look
from tests.support.transformers_models import WRONG

_EMPTY: tuple[Any, ...] = (None, 0, (), [], {})
PUBLISHED = Path(__file__).parent.parent / "golden" / "sizes.json"
CATALOG = Path(__file__).parent.parent.parent / "moectl" / "model" / "catalog.json"
FAMILIES = CATALOG.with_name("families.json")
GOLDEN = PUBLISHED.parent


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
            "config": entry["config"],
            "structure": strip(asdict(find_structure(entry))),
        }
        for name, entry in entries.items()
    ]


def make_families() -> dict[str, dict[str, Any]]:
    """Return for each of mlx-lm's model files: why splits are refused, whether transformers was compared, examples."""
    ways, published, compared = (
        json.loads((GOLDEN / name).read_text(encoding="utf-8"))
        for name in ("ways.json", "published.json", "transformers.json")
    )
    configs = json.loads((GOLDEN / "families.json").read_text(encoding="utf-8"))
    found: dict[str, dict[str, Any]] = {}
    for name, refused in ways.items():
        own = found.setdefault(_file_of(configs[name]), {"refused": refused})
        # A family's configurations may differ: what one of them can have, the family can have.
        own["refused"] = {split: why for split, why in own["refused"].items() if split in refused}
    found["dbrx"] |= {"transformers": True, "examples": ["databricks/dbrx-instruct"]}  # logits.npz
    for name in compared:
        own = found[_file_of(published[name]["config"])]
        if name in WRONG:
            own["differs"] = WRONG[name]
        else:
            own["transformers"] = True
        own.setdefault("examples", []).append(published[name]["from"].partition(" ")[0].rstrip(","))
    for alias, name in MODEL_REMAPPING.items():
        if name in found:
            found[name].setdefault("aliases", []).append(alias)
    return dict(sorted(found.items()))


def _file_of(config: dict[str, Any]) -> str:
    model_type: str = config["model_type"]
    return str(MODEL_REMAPPING.get(model_type, model_type))


def strip(value: Any) -> Any:
    """Return a document without what is empty: those are the types' defaults."""
    if isinstance(value, dict):
        return {key: strip(inner) for key, inner in value.items() if inner is False or inner not in _EMPTY}
    return [strip(inner) for inner in value] if isinstance(value, list | tuple) else value


if __name__ == "__main__":
    lines = ",\n".join(json.dumps(entry, separators=(",", ":")) for entry in make_catalog(read_published()))
    CATALOG.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(own)}" for name, own in make_families().items())
    FAMILIES.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
