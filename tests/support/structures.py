"""Structures of models for tests that need no weights: of a config.json, and of DBRX by its name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from moectl.model.catalog import MODELS
from moectl.model.structure import Quantization, Structure
from moectl.shards.look.outline import outline
from moectl.shards.look.skeleton import make_skeleton
from moectl.shards.look.ways import look

DBRX = MODELS["databricks/dbrx-instruct"]


def structure_of(config: Mapping[str, Any]) -> Structure:
    """Return the structure of the model that a config.json describes, in 16 bits."""
    return _find(json.dumps(config, sort_keys=True))


@cache
def _find(text: str) -> Structure:
    config = json.loads(text)
    skeleton = make_skeleton(config)
    return outline(skeleton, look(skeleton), config)


def dbrx(bits: int = 16) -> Structure:
    """Return DBRX's structure at this precision."""
    return DBRX.quantised(None if bits == 16 else Quantization(bits, 64)).structure
