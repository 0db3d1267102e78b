"""Shortened models with random weights, for measurements: mlx-lm's own layers, the first few of them.

Weights that all layers of a kind share take less memory and the same time per token.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from moectl.engine.network.load import find_part, make_part
from moectl.errors import PlanError
from moectl.model.ownership import Holding, find_holding
from moectl.model.placement import Placement
from moectl.model.structure import Quantization
from moectl.shards.look.skeleton import Skeleton, make_skeleton
from moectl.shards.look.ways import look
from moectl.shards.trace.precision import quantise_as_wanted

_NUMBER = re.compile(r"\.\d+\.")
_COUNTS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
# Block scales are bytes of an 8-bit float: small ones, so that random weights give no infinities.
_SCALE_BYTES = {"nvfp4": 24}
_SCALE_BYTE = 118


def shorten(config: Mapping[str, Any], depth: int) -> dict[str, Any]:
    """Return a config.json of the same model with this many layers. Raises PlanError where it cannot be told how."""
    made = copy.deepcopy(dict(config))
    tables = [table for table in (made, made.get("text_config")) if isinstance(table, dict)]
    changed = False
    for table in tables:
        counts = {key: table[key] for key in _COUNTS if isinstance(table.get(key), int)}
        for key, count in counts.items():
            table[key], changed = depth, True
            lists = {name: value for name, value in table.items() if isinstance(value, list) and len(value) == count}
            table.update({name: value[:depth] for name, value in lists.items()})
    if not changed:
        raise PlanError("moectl cannot shorten this model to measure it", hint="plan without --probe")
    return made


def choose_depths(order: Sequence[int], ranks: int) -> list[int]:
    """Return numbers of first layers from whose times that of each kind of layer follows, fewest first.

    `order` has the kind of each layer; `ranks` is how many layers there have to be at least. Of a kind of which there
    are no more after these, the time is in what is left.
    """
    if len(set(order)) == 1:
        return sorted({min(len(order), 2 * ranks), min(len(order), 2 * ranks + 4)})
    kinds = sorted(set(order))
    found: list[int] = []
    rows: list[list[int]] = []
    whole = 1 + max(order.index(kind) for kind in kinds)  # a model file may want a layer of each kind
    for depth in range(max(ranks, whole), len(order) + 1):
        row = [1, *(list(order[:depth]).count(kind) for kind in kinds)]
        if np.linalg.matrix_rank(np.array([*rows, row])) > len(rows):
            rows.append(row)
            found.append(depth)
        if len(rows) > len(kinds):
            break
    return found


def with_depth(placement: Placement, depth: int) -> Placement:
    """Return a placement of the first layers; a pipeline's evenly on all ranks."""
    shorter = replace(placement.structure, order=placement.structure.order[:depth])
    shares = (1,) * placement.world_size if placement.split == "layers" else placement.shares
    return replace(placement, structure=shorter, shares=shares)


@dataclass(slots=True)
class RandomWeights:
    """Random arrays by name, made once and held by every model that is filled from here."""

    config: Mapping[str, Any]
    quantization: Quantization | None
    dtype: mx.Dtype
    shared: bool = False  # whether layers that are alike have the same ones
    _held: dict[Any, mx.array] = field(default_factory=dict)

    def count_bytes(self, placement: Placement, rank: int) -> int:
        """Return the bytes that a model of these layers would take."""
        skeleton, shapes = self._make(placement, rank, None)
        dtypes = {name: array.dtype for name, array in tree_flatten(skeleton.model.parameters())}
        sizes = {self._key(name, shape): self._size(dtypes[name], shape) for name, shape in shapes.items()}
        return sum(sizes.values())

    def make_model(self, placement: Placement, rank: int, group: Any) -> Any:
        """Return a rank's part of a model of these layers, with a value for every parameter."""
        skeleton, shapes = self._make(placement, rank, group)
        dtypes = {name: array.dtype for name, array in tree_flatten(skeleton.model.parameters())}
        ready = []
        for name, shape in shapes.items():
            key = self._key(name, shape)
            if key not in self._held:
                self._held[key] = self._fill(name, shape, dtypes[name])
                mx.eval(self._held[key])
            ready.append((name, self._held[key]))
        skeleton.model.load_weights(ready, strict=False)
        return skeleton.model

    def _make(self, placement: Placement, rank: int, group: Any) -> tuple[Skeleton, dict[str, tuple[int, ...]]]:
        config = shorten(self.config, placement.structure.n_layers)
        skeleton = make_skeleton(config)
        found = look(skeleton)
        if self.quantization is not None:
            quantise_as_wanted(skeleton.model, config, self.quantization)
        whole = {name: array.shape for name, array in tree_flatten(skeleton.model.parameters())}
        names, holdings = make_part(skeleton, found, placement, rank, group)
        return skeleton, {name: _shape(name, whole[name], holdings) for name in names}

    def _key(self, name: str, shape: tuple[int, ...]) -> Any:
        return (_NUMBER.sub(".n.", name), shape) if self.shared else name

    def _size(self, dtype: mx.Dtype, shape: tuple[int, ...]) -> int:
        item = self.dtype.size if mx.issubdtype(dtype, mx.floating) else dtype.size
        return int(np.prod(shape)) * item

    def _fill(self, name: str, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        q, last = self.quantization, name.rpartition(".")[2]
        if dtype == mx.uint32:
            return mx.full(shape, 0x9E3779B9, dtype=mx.uint32)  # any bits do, and random ones take long
        if dtype == mx.uint8:
            return mx.full(shape, _SCALE_BYTES.get(q.mode if q else "", _SCALE_BYTE), dtype=mx.uint8)
        if last in ("scales", "biases") and q is not None:
            step = 0.04 / 2**q.bits  # weights between -0.02 and 0.02
            return mx.full(shape, step if last == "scales" else -0.02, dtype=self.dtype)
        if len(shape) < 2:
            return mx.ones(shape, dtype=self.dtype)
        bound = max(1, shape[-1]) ** -0.5
        matrix = mx.random.uniform(-bound, bound, shape[-2:], dtype=self.dtype)
        return mx.contiguous(mx.broadcast_to(matrix, shape))  # experts may be alike, but have a place each


def _shape(name: str, whole: tuple[int, ...], holdings: Mapping[str, Holding]) -> tuple[int, ...]:
    return find_part(name, whole, find_holding(holdings, name))[1]
