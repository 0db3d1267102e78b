"""Remove from hosts what moectl put there.

`onhost.clear` knows what is moectl's on a host, `onhost.workers` whether a worker runs there.
"""

from __future__ import annotations

import posixpath
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field

from moectl.errors import CommandFailed, MoectlError, StateError
from moectl.hosts.connect import ROOT, make_remote, on_each
from moectl.hosts.hostfile import Host
from moectl.hosts.programs import ask, list_pythons
from moectl.hosts.remote import Remote
from moectl.paths import cache_dir, data_dir
from moectl.server.client import find_running
from moectl.session.deployment import forget_hosts

LOOK_S = 60.0
ENDING_S = 1.5
FRAMEWORK = "/Python.app/Contents/MacOS/Python"
CLEAR_S = 600.0  # an environment has tens of thousands of files


@dataclass(frozen=True, slots=True)
class Cleared:
    """What was found or removed on one host; `left` is what is under moectl's root and not moectl's."""

    host: str
    root: str = ""
    items: dict[str, int] = field(default_factory=dict)  # "env", "logs", "shards/NAME"… → bytes
    left: tuple[str, ...] = ()
    error: MoectlError | None = None

    @property
    def bytes(self) -> int:
        return sum(self.items.values())


def clear_hosts(hosts: Sequence[Host], *, dry_run: bool) -> list[Cleared]:
    """Remove what moectl put on each host, or only look; a host's error is in its result.

    The error is a StateError where a worker runs under moectl's root there or a deploy is at work; nothing is removed
    on that host then. The record of the deployment forgets what has been removed.
    """
    keep = _own_sets() if any(host.is_local for host in hosts) else []
    found = on_each(hosts, lambda _, host: _clear(host, keep, dry_run))
    results = [
        Cleared(host.address, error=one) if isinstance(one, MoectlError) else one
        for host, one in zip(hosts, found, strict=True)
    ]
    if not dry_run:
        forget_hosts({one.host: one.root for one in results if one.error is None})
    return results


def _own_sets() -> list[str]:
    """Return this machine's own shard sets, which a `localhost` with dir= may share."""
    return [str(path) for root in (data_dir(), cache_dir()) for path in (root / "shards").glob("*")]


def _clear(host: Host, keep: Sequence[str], dry_run: bool) -> Cleared:
    root = host.dir or ROOT
    # The environment's own python last: it goes with the rest.
    pythons = (*list_pythons(host), *([] if host.is_local else [f"{root}/env/bin/python"]))
    with closing(make_remote(host)) as remote:
        refuse_workers(remote, pythons, root, host)
        request = {"root": root, "keep": list(keep) if host.is_local else [], "dry_run": dry_run}
        answer = ask(remote, pythons, "clear", request, timeout_s=CLEAR_S)
    if answer["busy"]:
        raise StateError(answer["busy"], host=host.address, hint="wait for the other deploy to end")
    error = None
    if answer["failed"]:
        error = CommandFailed(f"cannot remove {answer['failed'][0]}", host=host.address)
    return Cleared(host.address, answer["root"], answer["items"], tuple(answer["left"]), error)


def refuse_workers(remote: Remote, pythons: Sequence[str], root: str, host: Host) -> None:
    """Raise StateError where a worker uses what is under this root."""
    running = _find_running(remote, pythons, root)
    if running:
        time.sleep(ENDING_S)  # one that has just been stopped is on its way out
        running = _find_running(remote, pythons, root)
    if running:
        pids = ", ".join(map(str, running))
        hint = "moectl stop" if find_running() else f"stop it where it was started, or end {pids} there"
        raise StateError(f"a worker runs there (process {pids})", host=host.address, hint=hint)


def _find_running(remote: Remote, pythons: Sequence[str], root: str) -> list[int]:
    seen = ask(remote, pythons, "workers", {"root": root, "directory": ""}, timeout_s=LOOK_S)
    return [worker["pid"] for worker in seen["workers"] if _is_under(worker, seen["root"], pythons)]


def _is_under(worker: dict[str, object], root: str, pythons: Sequence[str]) -> bool:
    """Whether a worker uses this root; without a log it counts as one if it is this user's and in these pythons.

    A framework's python shows the same program for every environment.
    """
    logs = worker["logs"]
    assert isinstance(logs, list)
    paths = [str(worker["python"]), *map(str, logs)]
    under = any(posixpath.commonpath([path, root]) == root for path in paths if path.startswith("/"))
    could_be = worker["python"] in pythons or str(worker["python"]).endswith(FRAMEWORK)
    return under or (not logs and bool(worker["own"]) and could_be)
