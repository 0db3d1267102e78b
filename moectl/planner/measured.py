"""What is asked of a measurement and what comes of it: numbers and their JSON.

`probe` asks on this machine, `measure` answers on the nodes. Nothing is measured here, and nothing predicted but by
adding up: a pass takes what is outside the layers plus this many layers.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moectl.errors import CommandFailed
from moectl.hosts.hardware import Hardware
from moectl.model.manifest import Quantization
from moectl.model.placement import Held, Placement
from moectl.records import build

Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class Job:
    """What every rank of a group is to measure, one placement after the other."""

    placements: tuple[Placement, ...]
    quantization: Quantization | None
    memory_bytes: int  # that the weights of a measurement may take on each host
    prompt_tokens: int = 128  # wanted; fewer on a slow machine
    budget_s: float = 1.5  # per placement, for whole passes; the parts take about half as long again

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))


@dataclass(frozen=True, slots=True)
class Pass:
    """Seconds of one pass of this many tokens through the model, by all ranks together, exchanges included."""

    tokens: int
    layer_s: float  # each layer
    outer_s: float  # embedding, head, sampling, agreement, host

    def total_s(self, n_layers: int) -> float:
        """Return the seconds of a pass through a model of this many layers."""
        return self.outer_s + n_layers * self.layer_s


@dataclass(frozen=True, slots=True)
class RankSpeed:
    """One rank's own work on one token and one layer, while the other ranks do theirs; no exchange in it."""

    attention_s: float  # norms, attention over the context, router
    experts_s: Mapping[int, float]  # by how many of the chosen experts this rank computes (a part of)
    head_s: float | None  # final norm and head, per token; None where this rank has none
    bytes_s: float  # at which weights are read in a product with one vector
    flops_s: float  # in products with many vectors


@dataclass(frozen=True, slots=True)
class Speed:
    """A placement's measured speed on a group of hosts."""

    split: str
    shares: tuple[int, ...]
    decode: Pass
    prefill: Pass
    collective_s: Mapping[int, float]  # one sum over all ranks by the bytes that each adds; empty for one rank
    ranks: tuple[RankSpeed, ...]
    context: int  # tokens in the cache during decode
    scale: float  # of the experts' hidden dimension in the measurement; times are for the whole
    held: Held | None = None

    def is_of(self, placement: Placement) -> bool:
        """Whether this placement was measured."""
        return (self.split, self.shares, self.held) == (placement.split, placement.shares, placement.held)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True)
class MeasuredCluster:
    """A cluster as found: matrices and tuples are in rank order, a host to itself has 0."""

    hardware: tuple[Hardware, ...]
    rtt_s: Matrix  # median of small TCP round trips
    bandwidth_bytes_s: Matrix  # from row to column
    speeds: tuple[Speed, ...]  # one per placement asked for


def read_job(text: str) -> Job:
    """Read a job's JSON, which is this version's own: anything else is a bug."""
    return build(Job, json.loads(text))


def read_speeds(text: str) -> tuple[Speed, ...]:
    """Read the answer to a job. Raises CommandFailed."""
    try:
        speeds = tuple(build(Speed, raw) for raw in json.loads(text))
    except (ValueError, TypeError, RecursionError):
        raise CommandFailed(f"not the result of a measurement: {text[:80]!r}") from None
    if not all(speed.ranks and len(speed.ranks) == len(speed.shares) for speed in speeds):
        raise CommandFailed(f"not the result of a measurement: {text[:80]!r}")
    return speeds
