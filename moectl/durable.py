"""What makes files outlive a power cut: the only place that tells a disk to keep what was written.

Programs on hosts carry this text with them (`hosts.remote.read_program`), so it uses the standard library only,
runs from Python 3.9 on, and imports as little as it can.

Source: fsync(2) and fcntl(2) of macOS. There, fsync only moves bytes to the disk, whose own cache a power cut empties.
"""

from __future__ import annotations

import errno
import fcntl
import os

# What a file system answers that does not know F_FULLFSYNC, as some network and foreign ones do not.
_REFUSALS = (errno.EINVAL, errno.ENOTTY, errno.ENOTSUP, errno.EOPNOTSUPP)


def sync_file(fd: int) -> None:
    """Make all bytes of an open file durable, once, before the file gets its name. Raises OSError."""
    flush = getattr(fcntl, "F_FULLFSYNC", None)  # macOS alone has it
    if flush is not None:
        try:
            fcntl.fcntl(fd, flush)
        except OSError as error:
            if error.errno not in _REFUSALS:
                raise
        else:
            return
    os.fsync(fd)


def write_back(fd: int) -> None:
    """Send a file's bytes to the disk, so that `sync_file` has little left to do later. Raises OSError."""
    os.fsync(fd)


def sync_directory(directory: str | os.PathLike[str]) -> None:
    """Make the names in a directory durable, no later than the next file. Raises OSError."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_directory(directory: str | os.PathLike[str], *, mode: int = 0o777) -> None:
    """Make a directory and its missing parents, and make their names durable. Raises OSError."""
    path = os.fspath(directory)
    if os.path.isdir(path):  # noqa: PTH112
        return
    above = os.path.dirname(path) or "."  # noqa: PTH120
    make_directory(above, mode=mode)
    try:
        os.mkdir(path, mode)  # noqa: PTH102
    except FileExistsError:
        if not os.path.isdir(path):  # noqa: PTH112 - otherwise another process has just made it
            raise
    sync_directory(above)
