"""A rank's memory on a GPU: how much it may wire and keep, and how it gives all back.

Wired memory is what macOS never moves. mlx-lm's generator lets every process wire the GPU's whole working set, and MLX
keeps freed arrays up to nearly as much: with several ranks on a Mac, that is far more than there is.
"""

from __future__ import annotations

import contextlib
import gc
import sys

from moectl.planner.memory import Need


def working_set_bytes() -> int | None:
    """Return what Metal says that this machine's GPU should use at most; None without Metal."""
    import mlx.core as mx

    return int(mx.device_info()["max_recommended_working_set_size"]) if mx.metal.is_available() else None


def limit_memory(need: Need, *, ranks_here: int) -> None:
    """Limit what this process wires, and what it keeps of freed arrays; after its engine was built, which lifts that.

    `ranks_here` ranks share this machine's GPU. Without Metal nothing is wired.
    """
    import mlx.core as mx

    working_set = working_set_bytes()
    if working_set is None:
        return
    mx.set_wired_limit(need.wired_limit(working_set, ranks_here))
    mx.set_cache_limit(need.freed)


def settle() -> None:
    """Wait for what the default stream still computes; the engine waits for its own when it is dropped."""
    if "mlx.core" in sys.modules:
        import mlx.core as mx

        with contextlib.suppress(Exception):
            mx.synchronize()


def release() -> None:
    """Give back this process's memory; the model and the engine must be in no variable any more.

    MLX itself keeps the group until the process ends.
    """
    if "mlx.core" not in sys.modules:
        return
    import mlx.core as mx

    with contextlib.suppress(Exception):
        gc.collect()
        mx.set_wired_limit(0)
        mx.clear_cache()


def keeps_memory() -> bool:
    """Return whether this machine may keep what a process has wired after it has ended."""
    if "mlx.core" not in sys.modules:
        return False
    import mlx.core as mx

    return mx.metal.is_available()
