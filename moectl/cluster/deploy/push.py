"""Bring one host its files as they become ready: from this machine, or from another host that has them already.

Files that all hosts share come from another host where one has them (`relay`). All other files, and all when that
fails, come from this machine (`Remote.put`). What has arrived is verified and stays; the manifest goes last.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moectl.cluster.deploy.relay import Admit, Giver, Joined, More, Opened, TakeFrom, Taker, Up, Wants
from moectl.errors import MoectlError, Unreachable
from moectl.hosts.remote import Remote, read_program
from moectl.model import manifest as manifest_file
from moectl.model.manifest import FileEntry

LOOK_S = 5.0  # how often a silent host is looked for


@dataclass(frozen=True, slots=True)
class Found:
    """What is on a host before a push."""

    directory: str
    kept: Mapping[str, FileEntry]  # whole and right
    known: Mapping[str, str]  # SHA-256 of other files, as an earlier push recorded them
    may_lie: bool  # a manifest is there that may promise more than will be true while we push


@dataclass(frozen=True, slots=True)
class PeerLink:
    """A host's part in passing files on: where it can be reached, and how it asks."""

    rank: int
    addresses: Sequence[str]
    tell: Callable[[Up], None]
    floor_bytes_s: float


@dataclass(frozen=True, slots=True)
class Arrived:
    """What a push brought, in bytes; `relayed` is the part of `copied` that came from another host."""

    copied_bytes: int
    kept_bytes: int
    relayed_bytes: int


