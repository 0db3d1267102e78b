"""The families of models: mlx-lm's model files, how each can be split, what was compared, and what holds an example.

Families are read from the mlx-lm that is installed; `model/families.json` says what tests compared of them.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from moectl.errors import PlanError, UsageError
from moectl.model.catalog import MODELS, CatalogModel
from moectl.model.placement import SPLITS, make_placement
from moectl.model.structure import Quantization
from moectl.planner.chips import default_working_set_bytes
from moectl.planner.memory import METAL_DTYPE_BYTES, Memory, Verdict, judge, rank_need, weight_bytes
from moectl.text import did_you_mean

FOUR_BITS = Quantization(4, 64)
MACS_GIB = (16, 24, 32, 48, 64, 96, 128, 256, 512)
COUNTS = (1, 2, 3, 4, 6, 8)
CONTEXT = 4096
TRANSFORMERS, MLX_LM, REFUSED, UNKNOWN = "transformers", "mlx-lm", "no split: refused", "not compared"


@dataclass(frozen=True, slots=True)
class Example:
    """A published model of a family; bytes at 4 bits."""

    name: str
    parameters: int
    bytes: int
    macs: tuple[int, int] | None  # the smallest cluster that holds it: (how many, GiB of each)


@dataclass(frozen=True, slots=True)
class Family:
    """One of mlx-lm's model files."""

    name: str
    aliases: tuple[str, ...]  # other model types that it reads
    refused: dict[str, str]  # split → why not
    verified: str  # with what its splits were compared: transformers, mlx-lm's unsplit model, or nothing
    repository: str | None  # an example
    examples: tuple[Example, ...]  # published models that moectl knows
    differs: str | None = None  # how mlx-lm's model file differs from transformers

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(split for split in SPLITS if split not in self.refused) if self.verified != UNKNOWN else ()


def list_families() -> list[Family]:
    """Return all families of the mlx-lm that is installed, by name."""
    known = _read_known()
    return [_describe(name, known.get(name)) for name in sorted(set(_model_files()) | known.keys())]


def find_family(name: str) -> Family:
    """Return a family by the name of its model file or by a model type. Raises UsageError."""
    known, here = _read_known(), _model_files()
    for family in sorted(set(here) | known.keys()):
        if name in (family, *known.get(family, {}).get("aliases", ())):
            return _describe(family, known.get(family))
    raise UsageError(f"mlx-lm has no family {name!r}.{did_you_mean(name, known)}", hint="moectl models lists all")


def find_smallest(model: CatalogModel) -> tuple[int, int] | None:
    """Return the cluster of Macs with the least memory that holds a model at 4 bits: (how many, GiB of each)."""
    small = model if model.quantization else model.quantised(FOUR_BITS)
    clusters = sorted((count * gib, count, gib) for count in COUNTS for gib in MACS_GIB)
    return next(((count, gib) for _, count, gib in clusters if _fits(small, count, gib)), None)


def _fits(model: CatalogModel, count: int, gib: int) -> bool:
    budget = Memory(gib << 30, default_working_set_bytes(gib << 30)).budget
    if weight_bytes(make_placement(model.structure, "hidden", 1), 0, METAL_DTYPE_BYTES) > count * budget:
        return False
    for split in SPLITS:
        try:
            placement = make_placement(model.structure, split, count)
        except PlanError:
            continue
        context = min(CONTEXT, model.structure.context)
        needs = (rank_need(placement, rank, context=context).total for rank in range(count))
        if all(judge(need, budget) is Verdict.FITS for need in needs):
            return True
    return False


def _describe(name: str, known: dict[str, Any] | None) -> Family:
    if known is None:
        return Family(name, (), {}, UNKNOWN, None, ())
    refused: dict[str, str] = known["refused"]
    verified = TRANSFORMERS if known.get("transformers") and "differs" not in known else MLX_LM
    examples = tuple(_examples_of({name, *known.get("aliases", ())}))
    listed = [*(example.name for example in examples), *known.get("examples", ())]
    return Family(
        name,
        tuple(known.get("aliases", ())),
        refused,
        REFUSED if len(refused) == len(SPLITS) else verified,
        listed[0] if listed else None,
        examples,
        known.get("differs"),
    )


def _examples_of(types: set[str]) -> Iterator[Example]:
    for entry in MODELS.entries:
        if entry["structure"]["model_type"] in types:
            model = MODELS[entry["names"][0]]
            small = model.quantised(FOUR_BITS).structure
            size = weight_bytes(make_placement(small, "hidden", 1), 0, METAL_DTYPE_BYTES)
            yield Example(model.name, model.structure.parameters, size, find_smallest(model))


@cache
def _read_known() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads((files("moectl.model") / "families.json").read_text(encoding="utf-8"))
    return found


def _model_files() -> list[str]:
    """Return the names of mlx-lm's model files. Importing it would take a second."""
    package = importlib.util.find_spec("mlx_lm")
    roots = package.submodule_search_locations if package else None
    return [
        path.stem
        for root in roots or ()
        for path in (Path(root) / "models").glob("*.py")
        if "class ModelArgs" in path.read_text(encoding="utf-8")
    ]
