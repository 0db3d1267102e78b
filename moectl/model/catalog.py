"""The models that moectl knows by name: a plan for them needs neither network nor files.

`catalog.json` holds their structures; tests/support/make_catalog.py makes it from tests/golden/sizes.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from typing import Any

from moectl.model.structure import Quantization, Structure
from moectl.records import build


@dataclass(frozen=True, slots=True)
class CatalogModel:
    """The parts of a model that the planner needs."""

    name: str
    structure: Structure
    quantization: Quantization | None  # of most weights in the structure; None: 16 bits
    config: Mapping[str, Any] = field(default_factory=dict)  # its config.json

    def quantised(self, quantization: Quantization | None) -> CatalogModel:
        """Return the model with another precision, as it is where it has that one."""
        if quantization == self.quantization:
            return self
        structure = self.structure.quantised(quantization, over=self.quantization)
        return CatalogModel(self.name, structure, quantization, self.config)


class _Catalog(Mapping[str, CatalogModel]):
    """Models by the names of their repositories; read when one is asked for."""

    @cached_property
    def entries(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads((files("moectl.model") / "catalog.json").read_text(encoding="utf-8"))
        return found

    @cached_property
    def _by_name(self) -> dict[str, dict[str, Any]]:
        return {name: entry for entry in self.entries for name in (*entry["names"], *entry["quantised"])}

    def __getitem__(self, name: str) -> CatalogModel:
        entry = self._by_name[name]
        model = CatalogModel(name, build(Structure, entry["structure"]), None, entry["config"])
        if (numbers := entry["quantised"].get(name)) is None:
            return model
        return model.quantised(Quantization(*numbers))

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)


MODELS = _Catalog()
