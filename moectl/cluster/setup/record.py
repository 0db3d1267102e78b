"""What `setup --apply` ran on which host, written down before it ran, so that `--undo` undoes exactly that.

It is one file of JSON lines in the state directory (0600 in 0700). Lines are only added; the file is removed when
nothing is left to undo. A command whose end is not known counts as run.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moectl.durable import sync_directory
from moectl.errors import StateError
from moectl.files import append_line, try_lock
from moectl.paths import state_dir
from moectl.records import build

SCHEMA = "moectl.setup-record/1"


@dataclass(frozen=True, slots=True)
class RecordedCommand:
    """One command that was begun and not undone."""

    number: int
    host: str  # its address as in the hosts file: user@name:port
    argv: tuple[str, ...]
    undo: tuple[str, ...]
    interface: str | None = None
    address: str | None = None  # that the interface got by it
    needed: bool = True
    done: bool = False  # False: its end is not known


class Record:
    """The open record; made by `open_record`."""

    def __init__(self, path: Path, fd: int, entries: dict[int, RecordedCommand], last: int) -> None:
        self.path = path
        self._fd = fd
        self._entries = entries
        self._last = last

    @property
    def entries(self) -> tuple[RecordedCommand, ...]:
        """Return what could be undone, oldest first."""
        return tuple(self._entries[number] for number in sorted(self._entries))

    def begin(self, entry: RecordedCommand) -> int:
        """Write down a command that is about to run; return its number. Raises StateError.

        One that was run before and not undone, as after a restart, keeps its number and what undoes it.
        """
        for old in self._entries.values():
            if (old.host, old.argv) == (entry.host, entry.argv):
                return old.number
        self._last += 1
        fields = {name: value for name, value in asdict(entry).items() if name not in ("number", "done")}
        self._write({"begin": self._last, "at": int(time.time()), **fields})
        self._entries[self._last] = replace(entry, number=self._last)
        return self._last

    def finish(self, number: int) -> None:
        """Write down that a command succeeded."""
        self._write({"done": number})
        self._entries[number] = replace(self._entries[number], done=True)

    def forget(self, number: int) -> None:
        """Write down that a command was undone, or has failed and changed nothing."""
        self._write({"undone": number})
        self._entries.pop(number, None)

    def _write(self, line: dict[str, Any]) -> None:
        try:
            append_line(self._fd, line)
        except OSError as error:
            raise StateError(f"cannot write {self.path}: {error.strerror}; nothing was run after that") from None


def record_path() -> Path:
    """Return the file on this machine that lists what setup ran on hosts."""
    return state_dir() / "setup.jsonl"


@contextlib.contextmanager
def open_record() -> Iterator[Record]:
    """Hold the record for writing; it is removed afterwards when nothing is left in it.

    Raises StateError when another `setup` holds it, or it cannot be read or written.
    """
    path = record_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.parent.chmod(0o700)
        fd = try_lock(path, mode=0o600)
        if fd is None:
            raise StateError("another moectl setup is running", hint="wait until it has finished")
        os.fchmod(fd, 0o600)
    except OSError as error:
        raise StateError(f"cannot write {path}: {error.strerror}", hint="is XDG_STATE_HOME writable?") from None
    try:
        record = _open(path, fd)
        try:
            yield record
        finally:
            if not record.entries:
                path.unlink(missing_ok=True)
    finally:
        os.close(fd)


def read_record() -> tuple[RecordedCommand, ...]:
    """Return what could be undone, oldest first; nothing where there is no record. Raises StateError."""
    try:
        return tuple(_parse(record_path().read_bytes())[0].values())
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise StateError(f"cannot read {record_path()}: {error.strerror}") from None


def _open(path: Path, fd: int) -> Record:
    with open(fd, "rb", closefd=False) as f:
        data = f.read()
    entries, last, whole = _parse(data)
    record = Record(path, fd, entries, last)
    if not data:
        record._write({"schema": SCHEMA})
        sync_directory(path.parent)
    elif whole < len(data):
        os.ftruncate(fd, whole)  # a power cut left a part of a line
    return record


def _parse(data: bytes) -> tuple[dict[int, RecordedCommand], int, int]:
    """Return (entries by number, the last number, the length of what is whole). Raises StateError when damaged."""
    entries: dict[int, RecordedCommand] = {}
    last = 0
    whole = data.rfind(b"\n") + 1
    for number, text in enumerate(data[:whole].split(b"\n")[:-1], 1):
        try:
            line = json.loads(text)
            last = max(last, _replay(line, entries))
        except (ValueError, TypeError, KeyError, RecursionError, AttributeError):
            raise StateError(
                f"line {number} of {record_path()} is damaged",
                hint='read it: each line with "undo" is a command to type on its host; then remove the file',
            ) from None
    return entries, last, whole


def _replay(line: dict[str, Any], entries: dict[int, RecordedCommand]) -> int:
    """Apply one line to the entries; return its number, 0 for the heading."""
    if "schema" in line:
        if line["schema"] != SCHEMA:
            raise ValueError("another schema")
        return 0
    if "begin" in line:
        number = int(line["begin"])
        fields = {name: value for name, value in line.items() if name not in ("begin", "at")}
        entries[number] = build(RecordedCommand, {**fields, "number": number})
        return number
    number = int(line["done"] if "done" in line else line["undone"])
    if "done" in line:
        entries[number] = replace(entries[number], done=True)
    else:
        del entries[number]
    return number
