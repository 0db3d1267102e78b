"""The models that moectl knows by name: a plan for them needs neither network nor files. Data only."""

from __future__ import annotations

from dataclasses import dataclass

from moectl.model.structure import Quantization, Structure


@dataclass(frozen=True, slots=True)
class CatalogModel:
    """The parts of a model that the planner needs."""

    name: str
    structure: Structure
    quantization: Quantization | None  # of most weights in the structure; None: 16 bits

    def quantised(self, quantization: Quantization | None) -> CatalogModel:
        """Return the model with another precision, as it is where it has that one."""
        if quantization == self.quantization:
            return self
        return CatalogModel(self.name, self.structure.quantised(quantization), quantization)


MODELS: dict[str, CatalogModel] = {}
