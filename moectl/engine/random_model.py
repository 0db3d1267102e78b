"""Shortened models with random weights, for measurements: same layers, fewer of them, and fewer or narrower experts.

Weights that all layers share, or experts that are fewer, take less memory and the same time per token.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from moectl.engine.network.dbrx import Model
from moectl.model.placement import Placement
from moectl.model.structure import Quantization

_NAME = re.compile(r"transformer\.blocks\.(\d+)\.(.*)")
# Block scales are bytes of an 8-bit float: small ones, so that random weights give no infinities.
_SCALE_BYTES = {"nvfp4": 24}
_SCALE_BYTE = 118


class Weights:
    """Random arrays by name, made once and held by every model that is filled from here."""

    def __init__(self, quantization: Quantization | None, *, shared: bool) -> None:
        self._held: dict[str, mx.array] = {}
        self._quantization = quantization
        self._shared = shared  # whether all layers have the same ones

    def make_model(self, placement: Placement, rank: int, group: Any) -> Model:
        """Return a model without values: nothing has been computed, only names, shapes and types are known."""
        model = Model(placement, rank, group)
        if self._quantization is not None:
            q = self._quantization
            nn.quantize(
                model,
                group_size=q.group_size,
                bits=q.bits,
                mode=q.mode,
                class_predicate=lambda path, module: hasattr(module, "to_quantized") and ".router." not in path,
            )
        model.eval()
        return model

    def count_bytes(self, model: Model, dtype: mx.Dtype) -> int:
        """Return the bytes that `fill` would take."""
        sizes = {self._key(name): _size(array, dtype) for name, array in tree_flatten(model.parameters())}
        return sum(sizes.values())

    def fill(self, model: Model, dtype: mx.Dtype) -> Model:
        """Give every parameter a value; return the model."""
        ready = []
        for name, array in tree_flatten(model.parameters()):
            key = self._key(name)
            if key not in self._held:
                self._held[key] = self._make(name, array, dtype)
                mx.eval(self._held[key])
            ready.append((name, self._held[key]))
        model.load_weights(ready, strict=False)
        return model

    def _key(self, name: str) -> str:
        match = _NAME.fullmatch(name)
        return f"any layer: {match[2]}" if match and self._shared else name

    def _make(self, name: str, like: mx.array, dtype: mx.Dtype) -> mx.array:
        q = self._quantization
        if like.dtype == mx.uint32:
            return mx.full(like.shape, 0x9E3779B9, dtype=mx.uint32)  # any bits do, and random ones take long
        if like.dtype == mx.uint8:
            return mx.full(like.shape, _SCALE_BYTES.get(q.mode if q else "", _SCALE_BYTE), dtype=mx.uint8)
        if name.endswith(("scales", "biases")) and q is not None:
            step = 0.04 / 2**q.bits  # weights between -0.02 and 0.02
            return mx.full(like.shape, step if name.endswith("scales") else -0.02, dtype=dtype)
        if like.ndim == 1:
            return mx.ones(like.shape, dtype=dtype)
        bound = like.shape[-1] ** -0.5
        matrix = mx.random.uniform(-bound, bound, like.shape[-2:], dtype=dtype)
        return mx.contiguous(mx.broadcast_to(matrix, like.shape))  # experts may be alike, but have a place each


def with_depth(placement: Placement, depth: int) -> Placement:
    """Return a placement of the same layers, this many of them; a pipeline's evenly on all ranks."""
    shorter = replace(placement, geometry=replace(placement.geometry, n_layers=depth))
    if placement.split != "layers":
        return shorter
    base, extra = divmod(depth, placement.world_size)
    return replace(shorter, shares=tuple(base + (rank < extra) for rank in range(placement.world_size)))


def shrink(placement: Placement, quantization: Quantization | None) -> Placement:
    """Return a placement that needs less memory; the same one when there is none."""
    geometry = placement.geometry
    if placement.split == "experts":
        group = quantization.group_size if quantization else 1
        hidden = max(group, geometry.ffn_hidden // 2 // group * group)
        return replace(placement, geometry=replace(geometry, ffn_hidden=hidden))
    if geometry.n_experts > geometry.top_k:  # a token's time depends on the experts it chooses, not on the others
        return replace(placement, geometry=replace(geometry, n_experts=geometry.top_k))
    shares = tuple(max(1, share // 2) for share in placement.shares)
    hidden = sum(shares) * placement.unit
    return replace(placement, shares=shares, geometry=replace(geometry, ffn_hidden=hidden))


def module_bytes(module: Any, dtype: mx.Dtype) -> float:
    """Return the bytes of a module's parameters in this dtype."""
    return float(sum(_size(array, dtype) for _, array in tree_flatten(module.parameters())))


def _size(array: mx.array, dtype: mx.Dtype) -> int:
    return array.size * dtype.size if mx.issubdtype(array.dtype, mx.floating) else array.nbytes
