"""`moectl status`: what each host is doing."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from moectl import errors
from moectl.cli.options import Common, common
from moectl.cli.target import find_deployment_or_hosts
from moectl.cli.verb import verb
from moectl.errors import error_json
from moectl.text import clock_text, colour_wanted, columns, size_text, table_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moectl.cluster.status import Observer, Status, StatusRow

NOTHING = "Nothing is running."
_COLOURS = {"running": "32", "down": "31", "unknown": "33"}
_HEADER = ("RANK", "HOST", "STATE", "MODEL", "MEMORY", "UP", "TOKENS", "TOK/S", "LINK")


WATCH_S = 2.0
WATCH_LOOK_S = 6.0  # for a host to answer before it is shown as down


@verb("Observe")
@click.option("-w", "--watch", is_flag=True, help="Go on showing it, until Ctrl-C.")
@common
def status(common: Common, watch: bool) -> None:
    """Show what each host is doing.

    Asks the hosts of the deployment over SSH, or those that --hosts or --hostfile names, and the controllers on this
    machine. A host is running, idle, down, or unknown (it was reached and could not tell). TOKENS and TOK/S are the
    whole model's; LINK is what each rank sends for them, counted from the model's shape. `moectl ps` is the same.

    \b
    Examples:
      moectl status
      moectl status --watch
      moectl ps --json | jq '.hosts[] | select(.state == "down")'
    """
    from moectl.cli.terminal import can_redraw, on_ctrl_t
    from moectl.cluster.status import Observer
    from moectl.session.deployment import find_beside

    deployment, hosts = find_deployment_or_hosts(common)
    others = find_beside(deployment) if deployment else ()
    begin = time.monotonic()
    redraws = watch and can_redraw(sys.stdout) and not (common.json or common.quiet)
    with (
        on_ctrl_t(lambda: f"asking the hosts since {time.monotonic() - begin:.1f} s", _mute if redraws else common.say),
        Observer(deployment, hosts, others=others, **({"limit_s": WATCH_LOOK_S} if watch else {})) as observer,
    ):
        if redraws:
            _show_live(common, observer)
        if watch:
            _show_changes(common, observer)
        _print_status(common, observer.look(), deployment is not None or bool(hosts))


def _print_status(common: Common, found: Status, asked: bool) -> None:
    from moectl.hosts import connect

    if not (found.rows or asked or found.silent):
        raise errors.NotDeployed("nothing is running, and no model is deployed.", hint="moectl deploy hosts.txt")
    several = sum(error is not None for error in found.errors.values()) > 1
    common.print(status_text(found, reasons=several), status_json(found))  # the reason of one is in the error
    connect.raise_failures(found.errors, then=".", told=True)


def _mute(text: str) -> None:
    """Say nothing: a line on the terminal would disturb the table, which shows everything."""


def _show_live(common: Common, observer: Observer) -> None:
    """Look again and again and draw the table in the same place; ends by Ctrl-C only."""
    from moectl.cli.terminal import LiveView

    with LiveView(sys.stdout) as view:
        for text in _pictures(common, observer):
            view.draw(text)


def _show_changes(common: Common, observer: Observer) -> None:
    """Look again and again and print a line per change, or every look as JSON; ends by Ctrl-C only."""
    before: Status | None = None
    for found in _looks(observer):
        for line in [json.dumps(status_json(found))] if common.json else changed_lines(found, before):
            click.echo(line)
        before = found


def _looks(observer: Observer) -> Iterator[Status]:
    while True:
        begin = time.monotonic()
        yield observer.look()
        time.sleep(max(0.1, WATCH_S - (time.monotonic() - begin)))


def _pictures(common: Common, observer: Observer) -> Iterator[str]:
    coloured = colour_wanted(common.color, sys.stdout)
    yield "Asking the hosts…"
    for found in _looks(observer):
        text = f"{status_text(found)}\n\n{clock_text(found.time_s)}  Ctrl-C leaves."
        yield text if coloured else click.unstyle(text)


def up_text(seconds: float) -> str:
    """Return how long something has lasted: "41s", "12m", "2h14m", "3d4h"."""
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86400)
    if days:
        return f"{days}d{hours % 24}h"
    if hours:
        return f"{hours}h{minutes % 60:02d}m"
    return f"{minutes}m" if minutes else f"{int(seconds)}s"


def status_text(status: Status, *, width: int | None = None, reasons: bool = True) -> str:
    """Return a row per rank, with states in colour, and a line for each thing that is wrong.

    Without `reasons` it does not say why a host is down.
    """
    width = width or columns()
    lines = []
    if status.rows:
        table = table_text(_HEADER, [_status_row(row) for row in status.rows], right="aefghi", width=width)
        lines += _paint(table.split("\n"), [row.state for row in status.rows])
    else:
        lines.append(NOTHING)
    if reasons:
        lines += dict.fromkeys(f"{row.host}: {row.error.message}" for row in status.rows if row.error is not None)
    lines += [_controller_text(one) for one in status.controllers if _is_odd(one)]
    lines += [f"a controller does not answer: it loads, or hangs ({path})" for path in status.silent]
    return "\n".join(lines)


def _status_row(row: StatusRow) -> tuple[str, ...]:
    return (
        "" if row.rank is None else str(row.rank),
        row.host,
        row.state,
        row.model or "-",
        "-" if row.memory_bytes is None else size_text(row.memory_bytes),
        "-" if row.up_s is None else up_text(row.up_s),
        "" if row.tokens is None else f"{row.tokens:,}",
        "" if row.tok_s is None else f"{row.tok_s:.1f}",
        "" if row.link_bytes_s is None else f"{size_text(row.link_bytes_s)}/s",
    )


def _paint(lines: list[str], states: list[str]) -> list[str]:
    start = lines[0].find("STATE")
    if start < 0:
        return lines
    painted = lines[:1]
    for line, state in zip(lines[1:], states, strict=True):
        end, colour = start + len(state), _COLOURS.get(state)
        painted.append(f"{line[:start]}\x1b[{colour}m{line[start:end]}\x1b[0m{line[end:]}" if colour else line)
    return painted


def _is_odd(described: dict[str, Any]) -> bool:
    return bool(described["queued"] or described["restarts"] or not described["healthy"])


def _controller_text(described: dict[str, Any]) -> str:
    answered = f"{described['ranks_answered']} of {len(described['hosts'])} ranks answered"
    parts = [f"{described['running']} answers in progress, {described['queued']} waiting"]
    parts += [] if described["healthy"] else [f"not healthy: {answered}"]
    restarts = described["restarts"]
    parts += [f"restarted {restarts} time{'s'[: restarts > 1]}"] if restarts else []
    return f"{described['name']}: {', '.join(parts)}"


def status_json(status: Status) -> dict[str, Any]:
    """Return the document of `status --json`; `time` is in seconds since 1970."""
    return {
        "schema": "moectl.status/1",
        "time": status.time_s,
        "hosts": [_row_json(row) for row in status.rows],
        "controllers": [
            {k: v for k, v in one.items() if k not in ("schema", "memory_bytes", "key")} for one in status.controllers
        ],
        "silent_controllers": list(status.silent),
    }


def _row_json(row: StatusRow) -> dict[str, Any]:
    fields = ("rank", "host", "state", "model", "memory_bytes", "up_s", "tokens", "tok_s", "link_bytes_s")
    return {**{name: getattr(row, name) for name in fields}, "error": error_json(row.error)}


def changed_lines(status: Status, before: Status | None) -> list[str]:
    """Return a line for each row that is not as it was at the look before; all of them the first time."""
    old = {(row.host, row.rank, row.model): row for row in before.rows} if before else {}
    lines = []
    for row in status.rows:
        last = old.get((row.host, row.rank, row.model))
        same = last is not None and (last.state, last.tokens) == (row.state, row.tokens)
        if not same:
            words = [cell for cell in _status_row(row) if cell not in ("", "-")]
            lines.append(" ".join([clock_text(status.time_s), *words, *([row.error.message] if row.error else [])]))
    if not status.rows and (before is None or before.rows):
        lines.append(f"{clock_text(status.time_s)} {NOTHING}")
    return lines
