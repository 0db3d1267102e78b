"""The records of an unfinished `shard`: a lock on its directory, its settings, the files that are done.

They are two files beside the output; both are removed when the manifest has been written.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moectl.errors import StateError
from moectl.files import append_line, json_line, replace_file, try_lock
from moectl.model.manifest import FileEntry, is_count, is_entry, is_inside

NAME = ".moectl-journal.jsonl"
LOCK_NAME = ".moectl-lock"
_AGAIN_S = 0.1


@contextlib.contextmanager
def lock_directory(directory: Path, *, wait_s: float = 0.0) -> Iterator[None]:
    """Lock a directory against a second `shard`.

    Raises StateError when another process or thread holds the lock for more than `wait_s` seconds.
    """
    path = directory / LOCK_NAME
    until_s = time.monotonic() + wait_s
    while (fd := try_lock(path)) is None:
        if time.monotonic() >= until_s:
            raise StateError(
                f"another moectl shard is writing to {directory}", hint="wait until it has finished, or end it"
            )
        time.sleep(_AGAIN_S)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(fd)


class Journal:
    """An append-only list of finished files; its first line holds the settings.

    It is a context manager, so that the file is closed after Ctrl-C at any moment.
    """

    def __init__(self, directory: Path, binding: Mapping[str, Any], done: Mapping[str, FileEntry]) -> None:
        """Start a journal with `done` in it, in the place of an older one; it is durable on return."""
        self.done = dict(done)
        self._path = directory / NAME
        lines = [dict(binding), *(_entry_line(file, entry) for file, entry in self.done.items())]
        replace_file(self._path, b"".join(map(json_line, lines)))
        self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def record(self, file: str, entry: FileEntry) -> None:
        """Add a finished file, durably."""
        append_line(self._fd, _entry_line(file, entry))
        self.done[file] = entry

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


def read_journal(directory: Path) -> tuple[dict[str, Any], dict[str, FileEntry]] | None:
    """Return (binding, finished files) of an interrupted run, None when there is none.

    A broken line, as a power cut leaves it, is ignored with all lines after it. A journal that is not valid, or names a
    file outside the directory, gives two empty dictionaries.
    """
    try:
        data = (directory / NAME).read_bytes()
    except FileNotFoundError:
        return None
    records = []
    for line in data.split(b"\n")[:-1]:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(record, dict):
            break
        records.append(record)
    files = records[0].get("files") if records else None
    if not isinstance(files, dict) or not all(is_inside(f) and is_count(size) for f, size in files.items()):
        return {}, {}
    done = {}
    for record in records[1:]:
        file, entry = record.get("file"), FileEntry(record.get("bytes", -1), record.get("sha256", ""))
        if not isinstance(file, str) or file not in files or not is_entry(entry):
            break
        done[file] = entry
    return records[0], done


def _entry_line(file: str, entry: FileEntry) -> dict[str, Any]:
    return {"file": file, "bytes": entry.bytes, "sha256": entry.sha256}
