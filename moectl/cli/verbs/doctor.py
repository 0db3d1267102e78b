"""`moectl doctor`: what is wrong with the hosts, and what mends it; with --first-hour, what they are like at work.

What is right with a host shares a line; each warning and failure has its own line, with what mends it below.
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moectl import errors
from moectl.cli import suggest
from moectl.cli.options import FILE, Common, common, refuse_both
from moectl.cli.target import choose_target
from moectl.cli.terminal import log_printer
from moectl.cli.verb import verb
from moectl.cluster.doctor.finding import Level
from moectl.cluster.first_hour.step import NOTHING
from moectl.text import columns, count_text, printable

if TYPE_CHECKING:
    from moectl.cluster.doctor.diagnose import Diagnosis
    from moectl.cluster.doctor.finding import Finding
    from moectl.cluster.first_hour.step import Outcome

SCHEMA = "moectl.doctor/1"
_GAP = "  "
_WORD = len("FAIL")
_DOT = " · "
# of the target, all that is not asked for
_TARGET = (
    "local",
    "demo",
    "shards",
    "model",
    "split",
    "shares",
    "replicas",
    "q_bits",
    "force",
    "no_canary",
)  # not asked for
Paint = Callable[[Level, str], str]


def doctor_text(
    diagnosis: Diagnosis, *, width: int, verbose: bool = False, paint: Paint = lambda level, word: word
) -> str:
    """Return the lines of `doctor`; `verbose` gives each check a line of its own, `paint` colours a level's word."""
    blocks = [(report.host.address, report.findings) for report in diagnosis.hosts]
    links = [
        replace(finding, text=f"{report.a.name}-{report.b.name} {finding.text}")
        for report in diagnosis.pairs
        for finding in report.findings
    ]
    if links:
        blocks.append(("links", tuple(links)))
    if diagnosis.cluster:
        blocks.append(("cluster", diagnosis.cluster))
    column = max(len(name) for name, _ in blocks)
    lines = [line for name, found in blocks for line in _block(name.ljust(column), found, width, verbose, paint)]
    return "\n".join([*lines, summary_text(diagnosis)])


def summary_text(diagnosis: Diagnosis) -> str:
    """Return "31 ok, 1 warning, 2 failures"."""
    warnings, failures = diagnosis.count(Level.WARN), diagnosis.count(Level.FAIL)
    parts = [f"{diagnosis.count(Level.OK)} ok", count_text(warnings, "warning"), count_text(failures, "failure")]
    skipped = diagnosis.count(Level.SKIP)
    return ", ".join([*parts, f"{skipped} skipped"] if skipped else parts)


def doctor_json(diagnosis: Diagnosis, *, fast: bool) -> dict[str, Any]:
    """Return the document of --json."""
    return {
        "schema": SCHEMA,
        "source": diagnosis.source,
        "fast": fast,
        "ok": not diagnosis.count(Level.FAIL),
        "counts": {level.name.lower(): diagnosis.count(level) for level in Level},
        "hosts": [
            {"rank": report.rank, "host": report.host.address, "checks": _rows(report.findings)}
            for report in diagnosis.hosts
        ],
        "pairs": [
            {"a": report.a.address, "b": report.b.address, "checks": _rows(report.findings)}
            for report in diagnosis.pairs
        ],
        "cluster": _rows(diagnosis.cluster),
    }


