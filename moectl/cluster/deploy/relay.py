"""Hosts that pass files on: the relay's two programs on a host, the messages about them, and who takes from whom.

Tokens go to a program's stdin, never into an argument list, a log or a message that people see.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moectl.errors import MoectlError, Unreachable
from moectl.hosts.connect import ask_addresses
from moectl.hosts.onhost.prelude import parse_answer
from moectl.hosts.onhost.relay import BEAT_S, Address
from moectl.hosts.programs import end_process
from moectl.hosts.remote import Process, Remote
from moectl.model.manifest import FileEntry

HOLD_S = 10.0  # how long a host waits for one that has more already
HEAD = -1  # the place of those that lack nothing
MAX_TRIES = 2  # hosts that fail one host before it takes from the operator's machine
ANSWER_S = 30.0  # for a program to start and answer
SILENCE_S = 60.0
END_S = 10.0
FLOOR_BYTES_S = 250_000.0  # a source that is slower than this is given up


# Up: from a host's process to the one that started it.
@dataclass(frozen=True, slots=True)
class Joined:
    """A host has its interpreter, and can pass on what it has."""

    rank: int


@dataclass(frozen=True, slots=True)
class Wants:
    """A host wants to be told where to take the shared files from; the source it had has failed."""

    rank: int
    failed: int | None = None
    why: str = ""


@dataclass(frozen=True, slots=True)
class Opened:
    """A host lets another in, at these addresses; none means that it cannot."""

    rank: int
    taker: int
    at: tuple[Address, ...]


# Down.
@dataclass(frozen=True, slots=True)
class Admit:
    """Let a host in that knows the token."""

    taker: int
    token: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class TakeFrom:
    """Take shared files from this host; from the operator's machine when there is none."""

    source: int | None
    at: tuple[Address, ...] = ()
    token: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class More:
    """Files that are ready to be pushed; `last` when no more will come."""

    files: Mapping[str, FileEntry]
    last: bool


Up = Joined | Wants | Opened
Down = Admit | TakeFrom | More


class RelayProgram:
    """One program of `onhost.relay` on a host. It gets heartbeats until it is closed."""

    def __init__(self, remote: Remote, command: str) -> None:
        """Start it. Raises HostError, RemoteError."""
        self.heard_s = time.monotonic()
        self._host = remote.name
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._process: Process = remote.start([remote.python, "-m", "moectl.hosts.onhost.relay", command])
        threading.Thread(target=self._beat, daemon=True).start()

    def say(self, order: Mapping[str, Any]) -> None:
        """Send an order. Raises Unreachable."""
        self._write(json.dumps(order).encode() + b"\n")

    def answers(self) -> Iterator[dict[str, Any]]:
        """Yield its answers until it ends."""
        with contextlib.suppress(OSError, ValueError):  # closed by another thread
            while line := self._process.stdout.readline():
                answer = parse_answer(line)
                if answer is not None:
                    self.heard_s = time.monotonic()
                    if "alive" not in answer:
                        yield answer

    def close(self) -> None:
        """End the program by its stdin and wait for it; idempotent."""
        self._closed.set()
        with self._lock, contextlib.suppress(OSError, ValueError):
            self._process.stdin.close()
        end_process(self._process, END_S)

    def _beat(self) -> None:
        with contextlib.suppress(MoectlError):
            while not self._closed.wait(BEAT_S):
                self._write(b"\n")

    def _write(self, line: bytes) -> None:
        try:
            with self._lock:
                self._process.stdin.write(line)
                self._process.stdin.flush()
        except (OSError, ValueError):
            raise Unreachable("its relay program has ended", host=self._host) from None


class Giver:
    """The server on a host: lets other hosts take what is whole there."""

    def __init__(self, remote: Remote, addresses: Sequence[str]) -> None:
        """Start it at the host's addresses (those for tensors; none: the one SSH reached). Raises MoectlError."""
        if not addresses:
            addresses = [ask_addresses(remote)[1]]
            if not addresses[0]:
                raise Unreachable("its address is not known", host=remote.name)
        self._program = RelayProgram(remote, "serve")
        self._answers = self._program.answers()
        try:
            self._program.say({"bind": list(addresses)})
            self.at: tuple[Address, ...] = tuple((str(a), int(p)) for a, p in self._read()["at"])
        except BaseException:
            self._program.close()
            raise

    def admit(self, token: str) -> None:
        """Let one connection in that knows this token. Raises MoectlError."""
        self._program.say({"admit": token})
        self._read()

    def offer(self, files: Mapping[str, tuple[str, int]]) -> None:
        """Hand these out from now on: SHA-256 → (path, bytes). Raises Unreachable."""
        self._program.say({"offer": files})

    def close(self) -> None:
        self._program.close()

    def _read(self) -> dict[str, Any]:
        timer = threading.Timer(ANSWER_S, self._program.close)
        timer.start()
        try:
            answer = next(self._answers, {"error": "it has ended"})
        finally:
            timer.cancel()
        if "error" in answer:
            raise Unreachable(f"its relay program cannot listen: {answer.get('reason', answer['error'])}")
        return answer


