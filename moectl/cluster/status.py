"""What each host is doing: what the controllers here say, and what is seen on the hosts themselves.

Each look asks again; only the connections are kept.
"""

from __future__ import annotations

import posixpath
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moectl.errors import HostError, MoectlError, NotDeployed, Unreachable
from moectl.hosts.connect import ROOT, close_all, make_remote, on_each
from moectl.hosts.hostfile import Host
from moectl.hosts.programs import ask, list_pythons
from moectl.hosts.remote import Remote
from moectl.model.manifest import read_manifest
from moectl.planner.memory import CPU_DTYPE_BYTES, METAL_DTYPE_BYTES
from moectl.planner.speed import count_token_bytes
from moectl.server.client import Client, find_running
from moectl.session.deployment import DeployedRank, Deployment

LOOK_S = 15.0  # for a host to answer; one that does not is down
DESCRIBE_S = 2.0  # a controller that takes longer loads, or hangs
RUNNING, IDLE, DOWN, UNKNOWN = "running", "idle", "down", "unknown"


@dataclass(frozen=True, slots=True)
class StatusRow:
    """One rank, or one host without; None is what is not known or does not apply."""

    host: str
    rank: int | None = None
    state: str = UNKNOWN
    model: str | None = None
    memory_bytes: int | None = None
    up_s: float | None = None
    tokens: int | None = None  # generated since it was loaded; of the whole model, told with its first rank
    tok_s: float | None = None  # recently, of all answers together
    link_bytes_s: float | None = None  # that this rank sends for these tokens, by their count and the model's shape
    error: MoectlError | None = None  # why it is down, or not known


@dataclass(frozen=True, slots=True)
class Status:
    """One look at everything."""

    time_s: float
    rows: tuple[StatusRow, ...]
    controllers: tuple[dict[str, Any], ...]  # what those here say of themselves
    silent: tuple[str, ...] = ()  # sockets of those that did not answer: they load, or hang

    @property
    def errors(self) -> dict[str, MoectlError | None]:
        """Per host: why it is down, None where it is not."""
        return {row.host: row.error if row.state == DOWN else None for row in self.rows}


@dataclass(frozen=True, slots=True)
class _Seen:
    """What one host's python told."""

    system: str
    deployed: bool
    root: str
    workers: tuple[dict[str, Any], ...]


class Observer:
    """Looks at a deployment, or at hosts without one, and at this machine's controllers; use as a context manager.

    `others` are on the same hosts: where a controller has loaded one of them, that one is looked at.
    """

    def __init__(
        self,
        deployment: Deployment | None,
        hosts: Sequence[Host] = (),
        *,
        others: Sequence[Deployment] = (),
        limit_s: float = LOOK_S,
    ) -> None:
        self._all = (deployment, *others) if deployment else ()
        ranks = deployment.ranks if deployment else tuple(DeployedRank(host) for host in hosts)
        self._use(deployment, ranks)
        self._limit_s = limit_s
        self._remotes: list[Remote] = [make_remote(rank.host) for rank in ranks]
        self._asking: set[int] = set()  # ranks whose host has not answered the last question yet

    def __enter__(self) -> Observer:
        return self

    def __exit__(self, *_: object) -> None:
        close_all(self._remotes)

    def look(self) -> Status:
        """Ask all once, at the same time; a host that hangs is given up after the limit, 15 seconds."""
        described, silent = _describe_all()
        if self._all:
            loaded = (one for one in self._all if any(_runs(told, one) for told in described))
            shown = next(loaded, self._all[0])
            self._use(shown, shown.ranks)
        seen = on_each([rank.host for rank in self._ranks], self._see, limit_s=self._limit_s)
        rows = [self._row(rank, found) for rank, found in enumerate(seen)]
        others = []
        for one in described:
            if self._deployment is not None and _runs(one, self._deployment):
                rows = [_add_controller(row, one) for row in rows]
                rows = _add_link(rows, one, [f.system for f in seen if isinstance(f, _Seen)])
            else:
                others += _controller_rows(one)
        return Status(time.time(), (*rows, *self._strangers(seen), *others), tuple(described), silent)

    def _use(self, deployment: Deployment | None, ranks: Sequence[DeployedRank]) -> None:
        self._deployment = deployment
        self._name = deployment.name if deployment else None
        self._ranks = ranks

    def _see(self, rank: int, host: Host) -> _Seen:
        if rank in self._asking:
            raise Unreachable("it still has not answered", host=host.address)
        self._asking.add(rank)
        try:
            return self._ask(rank, host)
        finally:
            self._asking.discard(rank)

    def _ask(self, rank: int, host: Host) -> _Seen:
        own = self._ranks[rank]
        request = {"root": own.root or host.dir or ROOT, "directory": own.directory}
        pythons = list_pythons(host, own.python)
        answer = ask(self._remotes[rank], pythons, "workers", request, timeout_s=self._limit_s)
        return _Seen(answer["system"], answer["deployed"], answer["root"], tuple(answer["workers"]))

    def _row(self, rank: int, seen: _Seen | MoectlError) -> StatusRow:
        own = self._ranks[rank]
        row = StatusRow(own.host.address, rank if self._name else None, model=self._name)
        if isinstance(seen, MoectlError):
            return replace(row, state=DOWN if isinstance(seen, HostError) else UNKNOWN, error=seen)
        mine = [w for w in seen.workers if self._name and _log_of(seen.root, self._name, rank) in w["logs"]]
        if mine:
            return replace(row, state=RUNNING, memory_bytes=mine[0]["memory_bytes"], up_s=mine[0]["up_s"])
        if not self._name or (own.python and seen.deployed):
            return replace(row, state=IDLE)
        why = f"{own.directory} is gone" if own.python else f"{self._name} has not been deployed here yet"
        return replace(row, state=DOWN, error=NotDeployed(why, host=row.host, hint="moectl deploy"))

    def _strangers(self, seen: Sequence[_Seen | MoectlError]) -> list[StatusRow]:
        """Return the workers under the hosts' roots that are not this deployment's, but another user's or set's."""
        found = []
        for rank, one in enumerate(seen):
            if isinstance(one, MoectlError):
                continue
            mine = _log_of(one.root, self._name, rank) if self._name else ""
            for worker in one.workers:
                for log in worker["logs"]:
                    if log != mine and posixpath.dirname(posixpath.dirname(log)) == one.root:
                        found.append(_stranger_row(self._ranks[rank].host.address, log, worker))
        return found


