"""One measurement of the first hour, and the judgement of what it found. It measures nothing by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moectl.cluster.first_hour.stage import Stage

Data = dict[str, Any]  # numbers and words that JSON can hold
NOTHING = "nothing to do"


class Ending(StrEnum):
    """How a step ended."""

    EXPECTED = "as expected"
    DIFFERS = "differs"
    UNCLEAR = "says nothing"  # it ran where it cannot show what it is for
    FAILED = "failed"
    SKIPPED = "skipped"
    INTERRUPTED = "interrupted"


@dataclass(frozen=True, slots=True)
class Judgement:
    """What came of a measurement, and what follows for the owner of the hosts and for the developers."""

    as_expected: bool
    came: str
    owner: str = NOTHING
    developers: str = NOTHING


@dataclass(frozen=True, slots=True)
class HourStep:
    """What to measure, how long that may take, what is expected and why; `measure` needs hosts, `judge` only data."""

    name: str
    question: str
    seconds: float  # after which it is ended
    expected: str
    source: str
    measure: Callable[[Stage], Data]
    judge: Callable[[Data], Judgement]
    find_obstacle: Callable[[Stage], str] = lambda stage: ""  # why it cannot be measured here; "": it can


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one step ended."""

    step: HourStep
    status: Ending
    came: str = ""  # or why nothing came
    owner: str = NOTHING
    developers: str = NOTHING
    seconds: float = 0.0
    data: Data = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.step.name,
            "status": str(self.status),
            "question": self.step.question,
            "expected": self.step.expected,
            "source": self.step.source,
            "came": self.came,
            "owner": self.owner,
            "developers": self.developers,
            "seconds": round(self.seconds, 3),
            "data": self.data,
        }


def milliseconds(seconds: float) -> str:
    """Return a short time as "0.054 ms", "1.20 ms", "350 ms"."""
    value = 1e3 * seconds
    return f"{value:.3f} ms" if value < 1 else f"{value:.2f} ms" if value < 100 else f"{value:.0f} ms"
