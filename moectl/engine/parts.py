"""The parts of a pass's time: a rank's own work, without the group, and the exchange, without work."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from moectl.engine.network.exchange import sum_over_ranks

_PART_S = 0.04  # for each part


@dataclass(frozen=True, slots=True)
class Group:
    """This rank and the group of all; `group` is None for a single rank."""

    rank: int
    size: int
    group: Any

    def share(self, *values: float) -> list[list[float]]:
        """Return every rank's values, by rank; every rank waits for all."""
        mine = mx.array([values], dtype=mx.float32)
        if self.group is None:
            return mine.tolist()  # type: ignore[return-value]
        with mx.stream(mx.cpu):
            return mx.distributed.all_gather(mine, group=self.group).tolist()  # type: ignore[return-value]

    def largest(self, value: float) -> float:
        """Return the largest of all ranks' values, so that all decide alike."""
        return max(row[0] for row in self.share(value))

    def wait(self) -> None:
        self.share(0.0)


def time_model(model: Any, tokens: int, group: Group) -> tuple[float, float]:
    """Return the seconds of a pass of (this many tokens, one token after them), without exchanges.

    All ranks begin together.
    """
    prompt, one = mx.zeros((1, tokens), dtype=mx.int32), mx.zeros((1, 1), dtype=mx.int32)
    caches: list[Any] = []

    def read() -> None:
        caches[:] = make_prompt_cache(model)
        mx.eval(model(prompt, cache=caches))

    def step() -> None:
        mx.eval(model(one, cache=caches))

    return _time(read, group), _time(step, group)


def time_collectives(group: Group, width: int, tokens: int, dtype: mx.Dtype) -> dict[int, float]:
    """Return the seconds of one sum over all ranks, by bytes, for one token's state and for a prompt's."""
    if group.size == 1:
        return {}
    return {
        count * width * dtype.size: _time_collective(mx.ones((count, width), dtype=dtype), group)
        for count in sorted({1, tokens})
    }


def _time_collective(x: mx.array, group: Group) -> float:
    def chain(count: int) -> float:
        y = x
        for _ in range(count):
            y = sum_over_ranks(y, group.group) * (1 / group.size)
        group.wait()
        begin = time.perf_counter()
        mx.eval(y)
        return (time.perf_counter() - begin) / count

    chain(2)
    count = max(2, min(50, int(_PART_S / group.largest(chain(2)) / 2)))
    return group.largest(statistics.median(chain(count) for _ in range(5)))


def _time(work: Callable[[], object], group: Group) -> float:
    """Return the median seconds of some runs, after one that counts for nothing; all ranks begin together."""
    group.wait()
    work()
    seconds: list[float] = []
    begin = time.perf_counter()
    while len(seconds) < 3 or time.perf_counter() - begin < _PART_S:
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
        if time.perf_counter() - begin > 4 * _PART_S:
            break
    return statistics.median(seconds)