def _log_of(root: str, name: str, rank: int) -> str:
    return f"{root}/logs/{name}-rank-{rank}.log"


def _stranger_row(host: str, log: str, worker: dict[str, Any]) -> StatusRow:
    match = re.fullmatch(r"(.*)-rank-(\d+)\.log", posixpath.basename(log))
    assert match is not None  # `onhost.workers.read_marks`
    return StatusRow(host, int(match[2]), RUNNING, match[1], worker["memory_bytes"], worker["up_s"])


def _describe_all() -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    described, silent = [], []
    for path in find_running():
        try:
            described.append({**Client(path).describe(timeout_s=DESCRIBE_S), "key": path.stem})
        except MoectlError:
            silent.append(str(path))
    return described, tuple(silent)


def _runs(described: dict[str, Any], deployment: Deployment) -> bool:
    hosts = [rank.host.address for rank in deployment.ranks]
    return bool(described["name"] == deployment.name and described["hosts"] == hosts)


def _is_whole(described: dict[str, Any]) -> bool:
    return bool(described["ranks_answered"] == len(described["hosts"]))


def _add_controller(row: StatusRow, described: dict[str, Any]) -> StatusRow:
    """Return a rank's row with what its controller knows: it has a connection even where a new login fails."""
    assert row.rank is not None
    memory = described["memory_bytes"][row.rank] or row.memory_bytes
    if _is_whole(described):
        row = replace(row, state=RUNNING, error=None)
    row = replace(row, memory_bytes=memory, up_s=described["up_s"])
    return replace(row, tokens=described["tokens"], tok_s=described["tok_s"]) if row.rank == 0 else row


def _controller_rows(described: dict[str, Any]) -> list[StatusRow]:
    """Return the ranks of a controller; only what it says itself is known of them."""
    state = RUNNING if _is_whole(described) else UNKNOWN
    rows = [StatusRow(host, rank, state, described["name"]) for rank, host in enumerate(described["hosts"])]
    rows = [_add_controller(row, described) for row in rows]
    return _add_link(rows, described, _own_system(described))


def _own_system(described: dict[str, Any]) -> list[str]:
    return [sys.platform] if set(described["hosts"]) == {"localhost"} else []


def _add_link(rows: list[StatusRow], described: dict[str, Any], systems: list[str]) -> list[StatusRow]:
    """Return rows with what each rank sends per second; unchanged where the shape or the type is not known."""
    widths = {"float32": 4, "bfloat16": 2, "float16": 2}
    width = widths.get(described["options"].get("dtype") or "")
    if width is None and systems and len(set(systems)) == 1:
        # What ranks calculate in unless they are told otherwise.
        width = METAL_DTYPE_BYTES if systems[0] == "darwin" else CPU_DTYPE_BYTES
    if width is None:
        return rows
    try:
        each = count_token_bytes(read_manifest(Path(described["shards"])).placement, width)
    except MoectlError:  # the operator's copy may be gone
        return rows
    return [replace(row, link_bytes_s=each * described["tok_s"]) for row in rows]
