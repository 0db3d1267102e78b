"""The logs of all ranks, merged: which files there are, their last lines in order of time, and what is appended.

`onhost.logs` reads them on each host, this machine included. No process is left behind.
"""

from __future__ import annotations

import contextlib
import queue
import re
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moectl.errors import MoectlError, UsageError
from moectl.hosts import connect, programs
from moectl.hosts.connect import make_remote
from moectl.hosts.hostfile import Host
from moectl.hosts.onhost.prelude import parse_answer
from moectl.hosts.remote import Process, Remote
from moectl.paths import state_dir
from moectl.server.background import SERVICE, log_path
from moectl.server.client import find_running
from moectl.session.deployment import Deployment
from moectl.session.target import target_key

CONTROLLER = "controller"
END_S = 5.0  # for a reader to end once its stdin is closed
PATIENCE_S = 5.0  # for a host's old lines, while others have new ones
LOCAL = Host("localhost")
_Heard = dict[str, Any] | MoectlError | None  # what a reader answered, its failure, or its end
_COPY = re.compile(r"\[[^\]]+\] ")
_START = re.compile(r"rank \d+ of \d+ starts on ")  # a worker's first line
_RANK = re.compile(r"(.+)-rank-(\d+)\.log")


@dataclass(frozen=True, slots=True)
class LogFile:
    """One log file on one host; `label` names it among the others."""

    label: str
    host: Host
    file: str
    rank: int | None = None
    python: str = ""


@dataclass(frozen=True, slots=True)
class LogLine:
    """A line of a rank's log, and when it was written (seconds since 1970; None where it is not known)."""

    source: LogFile
    time_s: float | None
    text: str


@dataclass(frozen=True, slots=True)
class Trouble:
    """A host whose logs cannot be read (any more); with no `error`, a log that does not exist or has a gap."""

    label: str
    text: str
    error: MoectlError | None = None


@dataclass(frozen=True, slots=True)
class LogQuery:
    """What to read: the last lines, not older than this many seconds, of the last launch, and whether to go on."""

    tail: int | None = None
    since_s: float | None = None
    follow: bool = False
    last: bool = False


class Launches:
    """Finds where launches begin in lines of several ranks that are in order of time."""

    def __init__(self) -> None:
        self._begun: set[LogFile] = set()  # sources that the present launch has
        self._after_others = False  # whether a line came before

    def begins(self, line: LogLine) -> bool:
        """Return whether this line is the first of a launch, and lines of another one came before it."""
        after_others, self._after_others = self._after_others, True
        if not _START.match(line.text):
            return False
        first = not self._begun or line.source in self._begun
        self._begun = {line.source} if first else self._begun | {line.source}
        return first and after_others


def find_sources(deployment: Deployment | None, names: Sequence[str] = ()) -> list[LogFile]:
    """Return the logs of the deployment and its controller, and of what runs on this machine; or those of some hosts.

    With neither, the logs of the ranks that were last here. `names` are hosts, `localhost` and `controller`; UsageError
    for another one.
    """
    found = _deployed(deployment) if deployment else []
    running = {path.stem for path in find_running()}
    if deployment:  # its ranks are on its hosts, and its controller is among `found`
        running.discard(target_key(deployment))
    local = _local(running)
    if not found or names or any(source.label == CONTROLLER for source in local[1]):
        found += [source for source in local[0] + local[1] if source not in found]
    if (service := log_path(SERVICE)).exists():  # it says why a start failed, so it counts also when nothing runs
        found.append(LogFile(CONTROLLER, LOCAL, str(service)))
    chosen = [s for s in found if not names or {s.label, s.host.name, s.host.address} & set(names)]
    known = {s.label for s in found} | {s.host.address for s in found} | {s.host.name for s in found}
    for name in names:
        if name not in known:
            listed = ", ".join(sorted(known)) or "none"
            raise UsageError(f"there are no logs of {name!r} (of: {listed})", hint="name a host of the deployment")
    return chosen


def _deployed(deployment: Deployment) -> list[LogFile]:
    sources = [
        LogFile(r.host.address, r.host, f"{r.root}/logs/{deployment.name}-rank-{rank}.log", rank, r.python)
        for rank, r in enumerate(deployment.ranks)
        if r.root
    ]
    path = log_path(f"{deployment.name}-{target_key(deployment)}")
    return [*sources, *([LogFile(CONTROLLER, LOCAL, str(path))] if path.exists() else [])]


def _local(running: set[str]) -> tuple[list[LogFile], list[LogFile]]:
    """Return this machine's (ranks, controllers): of the set that was used last, and of what runs here."""
    directory = state_dir() / "logs"
    controllers = [p for p in sorted(directory.glob("controller-*.log")) if p.stem.rpartition("-")[2] in running]
    names = [p.stem.removeprefix(f"{CONTROLLER}-").rpartition("-")[0] for p in controllers]
    ranks = [(p, m) for p in directory.glob("*-rank-*.log") if (m := _RANK.fullmatch(p.name))]
    newest = max(ranks, key=lambda pair: _age(pair[0]), default=None)
    if not any(match[1] in names for _, match in ranks) and newest:
        names = [newest[1][1]]
    sources = [
        LogFile(f"localhost/{match[2]}", LOCAL, str(path), int(match[2]))
        for path, match in sorted(ranks, key=lambda pair: (pair[1][1], int(pair[1][2])))
        if match[1] in names
    ]
    return sources, [LogFile(CONTROLLER, LOCAL, str(path)) for path in controllers]


