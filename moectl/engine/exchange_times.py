"""A worker without a model that times exchanges: the backend's sum, and gathering with a sum on each rank.

`cluster.first_hour` starts `python -m moectl.engine.exchange_times` on every rank and asks for one size at a time, so
that what was measured is kept when a later size hangs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import mlx.core as mx

from moectl.engine.controller_link import ControllerLink
from moectl.engine.network.exchange import gather_and_sum
from moectl.engine.protocol import Done, Generate
from moectl.engine.request import Stats
from moectl.engine.timed_group import Group, join_without_model, time_exchange
from moectl.engine.worker import run
from moectl.records import build

WAYS: Mapping[str, Callable[..., mx.array]] = {"reduce": mx.distributed.all_sum, "gather": gather_and_sum}


@dataclass(frozen=True, slots=True)
class ExchangeJob:
    """One size to time."""

    size_bytes: int  # of each rank's array
    ways: tuple[str, ...]  # names of WAYS
    dtype: str  # "float32", "bfloat16"


def time_ways(job: ExchangeJob, group: Group) -> dict[str, float]:
    """Return the seconds of one exchange, by way."""
    dtype = getattr(mx, job.dtype)
    x = mx.ones((max(1, job.size_bytes // dtype.size),), dtype=dtype)
    return {way: time_exchange(partial(WAYS[way], group=group.group), x, group) for way in job.ways}


def _serve(link: ControllerLink) -> None:
    group = join_without_model(link)
    while True:  # until the link ends
        order: Generate = link.take(Generate)
        found = time_ways(build(ExchangeJob, json.loads(order.request.prompt)), group)
        if group.rank == 0:
            stats = Stats(0, 0, 0.0, 0.0, 0.0, mx.get_peak_memory())
            link.tell(Done(order.request.id, "stop", stats, json.dumps(found)))


if __name__ == "__main__":
    run(_serve)
