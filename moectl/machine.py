"""What this machine can give to the ranks that run on it. It asks the kernel and nothing else."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path

from moectl.budget import CPU_DTYPE_BYTES, METAL_DTYPE_BYTES, Memory
from moectl.chips import default_working_set_bytes
from moectl.plan import Node

_MEMINFO = Path("/proc/meminfo")


def own_node() -> Node | None:
    """Return this machine as a node; None where a CUDA build of MLX keeps the weights in memory that is not asked."""
    if importlib.util.find_spec("nvidia") is not None and sys.platform != "darwin":
        return None
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if sys.platform == "darwin":
        return Node("this machine", Memory(total, default_working_set_bytes(total)), None, METAL_DTYPE_BYTES)
    return Node(
        "this machine", Memory(total, None, max(0, total - _available(total))), None, CPU_DTYPE_BYTES, None, False
    )


def _available(total: int) -> int:
    try:
        match = re.search(r"^MemAvailable:\s+(\d+) kB$", _MEMINFO.read_text(), re.MULTILINE)
    except OSError:
        return total
    return int(match[1]) * 1024 if match else total
