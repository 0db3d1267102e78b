# ruff: noqa: PTH105, PTH108, PTH110, PTH111, PTH114, PTH116, PTH118, PTH120, PTH123, PTH208
"""Files on a host: received whole, verified, and remembered, so that they need not be hashed again.

Its text is sent to the host's own python (`python -c`), so it uses the standard library only and runs from Python 3.9
on. moectl also imports it for this machine.

    python -c TEXT receive      files on stdin, each behind a line {"path", "bytes", "sha256"};
                                answers {"kept": n} and takes the rest, then {} or {"error": …}
    python -c TEXT record       remember files that were verified; request on stdin, JSON

Each answer is a line of JSON behind `ANSWER`.
"""

# os.path, not pathlib: paths arrive as strings, and every import is paid on the host at each command.
from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import select
import shutil
import sys
from collections.abc import Callable, Iterable
from typing import Any

from moectl.durable import make_directory, sync_directory, sync_file
from moectl.hosts.onhost.prelude import read_line, tell

BLOCK_BYTES = 1 << 20
IDLE_S = 600.0
STALL_S = 120.0  # a sender that vanished must not hold the lock for ever
RECORD = ".moectl-verified.json"
MADE = ".moectl-made"  # in a root that moectl made: the nearest directory that was there before


class Refusal(Exception):
    """A request that cannot be done; `fields` are the names of its args in `describe_failure`."""

    fields: tuple[str, ...] = ()


class Busy(Refusal):
    """Another push is writing the same file, or another deploy is installing."""


class Cut(Refusal):
    """The sender went away before the file was complete."""


class Full(Refusal):
    """The disk does not have the free bytes that are needed."""

    fields = ("free", "needed")


class Outside(Refusal):
    """A name or a symbolic link leads out of the directory that was named."""

    fields = ("path",)


class Mismatch(Refusal):
    """The bytes have another hash than promised; the second arg is how many of them an earlier push had left."""

    fields = ("sha256", "kept")


def receive(
    read: Callable[[int], bytes],
    destination: str,
    size_bytes: int,
    sha256: str,
    on_kept: Callable[[int], None],
) -> None:
    """Complete `destination.partial` with bytes from `read`, check it, and give it its final name.

    `on_kept(n)` is called once, before the first read: `read` has to continue at byte n. A partial file with
    wrong bytes is removed; a file that is there and right does not change. Raises Busy, Cut, Full, Mismatch, OSError.
    """
    if _check(destination, size_bytes, sha256, None, True):
        on_kept(size_bytes)
        return
    partial = destination + ".partial"
    make_directory(os.path.dirname(destination) or ".")
    # A symbolic link there would be another user's file, and is refused.
    fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | getattr(os, "O_CLOEXEC", 0), 0o644)
    try:
        _lock(fd, partial)
        digest, kept = _hash_prefix(fd, size_bytes)
        free = shutil.disk_usage(os.path.dirname(partial) or ".").free
        if free < size_bytes - kept:
            raise Full(free, size_bytes - kept)
        on_kept(kept)
        _append(fd, read, digest, size_bytes - kept, partial)
        if digest.hexdigest() != sha256:
            os.unlink(partial)
            raise Mismatch(digest.hexdigest(), kept)
        sync_file(fd)
        os.replace(partial, destination)
        sync_directory(os.path.dirname(destination) or ".")
    finally:
        os.close(fd)


def _lock(fd: int, partial: str) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        same = os.path.samestat(os.fstat(fd), os.stat(partial))
    except (BlockingIOError, FileNotFoundError):
        same = False
    if not same:  # the other push renamed it between our open and our lock
        raise Busy(partial)


def _hash_prefix(fd: int, size_bytes: int) -> tuple[Any, int]:
    """Hash what an earlier push left, and return its size; a partial file that is too long starts over."""
    digest = hashlib.sha256()
    kept = os.fstat(fd).st_size
    if kept > size_bytes:
        os.ftruncate(fd, 0)
        kept = 0
    left = kept
    while left:
        block = os.read(fd, min(BLOCK_BYTES, left))
        digest.update(block)
        left -= len(block)
    return digest, kept


def _append(fd: int, read: Callable[[int], bytes], digest: Any, left: int, path: str) -> None:
    while left:
        block = read(min(BLOCK_BYTES, left))
        if not block:
            raise Cut(left)
        digest.update(block)
        try:
            view = memoryview(block)
            while view:
                view = view[os.write(fd, view) :]
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise Full(shutil.disk_usage(os.path.dirname(path) or ".").free, left) from None
            raise
        left -= len(block)


