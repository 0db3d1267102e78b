"""What this machine can give to the ranks that run on it, and whether that will do. It asks the kernel and nobody else.

The operator's machine uses it for ranks of its own, and a worker before it loads, where hosts.txt says nothing of the
host's memory.
"""

from __future__ import annotations

import bisect
import importlib.util
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from moectl.errors import PlanError
from moectl.model.manifest import Manifest, Quantization
from moectl.model.placement import Placement
from moectl.planner.chips import default_working_set_bytes
from moectl.planner.memory import (
    COMFORTABLE,
    CPU_DTYPE_BYTES,
    KV_STEP,
    METAL_DTYPE_BYTES,
    Memory,
    Verdict,
    judge,
    kv_bytes,
    rank_need,
)

CONTEXT = 4096  # tokens that a rank has to have room for
MOST_ANSWERS = 8  # of full length: the engine runs no more at once
_MEMINFO = Path("/proc/meminfo")


def own_memory() -> Memory | None:
    """Return this machine's memory; None where a CUDA build of MLX keeps the weights in memory that is not asked."""
    if importlib.util.find_spec("nvidia") is not None and sys.platform != "darwin":
        return None
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if sys.platform == "darwin":
        return Memory(total, default_working_set_bytes(total))
    return Memory(total, None, max(0, total - _available(total)))


def own_dtype_bytes() -> int:
    """Return the size of the type that ranks on this machine calculate in."""
    return METAL_DTYPE_BYTES if sys.platform == "darwin" else CPU_DTYPE_BYTES


def check_own_memory(
    manifest: Manifest, rank: int, *, ranks_here: int = 1, working_set_bytes: int | None = None
) -> None:
    """Raise PlanError when this machine cannot hold a rank beside others; `working_set_bytes` is what its GPU says."""
    memory = own_memory()
    if memory is None:
        return
    memory = replace(memory, ranks=ranks_here)
    if working_set_bytes is not None:
        memory = replace(memory, working_set=working_set_bytes)
    need = least_need(manifest.placement, manifest.quantization, [rank], own_dtype_bytes())
    if judge(need, memory.budget) is Verdict.TOO_MUCH:
        sizes = f"{need / 1e9:.1f} GB are needed, {memory.budget / 1e9:.1f} GB usable"
        raise too_large(manifest.name, sizes, need - memory.budget)


def least_need(placement: Placement, quantization: Quantization | None, ranks: Iterable[int], dtype_bytes: int) -> int:
    """Return the bytes that ranks on one host need at least: with room for a usual context each."""
    context = min(CONTEXT, placement.geometry.max_seq_len)
    needs = (rank_need(placement, quantization, rank, context=context, dtype_bytes=dtype_bytes) for rank in ranks)
    return sum(need.total for need in needs)


def too_large(name: str, sizes: str, missing_bytes: int) -> PlanError:
    """Return what refuses a model for which a host has too little memory."""
    return PlanError(
        f"{name} does not fit: {sizes} ({missing_bytes / 1e9:.1f} GB too little)",
        hint="'moectl plan' says what would fit; --force tries it all the same",
    )


def count_kv_tokens(manifest: Manifest, rank: int, *, ranks_here: int) -> int | None:
    """Return whose keys and values fit beside a rank's weights, in tokens; None where the memory is not known.

    At least one usual context, even where that is tight: whether it may run at all is `check_own_memory`'s to say.
    """
    memory = own_memory()
    if memory is None:
        return None
    budget = COMFORTABLE * replace(memory, ranks=ranks_here).budget
    dtype_bytes, longest = own_dtype_bytes(), manifest.geometry.max_seq_len

    def fits(steps: int) -> bool:
        need = rank_need(
            manifest.placement,
            manifest.quantization,
            rank,
            context=min(steps * KV_STEP, longest),
            dtype_bytes=dtype_bytes,
        )
        more = steps * KV_STEP - min(steps * KV_STEP, longest)  # of further answers: their keys and values alone
        return need.total + kv_bytes(manifest.placement, rank, more, 1, dtype_bytes) <= budget

    least = min(CONTEXT, longest)
    return max(
        least, bisect.bisect_left(range(MOST_ANSWERS * longest // KV_STEP), 1, key=lambda s: not fits(s + 1)) * KV_STEP
    )


def _available(total: int) -> int:
    try:
        match = re.search(r"^MemAvailable:\s+(\d+) kB$", _MEMINFO.read_text(), re.MULTILINE)
    except OSError:
        return total
    return int(match[1]) * 1024 if match else total
