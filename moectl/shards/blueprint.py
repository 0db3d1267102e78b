"""The blueprint of a checkpoint: its model as mlx-lm builds it, and where the bytes of each parameter come from.

It reads headers only. `recipe` lays out files with it, and a plan needs its structure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from moectl.model.structure import Quantization, Structure
from moectl.shards.look.outline import outline
from moectl.shards.look.skeleton import Skeleton, make_skeleton
from moectl.shards.look.ways import Findings, look
from moectl.shards.source.stored import name_stored
from moectl.shards.source.tensors import StoredTensor
from moectl.shards.trace.formats import read_format, unpack
from moectl.shards.trace.precision import cast, count_left, settle
from moectl.shards.trace.traced import Expression, check_parameters, trace


class Headers(Protocol):
    """The part of `checkpoint.Checkpoint` that a blueprint needs."""

    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def stored(self) -> Mapping[str, StoredTensor]: ...


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A model as it is to be written."""

    skeleton: Skeleton
    found: Findings
    parameters: dict[str, Expression]  # by mlx-lm's names, with the precision that the files will have
    quantization: Quantization | None  # of most weights; None: 16 bits
    table: dict[str, Any] | None  # config.json's `quantization`, as mlx-lm writes it
    structure: Structure
    left: float = 0.0  # the part of the weights that could not be quantised as wanted


def find_quantization(config: Mapping[str, Any]) -> Quantization | None:
    """Return how a checkpoint's weights are quantised already, None where they are floats. Raises CheckpointError."""
    table = read_format(config).table
    if table is None:
        return None
    return Quantization(table["bits"], table["group_size"], table.get("mode") or "affine")


def is_by_mlx(config: Mapping[str, Any]) -> bool:
    """Whether MLX has quantised a checkpoint. Raises CheckpointError for one that cannot be read."""
    return read_format(config).kind == "mlx"


def draw(headers: Headers, wanted: Quantization | None = None, recipe: str | None = None) -> Blueprint:
    """Draw a checkpoint's model: with the precision that is wanted, or as it is stored.

    `recipe` is one of mlx-lm's mixtures. Raises CheckpointError where mlx-lm would not load this checkpoint, PlanError
    where it would not quantise it so.
    """
    config = headers.config
    form = read_format(config)
    skeleton = make_skeleton(config)
    traced = trace(skeleton.model, unpack(name_stored(headers.stored), form))
    if form.kind == "plain" and wanted is None:
        traced = cast(skeleton.model, config, traced)  # as `mlx_lm.convert` copies
    if form.table is None:  # so that nothing is tried of a model that is not the checkpoint's
        check_parameters({name: tuple(array.shape) for name, array in skeleton.parameters.items()}, traced)
    found = look(skeleton)
    settled = settle(skeleton.model, config, traced, form, wanted, recipe)
    return Blueprint(
        skeleton,
        found,
        settled.parameters,
        wanted or find_quantization(config),
        settled.table,
        outline(skeleton, found, config),
        0.0 if wanted is None else count_left(skeleton.model, wanted),
    )