class Taker:
    """The program on a host that takes files from another host."""

    def __init__(self, remote: Remote, source: TakeFrom, floor: float) -> None:
        self._program = RelayProgram(remote, "take")
        self._program.say({"at": source.at, "token": source.token, "floor": floor})

    def want(self, path: str, entry: FileEntry) -> None:
        """Ask for one more file. Raises Unreachable."""
        self._program.say({"path": path, "bytes": entry.bytes, "sha256": entry.sha256})

    def follow(self, on_bytes: Callable[[int], None], on_done: Callable[[str], bool]) -> str:
        """Tell what arrives until `on_done` (told the SHA-256) returns False; return why it ended, "" for that reason.

        Bytes of a file that did not become whole are taken back.
        """
        begun = 0
        try:
            for answer in self._program.answers():
                if "error" in answer:
                    return str(answer.get("reason", answer["error"]))
                count = int(answer.get("kept", 0)) + int(answer.get("more", 0))
                if count:
                    begun += count
                    on_bytes(count)
                if "done" in answer:
                    begun = 0
                    if not on_done(answer["done"]):
                        return ""
            return "it has ended"
        finally:
            if begun:
                on_bytes(-begun)

    @property
    def is_silent(self) -> bool:
        return time.monotonic() - self._program.heard_s > SILENCE_S

    def close(self) -> None:
        self._program.close()


@dataclass(slots=True)
class _Member:
    lacks_bytes: int  # of shared files
    joined: bool = False
    late: bool = False  # busy with something else; no host waits for it
    place: int | None = None  # in the chain; whole ones stand at its head
    takers: int = 0
    wants_since: float | None = None
    failed: set[int] = field(default_factory=set)
    source: int | None = None


class Chain:
    """The hosts of one deployment, by rank."""

    def __init__(self) -> None:
        self._members: dict[int, _Member] = {}
        self._places = 0

    def expect(self, rank: int, lacks_bytes: int, *, whole: bool = False) -> None:
        """Add a host; a `whole` one has nothing to do, and will join when it is chosen."""
        self._members[rank] = _Member(lacks_bytes, joined=whole, place=HEAD if whole else None)

    def delay(self, rank: int) -> None:
        """Note that a host will be busy for a while before it joins."""
        if rank in self._members:
            self._members[rank].late = True

    def join(self, rank: int) -> None:
        """Note that a host can pass files on as soon as it has them."""
        member = self._members[rank]
        member.joined = True
        if not member.lacks_bytes:
            member.place = HEAD

    def want(self, rank: int, now_s: float, failed: int | None = None) -> None:
        """Note that a host asks for a source; the one that it had, if any, has failed."""
        member = self._members[rank]
        member.wants_since = now_s
        if failed is not None:
            member.failed.add(failed)
            self._leave_source(member)

    def drop(self, rank: int) -> None:
        """Forget a host that has failed."""
        member = self._members.pop(rank, None)
        if member is not None:
            self._leave_source(member)

    def finish(self, rank: int) -> None:
        """Note that a host has all; it goes on passing files on."""
        if rank in self._members:
            self._leave_source(self._members[rank])

    @property
    def is_waiting(self) -> bool:
        """Whether a host waits to be told its source."""
        return any(m.wants_since is not None for m in self._members.values())

    def decide(self, now_s: float) -> list[tuple[int, int | None]]:
        """Return (rank, its source) for every host whose turn has come; None is the operator's machine."""
        decided: list[tuple[int, int | None]] = []
        asking = sorted((m.lacks_bytes, rank) for rank, m in self._members.items() if m.wants_since is not None)
        for _, rank in asking:
            member = self._members[rank]
            if self._should_wait(rank, now_s):
                continue
            member.wants_since = None
            member.source = self._choose(rank)
            if member.source is not None:
                self._members[member.source].takers += 1
            if member.place is None:
                member.place, self._places = self._places, self._places + 1
            decided.append((rank, member.source))
        return decided

    def _should_wait(self, rank: int, now_s: float) -> bool:
        """Whether a host that has more of the files, or a lower rank, is about to join."""
        member = self._members[rank]
        if member.wants_since is None or now_s - member.wants_since >= HOLD_S:
            return False
        mine = (member.lacks_bytes, rank)
        return any((m.lacks_bytes, r) < mine and m.place is None and not m.late for r, m in self._members.items())

    def _choose(self, rank: int) -> int | None:
        member = self._members[rank]
        if len(member.failed) >= MAX_TRIES:
            return None
        place = self._places if member.place is None else member.place
        able = [
            (m.takers, m.place != HEAD, -m.place, r)
            for r, m in self._members.items()
            if r != rank and m.joined and m.place is not None and m.place < place and r not in member.failed
        ]
        return min(able)[-1] if able else None

    def _leave_source(self, member: _Member) -> None:
        if member.source in self._members:
            self._members[member.source].takers -= 1
        member.source = None
