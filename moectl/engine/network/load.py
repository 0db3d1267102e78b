"""Load one rank's part of a shard set into mlx-lm's model. It reads what the manifest lists and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from moectl.engine.network import attention, experts
from moectl.engine.network.parallel import divide
from moectl.engine.network.stages import keep, make_stage, remove_head
from moectl.errors import IntegrityError
from moectl.model.manifest import Manifest, refuse_links_outside
from moectl.model.ownership import Holding, find_holding
from moectl.model.placement import Placement
from moectl.model.regions import Region, belongs_to_sum, find_regions
from moectl.shards.look.flow import names_of_rank
from moectl.shards.look.skeleton import Skeleton, make_skeleton
from moectl.shards.look.units import divisions_of
from moectl.shards.look.ways import Findings, look, require
from moectl.shards.trace.parts import full
from moectl.shards.trace.precision import quantise_by
from moectl.shards.trace.traced import Stored, form_of, trace

HINT = "moectl deploy --verify (on this machine: moectl shard --verify DIR)"


def compute_dtype() -> mx.Dtype:
    """Return the dtype to calculate in on this device: bfloat16 on a GPU, float32 on a CPU.

    MLX's CPU kernels accumulate quantised products in the activations' dtype: bf16 there is inexact and slow.
    """
    return mx.bfloat16 if experts.computes_on_gpu() else mx.float32


def load_rank(
    directory: Path,
    manifest: Manifest,
    rank: int,
    group: mx.distributed.Group | None = None,
    *,
    dtype: mx.Dtype | None = None,
) -> Any:
    """Build the model of one rank and read its weights, layer by layer.

    `dtype` is what activations, scales and unquantised weights become (None: `compute_dtype()`). The model's own sums
    need `exchange.seam`. Raises IntegrityError when a file is missing, truncated, or does not hold what the manifest's
    model needs.
    """
    weights = open_weights(directory, manifest, rank)
    skeleton, found = build_skeleton(manifest)
    model = skeleton.model
    shapes = {name: array.shape for name, array in tree_flatten(model.parameters())}
    layers = [f"{skeleton.paths[id(layer)]}." for layer in skeleton.layers]
    names, holdings = make_part(skeleton, found, manifest.placement, rank, group)
    reader = _Reader(directory, manifest, rank, weights, holdings, shapes)
    casts = getattr(model, "cast_predicate", lambda _: True)
    for prefix in layers:
        reader.fill(model, [n for n in names if n.startswith(prefix)], dtype or compute_dtype(), casts)
    reader.fill(model, [n for n in names if not n.startswith(tuple(layers))], dtype or compute_dtype(), casts)
    return model


def build_skeleton(manifest: Manifest) -> tuple[Skeleton, Findings]:
    """Return a shard set's model without weights, quantised as the set is, and what of it can be divided."""
    skeleton = make_skeleton(manifest.config)
    # As mlx-lm loads what it has converted: some `sanitize` takes the head away where there are no weights for it.
    kept = {name: array for name, array in skeleton.parameters.items() if name in manifest.tensors}
    trace(skeleton.model, {n: Stored(n, form_of(tuple(array.shape), array.dtype)) for n, array in kept.items()})
    found = look(skeleton)
    if manifest.table is not None:
        quantise_by(skeleton.model, manifest.table, manifest.tensors)
    return skeleton, found


def make_part(
    skeleton: Skeleton, found: Findings, placement: Placement, rank: int, group: mx.distributed.Group | None
) -> tuple[list[str], dict[str, Holding]]:
    """Let a whole model compute one rank's part; return the names of the parameters that it needs, and its holdings.

    The parameters stay whole and empty. Raises PlanError where the model cannot be split so.
    """
    model = skeleton.model
    if placement.world_size > 1:
        require(skeleton, found, placement.split)
    holdings: dict[str, Holding] = {}
    if placement.split != "layers" and placement.world_size > 1:
        holdings = placement.hold(divisions_of(model, found.parts, placement.split), rank)
    names = _list_needed(skeleton, found, placement, rank)
    keep(model, names)
    if placement.split == "layers" and placement.world_size > 1:
        assert found.flow is not None
        spans = [placement.layers(r) for r in range(placement.world_size)]
        make_stage(model, found.flow, spans, rank, group)
    elif placement.world_size > 1:
        divide(model, found.parts, holdings, group, rank=rank, held=placement.held)
        if rank != placement.head_rank and found.flow is not None:
            remove_head(model, found.flow)
    experts.install(model)
    attention.install(skeleton.layers)
    return names, holdings


