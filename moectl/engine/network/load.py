"""Load one rank's part of a shard set into mlx-lm's model. It reads what the manifest lists and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from moectl.engine.network import experts
from moectl.engine.network.parallel import divide
from moectl.engine.network.stages import make_stage, remove_head
from moectl.errors import IntegrityError
from moectl.model.manifest import Manifest, refuse_links_outside
from moectl.model.ownership import Holding, find_holding
from moectl.model.regions import Region, belongs_to_sum, find_regions
from moectl.shards.flow import names_of_rank
from moectl.shards.parts import full
from moectl.shards.precision import quantise_modules
from moectl.shards.skeleton import Skeleton, empty, make_skeleton
from moectl.shards.units import divisions_of
from moectl.shards.ways import Findings, look, require

_HINT = "moectl deploy --verify (on this machine: moectl shard --verify DIR)"

Group = Any  # mx.distributed.Group


def compute_dtype() -> mx.Dtype:
    """Return the dtype to calculate in on this device: bfloat16 on a GPU, float32 on a CPU.

    MLX's CPU kernels accumulate quantised products in the activations' dtype: bf16 there is inexact and slow.
    """
    return mx.float32 if mx.default_device() == mx.Device(mx.cpu) else mx.bfloat16


def load_rank(
    directory: Path, manifest: Manifest, rank: int, group: Group = None, *, dtype: mx.Dtype | None = None
) -> Any:
    """Build the model of one rank and read its weights, layer by layer.

    `dtype` is what activations, scales and unquantised weights become (None: `compute_dtype()`), but for those that the
    model wants as they are. Its sums need `exchange.seam` while it runs. Raises IntegrityError when a file is missing,
    truncated, or does not hold what the model needs.
    """
    dtype = dtype or compute_dtype()
    if mx.metal.is_available():
        mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))
    weights = _open_weights(directory, manifest, rank)
    skeleton = make_skeleton(manifest.config)
    found = look(skeleton)
    if manifest.table is not None:
        quantise_modules(skeleton.model, manifest.table, manifest.tensors)
        empty(skeleton.model)
    part = _Part(skeleton, found, manifest, rank)
    shapes = part.check(weights, directory)
    casts = getattr(skeleton.model, "cast_predicate", lambda _: True)
    for names in part.group(shapes):
        _materialise(skeleton.model, [name for name in names if shapes[name] is not None], weights, dtype, casts)
    zeros = {name: array for name, array in skeleton.parameters.items() if name in shapes and shapes[name] is None}
    skeleton.model.load_weights([(name, array.astype(dtype)) for name, array in zeros.items()], strict=False)
    part.install(group)
    return skeleton.model


class _Part:
    """What one rank has of a model."""

    def __init__(self, skeleton: Skeleton, found: Findings, manifest: Manifest, rank: int) -> None:
        self._skeleton, self._found, self._manifest, self._rank = skeleton, found, manifest, rank
        self._placement = placement = manifest.placement
        self._is_divided = placement.split != "layers" and placement.world_size > 1
        self._holdings: dict[str, Holding] = {}
        if placement.world_size > 1:
            require(skeleton, found, placement.split)
        if self._is_divided:
            divisions = divisions_of(skeleton.model, found.parts, placement.split)
            self._holdings = placement.hold(divisions, rank)

    def check(self, weights: Mapping[str, mx.array], directory: Path) -> dict[str, tuple[int, ...] | None]:
        """Return the shape of each parameter that the rank needs, None for zeros that no file holds.

        Raises IntegrityError where a file holds something else.
        """
        found: dict[str, tuple[int, ...] | None] = {}
        needed, files = self._list_needed(), self._manifest.files_of(self._rank)
        for name, array in self._skeleton.parameters.items():
            if name not in needed:
                continue
            regions, shape = self._find(name, array.shape)
            found[name] = shape
            if shape is None:
                continue
            if name not in weights:
                raise IntegrityError(f"{directory} has no tensor {name!r} for rank {self._rank}", hint=_HINT)
            held = self._manifest.tensors.get(name, {})
            listed = [region for file in held if file in files for region in held[file]]
            if weights[name].shape != shape or (listed or [full(array.shape)]) != regions:
                raise IntegrityError(
                    f"{directory}: {name} has shape {weights[name].shape} of {listed or 'all'}, expected {shape} of"
                    f" {regions}",
                    hint=_HINT,
                )
        return found

    def group(self, names: Mapping[str, Any]) -> Iterator[list[str]]:
        """Yield names by layer, and last those of no layer."""
        paths = [f"{self._skeleton.paths[id(layer)]}." for layer in self._skeleton.layers]
        for path in paths:
            yield [name for name in names if name.startswith(path)]
        yield [name for name in names if not name.startswith(tuple(paths))]

    def install(self, group: Group) -> None:
        """Let the model compute this part, and exchange with the other ranks."""
        model, flow, placement = self._skeleton.model, self._found.flow, self._placement
        if self._is_divided:
            divide(model, self._found.parts, self._holdings, group, rank=self._rank, held=placement.held)
            if self._rank != placement.head_rank and flow is not None:
                remove_head(model, flow)
        elif placement.world_size > 1:
            assert flow is not None
            spans = [placement.layers(rank) for rank in range(placement.world_size)]
            make_stage(model, flow, spans, self._rank, group)
        experts.install(model)

    def _list_needed(self) -> set[str]:
        placement, flow = self._placement, self._found.flow
        if flow is None:
            return set(self._skeleton.parameters)
        first, last = placement.split != "layers" or self._rank == 0, self._rank == placement.head_rank
        return names_of_rank(self._skeleton, flow, placement.layers(self._rank), first=first, last=last)

    def _find(self, name: str, shape: tuple[int, ...]) -> tuple[list[Region], tuple[int, ...] | None]:
        """Return the regions of a parameter that the rank has, and the shape of them together."""
        holding, last = find_holding(self._holdings, name), name.rpartition(".")[2]
        if holding is None:
            return [full(shape)], tuple(shape)
        if holding.is_empty or (belongs_to_sum(last, holding.division) and not holding.adds):
            return [], None
        regions, axis = find_regions(last, tuple(shape), holding.division, holding.spans)
        length = sum(stop - start for start, stop in (region[axis] for region in regions))
        return regions, (*shape[:axis], length, *shape[axis + 1 :])


def _open_weights(directory: Path, manifest: Manifest, rank: int) -> dict[str, mx.array]:
    refuse_links_outside(directory)
    weights: dict[str, mx.array] = {}
    for path, entry in manifest.files_of(rank).items():
        if not path.endswith(".safetensors"):
            continue
        file = directory / path
        try:
            if file.stat().st_size != entry.bytes:
                raise IntegrityError(f"{path} has {file.stat().st_size} bytes, expected {entry.bytes}", hint=_HINT)
            loaded = mx.load(str(file))
        except (OSError, RuntimeError, ValueError) as error:
            raise IntegrityError(f"{file} cannot be read: {error}", hint=_HINT) from None
        assert isinstance(loaded, dict)
        weights.update(loaded)
    return weights


def _materialise(
    model: Any,
    names: list[str],
    weights: dict[str, mx.array],
    dtype: mx.Dtype,
    casts: Callable[[str], bool],
) -> None:
    def make(name: str) -> mx.array:
        # Popping frees each layer's lazy source before the next one is read: the peak is one layer above the model.
        array = weights.pop(name)
        return array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) and casts(name) else array

    ready = [(name, make(name)) for name in names]
    model.load_weights(ready, strict=False)
    mx.eval([array for _, array in ready])
