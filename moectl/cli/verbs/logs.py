"""`moectl logs`: the workers' logs of all hosts, past and present."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from moectl import errors
from moectl.cli import suggest
from moectl.cli.options import Common, Duration, common
from moectl.cli.target import find_deployment_or_hosts
from moectl.cli.verb import verb
from moectl.errors import error_json
from moectl.text import clock_text, count_text

if TYPE_CHECKING:
    from moectl.cluster.logs import LogLine, LogReader
    from moectl.errors import MoectlError

LINES = 50  # of each log, unless told otherwise
RULE = "─" * 60  # between launches


def line_text(line: LogLine, *, prefix: bool, timestamps: bool) -> str:
    """Return one line of a log; control characters are shown, not sent to the terminal."""
    text = "".join(c if c.isprintable() or c == "\t" else f"\\x{ord(c):02x}" for c in line.text)
    when = f"{clock_text(line.time_s)} " if timestamps else ""
    return f"{f'[{line.source.label}] ' if prefix else ''}{when}{text}"


def line_json(line: LogLine) -> dict[str, Any]:
    """Return one line of a log; `time` is in seconds since 1970."""
    source = line.source
    fields = {"host": source.host.address, "source": source.label, "rank": source.rank}
    return {**fields, "time": line.time_s, "text": line.text}


def logs_json(lines: list[LogLine], failed: dict[str, MoectlError]) -> dict[str, Any]:
    """Return the document of --json."""
    errors = [{"host": host, "error": error_json(error)} for host, error in failed.items()]
    return {"schema": "moectl.logs/1", "lines": [line_json(line) for line in lines], "failed": errors}


@verb("Observe", old={"-n": "--tail", "-t": "--timestamps"})
@click.argument("names", metavar="[HOST]...", nargs=-1, shell_complete=suggest.hosts)
@click.option("-f", "--follow", is_flag=True, help="Show new lines as they come, until Ctrl-C.")
@click.option("--tail", type=click.IntRange(0), metavar="N", help=f"Last lines of each (default: {LINES}).")
@click.option("--since", type=Duration(), metavar="TIME", help="Only lines that are not older: 30s, 10m, 2h.")
@click.option("--last", is_flag=True, help="Only lines of the last launch.")
@click.option("--timestamps/--no-timestamps", default=True, help="Show when each line was written, in UTC, or not.")
@common
def logs(common: Common, names: tuple[str, ...], **options: Any) -> None:
    """Show the workers' logs, in order of time.

    HOST is a host of the deployment, `localhost` for ranks on this machine, or `controller`. Without it, the logs of
    the deployment, of its controller and of what runs here are shown, with a rule before each launch. No log contains
    prompts or answers.

    \b
    Examples:
      moectl logs mac3 --tail 20
      moectl logs --follow
      moectl logs --last
      moectl logs --since 10m --json
    """
    from moectl.cli.terminal import on_ctrl_t
    from moectl.cluster.logs import LogQuery, LogReader, find_sources

    deployment, hosts = find_deployment_or_hosts(common)
    asked = common.hosts is not None or common.hostfile is not None or names
    if hosts and (asked or not find_sources(None)):  # hosts.txt alone does not hide what ran here
        listed = ", ".join(host.address for host in hosts)
        raise errors.NotDeployed(f"no model is deployed on {listed}.", hint="moectl deploy")
    sources = find_sources(deployment, names)
    if not sources:
        raise errors.NotDeployed("nothing has been logged: no model ran here, and none is deployed.", hint="moectl run")
    limited = options["tail"] is not None or options["since"] is not None or options["last"]
    tail = options["tail"] if limited else LINES
    reader = LogReader(sources, LogQuery(tail, options["since"], options["follow"], options["last"]))
    with on_ctrl_t(lambda: f"{reader.lines} lines of {count_text(len(sources), 'log')}", common.say), reader:
        _print_logs(common, reader, {source.label for source in sources}, options)


def _print_logs(common: Common, reader: LogReader, labels: set[str], options: dict[str, Any]) -> None:
    from moectl.cluster.logs import Launches, LogLine
    from moectl.hosts import connect

    failed: dict[str, errors.MoectlError] = {}
    kept: list[LogLine] = []
    launches = Launches()
    for item in reader.read():
        if not isinstance(item, LogLine):
            common.say(f"[{item.label}] {item.text}")
            if item.error is not None:
                failed[item.label] = item.error
        elif not common.json:
            if launches.begins(item):
                click.echo(RULE)
            click.echo(line_text(item, prefix=len(labels) > 1, timestamps=options["timestamps"]))
        elif options["follow"]:
            click.echo(json.dumps({"schema": "moectl.logs/1", **line_json(item)}))
        else:
            kept.append(item)
    if common.json and not options["follow"]:
        click.echo(json.dumps(logs_json(kept, failed)))
    connect.raise_failures({**dict.fromkeys(reader.hosts), **failed}, then=".")
