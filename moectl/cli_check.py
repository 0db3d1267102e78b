"""The verb that looks at the cluster: doctor.

Imports of the working modules are inside the commands, so that `--help` and Tab load click only.
"""

from __future__ import annotations

import click

from moectl import errors, suggest
from moectl.flags import Common, common
from moectl.verb import verb


@verb("Observe")
@click.argument("hostfile_", metavar="[HOSTFILE]", required=False, shell_complete=suggest.files)
@click.option("--fast", is_flag=True, help="Time no transfers between hosts, and run no model on pairs of them.")
@common
def doctor(common: Common, hostfile_: str | None, fast: bool) -> None:
    """Check hosts, network and versions; say what mends what is wrong.

    Every host at once: ssh, system, settings, python and versions, disk and memory for the shard set; then hosts beside
    each other; then every pair: TCP from the worker's own python, its speed, and a sum over each two neighbours.
    Nothing is changed anywhere. Without hosts and deployment, this machine is checked alone.

    \b
    Examples:
      moectl doctor hosts.txt
      moectl doctor --hosts mac1,mac2 --fast
      moectl doctor --json | jq '.hosts[].checks[] | select(.level == "fail")'
    """
    from moectl import doctor_report
    from moectl.cluster.doctor.diagnose import choose_hosts, diagnose
    from moectl.cluster.doctor.finding import Level
    from moectl.text import columns

    if hostfile_:
        common.hostfile = hostfile_
    where, deployed = choose_hosts(common.host_list())
    found = diagnose(where, deployed, fast=fast, say=common.say)
    colours = {Level.OK: "green", Level.WARN: "yellow", Level.FAIL: "red", Level.SKIP: "cyan"}
    text = doctor_report.doctor_text(
        found,
        width=columns(),
        verbose=common.verbose > 0,
        paint=lambda level, word: click.style(word, fg=colours[level], bold=level is Level.FAIL or None),
    )
    common.print(text, doctor_report.doctor_json(found, fast=fast), doctor_report.summary_text(found))
    failures = found.count(Level.FAIL)
    if failures:
        raise errors.PartialFailure(
            f"{failures} check{'s' * (failures != 1)} failed.", hint="each FAIL line says what mends it."
        )
