"""The one exchange per layer: sum an array over all ranks. It knows nothing of what is summed."""

from __future__ import annotations

import mlx.core as mx

# Up to here latency, not bandwidth, decides: all_gather makes N-1 hops where all_sum makes 2(N-1).
GATHER_BELOW_BYTES = 64 * 1024


def sum_over_ranks(x: mx.array, group: mx.distributed.Group | None) -> mx.array:
    """Return the sum of `x` over the ranks of `group`, bit-identical on every rank; `x` itself for one rank.

    Same shape and dtype as `x`. Small arrays are gathered and summed locally in float32, so that bf16 rounds once;
    large ones take the backend's all-reduce. Built lazily, on the current stream: every collective of a process must
    run on one stream.
    """
    if group is None or group.size() == 1:
        return x
    if x.nbytes > GATHER_BELOW_BYTES:
        return mx.distributed.all_sum(x, group=group)
    parts = mx.distributed.all_gather(x[None], group=group)
    return parts.astype(mx.float32).sum(axis=0).astype(x.dtype)
