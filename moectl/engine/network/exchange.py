"""The one exchange per layer: sum an array over all ranks. It knows nothing of what is summed.

`moectl.engine.profile` observes exchanges here; without an observer nothing is added.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from functools import partial
from itertools import accumulate
from typing import Any

import mlx.core as mx

from moectl.shards.look.hooks import replaced_sum

Exchange = Callable[[mx.array], mx.array]
Observer = Callable[[mx.array, Exchange], mx.array]

# Up to here latency, not bandwidth, decides: all_gather makes N-1 hops where all_sum makes 2(N-1).
GATHER_BELOW_BYTES = 64 * 1024
# Times the number of ranks: from there on MLX's ring sends an array both ways round at once (min_send_size in its
# ring.cpp). Then each socket has two users, and its thread looks at their list of tasks without the lock. mlx#4475
# reports that sums of three and more Macs hang in 3 to 4 % of the calls; one way round costs about as much.
ONE_WAY_BYTES = 2 * 262_144
_LEAST_RANKS = 3

_backend = "ring"
_observer: ContextVar[Observer | None] = ContextVar("observer", default=None)
_backend_sum = mx.distributed.all_sum


def sum_over_ranks(x: mx.array, group: mx.distributed.Group | None) -> mx.array:
    """Return the sum of `x` over the ranks of `group`, bit-identical on every rank; `x` itself for one rank.

    Same shape and dtype as `x`. Small arrays are gathered and summed locally in float32, so that bf16 rounds once;
    large ones take the backend's all-reduce. Built lazily, on the current stream: every collective of a process must
    run on one stream.
    """
    if group is None or group.size() == 1:
        return x
    return run_exchange(x, partial(_sum, group=group))


@contextlib.contextmanager
def seam() -> Iterator[None]:
    """Let mlx-lm's blocks that sum over ranks by themselves do it by `sum_over_ranks` while the block runs."""

    def all_sum(x: mx.array, *, group: mx.distributed.Group | None = None, stream: Any = None) -> mx.array:
        return sum_over_ranks(x, group or mx.distributed.init())

    with replaced_sum(all_sum):
        yield


def use_backend(name: str) -> None:
    """Note over which of MLX's backends this process exchanges arrays."""
    global _backend
    _backend = name


def share_first(arrays: Sequence[mx.array], group: mx.distributed.Group) -> list[mx.array]:
    """Return rank 0's arrays on every rank, in one exchange. Not observed: it is no rank's work."""
    flat = mx.concatenate([array.reshape(-1).astype(mx.float32) for array in arrays])
    first = mx.distributed.all_gather(flat[None], group=group)[0]
    ends = list(accumulate(array.size for array in arrays))
    parts = mx.split(first, ends[:-1])
    return [part.reshape(array.shape).astype(array.dtype) for part, array in zip(parts, arrays, strict=True)]


def run_exchange(x: mx.array, exchange: Exchange, *, waits: bool = False) -> mx.array:
    """Return `exchange(x)`, an array that other ranks take part in; an observer may run it in its own way.

    `waits` says that another rank may come to it seconds later: then it stands alone (`run_alone`).
    """
    if waits:
        exchange = partial(run_alone, exchange)
    observer = _observer.get()
    return exchange(x) if observer is None else observer(x, exchange)


def run_alone(exchange: Exchange, x: mx.array) -> mx.array:
    """Return `exchange(x)`, evaluated after `x` and before anything can depend on it.

    Collectives run on the CPU. What depends on one waits for it inside a command buffer of the GPU, and macOS ends such
    a buffer after about 5 s (mlx-examples#1200, mlx#3830). A wait on the CPU may take any time.
    """
    mx.eval(x)
    result = exchange(x)
    mx.eval(result)
    return result


@contextlib.contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Call `observer(x, exchange)` in the place of every `exchange(x)` that is built while the block runs."""
    before = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(before)


def _sum(x: mx.array, group: mx.distributed.Group) -> mx.array:
    return _sum_large(x, group) if x.nbytes > GATHER_BELOW_BYTES else gather_and_sum(x, group)


def gather_and_sum(x: mx.array, group: mx.distributed.Group) -> mx.array:
    """Return the sum of `x` over all ranks, gathered and summed here in float32, whatever its size."""
    parts = mx.distributed.all_gather(x[None], group=group)
    return parts.astype(mx.float32).sum(axis=0).astype(x.dtype)


def _sum_large(x: mx.array, group: mx.distributed.Group) -> mx.array:
    most = ONE_WAY_BYTES * group.size() - 1
    if _backend != "ring" or group.size() < _LEAST_RANKS or x.nbytes <= most:
        return _backend_sum(x, group=group)
    flat = x.reshape(-1)
    step = most // x.itemsize
    pieces = [_backend_sum(flat[begin : begin + step], group=group) for begin in range(0, flat.size, step)]
    return mx.concatenate(pieces).reshape(x.shape)
