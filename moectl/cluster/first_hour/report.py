"""The report of the first hour: one JSON document without names, written whole after each step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moectl import __version__
from moectl.cluster.first_hour.stage import Stage
from moectl.cluster.first_hour.step import Ending, Outcome
from moectl.files import write_whole

SCHEMA = "moectl.first-hour/1"


@dataclass(slots=True)
class Report:
    """What was found so far."""

    hosts: list[dict[str, Any]]  # by rank
    backend: str  # of the workers
    quick: bool
    outcomes: list[Outcome] = field(default_factory=list)
    finished: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the document."""
        return {
            "schema": SCHEMA,
            "moectl": __version__,
            "backend": self.backend,
            "quick": self.quick,
            "finished": self.finished,
            "hosts": self.hosts,
            "steps": [outcome.to_json() for outcome in self.outcomes],
        }

    def write(self, path: Path) -> None:
        """Write the document, whole or not at all. Raises StateError."""
        write_whole(path, (json.dumps(self.to_json(), indent=1) + "\n").encode())


def describe_hosts(stage: Stage) -> list[dict[str, Any]]:
    """Return what each rank's host is, without its name; ranks with the same `host` share one."""
    numbers: dict[str, int] = {}
    return [_describe(stage, rank, numbers) for rank in range(stage.size)]


def _describe(stage: Stage, rank: int, numbers: dict[str, int]) -> dict[str, Any]:
    address = stage.ranks[rank].host.address
    hardware, facts = stage.surveys[rank].hardware, stage.facts[rank]
    return {
        "rank": rank,
        "host": numbers.setdefault(address, len(numbers)),
        "system": hardware.os,
        "system_version": hardware.os_version,
        "build": stage.surveys[rank].build,
        "machine": facts.machine,
        "chip": hardware.chip,
        "cores": hardware.cores,
        "gpu_cores": hardware.gpu_cores,
        "memory_bytes": hardware.memory_bytes,
        "in_use_bytes": hardware.in_use_bytes,
        "wired_limit_bytes": hardware.wired_limit_bytes,
        "working_set_bytes": facts.working_set_bytes,
        "thunderbolt": hardware.thunderbolt,
        "rdma_devices": sum(device is not None for device in stage.ranks[rank].host.rdma),
        "versions": dict(facts.versions),
        "wheel": facts.wheel,
        "backends": list(facts.backends),
        "metal": facts.metal,
    }


def summary_text(outcomes: Sequence[Outcome]) -> str:
    """Return "5 as expected, 1 differs, 3 skipped"."""
    counts = {status: sum(outcome.status is status for outcome in outcomes) for status in Ending}
    return ", ".join(f"{count} {status}" for status, count in counts.items() if count)
