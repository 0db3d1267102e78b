"""Load one rank's part of a shard set into a `Model`. It reads what the manifest lists and nothing else."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from moectl.engine.network.dbrx import Model
from moectl.engine.network.stored import Parts, Reader, StoredEmbedding, StoredMatrix
from moectl.errors import IntegrityError
from moectl.model.manifest import Manifest, is_for, refuse_links_outside
from moectl.model.placement import Placement
from moectl.model.structure import Quantization
from moectl.shards.tensors import StoredTensor, quantization_table

_HINT = "moectl deploy --verify (on this machine: moectl shard --verify DIR)"

# Shards name experts as the checkpoint does, mlx-lm's SwitchGLU by role.
_EXPERT_NAMES = {
    "experts.w1.": "experts.mlp.gate_proj.",
    "experts.v1.": "experts.mlp.up_proj.",
    "experts.w2.": "experts.mlp.down_proj.",
}
_EXPERT = re.compile(r"(\.experts)\.\d+(?=\.)")
_BLOCK = re.compile(r"(transformer\.blocks\.)(\d+)\.")


def compute_dtype() -> mx.Dtype:
    """Return the dtype to calculate in on this device: bfloat16 on a GPU, float32 on a CPU.

    MLX's CPU kernels accumulate quantised products in the activations' dtype: bf16 there is inexact and slow.
    """
    return mx.float32 if mx.default_device() == mx.Device(mx.cpu) else mx.bfloat16


def load_rank(
    directory: Path,
    manifest: Manifest,
    rank: int,
    group: mx.distributed.Group | None = None,
    *,
    dtype: mx.Dtype | None = None,
) -> Model:
    """Build the model of one rank and read its weights, layer by layer.

    `dtype` is what activations, scales and unquantised weights become (None: `compute_dtype()`). Raises IntegrityError
    when a file is missing, truncated, or does not hold what the manifest's geometry needs.
    """
    dtype = dtype or compute_dtype()
    if mx.metal.is_available():
        mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))
    weights = _open_weights(directory, manifest, rank)
    model = Model(manifest.placement, rank, group)
    _quantise_like(model, manifest, rank, weights)
    wanted = list(dict(tree_flatten(model.parameters())))
    _check(model, wanted, weights, directory, rank)
    model.eval()
    names = [f"transformer.blocks.{i}." for i in range(len(model.layers))]
    for prefix in names:
        _materialise(model, [n for n in wanted if n.startswith(prefix)], weights, dtype)
    _materialise(model, [n for n in wanted if not n.startswith("transformer.blocks.")], weights, dtype)
    return model


def load_part(
    directory: Path,
    manifest: Manifest,
    rank: int,
    layer: int | None,
    *,
    dtype: mx.Dtype,
    reader: Reader | None = None,
) -> Model:
    """Build a model of which a rank's part of one layer is there, as `layers[0]`; None: all but the layers.

    The layer counts from the model's first one. Nothing else is read; with a `reader` matrices stay on disk, and it
    reads them when they are used. Raises IntegrityError as `load_rank`.
    """
    mine = "transformer.blocks." if layer is None else f"transformer.blocks.{layer}."
    files = {
        file
        for tensor, places in manifest.tensors.items()
        if tensor.startswith(mine) == (layer is not None)
        for file in places
    }
    weights = _open_weights(directory, manifest, rank, files)
    model = Model(_only(manifest.placement, rank, layer), rank)
    if layer is not None:
        weights = {_BLOCK.sub("transformer.blocks.0.", name): array for name, array in weights.items()}
    _quantise_like(model, manifest, rank, weights, first=layer)
    wanted = [n for n, _ in tree_flatten(model.parameters()) if n.startswith("transformer.blocks.") != (layer is None)]
    _check(model, wanted, weights, directory, rank)
    model.eval()
    if reader is not None:
        stored = {
            name: tensor
            for file in files
            if is_for(file, rank)
            for name, tensor in reader.open(directory / file).items()
        }
        stored = {_module_name(name, 0 if layer is None else layer): tensor for name, tensor in stored.items()}
        wanted = _leave_on_disk(model, wanted, stored, reader)
    _materialise(model, wanted, weights, dtype)
    return model


def _only(placement: Placement, rank: int, layer: int | None) -> Placement:
    """Return a placement of a model that has one layer, on this rank; None: no layer."""
    count = 0 if layer is None else 1
    shorter = replace(placement, geometry=replace(placement.geometry, n_layers=count))
    if placement.split != "layers":
        return shorter
    return replace(shorter, shares=tuple(count * (other == rank) for other in range(placement.world_size)))


def _leave_on_disk(model: Model, wanted: list[str], stored: Mapping[str, StoredTensor], reader: Reader) -> list[str]:
    """Let `reader` read the model's matrices when they are used; return what of `wanted` they are not."""
    matrices: list[tuple[str, nn.Module]] = []
    for path, module in tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module):
        if f"{path}.weight" in wanted and module.weight.ndim > 1:
            scales, biases = stored.get(f"{path}.scales"), stored.get(f"{path}.biases")
            quantization = Quantization(module.bits, module.group_size, module.mode) if scales else None
            kind = StoredEmbedding if isinstance(module, nn.Embedding | nn.QuantizedEmbedding) else StoredMatrix
            matrices.append((path, kind(Parts(stored[f"{path}.weight"], scales, biases, quantization), reader)))
    model.update_modules(tree_unflatten(matrices))
    paths = {path for path, _ in matrices}
    return [name for name in wanted if name.rpartition(".")[0] not in paths]


