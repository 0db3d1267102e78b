"""What the observing verbs show: text for people, JSON documents for scripts. It computes and prints nothing.

As in `report`: sizes in bytes, times in seconds, snake_case; fields may be added, never renamed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moectl.text import columns, size_text, table_text

if TYPE_CHECKING:
    from moectl.cluster.deploy.uninstall import Cleared
    from moectl.cluster.logs import Line
    from moectl.cluster.sets import Listing, ShardSet
    from moectl.cluster.status import Row, Status
    from moectl.errors import MoectlError
from moectl.errors import error_json
from moectl.text import clock_text

NOTHING = "Nothing is running."
_COLOURS = {"running": "32", "down": "31", "unknown": "33"}
_HEADER = ("RANK", "HOST", "STATE", "MODEL", "MEMORY", "UP", "TOKENS", "TOK/S", "LINK")


def up_text(seconds: float) -> str:
    """Return how long something has lasted: "41s", "12m", "2h14m", "3d4h"."""
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86400)
    if days:
        return f"{days}d{hours % 24}h"
    if hours:
        return f"{hours}h{minutes % 60:02d}m"
    return f"{minutes}m" if minutes else f"{int(seconds)}s"


def status_text(status: Status, *, width: int | None = None) -> str:
    """Return a row per rank, with states in colour, and a line per thing that is not as it should be."""
    width = width or columns()
    lines = []
    if status.rows:
        table = table_text(_HEADER, [_status_row(row) for row in status.rows], right="aefghi", width=width)
        lines += _paint(table.split("\n"), [row.state for row in status.rows])
    else:
        lines.append(NOTHING)
    lines += [f"{row.host}: {row.error.message}" for row in status.rows if row.error is not None]
    lines += [_controller_text(one) for one in status.controllers if _is_odd(one)]
    lines += [f"a controller does not answer: it loads, or hangs ({path})" for path in status.silent]
    return "\n".join(lines)


def _status_row(row: Row) -> tuple[str, ...]:
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


def _row_json(row: Row) -> dict[str, Any]:
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


# Logs.


def line_text(line: Line, *, prefix: bool, timestamps: bool) -> str:
    """Return one line of a log; control characters are shown, not sent to the terminal."""
    text = "".join(c if c.isprintable() or c == "\t" else f"\\x{ord(c):02x}" for c in line.text)
    when = f"{clock_text(line.time_s)} " if timestamps else ""
    return f"{f'[{line.source.label}] ' if prefix else ''}{when}{text}"


def line_json(line: Line) -> dict[str, Any]:
    """Return one line of a log; `time` is in seconds since 1970."""
    source = line.source
    fields = {"host": source.host.address, "source": source.label, "rank": source.rank}
    return {**fields, "time": line.time_s, "text": line.text}


def logs_json(lines: list[Line], failed: dict[str, MoectlError]) -> dict[str, Any]:
    """Return the document of `logs --json`."""
    errors = [{"host": host, "error": error_json(error)} for host, error in failed.items()]
    return {"schema": "moectl.logs/1", "lines": [line_json(line) for line in lines], "failed": errors}


# Lists.


def list_text(listing: Listing, *, width: int | None = None) -> str:
    """Return the tables of `list`."""
    width = width or columns()
    parts = []
    if listing.sets:
        header = ("SHARD SET", "RANKS", "SPLIT", "SIZE", "CHANGED", "USE", "DIRECTORY")
        rows = [_set_row(one) for one in listing.sets]
        parts.append(table_text(header, rows, right="bd", width=width))
    else:
        parts.append("There are no shard sets here.")
    if listing.deployment is not None:
        ranks = [
            (str(r.rank), r.host, "-" if r.bytes is None else size_text(r.bytes), r.directory or "not deployed yet")
            for r in listing.deployment.ranks
        ]
        table = table_text(("RANK", "HOST", "SIZE", "DIRECTORY"), ranks, right="ac", width=width)
        parts.append(f"\nDeployed: {listing.deployment.name}\n{table}")
    return "\n".join(parts)


def _set_row(one: ShardSet) -> tuple[str, ...]:
    use = one.use or ("" if one.state == "complete" else one.state)
    ranks = "" if one.ranks is None else str(one.ranks)
    changed = clock_text(one.changed_s)[:10]
    return (one.name, ranks, one.split or "", size_text(one.bytes), changed, use, str(one.directory))


def list_json(listing: Listing, pruned: tuple[ShardSet, ...] | None = None) -> dict[str, Any]:
    """Return the document of `list --json`; `pruned` are sets that have just been deleted."""
    deployment = listing.deployment
    return {
        "schema": "moectl.list/1",
        "sets": [_set_json(one) for one in listing.sets],
        "deployment": deployment
        and {
            "name": deployment.name,
            "hosts": [
                {"rank": r.rank, "host": r.host, "bytes": r.bytes, "directory": r.directory} for r in deployment.ranks
            ],
        },
        **({} if pruned is None else {"pruned": [_set_json(one) for one in pruned]}),
    }


def _set_json(one: ShardSet) -> dict[str, Any]:
    fields = ("name", "ranks", "split", "bits", "bytes", "changed_s", "place", "state", "use")
    return {**{name: getattr(one, name) for name in fields}, "directory": str(one.directory)}


# Uninstalling.


def uninstall_text(results: list[Cleared], *, dry_run: bool) -> str:
    """Return a line per host, and one per thing that is left because it is not moectl's."""
    width = max(len(one.host) for one in results)
    lines = []
    for one in results:
        lines.append(f"{one.host:{width}}  {_cleared_text(one, dry_run)}")
        lines += [f"{'':{width}}  left: {path} is not moectl's" for path in one.left]
        if dry_run:
            lines += [f"{'':{width}}  would go: {name} ({size_text(size)})" for name, size in one.items.items()]
    return "\n".join(lines)


def _cleared_text(one: Cleared, dry_run: bool) -> str:
    if one.error is not None:
        return f"failed  {one.error.message}"
    if not one.items:
        return f"ok      nothing of moectl's is there{f' ({one.root})' if one.root else ''}"
    what = f"{size_text(one.bytes)} in {one.root}"
    return f"{'found' if dry_run else 'ok   '}   {what}{'' if dry_run else ', removed'}"


def uninstall_json(results: list[Cleared], *, dry_run: bool) -> dict[str, Any]:
    """Return the document of `uninstall --json`; `items` are what is (or would be) removed, in bytes."""
    hosts = [
        {
            "host": one.host,
            "ok": one.error is None,
            "error": error_json(one.error),
            "root": one.root,
            "bytes": one.bytes,
            "items": one.items,
            "left": list(one.left),
        }
        for one in results
    ]
    return {"schema": "moectl.uninstall/1", "dry_run": dry_run, "hosts": hosts}
