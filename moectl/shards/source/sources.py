"""The source files of a cut: each is fetched before its use, one ahead of those in use, and released after it.

It decides when files are fetched and released; the supply does it. `writer` reads them.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from moectl.errors import CheckpointError


class Supply(Protocol):
    """Where source files come from: the part of `checkpoint.Checkpoint` that is used here."""

    def path(self, file: str) -> Path: ...
    def prefetch(self, file: str) -> None: ...
    def release(self, file: str) -> None: ...


class Output(Protocol):
    """The part of `recipe.OutputFile` that is used here."""

    @property
    def sources(self) -> tuple[str, ...]: ...


class Cancelled(Exception):
    """Another thread failed, or the user stopped the cut."""


class Sources:
    """Open source files for outputs that are made one by one, in order. All methods may be called on any thread."""

    def __init__(self, supply: Supply, files: Sequence[Output]) -> None:
        self._supply = supply
        self._uses = Counter(file for output in files for file in output.sources)
        self._coming = list(self._uses)  # in the order of their first use
        self._news = threading.Condition()
        self._here: dict[str, int | BaseException] = {}  # open descriptors, or why there is none
        self._asked: set[str] = set()
        self._prefetched: set[str] = set()
        self._cancelled = False

    def open(self, file: str) -> int:
        """Return a file's descriptor as soon as the file is here.

        Raises Cancelled, CheckpointError when it cannot be opened, and what the supply raises.
        """
        with self._news:
            if file not in self._asked:
                self._asked.add(file)
                # A download takes minutes and cannot be stopped: after a cancellation, nothing waits for this thread.
                threading.Thread(target=self._fetch, args=(file,), daemon=True).start()
            while not self._cancelled and file not in self._here:
                self._news.wait()
            if self._cancelled:
                raise Cancelled
            found = self._here[file]
        if isinstance(found, BaseException):
            raise found
        return found

    def done(self, file: str) -> None:
        """Count one output that needs a file as finished; after the last one the file is closed and released."""
        with self._news:
            self._uses[file] -= 1
            if self._uses[file] == 0:
                self._close(file)
                self._supply.release(file)

    def cancel(self) -> None:
        """Wake the threads that wait in `open`; it raises Cancelled there."""
        with self._news:
            self._cancelled = True
            self._news.notify_all()

    def close(self) -> None:
        """Close every descriptor; no thread may read any more."""
        self.cancel()
        with self._news:
            for file in list(self._here):
                self._close(file)

    def _close(self, file: str) -> None:
        found = self._here.pop(file, None)  # it may not have been read
        if isinstance(found, int):
            os.close(found)

    def _fetch(self, file: str) -> None:
        found: int | BaseException
        try:
            found = os.open(self._supply.path(file), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            found = explain_unreadable(file, error)
        except BaseException as error:
            found = error
        with self._news:
            self._here[file] = found
            if self._cancelled:
                self._close(file)
            elif isinstance(found, int):
                self._prefetch()
            self._news.notify_all()

    def _prefetch(self) -> None:
        """Fetch the first file that was not asked for yet: one ahead of those in use."""
        following = next((f for f in self._coming if f not in self._asked), None)
        if following is not None and following not in self._prefetched:
            self._prefetched.add(following)
            self._supply.prefetch(following)


def peak_bytes(files: Sequence[Output], sizes: Mapping[str, int]) -> int:
    """Return the largest size of source files that are here at once while `files` are made, one after another."""
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for turn, output in enumerate(files):
        for file in output.sources:
            first.setdefault(file, turn)
            last[file] = turn
    peak = 0
    for turn in range(len(files)):
        held = sum(sizes[f] for f in first if first[f] <= turn <= last[f])
        following = next((sizes[f] for f in first if first[f] > turn), 0)
        peak = max(peak, held + following)
    return peak


def explain_unreadable(file: str, error: OSError) -> CheckpointError:
    """Return the error that names a source file as the one that cannot be read."""
    return CheckpointError(f"the source file {error.filename or file} cannot be read: {error.strerror or error}")


def fill(fd: int, file: str, offset: int, views: list[memoryview]) -> None:
    """Read a source file from `offset` on into memory, one view after the other. Raises CheckpointError."""
    wanted = sum(map(len, views))
    while wanted:
        try:
            count = os.preadv(fd, views, offset)
        except OSError as error:  # otherwise it would look like an error of the output's disk
            raise explain_unreadable(file, error) from error
        if count == 0:
            raise CheckpointError(f"{file} ended too early: it became shorter while it was read")
        wanted -= count
        offset += count
        while views and count >= len(views[0]):
            count -= len(views.pop(0))
        if views and count:
            views[0] = views[0][count:]