def _check(model: Model, wanted: list[str], weights: dict[str, mx.array], directory: Path, rank: int) -> None:
    shapes = {name: array.shape for name, array in tree_flatten(model.parameters())}
    for name in wanted:
        if name not in weights:
            raise IntegrityError(f"{directory} has no tensor {name!r} for rank {rank}", hint=_HINT)
        if weights[name].shape != shapes[name]:
            raise IntegrityError(
                f"{directory}: {name} has shape {weights[name].shape}, expected {shapes[name]}",
                hint=_HINT,
            )


def _open_weights(
    directory: Path, manifest: Manifest, rank: int, only: Collection[str] | None = None
) -> dict[str, mx.array]:
    refuse_links_outside(directory)
    weights: dict[str, mx.array] = {}
    first, _ = manifest.placement.layers(rank)
    for path, entry in manifest.files_of(rank).items():
        if not path.endswith(".safetensors") or (only is not None and path not in only):
            continue
        file = directory / path
        try:
            if file.stat().st_size != entry.bytes:
                raise IntegrityError(f"{path} has {file.stat().st_size} bytes, expected {entry.bytes}", hint=_HINT)
            loaded = mx.load(str(file))
        except (OSError, RuntimeError, ValueError) as error:
            raise IntegrityError(f"{file} cannot be read: {error}", hint=_HINT) from None
        assert isinstance(loaded, dict)
        weights.update((_module_name(name, first), array) for name, array in loaded.items())
    return weights


def _module_name(name: str, first: int) -> str:
    """Return a tensor's name in the module of a rank whose first layer is `first`."""
    for theirs, ours in _EXPERT_NAMES.items():
        name = name.replace(theirs, ours)
    return _BLOCK.sub(lambda match: f"{match[1]}{int(match[2]) - first}.", name)


def _quantise_like(
    model: Model, manifest: Manifest, rank: int, weights: dict[str, mx.array], *, first: int | None = None
) -> None:
    """Make those modules quantised whose weights come with scales; `first` is the number of the model's first layer."""
    q = manifest.quantization
    if q is None:
        return
    if first is None:
        first, _ = manifest.placement.layers(rank)
    # A layer's experts are alike (`recipe`): what is said of one holds for the stack.
    overrides = {
        _module_name(_EXPERT.sub(r"\1", name) + ".", first).removesuffix("."): own
        for name, own in quantization_table(manifest.config).items()
    }

    def predicate(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if f"{path}.scales" not in weights:
            return False
        override = overrides.get(path)
        if isinstance(override, dict):
            return {key: override[key] for key in ("bits", "group_size", "mode") if override.get(key) is not None}
        return hasattr(module, "to_quantized")

    nn.quantize(model, group_size=q.group_size, bits=q.bits, mode=q.mode, class_predicate=predicate)


def _materialise(model: Model, names: list[str], weights: dict[str, mx.array], dtype: mx.Dtype) -> None:
    # Popping frees each layer's lazy source before the next one is read: the peak is one layer above the model.
    arrays = [(name, weights.pop(name)) for name in names]
    ready = [(n, a.astype(dtype) if mx.issubdtype(a.dtype, mx.floating) else a) for n, a in arrays]
    model.load_weights(ready, strict=False)
    mx.eval([a for _, a in ready])
