"""One rank that sums large arrays over a real ring: `python -m tests.support.ring_sums COUNT BYTES`.

Exits with 0 when every sum was right; the ring's variables say which rank it is.
"""

from __future__ import annotations

import os
import sys

import mlx.core as mx

from moectl.engine.network.exchange import sum_over_ranks


def main() -> None:
    """Sum whole numbers, which float32 adds up without rounding, over all ranks."""
    count, size = int(sys.argv[1]), int(sys.argv[2]) // 4
    group = mx.distributed.init(strict=True, backend="ring")
    ranks, number = group.size(), mx.arange(size, dtype=mx.float32) % 1024
    for turn in range(count):
        own = (number + turn % 7) * (group.rank() + 1)
        wanted = (number + turn % 7) * (ranks * (ranks + 1) // 2)
        assert mx.array_equal(sum_over_ranks(own, group), wanted).item(), f"sum {turn} is wrong"
    os._exit(0)  # as the worker does: no destructor of the ring may keep the test waiting


if __name__ == "__main__":
    main()
