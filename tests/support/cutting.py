"""Cut a checkpoint in this process, without the canary if it is not asked for: for tests of what comes after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moectl.model.catalog import CatalogModel
from moectl.model.manifest import Manifest
from moectl.shards import build
from moectl.shards.checkpoint import open_checkpoint
from moectl.shards.prepare import Wanted, draw_wanted, place


def cut(
    source: Path,
    directory: Path,
    *,
    jobs: int = 2,
    force: bool = False,
    compute_canary: build.ComputeCanary | None = None,
    **wanted: Any,
) -> Manifest:
    """Cut a checkpoint as `wanted`, the fields of `Wanted`, says; return the manifest."""
    asked = Wanted(**wanted)
    with open_checkpoint(str(source)) as checkpoint:
        blueprint = draw_wanted(checkpoint, asked)
        placement = place(CatalogModel(checkpoint.source, blueprint.structure, blueprint.quantization), asked)
        return build.cut(
            checkpoint,
            blueprint,
            placement,
            directory,
            name="set",
            jobs=jobs,
            force=force,
            compute_canary=compute_canary,
        )