def _age(path: Path) -> float:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return 0.0


class LogReader:
    """Reads logs on all their hosts at once; use as a context manager: its end ends every reader there."""

    def __init__(self, sources: Sequence[LogFile], asked: LogQuery) -> None:
        self._asked = asked
        self._labels = {source.label for source in sources}
        self._groups: dict[str, list[LogFile]] = {}
        for source in sources:
            self._groups.setdefault(source.host.address, []).append(source)
        self._heard: queue.SimpleQueue[tuple[str, _Heard]] = queue.SimpleQueue()
        self._processes: list[Process] = []
        self._remotes: list[Remote] = []
        self._closing = threading.Lock()
        self._closed = False
        self.lines = 0  # that were read so far

    def __enter__(self) -> LogReader:
        return self

    def __exit__(self, *_: object) -> None:
        with self._closing:
            self._closed = True
        for process in self._processes:
            with contextlib.suppress(OSError, ValueError):
                process.stdin.close()
        for process in self._processes:
            programs.end_process(process, END_S)
        connect.close_all(self._remotes)

    @property
    def hosts(self) -> tuple[str, ...]:
        """Addresses of the hosts that are read."""
        return tuple(self._groups)

    def read(self) -> Iterator[LogLine | Trouble]:
        """Yield the old lines of all in order of time, then with `follow` new ones as they come, until all hosts end.

        A host that cannot be read is a Trouble with its error; the others go on.
        """
        for host in self._groups:
            threading.Thread(target=self._listen, args=(host,), daemon=True).start()
        alive = set(self._groups)  # that have not ended
        behind = set(self._groups)  # whose old lines have not all come: until then everything waits to be sorted
        past: list[LogLine] = []
        deadline = time.monotonic() + PATIENCE_S
        while alive:
            try:
                left_s = max(0.0, deadline - time.monotonic()) if behind and self._asked.follow else None
                host, heard = self._heard.get(timeout=left_s)
            except queue.Empty:
                behind.clear()
                host, heard = "", {"done": True}
            for item in self._take(host, heard):
                if isinstance(item, LogLine) and behind:
                    past.append(item)
                else:
                    yield item
            if not isinstance(heard, dict):
                alive.discard(host)
            if not isinstance(heard, dict) or heard.get("done"):
                behind.discard(host)
            if not behind:
                yield from in_order(past)
                past = []
        yield from in_order(past)

    def _take(self, host: str, heard: _Heard) -> Iterator[LogLine | Trouble]:
        if isinstance(heard, MoectlError):
            yield Trouble(host, heard.message, heard)
        if not isinstance(heard, dict) or "file" not in heard:
            return
        source = self._groups[host][heard["file"]]
        if heard.get("missing"):
            yield Trouble(source.label, f"there is no log yet ({source.file})")
        if heard.get("lost"):
            yield Trouble(source.label, "its log was rotated more than once at a time: lines may be missing")
        for when, text in heard.get("lines", ()):
            if when is not None and source.label == CONTROLLER and len(self._labels) > 1 and _COPY.match(text):
                continue  # a copy of what a worker said at its start: that rank's own log has it
            self.lines += 1
            yield LogLine(source, when, text)

    def _listen(self, host: str) -> None:
        try:
            self._listen_to(host)
        except MoectlError as error:
            self._heard.put((host, error))
        except (OSError, ValueError) as error:
            self._heard.put((host, MoectlError(f"the connection broke: {error}", host=host)))

    def _listen_to(self, host: str) -> None:
        group = self._groups[host]
        remote = make_remote(group[0].host)
        pythons = programs.list_pythons(group[0].host, *(source.python for source in group))
        request = {"files": [source.file for source in group], **asdict(self._asked)}
        with self._closing:
            if self._closed:
                return
            self._remotes.append(remote)
        process = programs.start(remote, pythons, "logs", request)
        with self._closing:
            self._processes.append(process)
            if self._closed:
                process.stdin.close()
        said = False
        errors: list[bytes] = []
        draining = threading.Thread(target=lambda: errors.append(_read_all(process)), daemon=True)
        draining.start()
        for raw in process.stdout:
            answer = parse_answer(raw)
            if answer is not None:
                said = said or bool(answer.get("done"))
                self._heard.put((host, answer))
        code = process.wait(END_S)
        draining.join(END_S)
        if not said or (self._asked.follow and not self._closed):
            raise programs.explain_silence(host, code, b"".join(errors))
        self._heard.put((host, None))


def _read_all(process: Process) -> bytes:
    with contextlib.suppress(OSError, ValueError):
        return process.stderr.read()
    return b""


def in_order(lines: Sequence[LogLine]) -> list[LogLine]:
    """Return lines of several sources by time; each source keeps its order, also where a line has no time."""
    latest: dict[LogFile, float] = {}
    keyed = []
    for index, line in enumerate(lines):
        # A clock that was set back must not change a source's own order.
        when = max(line.time_s if line.time_s is not None else 0.0, latest.get(line.source, 0.0))
        latest[line.source] = when
        keyed.append((when, index, line))
    return [line for _, _, line in sorted(keyed, key=lambda key: key[:2])]
