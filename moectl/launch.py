"""From a shard set or a deployment to a running session: which process, where, reading what, reachable how.

It decides nothing about the model; it turns what is on disk or deployed into one RankSpec per rank.
"""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moectl.backend import choose_backend
from moectl.demo import demo_dir
from moectl.errors import HostsError
from moectl.hosts import Host
from moectl.manifest import Manifest, read_manifest
from moectl.prepare import Wanted
from moectl.remote import LocalRemote, Remote
from moectl.session import RankSpec, Session

LOOPBACK = "127.0.0.1"
WORKER = ("-m", "moectl", "worker")


@dataclass(frozen=True, slots=True)
class Local:
    """A shard set on this machine, all ranks here."""

    directory: Path
    manifest: Manifest


def prepare_local(
    model: str | None,
    wanted: Wanted,
    *,
    shard: Callable[[str, Wanted], Path],
) -> Local:
    """Return a local target for a model (None: the bundled demo), cut into the cache first when needed."""
    directory = shard(model or str(demo_dir()), wanted)
    return Local(directory, read_manifest(directory))
