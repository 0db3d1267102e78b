"""`moectl doctor`: what is wrong with the hosts, and what mends it.

What is right with a host shares a line; each warning and failure has its own line, with what mends it below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import click

from moectl import errors
from moectl.cli import suggest
from moectl.cli.options import Common, common
from moectl.cli.verb import verb
from moectl.cluster.doctor.finding import Level
from moectl.text import columns, count_text

if TYPE_CHECKING:
    from moectl.cluster.doctor.diagnose import Diagnosis
    from moectl.cluster.doctor.finding import Finding

SCHEMA = "moectl.doctor/1"
_GAP = "  "
_WORD = len("FAIL")
_DOT = " · "
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


@verb("Observe")
@click.argument("hostfile_", metavar="[HOSTFILE]", required=False, shell_complete=suggest.files)
@click.option("--fast", is_flag=True, help="Do not time transfers between hosts, nor run an all-reduce on pairs.")
@common
def doctor(common: Common, fast: bool) -> None:
    """Check hosts, network and versions; say how to mend what is wrong.

    First each host: ssh, system, settings, python and versions, disk and memory for the shard set. Then the hosts are
    compared with each other. Then every pair: TCP from the worker's python, its speed, and an all-reduce over each two
    neighbours. Nothing is changed anywhere. Without hosts and deployment, this machine is checked alone.

    \b
    Examples:
      moectl doctor hosts.txt
      moectl doctor --hosts mac1,mac2 --fast
      moectl doctor --json | jq '.hosts[].checks[] | select(.level == "fail")'
    """
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
