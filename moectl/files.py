"""What a disk refuses, as our errors; how much it has left; names made durable. It knows nothing of what files hold."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from pathlib import Path

from moectl.errors import MoectlError, StateError, UsageError
from moectl.text import format_gb

_AGAIN = "run the same command again: it continues"


def explain_refusal(error: OSError, path: Path) -> MoectlError:
    """Turn what the disk says when `path` is written into what to do."""
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
    """Return what the disk has left on which `path` is, or will be."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def check_destination(path: Path) -> None:
    """Raise UsageError when no file can be made at `path`, so that nobody works long for one."""
    if path.is_dir():
        raise UsageError(f"{path} is a directory")
    if not os.access(path.absolute().parent, os.W_OK | os.X_OK):
        raise UsageError(f"{path.absolute().parent} is not a directory that can be written to")


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is there complete or not at all. Raises StateError."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise StateError(f"{path} cannot be written: {os.strerror(error.errno or 0)}") from None


def make_directory(path: Path, *, mode: int = 0o777) -> None:
    """Make a directory, with those above it, whose names are durable. Raises OSError."""
    for missing in reversed([p for p in (path, *path.parents) if not p.exists()]):
        missing.mkdir(mode=mode, exist_ok=True)
        sync_directory(missing.parent)


def make_private_directory(directory: Path) -> None:
    """Make a directory, and its parents where they are missing, for this user alone (0700). Raises OSError."""
    make_directory(directory, mode=0o700)


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