class Push:
    """The files of one host while they arrive. `run` works in one thread, other threads call the rest."""

    def __init__(
        self, remote: Remote, shards: Path, found: Found, on_bytes: Callable[[int], None], link: PeerLink | None
    ) -> None:
        """With no `link`, nothing is taken from other hosts, nor given to them."""
        self._remote = remote
        self._shards = shards
        self._found = found
        self._on_bytes = on_bytes
        self._link = link
        self._turn = threading.Condition()  # guards what follows
        self._own: deque[str] = deque()
        self._shared: deque[str] = deque()  # not arrived, and not being taken
        self._taking: dict[str, FileEntry] = {}
        self._manifest: str | None = None
        self._entries: dict[str, FileEntry] = {}
        self._here: dict[str, FileEntry] = {n: e for n, e in found.kept.items() if manifest_file.is_shared(n)}
        self._arrived: dict[str, str] = {}
        self._last = False
        self._asked = False
        self._sends_shared = link is None
        self._promise = threading.Lock()  # guards the next
        self._may_lie = found.may_lie
        self._copied_bytes = self._kept_bytes = self._relayed_bytes = 0
        self._taker: Taker | None = None
        self._giver: Giver | None = None
        self._closed = False

    # For other threads.

    def add(self, more: More) -> None:
        """Push these as well, those that were told before not again; files that are there already are only counted."""
        with self._turn:
            for name, entry in more.files.items():
                if self._entries.get(name) == entry:
                    continue
                self._entries[name] = entry
                if self._found.known.get(name) == entry.sha256 and name != manifest_file.NAME:
                    self._keep(name, entry)
                elif name == manifest_file.NAME:
                    self._manifest = name
                elif not manifest_file.is_shared(name):
                    self._own.append(name)
                elif self._taker is not None:
                    self._take(name, self._taker)
                else:
                    self._shared.append(name)
            self._last = self._last or more.last
            self._turn.notify_all()

    def take_from(self, source: TakeFrom) -> None:
        """Take shared files from another host from now on, or from this machine."""
        if source.source is None:
            with self._turn:
                self._sends_shared = True
                self._turn.notify_all()
        else:
            threading.Thread(target=self._take_all, args=(source,), daemon=True).start()

    def admit(self, order: Admit) -> None:
        """Let another host take what is here; tell where it finds it."""
        assert self._link is not None
        at: tuple[tuple[str, int], ...] = ()
        with contextlib.suppress(MoectlError):
            if self._giver is None:
                giver = Giver(self._remote, self._link.addresses)
                with self._turn:
                    self._giver = giver
                    giver.offer(self._offers(self._here))
            self._giver.admit(order.token)
            at = self._giver.at
        self._link.tell(Opened(self._link.rank, order.taker, at))

    # The thread that pushes.

    def run(self) -> Arrived:
        """Push until the last file has arrived. Raises what `Remote.put` raises."""
        if self._link is not None:
            self._link.tell(Joined(self._link.rank))
        try:
            while (name := self._next()) is not None:
                self._take_back_promise()
                entry = self._entries[name]
                path = f"{self._found.directory}/{name}"
                self._remote.put(self._shards / name, path, sha256=entry.sha256, on_bytes=self._on_bytes)
                with self._turn:
                    self._note(name, entry)
        finally:
            self._stop_taking()
            with self._turn:
                arrived = dict(self._arrived)
            record(self._remote, self._found.directory, arrived)
        return Arrived(self._copied_bytes, self._kept_bytes, self._relayed_bytes)

    def close(self) -> None:
        """Let no host take anything any more."""
        with self._turn:
            giver, self._giver, self._closed = self._giver, None, True
        if giver is not None:
            giver.close()

    def _next(self) -> str | None:
        """Return the file to push next, None when all have arrived; wait while there is nothing to do."""
        with self._turn:
            while True:
                if self._shared and self._sends_shared:
                    return self._shared.popleft()
                if self._shared and not self._asked:
                    self._ask(None, "")
                if self._own:
                    return self._own.popleft()
                if self._last and not self._shared and not self._taking:
                    name, self._manifest = self._manifest, None
                    return name if name is None or not self._is_promised(name) else None
                if self._taker is not None and self._taker.is_silent:
                    raise Unreachable("the host stopped answering", host=self._remote.name)
                self._turn.wait(LOOK_S)

    def _take_back_promise(self) -> None:
        """Remove a manifest before anything changes: until the last file is there, none may promise a complete set."""
        with self._promise:
            if self._may_lie:
                self._remote.run(["rm", "-f", "--", f"{self._found.directory}/{manifest_file.NAME}"])
                self._may_lie = False

    def _is_promised(self, name: str) -> bool:
        """Whether the manifest that is there is the right one and was left alone; it is kept then."""
        entry = self._entries[name]
        if self._copied_bytes or not self._may_lie or self._found.known.get(name) != entry.sha256:
            return False
        self._keep(name, entry)
        return True

    def _ask(self, failed: int | None, why: str) -> None:
        assert self._link is not None
        self._asked = True
        self._link.tell(Wants(self._link.rank, failed, why))

    def _keep(self, name: str, entry: FileEntry) -> None:
        self._kept_bytes += entry.bytes
        self._offer(name, entry)

    def _note(self, name: str, entry: FileEntry) -> None:
        self._arrived[name] = entry.sha256
        self._copied_bytes += entry.bytes
        self._offer(name, entry)

    def _offer(self, name: str, entry: FileEntry) -> None:
        if manifest_file.is_shared(name) and name != manifest_file.NAME:
            self._here[name] = entry
            if self._giver is not None:
                with contextlib.suppress(MoectlError):  # the host that takes from this one will notice
                    self._giver.offer(self._offers({name: entry}))

    def _offers(self, files: Mapping[str, FileEntry]) -> dict[str, tuple[str, int]]:
        return {e.sha256: (f"{self._found.directory}/{name}", e.bytes) for name, e in files.items()}

    # The thread that takes.

    def _take_all(self, source: TakeFrom) -> None:
        why = ""
        taker = None
        try:
            self._take_back_promise()
            taker = Taker(self._remote, source, self._link.floor_bytes_s if self._link else 0.0)
            with self._turn:
                if self._closed:
                    return
                self._taker = taker
                while self._shared:
                    self._take(self._shared.popleft(), taker)
            why = taker.follow(self._on_bytes, self._note_taken)
        except Exception as error:
            why = str(error)
        finally:
            if taker is not None:
                taker.close()  # before its files are pushed from here: it holds a lock on one
            self._end_taking(source, why)

    def _take(self, name: str, taker: Taker) -> None:
        entry = self._taking[name] = self._entries[name]
        with contextlib.suppress(MoectlError):  # `follow` will say that it has ended
            taker.want(f"{self._found.directory}/{name}", entry)

    def _note_taken(self, sha256: str) -> bool:
        with self._turn:
            for name in [n for n, e in self._taking.items() if e.sha256 == sha256]:
                entry = self._taking.pop(name)
                self._relayed_bytes += entry.bytes
                self._note(name, entry)
                break  # the same bytes may be wanted under two names
            self._turn.notify_all()
            return bool(self._taking or not self._last)

    def _end_taking(self, source: TakeFrom, why: str) -> None:
        """Give back what did not come, and ask for another source."""
        with self._turn:
            self._taker = None
            left = [*self._taking, *self._shared]
            self._taking.clear()
            self._shared = deque(left)
            if (left or not self._last) and not self._closed:
                self._ask(source.source, why)
            self._turn.notify_all()

    def _stop_taking(self) -> None:
        with self._turn:
            taker, self._closed = self._taker, True
        if taker is not None:
            taker.close()


def record(remote: Remote, directory: str, files: Mapping[str, str]) -> None:
    """Let the host remember files that were just verified: path under `directory` → SHA-256."""
    if not files:
        return
    request = json.dumps({"directory": directory, "files": files}).encode()
    # Unrecorded files cost a re-hash next time, nothing else: do not hide the error that got us here.
    with contextlib.suppress(MoectlError):
        remote.run([remote.python, "-c", read_program("files"), "record"], stdin=request, check=False)
