"""The models that moectl knows by name: a plan for them needs neither network nor files. Data only."""

from __future__ import annotations

from dataclasses import dataclass

from moectl.model.geometry import DBRX, Geometry
from moectl.model.structure import Quantization


@dataclass(frozen=True, slots=True)
class CatalogModel:
    """The parts of a model that the planner needs."""

    name: str
    geometry: Geometry
    quantization: Quantization | None  # as it is stored; None: 16 bits


_BF16 = (
    "databricks/dbrx-instruct",
    "databricks/dbrx-base",
    "alpindale/dbrx-instruct",
    "SinclairSchneider/dbrx-instruct-quantization-fixed",
    "Undi95/dbrx-base",
)
MODELS = {
    **{name: CatalogModel(name, DBRX, None) for name in _BF16},
    "mlx-community/dbrx-instruct-4bit": CatalogModel("mlx-community/dbrx-instruct-4bit", DBRX, Quantization(4, 64)),
}
