"""Files on this machine: written whole and durably, locked, and a refusal of the disk as an error of ours."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

from moectl.durable import make_directory, sync_directory, sync_file
from moectl.errors import MoectlError, StateError, UsageError
from moectl.text import format_gb

_AGAIN = "run the same command again: it continues"


def explain_refusal(error: OSError, path: Path) -> MoectlError:
    """Return the error for a disk that refused to write `path`."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StateError(
            f"the disk is full: {path} cannot be written ({reason}; {format_gb(free_bytes(path))} free)",
            hint=f"free some space and {_AGAIN}",
        )
    named = error.filename or path
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        hint = "choose another directory with -o, or set XDG_DATA_HOME and XDG_CACHE_HOME"
        return StateError(f"{named} cannot be written: {reason}", hint=hint)
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return UsageError(f"{path} is not a directory", hint="choose another directory with -o")
    return StateError(f"{named} cannot be used: {reason}")


def free_bytes(path: Path) -> int:
    """Return the free bytes of the disk on which `path` is or will be."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def check_destination(path: Path) -> None:
    """Raise UsageError when no file can be made at `path`: before the work whose result it would hold."""
    if path.is_dir():
        raise UsageError(f"{path} is a directory")
    if not os.access(path.absolute().parent, os.W_OK | os.X_OK):
        raise UsageError(f"{path.absolute().parent} is not a directory that can be written to")


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is there complete or not at all. Raises StateError."""
    try:
        replace_file(path, data)
    except OSError as error:
        raise StateError(f"{path} cannot be written: {os.strerror(error.errno or 0)}") from None


def replace_file(path: Path, data: bytes, *, mode: int = 0o666) -> None:
    """Write a file, and its name, durably: it is there complete or not at all. Raises OSError."""
    partial = write_partial(path, data, mode=mode)
    try:
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_partial(path: Path, data: bytes, *, mode: int = 0o666) -> Path:
    """Write the content of a file durably under its partial name, and return that name. Raises OSError."""
    partial = partial_path(path)
    try:
        partial.unlink(missing_ok=True)
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "wb") as f:
            f.write(data)
            f.flush()
            sync_file(f.fileno())
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    return partial


def partial_path(path: Path) -> Path:
    """Return the name that a file has until it is complete."""
    return path.with_name(f".{path.name}.partial")


def append_line(fd: int, line: dict[str, Any]) -> None:
    """Add a line of JSON to an open file, durably. Raises OSError."""
    data = json_line(line)
    while data:
        data = data[os.write(fd, data) :]
    sync_file(fd)


def json_line(line: dict[str, Any]) -> bytes:
    """Return an object as one line of JSON."""
    return json.dumps(line, sort_keys=True).encode() + b"\n"


def try_lock(path: Path, *, mode: int = 0o644) -> int | None:
    """Open a file to read and append, and lock it; None when another process or thread holds the lock.

    Closing the descriptor releases the lock; its holder may remove the file first. Raises OSError.
    """
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, mode)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), path.stat()):
                return fd
        except BlockingIOError:
            os.close(fd)
            return None
        except FileNotFoundError:
            pass
        os.close(fd)  # its last holder removed the name between the two calls


def make_private_directory(directory: Path) -> None:
    """Make a directory, and its parents where they are missing, for this user alone (0700). Raises OSError."""
    make_directory(directory, mode=0o700)
