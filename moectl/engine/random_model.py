"""Shortened models with random weights, for measurements: a model's own layers, fewer of them, perhaps fewer experts.

A model is shortened in its config.json, and mlx-lm builds it. Weights that all layers share, or experts that are fewer,
take less memory and the same time per token.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache

from moectl.engine.network import experts
from moectl.engine.network.parallel import divide, take
from moectl.engine.network.stages import keep, make_stage, remove_head
from moectl.errors import PlanError
from moectl.model.ownership import find_holding, hold, own_layers
from moectl.model.placement import Placement
from moectl.model.structure import Quantization, Structure
from moectl.shards.caches import can_batch, can_trim
from moectl.shards.flow import names_of_rank
from moectl.shards.outline import outline
from moectl.shards.skeleton import Skeleton, make_skeleton
from moectl.shards.units import divisions_of
from moectl.shards.ways import look

_LAYERS = ("num_hidden_layers", "n_layers", "num_layers", "n_layer")
# Block scales are bytes of an 8-bit float: small ones, so that random weights give no infinities.
_SCALE_BYTES = {"nvfp4": 24}
_SCALE_BYTE = 118


@dataclass(frozen=True, slots=True)
class Short:
    """One rank's part of a shortened model, and what its engine has to know."""

    model: Any
    structure: Structure  # of the whole shortened model
    trimmable: bool
    batchable: bool


class Weights:
    """Random arrays by name, made once and held by every model that is filled from here."""

    def __init__(self, config: Mapping[str, Any], quantization: Quantization | None, *, shared: bool) -> None:
        self._config = config
        self._held: dict[str, mx.array] = {}
        self._quantization = quantization
        self._shared = shared  # whether all layers have the same ones

    def make_model(self, placement: Placement, depth: int, rank: int, group: Any, *, is_whole: bool = False) -> Short:
        """Return a rank's part of a model of this many layers; `is_whole`: all of it, as if it were alone.

        Its parameters take no memory before `fill`. Raises PlanError where a model cannot be shortened.
        """
        skeleton = make_skeleton(shorten(self._config, placement.structure.n_layers, depth))
        if len(skeleton.layers) != depth:
            raise PlanError(
                f"a {skeleton.model_type} model cannot be shortened for a measurement", hint="plan without --probe"
            )
        found = look(skeleton)
        if self._quantization is not None:
            quantise(skeleton, self._quantization)
        structure = outline(skeleton, found, self._config)
        model, ranks = skeleton.model, placement.world_size
        trims, batches = can_trim(make_prompt_cache(model)), can_batch(skeleton)
        split = placement.split
        if ranks > 1 and not is_whole and split == "layers" and found.flow is not None:
            spans = own_layers(depth, (1,) * ranks)
            keep_names(
                skeleton, names_of_rank(skeleton, found.flow, spans[rank], first=rank == 0, last=rank == ranks - 1)
            )
            make_stage(model, found.flow, spans, rank, group)
        elif ranks > 1 and not is_whole:
            holdings = hold(divisions_of(model, found.parts, split), placement.shares, rank, placement.held)
            for name, array in skeleton.parameters.items():
                if (holding := find_holding(holdings, name)) is not None:
                    model.update(_nest(name, _hollow(take(name.rpartition(".")[2], array, holding))))
            divide(model, found.parts, holdings, group, rank=rank, held=placement.held)
            if rank != placement.head_rank and found.flow is not None:
                keep_names(skeleton, names_of_rank(skeleton, found.flow, (0, depth), first=True, last=False))
                remove_head(model, found.flow)
        experts.install(model)
        return Short(model, structure, trims, batches)

    def count_bytes(self, short: Short, dtype: mx.Dtype) -> int:
        """Return the bytes that `fill` would take."""
        layers = _layer_names(short.model)
        return sum({self._key(n, layers): _size(a, dtype) for n, a in _wanted(short.model)}.values())

    def fill(self, short: Short, dtype: mx.Dtype) -> Short:
        """Give every parameter a value; return the model."""
        ready, layers = [], _layer_names(short.model)
        for name, array in _wanted(short.model):
            key = self._key(name, layers)
            if key not in self._held or self._held[key].shape != array.shape:
                self._held[key] = self._make(name, array, dtype)
                mx.eval(self._held[key])
            ready.append((name, self._held[key]))
        short.model.load_weights(ready, strict=False)
        return short

    def _key(self, name: str, layers: Sequence[str]) -> str:
        prefix = next((prefix for prefix in layers if name.startswith(prefix)), None)
        return name if prefix is None or not self._shared else f"any layer: {name.removeprefix(prefix)}"

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


def quantise(skeleton: Skeleton, quantization: Quantization) -> None:
    """Quantise what mlx-lm would, each matrix alike."""
    chosen = getattr(skeleton.model, "quant_predicate", None) or (lambda *_: True)

    def choose(path: str, module: nn.Module) -> bool:
        fits = hasattr(module, "to_quantized") and module.weight.shape[-1] % quantization.group_size == 0
        return fits and bool(chosen(path, module))

    q = quantization
    nn.quantize(skeleton.model, q.group_size, q.bits, mode=q.mode, class_predicate=choose)


def shorten(config: Mapping[str, Any], layers: int, depth: int) -> dict[str, Any]:
    """Return the config.json of the same model with fewer layers: the first ones."""
    short = copy.deepcopy(dict(config))
    for key, value in short.items():
        is_pattern = isinstance(value, list) or (isinstance(value, str) and key.endswith("pattern"))
        if key in _LAYERS and value == layers:
            short[key] = depth
        elif is_pattern and len(value) == layers:
            short[key] = value[:depth]
        elif isinstance(value, dict) and key not in ("quantization", "quantization_config"):
            short[key] = shorten(value, layers, depth)
    return short


def fewer_experts(config: Mapping[str, Any], experts: int, kept: int) -> dict[str, Any]:
    """Return the config.json of the same model with fewer experts in its stacks."""
    short = copy.deepcopy(dict(config))
    for key, value in short.items():
        if "expert" in key and value == experts and not isinstance(value, bool):
            short[key] = kept
        elif isinstance(value, dict):
            short[key] = fewer_experts(value, experts, kept)
    return short


def keep_names(skeleton: Skeleton, names: set[str]) -> None:
    """Take the values of all parameters but these, and mark them: they are not filled."""
    keep(skeleton.model, names)
    skeleton.model.moectl_left = frozenset(skeleton.parameters) - names


def module_bytes(module: Any, dtype: mx.Dtype) -> float:
    """Return the bytes of a module's parameters in this dtype."""
    return float(sum(_size(array, dtype) for _, array in tree_flatten(module.parameters())))


def _wanted(model: Any) -> list[tuple[str, mx.array]]:
    left: frozenset[str] = getattr(model, "moectl_left", frozenset())
    return [(name, array) for name, array in tree_flatten(model.parameters()) if name not in left]


def _layer_names(model: Any) -> list[str]:
    layers = {id(layer) for layer in model.layers}
    return [f"{path}." for path, module in model.named_modules() if id(module) in layers]


def _nest(name: str, array: mx.array) -> dict[str, Any]:
    nested: dict[str, Any] = tree_unflatten([(name, array)])
    return nested


def _hollow(array: mx.array) -> mx.array:
    return mx.broadcast_to(mx.array(0, dtype=array.dtype), array.shape)


def _size(array: mx.array, dtype: mx.Dtype) -> int:
    return array.size * dtype.size if mx.issubdtype(array.dtype, mx.floating) else array.nbytes