def _rows(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    return [{**asdict(finding), "level": finding.level.name.lower()} for finding in findings]


def _block(name: str, findings: Sequence[Finding], width: int, verbose: bool, paint: Paint) -> list[str]:
    """Return the lines of one host, of the links or of the cluster."""
    indent = len(name) + 2 * len(_GAP) + _WORD

    def head(level: Level) -> str:
        return f"{name}{_GAP}{paint(level, level.word.ljust(_WORD))}{_GAP}"

    good = [finding.text for finding in findings if finding.level is Level.OK]
    texts = good if verbose else _fill(good, width - indent)
    lines = [(" " * indent if place and not verbose else head(Level.OK)) + text for place, text in enumerate(texts)]
    for finding in sorted((f for f in findings if f.level is not Level.OK), key=lambda f: f.level, reverse=True):
        lines.append(head(finding.level) + finding.text)
        if finding.fix:
            lines.append(f"{' ' * indent}fix: {finding.fix}")
    return lines


def _fill(words: Sequence[str], width: int) -> list[str]:
    """Return words in lines of at most `width` letters, broken between words only."""
    lines: list[str] = []
    for word in words:
        if lines and len(lines[-1]) + len(_DOT) + len(word) <= width:
            lines[-1] += _DOT + word
        else:
            lines.append(word)
    return lines


def first_hour_text(outcomes: Sequence[Outcome], *, width: int, verbose: bool = False) -> str:
    """Return the steps of the first hour: how each ended, what came, what was expected, and what follows.

    `verbose` adds the source of what was expected.
    """
    name = max(len(outcome.step.name) for outcome in outcomes)
    status = max(len(outcome.status) for outcome in outcomes)
    lines: list[str] = []
    for outcome in outcomes:
        head = f"{outcome.step.name:{name}}{_GAP}{outcome.status:{status}}{_GAP}"
        below = [("expected", outcome.step.expected)] if outcome.data else []
        below += [("source", outcome.step.source)] if outcome.data and verbose else []
        below += [("you", outcome.owner), ("developers", outcome.developers)]
        texts = [
            (head, outcome.came),
            *((" " * len(head) + f"{who}: ", text) for who, text in below if text != NOTHING),
        ]
        for begin, text in texts:
            more = " " * len(head)
            lines += textwrap.wrap(printable(text), max(width, 60), initial_indent=begin, subsequent_indent=more)
    return "\n".join(lines)


@verb("Observe")
@click.argument("hostfile_", metavar="[HOSTFILE]", required=False, shell_complete=suggest.files)
@click.option("--fast", is_flag=True, help="Do not time transfers between hosts, nor run an all-reduce on pairs.")
@click.option(
    "--first-hour",
    is_flag=True,
    help="Measure the deployed hosts at work instead, for up to an hour, and write a report without names.",
)
@click.option("--report", type=FILE, metavar="FILE", help="For --first-hour: write the report to this file.")
@click.option(
    "--quick",
    is_flag=True,
    help="For --first-hour: wait and measure for moments only: it shows that it runs, and no more.",
)
@common
def doctor(common: Common, fast: bool, first_hour: bool, report: Path | None, quick: bool) -> None:
    """Check hosts, network and versions; say how to mend what is wrong.

    First each host: ssh, system, settings, python and versions, disk and memory for the shard set. Then the hosts are
    compared with each other. Then every pair: TCP from the worker's python, its speed, and an all-reduce over each two
    neighbours. Nothing is changed anywhere. Without hosts and deployment, this machine is checked alone.

    --first-hour measures what is not known before: RDMA, exchanges, a rank that loads late, memory after the
    end, idle minutes, and more. It loads the deployed model several times and needs no root. Without a deployment, the
    demo model runs on two local ranks. Ctrl-C keeps the report so far. Please send the report in.

    \b
    Examples:
      moectl doctor hosts.txt
      moectl doctor --hosts mac1,mac2 --fast
      moectl doctor hosts.txt --first-hour --report first-hour.json
      moectl doctor --json | jq '.hosts[].checks[] | select(.level == "fail")'
    """
    if first_hour:
        refuse_both({"--first-hour": True}, {"--fast": fast})
        _measure(common, report, quick=quick)
        return
    for name, given in (("--report", report), ("--quick", quick)):
        if given:
            raise errors.UsageError(f"{name} is for --first-hour", hint="add --first-hour")
    from moectl.cluster.doctor.diagnose import choose_hosts, diagnose

    where, deployed = choose_hosts(common.host_list())
    found = diagnose(where, deployed, fast=fast, say=common.say)
    colours = {Level.OK: "green", Level.WARN: "yellow", Level.FAIL: "red", Level.SKIP: "cyan"}
    text = doctor_text(
        found,
        width=columns(),
        verbose=common.verbose > 0,
        paint=lambda level, word: click.style(word, fg=colours[level], bold=level is Level.FAIL or None),
    )
    common.print(text, doctor_json(found, fast=fast), summary_text(found))
    failures = found.count(Level.FAIL)
    if failures:
        raise errors.PartialFailure(
            f"{count_text(failures, 'check')} failed.", hint="each FAIL line says what mends it."
        )


def _measure(common: Common, path: Path | None, *, quick: bool) -> None:
    """Spend the first hour with the deployed hosts, or with the demo model here."""
    from moectl.cluster.first_hour.hour import spend_first_hour
    from moectl.cluster.first_hour.report import summary_text as summary
    from moectl.cluster.first_hour.stage import open_stage
    from moectl.cluster.first_hour.step import Ending
    from moectl.files import check_destination
    from moectl.server.attach import refuse_second

    path = path or Path(time.strftime("first-hour-%Y%m%d-%H%M%S.json", time.gmtime()))
    check_destination(path)
    target = choose_target(common, dict.fromkeys(_TARGET))
    refuse_second(target)
    common.say(f"The report goes to {path}: no host, user, address or path is named in it.")
    try:
        with open_stage(target, quick=quick, on_log=log_printer(common)) as stage:
            report = spend_first_hour(stage, path, say=common.say)
    except BaseException:  # Ctrl-C, most of all
        if path.exists():
            common.say(f"What was measured so far is in {path}.")
        raise
    common.print(
        first_hour_text(report.outcomes, width=columns(), verbose=common.verbose > 0),
        report.to_json(),
        summary(report.outcomes),
    )
    common.say(f"Please send {path} in: see 'moectl help verified'.")
    failed = [outcome.step.name for outcome in report.outcomes if outcome.status is Ending.FAILED]
    if failed:
        raise errors.PartialFailure(
            f"{count_text(len(failed), 'step')} failed: {', '.join(failed)}.", hint="the report says why; send it in"
        )