def hash_file(path: str) -> str:
    """Return a file's SHA-256 in lower-case hex."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as f:
        while block := f.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def refuse_names_outside(names: Iterable[str]) -> None:
    """Raise Outside for a relative path that does not stay below where it starts."""
    for name in names:
        if not name or name.startswith("/") or "\0" in name or ".." in name.split("/"):
            raise Outside(name)


def refuse_links_outside(directory: str) -> None:
    """Raise Outside when a symbolic link below a directory leads out of it, or nowhere."""
    base = os.path.realpath(directory)
    for place, directories, files in os.walk(base):
        for name in (*directories, *files):
            path = os.path.join(place, name)
            if os.path.islink(path) and not os.path.realpath(path).startswith(base + os.sep):
                raise Outside(path)


def read_text(path: str) -> str:
    """Return the text of a file; empty where it cannot be read."""
    try:
        with open(path, encoding="utf-8") as f:
            return f.read()
    except (OSError, UnicodeDecodeError):
        return ""


def compare(
    directory: str, files: dict[str, list[Any]], record: dict[str, Any], verify: bool
) -> tuple[dict[str, int], list[str], list[str]]:
    """Compare files {path: [bytes, sha256]} with those on the disk; hash only what `record` does not list as it is.

    Returns (missing or wrong file → bytes of its `.partial`, files that are right, files that exist but are wrong), and
    updates `record`.
    """
    missing: dict[str, int] = {}
    kept, corrupt = [], []
    for name, (size, sha256) in files.items():
        path = os.path.join(directory, name)
        state = _check(path, size, sha256, record.get(name), verify)
        if state is None:
            missing[name] = min(size, size_of(path + ".partial"))
            record.pop(name, None)
            if os.path.exists(path):
                corrupt.append(name)
        else:
            kept.append(name)
            record[name] = state
    return missing, kept, corrupt


def _check(path: str, size: int, sha256: str, known: Any, verify: bool) -> list[Any] | None:
    """Return the record of a right file, None for a wrong one; hash it unless `known` is its record."""
    with contextlib.suppress(OSError):
        status = os.stat(path)
        state = make_stamp(status, sha256)
        if status.st_size == size and ((not verify and known == state) or hash_file(path) == sha256):
            return state
    return None


def make_stamp(status: os.stat_result, sha256: str) -> list[Any]:
    """Return the entry of a file that was hashed; every write to the file changes its times or its inode.

    Times are only compared for equality with this host's own, so its clock may be wrong.
    """
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, sha256]


def size_of(path: str) -> int:
    """Return the bytes of a file; 0 where there is none."""
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def record(request: dict[str, Any]) -> dict[str, Any]:
    """Remember files that `receive` has just verified: {directory, files {path: sha256}}."""
    refuse_names_outside(request["files"])
    known = read_record(request["directory"])
    for name, sha256 in request["files"].items():
        known[name] = make_stamp(os.stat(os.path.join(request["directory"], name)), sha256)
    write_record(request["directory"], known)
    return {}


def read_record(directory: str) -> dict[str, Any]:
    """Return the record of a directory's files: path → `make_stamp`."""
    return read_object(os.path.join(directory, RECORD))


def read_object(path: str) -> dict[str, Any]:
    """Return the JSON object in a file, an empty one where there is none."""
    try:
        found = json.loads(read_text(path) or "{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def write_record(directory: str, known: dict[str, Any]) -> None:
    """Remember the stamps of a directory's files."""
    # Without a record the files are hashed again next time; that is all.
    with contextlib.suppress(OSError):
        write(os.path.join(directory, RECORD), json.dumps(known, sort_keys=True).encode())


def write(path: str, content: bytes) -> None:
    """Write a small file atomically."""
    path = os.path.expanduser(path)
    make_directory(os.path.dirname(path) or ".")
    _drop_stale(path)
    temporary = f"{path}.{os.getpid()}.tmp"
    with open(temporary, "wb") as f:
        f.write(content)
        f.flush()
        sync_file(f.fileno())
    os.replace(temporary, path)
    sync_directory(os.path.dirname(path) or ".")


def _drop_stale(path: str) -> None:
    """Delete the temporary files of processes that were killed while they wrote this file."""
    directory, name = os.path.split(path)
    for found in os.listdir(directory or "."):
        pid = found[len(name) + 1 : -len(".tmp")] if found.startswith(f"{name}.") and found.endswith(".tmp") else ""
        if pid.isdecimal() and not _is_alive(int(pid)):
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(directory, found))


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass
    return True


def describe_failure(error: Exception) -> dict[str, Any]:
    """Return what went wrong as plain data, for the other end of the connection."""
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason, path = error.strerror or str(error), str(error.filename or "")
        return {"error": "os", "reason": reason, "path": path, "full": full}
    if not isinstance(error, Refusal):
        return {"error": "unexpected", "reason": f"{type(error).__name__}: {error}"}
    fields = dict(zip(error.fields, error.args))  # noqa: B905 (python 3.9)
    return {"error": type(error).__name__.replace("Failed", "").lower(), **fields}


def _receive_next() -> bool:
    """Receive one file; False when no more comes."""
    # The sender waits for our answer: no byte of the file follows the line yet.
    line = read_line(lambda: _read_stdin(1 << 16, IDLE_S))
    if not line:
        return False
    header = json.loads(line)
    path = os.path.expanduser(header["path"])
    _hold_directory(os.path.dirname(path) or ".")
    try:
        receive(_read_stdin, path, header["bytes"], header["sha256"], lambda kept: tell({"kept": kept}))
    except Mismatch as error:
        tell(describe_failure(error))
    else:
        tell({})
    return True


_held: dict[str, int] = {}  # directory → descriptor that keeps it locked until this process ends


def _hold_directory(directory: str) -> None:
    """Keep others from receiving into a directory until all our files are there. Raises Busy, OSError."""
    if directory not in _held:
        make_directory(directory)
        fd = os.open(directory, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise Busy(directory) from None
        except OSError:
            pass  # a file system without locks on directories: the lock on each file is left
        _held[directory] = fd


def _read_stdin(count: int, timeout_s: float = STALL_S) -> bytes:
    ready, _, _ = select.select([0], [], [], timeout_s)
    return os.read(0, count) if ready else b""


def _main(command: str) -> None:
    os.umask(0o077)  # only its user may read what is here
    try:
        if command == "receive":
            with contextlib.suppress(AttributeError, OSError):  # Linux only: fewer, larger reads
                fcntl.fcntl(0, fcntl.F_SETPIPE_SZ, BLOCK_BYTES)
            while _receive_next():
                pass
        else:
            tell(record(json.loads(sys.stdin.buffer.read())))
    except Exception as error:
        tell(describe_failure(error))


if __name__ == "__main__":
    _main(sys.argv[1])
