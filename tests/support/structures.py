"""Structures of models for tests that need no weights: DBRX as it is published, and a small one of its kind."""

from __future__ import annotations

from functools import cache
from typing import Any

from moectl.model.catalog import MODELS
from moectl.model.structure import Quantization, Structure
from moectl.shards.outline import outline
from moectl.shards.skeleton import make_skeleton
from moectl.shards.ways import look
from tests.support.tiny import make_config

DBRX = MODELS["databricks/dbrx-instruct"].structure
Q4 = Quantization(4, 64)


def dbrx(bits: int = 16) -> Structure:
    """Return DBRX's structure at this precision."""
    return DBRX if bits == 16 else DBRX.quantised(Quantization(bits, 64))


@cache
def _small(sizes: tuple[tuple[str, Any], ...]) -> Structure:
    config = make_config(**dict(sizes))
    skeleton = make_skeleton(config)
    return outline(skeleton, look(skeleton), config)


def small(**sizes: Any) -> Structure:
    """Return the structure of a DBRX of the tests' small size; `sizes` are the keywords of `tiny.make_config`."""
    return _small(tuple(sorted(sizes.items())))
