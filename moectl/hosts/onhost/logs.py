# ruff: noqa: PTH116,PTH123
"""The program that reads logs on a host: their last lines, and new lines while its stdin is open.

Its text is sent to the host's own python (`python -c`), so it uses the standard library only and runs from Python 3.9
on. It follows names, not files: it continues when a log is rotated to NAME.1, truncated or replaced. It writes nothing.

    python -c TEXT        {"files", "tail", "since_s", "follow", "last"} on stdin; answers, each a line of JSON behind
                          `ANSWER`:
                          {"file": index, "lines": [[seconds since 1970 or null, text]…]}, {"file", "missing"},
                          {"file", "lost": true} where a log grew faster than it was read, {"done"} after the past lines
"""

from __future__ import annotations

import datetime
import json
import os
import re
import select
import time
from typing import Any

from moectl.hosts.onhost.prelude import read_line, tell

MOST_BYTES = 4_000_000  # of one file's past
POLL_S = 0.2
_BATCH = 500
# A controller's log has "[host] " before the line of a worker.
_STAMP = re.compile(r"(\[[^\]]*\] )?(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:[+-]\d{4}|Z)) ?")
_START = re.compile(r"(?:^|\] )rank (\d+) of \d+ starts on ")  # a worker's first line


def parse_line(text: str) -> list[Any]:
    """Return [its time or None, the rest of the line]."""
    match = _STAMP.match(text)
    if match is None:
        return [None, text]
    try:
        when = datetime.datetime.strptime(match[2].replace("Z", "+0000"), "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except ValueError:
        return [None, text]
    return [when, (match[1] or "") + text[match.end() :]]


class Log:
    """One log by its name: first its past lines, then new ones."""

    def __init__(self, path: str) -> None:
        self.path = os.path.expanduser(path)  # noqa: PTH111
        self._fd = -1
        self._rest = b""  # of a line that is not complete
        self._identity: tuple[int, int] | None = None
        self._position = 0

    def read_past(self) -> list[list[Any]] | None:
        """Return all lines of the log, with those of the rotated file before it; None where there is no log."""
        before = self._read_backup()
        if not self._open():
            return before
        if self._backup_identity() == self._identity:  # rotated between the two
            before = None
        size = os.fstat(self._fd).st_size
        if size > MOST_BYTES:
            self._position = os.lseek(self._fd, size - MOST_BYTES, os.SEEK_SET)
            self._read()
            self._rest = self._rest.partition(b"\n")[2]
        return (before or []) + self.read_new()

    def read_new(self) -> list[list[Any]]:
        """Return the new lines."""
        if self._fd < 0 and not self._open():
            return []
        self._read()
        *complete, self._rest = self._rest.split(b"\n")
        return [parse_line(line.decode("utf-8", "replace").rstrip("\r")) for line in complete]

    def turn(self) -> tuple[list[list[Any]], bool]:
        """Follow the name to a new file if there is one; return the old one's last lines, and whether some are lost."""
        try:
            status = os.stat(self.path)
        except OSError:
            return [], False  # not made yet, or removed
        if self._fd < 0:
            return [], False  # `read_new` opens it
        here = (status.st_dev, status.st_ino)
        if here == self._identity:
            if status.st_size < self._position:  # truncated
                self._position = os.lseek(self._fd, 0, os.SEEK_SET)
                self._rest = b""
            return [], False
        lines = self.read_new()  # what was written before it was renamed
        if self._rest:
            lines.append(parse_line(self._rest.decode("utf-8", "replace")))
        old = self._identity
        os.close(self._fd)
        self._fd, self._rest = -1, b""
        if not self._open():
            return lines, False
        backup = self._backup_identity()
        if backup not in (old, self._identity, None):  # rotated twice since: the file between is the backup now
            lines += self._read_backup() or []
        return lines + self.read_new(), backup not in (old, None)

    def rest(self) -> list[list[Any]]:
        """Return a last line without an end."""
        return [parse_line(self._rest.decode("utf-8", "replace"))] if self._rest else []

    def _open(self) -> bool:
        try:
            self._fd = os.open(self.path, os.O_RDONLY)
        except OSError:
            return False
        status = os.fstat(self._fd)
        self._identity, self._position, self._rest = (status.st_dev, status.st_ino), 0, b""
        return True

    def _read(self) -> None:
        blocks = [self._rest]
        while True:
            block = os.read(self._fd, 1 << 18)
            if not block:
                break
            self._position += len(block)
            blocks.append(block)
        self._rest = b"".join(blocks)

    def _backup_identity(self) -> tuple[int, int] | None:
        try:
            status = os.stat(self.path + ".1")
        except OSError:
            return None
        return (status.st_dev, status.st_ino)

    def _read_backup(self) -> list[list[Any]] | None:
        try:
            with open(self.path + ".1", "rb") as f:
                f.seek(max(0, os.fstat(f.fileno()).st_size - MOST_BYTES))
                data = f.read(MOST_BYTES)
        except OSError:
            return None
        return [parse_line(line.decode("utf-8", "replace")) for line in data.split(b"\n")[:-1]]


def pick(lines: list[list[Any]], tail: int | None, since_s: float | None, now_s: float) -> list[list[Any]]:
    """Return the last lines that are new enough; a line without a time is as old as the one before it."""
    if since_s is not None:
        fresh, kept = False, []
        for line in lines:
            fresh = line[0] >= now_s - since_s if line[0] is not None else fresh
            if fresh:
                kept.append(line)
        lines = kept
    return lines if tail is None else lines[max(0, len(lines) - tail) :]


def last_launch(lines: list[list[Any]]) -> list[list[Any]]:
    """Return the lines of the last launch; a controller's log has the first line of each rank, so the lowest counts."""
    starts = [(int(match[1]), at) for at, line in enumerate(lines) if (match := _START.search(line[1]))]
    if not starts:
        return lines
    lowest = min(rank for rank, _ in starts)
    return lines[max(at for rank, at in starts if rank == lowest) :]


def _tell_lines(index: int, lines: list[list[Any]]) -> None:
    for start in range(0, len(lines), _BATCH):
        tell({"file": index, "lines": lines[start : start + _BATCH]})


def _tell_past(logs: list[Log], request: dict[str, Any]) -> None:
    for index, log in enumerate(logs):
        past = log.read_past()
        if past is None:
            tell({"file": index, "missing": True})
            continue
        if not request["follow"]:
            past += log.rest()
        if request["last"]:
            past = last_launch(past)
        _tell_lines(index, pick(past, request["tail"], request["since_s"], time.time()))
    tell({"done": True})


def _follow(logs: list[Log]) -> None:
    while True:
        ready, _, _ = select.select([0], [], [], POLL_S)
        if ready and not os.read(0, 1 << 12):
            return
        for index, log in enumerate(logs):
            lines = log.read_new()
            more, lost = log.turn()
            if lost:
                tell({"file": index, "lost": True})
            _tell_lines(index, lines + more)


def _main() -> None:
    request = json.loads(read_line(lambda: os.read(0, 1 << 16)))  # not buffered, because `_follow` selects on stdin
    logs = [Log(path) for path in request["files"]]
    _tell_past(logs, request)
    if request["follow"]:
        _follow(logs)


if __name__ == "__main__":
    try:
        _main()
    except BrokenPipeError:  # the asker is gone
        os._exit(0)
