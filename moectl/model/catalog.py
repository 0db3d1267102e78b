"""The models that moectl knows by name: a plan for them needs neither network nor files. Data only."""

from __future__ import annotations

from dataclasses import dataclass

from moectl.model.structure import Quantization, Structure


@dataclass(frozen=True, slots=True)
class CatalogModel:
    """The parts of a model that the planner needs."""

    name: str
    structure: Structure
    quantization: Quantization | None  # as it is stored; None: 16 bits


MODELS: dict[str, CatalogModel] = {}
