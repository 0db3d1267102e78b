"""The first hour: all steps in turn, each bounded; one that cannot be done is named, and the rest goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from moectl.cluster.first_hour.exchanges import EXCHANGE, GATHER
from moectl.cluster.first_hour.on_macs import RDMA, SLEEP, WIRED
from moectl.cluster.first_hour.on_random import KNOB, LAYERS, SHARES
from moectl.cluster.first_hour.on_workers import IDLE, SKEW
from moectl.cluster.first_hour.report import Report, describe_hosts
from moectl.cluster.first_hour.stage import Stage
from moectl.cluster.first_hour.step import Ending, HourStep, Outcome
from moectl.errors import MoectlError, unexpected
from moectl.text import time_text

HOUR_S = 3600.0
STEPS = (RDMA, EXCHANGE, GATHER, SKEW, SLEEP, WIRED, SHARES, LAYERS, KNOB, IDLE)  # what blocks comes first
Say = Callable[[str], None]


def spend_first_hour(stage: Stage, path: Path, *, say: Say, steps: Sequence[HourStep] = STEPS) -> Report:
    """Measure everything and return the report; it is written to `path` after every step, Ctrl-C included."""
    scrubber = stage.make_scrubber()
    report = Report(scrubber.data(describe_hosts(stage)), stage.choose_backend(), stage.quick)
    begin = time.monotonic()
    for number, step in enumerate(steps, 1):
        say(f"{number} of {len(steps)}: {step.question} (at most {time_text(step.seconds)})")
        try:
            left_s = HOUR_S - (time.monotonic() - begin)
            outcome = try_step(step, stage, left_s=left_s)
        except BaseException:
            report.outcomes.append(Outcome(step, Ending.INTERRUPTED, "interrupted"))
            report.write(path)
            raise
        report.outcomes.append(outcome)
        report.finished = number == len(steps)
        report.write(path)
        say(f"   {outcome.status}: {outcome.came}")
    return report


def try_step(step: HourStep, stage: Stage, *, left_s: float = HOUR_S) -> Outcome:
    """Return how a step ended; no error of a host ends the hour."""
    scrubber = stage.make_scrubber()
    if left_s < step.seconds:
        return Outcome(step, Ending.SKIPPED, f"it may take {time_text(step.seconds)}, and the hour is over before")
    begin = time.monotonic()
    try:
        if obstacle := step.find_obstacle(stage):
            return Outcome(step, Ending.SKIPPED, obstacle)
        with stage.limit(step.seconds):
            data = scrubber.data(step.measure(stage))
        found = step.judge(data)
    except Exception as error:
        known = error if isinstance(error, MoectlError) else unexpected(error)
        late = f"it took longer than {time_text(step.seconds)}"
        reason = late if stage.is_late else scrubber.text(str(known))
        developers = "see the reason" if isinstance(error, MoectlError) else "mend this bug"
        return Outcome(step, Ending.FAILED, reason, developers=developers, seconds=time.monotonic() - begin)
    seconds = time.monotonic() - begin
    if stage.doubt:
        return Outcome(step, Ending.UNCLEAR, f"{found.came} ({stage.doubt})", seconds=seconds, data=data)
    status = Ending.EXPECTED if found.as_expected else Ending.DIFFERS
    return Outcome(step, status, found.came, found.owner, found.developers, seconds, data)
