"""Chaos: a seeded random schedule of faults against a cluster under load, and what has to hold whatever happens.

    python -m tests.system.chaos --minutes 60 --seed 7 --output chaos.json
    python -m tests.system.chaos --only "ring parted" --only "sshd killed"

Every request ends with its exact answer or one clear error; after each act of faults the cluster comes back by itself,
and nothing is left over: no process, port, file, zombie or memory. Needs root and what `netns` needs. The same seed
gives the same faults; when exactly they meet the load is the machine's.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.netns import Cluster, run_cluster
from tests.system.chaos_faults import FAULTS, Fault, Heal, Strike, draw_acts, wait_until
from tests.system.chaos_load import Load, Outcome
from tests.system.chaos_site import Site, Timeline, run_site

BACK_S = 150.0  # for a cluster whose faults have healed to answer again
LEFT_S = 60.0  # for what a fault has left to go
GONE_S = 15.0  # for the workers of a killed controller to go
CLIENTS = 2
MAX_RESTARTS = 50
MARGIN_BYTES = 96 << 20
MARGIN_FILES = 24
MARGIN_THREADS = 12
MOST_VIOLATIONS = 20  # then it stops: more of the same would teach nothing


@dataclass(slots=True)
class Report:
    """What came of a run."""

    seed: int
    seconds: float = 0.0
    faults: collections.Counter[str] = field(default_factory=collections.Counter)
    acts: int = 0
    outcomes: list[Outcome] = field(default_factory=list)
    recoveries: list[tuple[float, str]] = field(default_factory=list)  # seconds, what was struck
    workers_gone_s: float = 0.0  # the longest that workers outlived their killed controller
    controllers: int = 0
    base: dict[str, int] = field(default_factory=dict)
    most: dict[str, int] = field(default_factory=dict)
    violations: list[dict[str, Any]] = field(default_factory=list)

    def describe(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {
            "schema": "moectl.chaos/1",
            "seed": self.seed,
            "seconds": round(self.seconds, 1),
            "acts": self.acts,
            "faults": dict(sorted(self.faults.items())),
            "faults_in_all": sum(self.faults.values()),
            "requests": dict(collections.Counter(outcome.kind for outcome in self.outcomes)),
            "resumed": sum(outcome.resumed for outcome in self.outcomes),
            "waited": sum(outcome.waited for outcome in self.outcomes),
            "errors": sorted({outcome.message for outcome in self.outcomes if outcome.kind == "error"}),
            "longest_request_s": round(max((o.ended_s - o.began_s for o in self.outcomes), default=0.0), 2),
            "longest_recovery": max(self.recoveries, default=(0.0, "")),
            "mean_recovery_s": round(sum(s for s, _ in self.recoveries) / max(1, len(self.recoveries)), 2),
            "workers_outlived_their_controller_s": round(self.workers_gone_s, 2),
            "controllers": self.controllers,
            "base": self.base,
            "most": self.most,
            "violations": self.violations,
        }

    def write(self) -> str:
        """Return it as text for people."""
        found = self.describe()
        plain = [f"{key}: {found[key]}" for key in found if key not in ("violations", "schema")]
        wrong = [f"VIOLATION at {v['at_s']:.2f} s: {v['what']}" for v in self.violations]
        return "\n".join([*plain, *(wrong or ["no violation"])])


class Chaos:
    """One run against a site; `run` it once."""

    def __init__(self, site: Site, load: Load, report: Report) -> None:
        self.site = site
        self.load = load
        self.report = report
        self._judged = 0  # outcomes whose violations are in the report
        self._ends = 0  # the same of controllers' ends
        self._known: set[str] = set()  # what was found to be left over already

    def run(self, seconds: float, faults: Sequence[Fault]) -> None:
        """Strike with these for so long, then see that nothing is left."""
        self._wait_until_served()
        self.load.record()
        for question in self.load.questions:
            self.site.timeline.note(f"{question.path} {question.fields}: {question.text!r}")
        self.load.start()
        time.sleep(4.0)  # with all clients at once the workers reach their size
        self._settle("before the first fault")
        self.report.base = self.site.measure()
        self.load.go_on()
        began_s = time.monotonic()
        for act in draw_acts(self.report.seed, faults):
            if time.monotonic() - began_s > seconds or len(self.report.violations) >= MOST_VIOLATIONS:
                break
            self._play(act)
        self.report.seconds = time.monotonic() - began_s
        self._end()

    def _wait_until_served(self) -> None:
        end = time.monotonic() + BACK_S
        while (health := self.site.health()) is None or health["code"] != 200:
            assert time.monotonic() < end, f"it never served: {self.site.tell_evidence()}"
            time.sleep(0.1)

    # One act: strike, heal, come back, tidy up.

    def _play(self, act: tuple[Strike, ...]) -> None:
        names = " + ".join(f"{s.fault.name} ({s.draw.rank})" for s in act)
        self.report.acts += 1
        time.sleep(1.0)  # answers are under way
        before, life, restarts = self.site.workers(), self.site.life, self._count_restarts()
        self.site.timeline.note(f"ACT {self.report.acts}: {names}")
        began_s = self.site.timeline.now_s()
        self._strike_all(act)
        if any(s.fault.name in ("controller killed", "start without a host") for s in act):
            self._wait_until_gone(before, names, is_cut=len(act) > 1 or "without a host" in names)
        back_s = self._wait_until_back(names)
        self.site.timeline.note(f"back after {back_s:.2f} s")
        self._settle(names)
        after = self.site.workers()
        if len(act) == 1:
            self._judge_death(act[0], before == after and life is self.site.life, names)
            self._judge_name(act[0], began_s)
        if before != after and life is self.site.life and self._count_restarts() <= restarts:
            self._violate(f"after {names}: the workers are others, but /health counts no restart")
        self.load.go_on()

    def _strike_all(self, act: tuple[Strike, ...]) -> None:
        began_s = time.monotonic()
        due = [(strike.after_s, number) for number, strike in enumerate(act)]
        healing: list[tuple[float, int]] = []
        heals: dict[int, Heal] = {}
        try:
            for after_s, number in sorted(due):
                self._heal_until(began_s, after_s, healing, heals)
                wait_until(began_s + after_s)
                strike = act[number]
                self.report.faults[strike.fault.name] += 1
                self.site.timeline.note(f"strikes: {strike.fault.name} {strike.draw}")
                heals[number] = strike.fault.strike(self.site, self.load, strike.draw)
                healing.append((after_s + strike.draw.hold_s, number))
            self._heal_until(began_s, float("inf"), healing, heals)
        finally:
            for heal in heals.values():  # whatever went wrong meanwhile
                heal()

    def _heal_until(
        self, began_s: float, until_s: float, healing: list[tuple[float, int]], heals: dict[int, Heal]
    ) -> None:
        for entry in sorted(healing):
            if entry[0] <= until_s:
                healing.remove(entry)
                wait_until(began_s + entry[0])
                heals.pop(entry[1])()

    def _wait_until_gone(self, before: list[list[int]], names: str, *, is_cut: bool) -> None:
        """Wait for the workers of a controller that was killed."""
        began_s = time.monotonic()
        old = {pid for workers in before for pid in workers}
        while left := old & {pid for workers in self.site.workers() for pid in workers}:
            if time.monotonic() - began_s > GONE_S:
                self._violate(f"after {names}: {len(left)} workers live {GONE_S:g} s after their controller")
                return
            time.sleep(0.05)
        if not is_cut:
            self.report.workers_gone_s = max(self.report.workers_gone_s, time.monotonic() - began_s)

    def _wait_until_back(self, names: str) -> float:
        """Return how long it took to give an exact answer again."""
        began_s = time.monotonic()
        while time.monotonic() - began_s < BACK_S:
            if self.load.probe().kind == "exact":
                took_s = time.monotonic() - began_s
                self.report.recoveries.append((round(took_s, 2), names))
                return took_s
            time.sleep(0.3)
        self._violate(f"after {names}: no exact answer within {BACK_S:g} s")
        return BACK_S

    def _settle(self, names: str) -> None:
        """Let all answers end; then the cluster has to be well, with nothing left over, soon."""
        self.load.drain()
        end = time.monotonic() + LEFT_S
        while problems := self._find_problems():
            if time.monotonic() > end:
                self._known.update(problems)  # what stays is told once
                for problem in problems:
                    self._violate(f"after {names}: {problem}")
                break
            time.sleep(0.3)
        self._collect(names)

    def _find_problems(self) -> list[str]:
        health = self.site.health()
        if health is None or health["code"] != 200:
            return [f"the controller says {health}"]
        problems = [problem for problem in self.site.find_leftovers() if problem not in self._known]
        if health["running"] or health["queued"]:
            problems.append(f"{health['running']} requests run and {health['queued']} wait although nobody asks")
        if not self.report.base:
            return problems
        now = self.site.measure()
        for name, value in now.items():
            self.report.most[name] = max(value, self.report.most.get(name, 0))
            base = self.report.base[name]
            margin = {"bytes": MARGIN_BYTES, "files": MARGIN_FILES, "threads": MARGIN_THREADS}[name.split()[-1]]
            if value > base + margin:
                problems.append(f"{name}: {value}, at the beginning {base}")
        return problems

    def _collect(self, names: str) -> None:
        """Take the violations that clients and the keeper of controllers have met."""
        while self._judged < len(self.load.outcomes):
            outcome = self.load.outcomes[self._judged]
            self._judged += 1
            if outcome.violation:
                self._violate(f"during {names}: the request of {outcome.began_s:.2f} s: {outcome.violation}")
        while self._ends < len(self.site.problems):
            self._ends += 1
            self._violate(f"during {names}: {self.site.problems[self._ends - 1]}")

    def _judge_death(self, strike: Strike, same: bool, names: str) -> None:
        if strike.fault.is_death is False and not same:
            self._violate(f"{names} was taken for a death")
        if strike.fault.is_death is True and same:
            self._violate(f"{names} was noticed by nobody")

    def _judge_name(self, strike: Strike, began_s: float) -> None:
        """Whoever was told of a failure by a fault that has a host has to be told that host, and no other."""
        host = f"node{strike.draw.rank}"
        said = [line for life in self.site.lives[-2:] for s, line in list(life.said) if s >= began_s]
        told = [line for line in said if "Starting again" in line or line.startswith("Error:")]
        if strike.fault.names_host and told and not told[0].removeprefix("Error: ").startswith(f"{host}:"):
            self._violate(f"{strike.fault.name} on {host} was told as: {told[0]}")

    def _count_restarts(self) -> int:
        health = self.site.health()
        return int(health["restarts"]) if health else 0

    def _violate(self, what: str) -> None:
        self.site.timeline.note(f"VIOLATION: {what}")
        at_s = self.site.timeline.now_s()
        self.report.violations.append({"at_s": round(at_s, 2), "what": what, **self.site.tell_evidence()})

    def _end(self) -> None:
        self.load.stop()
        self._collect("the end")
        self.site.stop()
        end = time.monotonic() + GONE_S
        while (left := self.site.find_nothing_left()) and time.monotonic() < end:
            time.sleep(0.2)
        for problem in left:
            self._violate(f"after the end: {problem}")
        self._collect("the end")
        self.report.outcomes = self.load.outcomes
        self.report.controllers = len(self.site.lives)


def run_chaos(
    cluster: Cluster,
    directory: Path,
    *,
    seconds: float,
    seed: int,
    max_restarts: int = MAX_RESTARTS,
    clients: int = CLIENTS,
    faults: Sequence[Fault] = FAULTS,
    aloud: bool = False,
) -> Report:
    """Strike a cluster for so long and return what came of it; the hosts are whole again afterwards."""
    report = Report(seed)
    timeline = Timeline(aloud=aloud)
    try:
        with run_site(cluster, directory, timeline, max_restarts=max_restarts) as site:
            Chaos(site, Load(site, seed, clients), report).run(seconds, faults)
    finally:
        cluster.mend()
    return report


@contextlib.contextmanager
def _own_cluster() -> Iterator[tuple[Cluster, Path]]:
    with tempfile.TemporaryDirectory(prefix="moectl-chaos-") as scratch:
        directory = Path(scratch)
        for name in ("hosts", "site"):
            (directory / name).mkdir()
        with run_cluster(directory / "hosts", 4) as cluster:
            yield cluster, directory / "site"


def main() -> int:
    """Run as a program; return 1 when anything was violated."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.system.chaos", description="Faults against a cluster under load."
    )
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--max-restarts", type=int, default=MAX_RESTARTS, help="of one controller within ten minutes")
    names = [fault.name for fault in FAULTS]
    parser.add_argument("--only", action="append", choices=names, help="this fault only (repeatable)")
    parser.add_argument("--output", type=Path, help="file for the report as JSON")
    parser.add_argument("--quiet", action="store_true", help="no timeline on stderr")
    given = parser.parse_args()
    with _own_cluster() as (cluster, directory):
        report = run_chaos(
            cluster,
            directory,
            seconds=given.minutes * 60,
            seed=given.seed,
            max_restarts=given.max_restarts,
            clients=given.clients,
            faults=[fault for fault in FAULTS if not given.only or fault.name in given.only],
            aloud=not given.quiet,
        )
    if given.output:
        given.output.write_text(json.dumps(report.describe(), indent=1))
    sys.stdout.write(report.write() + "\n")
    return 1 if report.violations else 0


if __name__ == "__main__":
    sys.exit(main())
