"""New: moectl.session.target"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moectl.demo import demo_dir
from moectl.model.manifest import read_manifest
from moectl.session.target import Local
from moectl.shards.prepare import Wanted


def prepare_local(model: str | None, wanted: Wanted, *, shard: Callable[[str, Wanted], Path]) -> Local:
    """Return a local target for a model (None: the bundled demo), which `shard` finds or makes."""
    directory = shard(model or str(demo_dir()), wanted)
    return Local(directory, read_manifest(directory))