def find_part(name: str, whole: tuple[int, ...], holding: Holding | None) -> tuple[list[Region], tuple[int, ...]]:
    """Return the regions of a parameter that a rank has, and the shape of them together."""
    if holding is None:
        return [full(whole)], whole
    regions, axis = find_regions(name.rpartition(".")[2], whole, holding.division, holding.spans)
    length = sum(region[axis][1] - region[axis][0] for region in regions)
    return regions, (*whole[:axis], length, *whole[axis + 1 :])


def _list_needed(skeleton: Skeleton, found: Findings, placement: Placement, rank: int) -> list[str]:
    """Return the parameters of which a rank has at least a part, in the model's order."""
    if found.flow is None:
        return list(skeleton.parameters)
    first, last = placement.split != "layers" or rank == 0, rank == placement.head_rank
    mine = names_of_rank(skeleton, found.flow, placement.layers(rank), first=first, last=last)
    return [name for name in skeleton.parameters if name in mine]


def open_weights(
    directory: Path, manifest: Manifest, rank: int, only: Collection[str] | None = None
) -> dict[str, mx.array]:
    """Return a rank's arrays by name; they are read when they are used. Raises IntegrityError."""
    refuse_links_outside(directory)
    weights: dict[str, mx.array] = {}
    for path, entry in manifest.files_of(rank).items():
        if not path.endswith(".safetensors") or (only is not None and path not in only):
            continue
        file = directory / path
        try:
            if file.stat().st_size != entry.bytes:
                raise IntegrityError(f"{path} has {file.stat().st_size} bytes, expected {entry.bytes}", hint=HINT)
            loaded = mx.load(str(file))
        except (OSError, RuntimeError, ValueError) as error:
            raise IntegrityError(f"{file} cannot be read: {error}", hint=HINT) from None
        assert isinstance(loaded, dict)
        weights.update(loaded)
    return weights


class _Reader:
    """Gives a model its arrays, checked."""

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        rank: int,
        weights: dict[str, mx.array],
        holdings: dict[str, Holding],
        shapes: dict[str, tuple[int, ...]],
    ) -> None:
        self._directory, self._weights, self._rank = directory, weights, rank
        self._holdings, self._shapes = holdings, shapes
        self._manifest, self._files = manifest, manifest.files_of(rank)

    def fill(self, model: Any, names: list[str], dtype: mx.Dtype, casts: Callable[[str], bool]) -> None:
        """Evaluate these parameters and put them into a model; floats become `dtype` where `casts` allows it."""
        # Popping frees each layer's lazy source before the next one is read: the peak is one layer above the model.
        arrays = [(name, self._take(name)) for name in names]
        ready = [
            (name, array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) and casts(name) else array)
            for name, array in arrays
        ]
        model.load_weights(ready, strict=False)
        mx.eval([array for _, array in ready])

    def _take(self, name: str) -> mx.array:
        holding, whole, last = find_holding(self._holdings, name), self._shapes[name], name.rpartition(".")[2]
        regions, shape = find_part(name, whole, holding)
        if holding is not None and (holding.is_empty or (belongs_to_sum(last, holding.division) and not holding.adds)):
            return mx.zeros(shape)  # another rank adds it, or there is nothing of it here
        if (array := self._weights.pop(name, None)) is None:
            raise IntegrityError(f"{self._directory} has no tensor {name!r} for rank {self._rank}", hint=HINT)
        if array.shape != shape:
            raise IntegrityError(f"{self._directory}: {name} has shape {array.shape}, expected {shape}", hint=HINT)
        places = self._manifest.tensors.get(name, {})
        held = [region for file, found in places.items() if file in self._files for region in found]
        if (held or [full(whole)]) != regions:
            raise IntegrityError(f"{self._directory}: {name} holds {held or 'all'}, expected {regions}", hint=HINT)
        return array
