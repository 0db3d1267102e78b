"""How much memory this machine has for the ranks that run on it, and whether that is enough. It asks only the system.

The operator's machine uses it for its own ranks, and a worker before it loads the model.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from moectl.errors import PlanError
from moectl.hosts.hardware import parse_macos, parse_wired
from moectl.hosts.macos import parse_version
from moectl.model.manifest import Manifest
from moectl.model.placement import Placement
from moectl.planner.chips import default_working_set_bytes
from moectl.planner.memory import (
    COMFORTABLE,
    CPU_DTYPE_BYTES,
    KV_STEP,
    METAL_DTYPE_BYTES,
    SYSTEM_BYTES,
    Memory,
    Need,
    Verdict,
    cache_bytes,
    judge,
    most_that_fits,
    rank_need,
)

CONTEXT = 4096  # tokens for which every rank has to have memory
MOST_ANSWERS = 8  # of full length, at once
SYSCTL = "/usr/sbin/sysctl"
VM_STAT = "/usr/bin/vm_stat"
HELD_HINT = "end other programs that use its GPU (Ollama, LM Studio); if that changes nothing, restart that Mac"
_MEMINFO = Path("/proc/meminfo")


def own_memory() -> Memory | None:
    """Return this machine's memory; None where a CUDA build of MLX keeps the weights in the GPU's own memory."""
    if importlib.util.find_spec("nvidia") is not None and sys.platform != "darwin":
        return None
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if sys.platform == "darwin":
        version = parse_version(read_macos())
        limit = parse_macos(ask_tool(SYSCTL, "iogpu.wired_limit_mb"), "", "", "").wired_limit_bytes
        held = find_held(parse_wired(ask_tool(VM_STAT)) or 0, total)
        return Memory(total, limit or default_working_set_bytes(total, version[0] if version else None), held)
    return Memory(total, None, max(0, total - _available(total)))


def find_held(wired_bytes: int, total_bytes: int) -> int:
    """Return how much wired memory of a Mac is more than macOS itself wires, which is an estimate.

    A program holds it, or one that was killed has left it.
    """
    return max(0, wired_bytes - SYSTEM_BYTES - total_bytes // 16)


def ask_tool(*argv: str) -> str:
    """Return what a tool of the system prints; nothing where it cannot."""
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode("utf-8", "replace").strip()


def read_macos() -> str | None:
    """Return the version of macOS; None on another system, "" where it is not known.

    Asked of sw_vers, because macOS tells a python that was built with an older SDK another one.
    """
    return ask_tool("sw_vers", "-productVersion") if sys.platform == "darwin" else None


def own_dtype_bytes() -> int:
    """Return the size in bytes of the type in which ranks on this machine calculate."""
    return METAL_DTYPE_BYTES if sys.platform == "darwin" else CPU_DTYPE_BYTES


def check_own_memory(
    manifest: Manifest, rank: int, *, ranks_here: int = 1, working_set_bytes: int | None = None
) -> None:
    """Raise PlanError when this machine cannot hold a rank; `working_set_bytes` is the limit that its GPU reports."""
    memory = own_memory()
    if memory is None:
        return
    memory = replace(memory, ranks=ranks_here)
    if working_set_bytes is not None:
        memory = replace(memory, working_set=working_set_bytes)
    if sys.platform == "darwin" and ranks_here > 1:  # the other ranks may have wired their part already
        memory = replace(memory, in_use=0)
    need = least_need(manifest.placement, [rank], own_dtype_bytes())
    if judge(need, memory.budget) is Verdict.TOO_MUCH:
        sizes = f"{need / 1e9:.1f} GB are needed, {memory.budget / 1e9:.1f} GB usable"
        if sys.platform == "darwin" and judge(need, replace(memory, in_use=0).budget) is not Verdict.TOO_MUCH:
            held = (
                f"{memory.in_use / 1e9:.1f} GB of wired memory are still held by a program, or by one that was killed"
            )
            raise PlanError(f"{manifest.name} does not fit: {sizes}; {held}", hint=HELD_HINT)
        raise too_large(manifest.name, sizes, need - memory.budget)


def least_need(placement: Placement, ranks: Iterable[int], dtype_bytes: int) -> int:
    """Return the bytes that ranks on one host need at least: each with memory for a usual context."""
    context = min(CONTEXT, placement.structure.context)
    needs = (rank_need(placement, rank, context=context, dtype_bytes=dtype_bytes) for rank in ranks)
    return sum(need.total for need in needs)


def too_large(name: str, sizes: str, missing_bytes: int) -> PlanError:
    """Return the error for a model that needs more memory than a host has."""
    return PlanError(
        f"{name} does not fit: {sizes} ({missing_bytes / 1e9:.1f} GB too little)",
        hint="'moectl plan' says what would fit; --force tries it all the same",
    )


def count_kv_tokens(manifest: Manifest, rank: int, *, ranks_here: int) -> int | None:
    """Return for how many tokens the keys and values fit beside a rank's weights; None where memory is not known.

    It is at least one usual context, even where memory is short: `check_own_memory` refuses a rank that cannot run.
    """
    memory = own_memory()
    if memory is None:
        return None
    budget = COMFORTABLE * replace(memory, ranks=ranks_here).budget
    dtype_bytes, longest = own_dtype_bytes(), manifest.structure.context

    def fits(steps: int) -> bool:
        return need_of_tokens(manifest, rank, steps * KV_STEP, dtype_bytes).total <= budget

    return max(min(CONTEXT, longest), most_that_fits(fits, MOST_ANSWERS * longest // KV_STEP) * KV_STEP)


def need_of_tokens(manifest: Manifest, rank: int, tokens: int, dtype_bytes: int) -> Need:
    """Return what a rank needs with keys and values of this many tokens: full answers, and one of the rest."""
    longest, placement = manifest.structure.context, manifest.placement
    whole, rest = divmod(tokens, longest)
    need = rank_need(placement, rank, context=longest if whole else rest, dtype_bytes=dtype_bytes)
    full = cache_bytes(placement, rank, longest, max(0, whole - 1), dtype_bytes)
    more = cache_bytes(placement, rank, rest, bool(whole and rest), dtype_bytes)
    return replace(need, kv=need.kv + full + more)


def _available(total: int) -> int:
    try:
        match = re.search(r"^MemAvailable:\s+(\d+) kB$", _MEMINFO.read_text(), re.MULTILINE)
    except OSError:
        return total
    return int(match[1]) * 1024 if match else total
