"""What a worker does for itself before MLX is imported: its environment, and a Mac that stays awake.

Sources: the names that libmlx and libjaccl 0.32.4 look up (their strings), MLX's guides "Environment variables" and
"Distributed" (MLX_METAL_FAST_SYNCH may "lead to deadlock and leave the GPU wedged"), caffeinate(8).
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterable, MutableMapping

CAFFEINATE = "/usr/bin/caffeinate"
# JACCL looks up JACCL_RANK before MLX_RANK, and so on: one that is left over from elsewhere would win.
_PREFIXES = ("JACCL_", "MLX_JACCL_")
# On one rank alone, the last one hangs the others or lets them read old numbers.
_NAMES = {"MLX_RANK", "MLX_WORLD_SIZE", "MLX_HOSTFILE", "MLX_IBV_DEVICES", "MLX_METAL_FAST_SYNCH"}
# macOS 26 takes weights out of wired memory that no GPU has used for a second; 0 keeps them there.
_WANTED = {"MLX_METAL_RESIDENCY_REFRESH_INTERVAL_MS": "0"}
_awake: list[subprocess.Popen[bytes]] = []


def list_unwanted(names: Iterable[str]) -> list[str]:
    """Return those of these variables that moectl sets itself, or that a rank must not have; sorted."""
    return sorted(name for name in names if name in _NAMES or name.startswith(_PREFIXES))


def prepare_environment(environment: MutableMapping[str, str]) -> list[str]:
    """Make an environment that of a worker, before it imports mlx; return the variables that were removed."""
    removed = list_unwanted(environment)
    for name in removed:
        del environment[name]
    for name, value in _WANTED.items():
        environment.setdefault(name, value)
    return removed


def keep_awake() -> None:
    """Keep a Mac awake until this process ends, which needs no root; elsewhere, or without the program, do nothing."""
    if sys.platform != "darwin" or _awake:
        return
    with contextlib.suppress(OSError):
        argv = [CAFFEINATE, "-is", "-w", str(os.getpid())]
        nothing = subprocess.DEVNULL  # it outlives no stream of this process
        _awake.append(subprocess.Popen(argv, stdin=nothing, stdout=nothing, stderr=nothing))
