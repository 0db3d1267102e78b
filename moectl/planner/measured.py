"""The job and the result of a measurement on a cluster, as numbers and as JSON.

`cluster.probe` sends the job from this machine, `engine.measure` measures on the nodes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from moectl.errors import CommandFailed
from moectl.hosts.hardware import Hardware
from moectl.model.ownership import Held, normalise
from moectl.model.placement import Placement
from moectl.model.structure import Quantization
from moectl.records import build

Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class Job:
    """The job of every rank of a group: measure these placements, one after the other."""

    placements: tuple[Placement, ...]
    config: dict[str, Any]  # the model's config.json
    quantization: Quantization | None
    memory_bytes: int  # for the weights of a measurement on each host
    prompt_tokens: int = 128  # at most; fewer on a slow machine
    budget_s: float = 1.5  # per placement, for whole passes; the parts take half of that more

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
    """One rank's own work, beside the other ranks, without exchanges."""

    layer_s: float  # of one token in an average layer
    bytes_s: float  # at which the weights are read for one token
    flops_s: float  # operations per second of a prompt
    working_set_bytes: float = 0.0  # that Metal recommends; 0 on other systems


@dataclass(frozen=True, slots=True)
class Speed:
    """A placement's measured speed on a group of hosts."""

    split: str
    shares: tuple[int | float, ...]
    decode: Pass
    prefill: Pass
    collective_s: Mapping[int, float]  # of a sum over all ranks, by the bytes of each rank; empty for one rank
    ranks: tuple[RankSpeed, ...]
    context: int  # tokens in the cache during decode
    held: Held | None = None

    def is_of(self, placement: Placement) -> bool:
        """Whether this placement was measured."""
        alike = (self.split, self.held) == (placement.split, placement.held)
        return alike and normalise(self.shares) == normalise(placement.shares)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True)
class MeasuredCluster:
    """A cluster as it was measured: matrices and tuples are in rank order, and a host to itself has 0."""

    hardware: tuple[Hardware, ...]
    rtt_s: Matrix  # median of small TCP round trips
    bandwidth_bytes_s: Matrix  # from row to column
    speeds: tuple[Speed, ...]  # one per placement asked for


def read_job(text: str) -> Job:
    """Read the JSON of a job of the same version; other JSON is a bug."""
    return build(Job, json.loads(text))


def read_speeds(text: str) -> tuple[Speed, ...]:
    """Read the answer to a job. Raises CommandFailed."""
    with suppress(ValueError, TypeError, RecursionError):
        speeds = tuple(build(Speed, raw) for raw in json.loads(text))
        if all(speed.ranks and len(speed.ranks) == len(speed.shares) for speed in speeds):
            return speeds
    raise CommandFailed(f"not the result of a measurement: {text[:80]!r}")
