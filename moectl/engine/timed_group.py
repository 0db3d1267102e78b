"""The group of all ranks in a measurement, and the time of an exchange in it.

It needs no model, and so it imports none of mlx-lm.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from moectl.engine.controller_link import ControllerLink
from moectl.engine.group import open_group
from moectl.engine.network.exchange import Exchange
from moectl.engine.protocol import Check, Load, Loaded, Ready, Start

PART_S = 0.04  # for each thing that is measured by itself


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


def time_exchange(exchange: Exchange, x: mx.array, group: Group) -> float:
    """Return the seconds of one exchange of `x`, from chains of them; every rank returns the same."""

    def chain(count: int) -> float:
        y = x
        for _ in range(count):
            y = exchange(y) * (1 / group.size)
        group.largest(0.0)
        begin = time.perf_counter()
        mx.eval(y)
        return (time.perf_counter() - begin) / count

    chain(2)
    count = max(2, min(50, int(PART_S / group.largest(chain(2)) / 2)))
    return group.largest(statistics.median(chain(count) for _ in range(5)))


def join_without_model(link: ControllerLink) -> Group:
    """Join the group of all ranks as a worker does that has no model to load."""
    start: Start = link.take(Start)
    group = open_group(link, start)
    link.take(Load)
    link.tell(Loaded())
    link.take(Check)
    link.tell(Ready("", None, 0, 0, 0))
    return Group(start.rank, start.world_size, group)
