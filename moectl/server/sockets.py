"""The sockets that the controller listens on: a Unix socket that only this user can open, and TCP if it is wanted.

They listen before the model is loaded, so a client that comes early waits instead of being refused.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moectl.errors import AlreadyRunning, StateError, UsageError
from moectl.files import make_private_directory

_BACKLOG = 128
_ATTEMPTS, _ATTEMPT_S = 5, 0.1  # to get the lock


@contextlib.contextmanager
def listen_unix(path: Path) -> Iterator[socket.socket]:
    """Listen on a Unix socket of mode 0600 in a directory of mode 0700; the socket's file is removed at the end.

    A lock beside it, which the kernel frees with the process, tells a live controller's socket from a stale one, which
    is replaced. Raises StateError when another controller has it, UsageError when the directory cannot be used.
    """
    _open_directory(path.parent)
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        lock = os.open(path.with_name(path.name + ".lock"), flags, 0o600)
    except OSError as error:
        raise _unfit(path.parent, error) from None
    try:
        _take_lock(lock, path)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            young = path.with_name(path.name + "~")  # under its own name it appears once it listens
            young.unlink(missing_ok=True)
            try:
                listener.bind(str(young))
            except OSError as error:  # mostly: longer than the 104 or 108 bytes that the kernel takes
                raise UsageError(
                    f"cannot listen on {path}: {error.strerror or error}", hint="set XDG_RUNTIME_DIR to a shorter path"
                ) from None
            young.chmod(0o600)  # before it listens, so no other user can have connected
            listener.listen(_BACKLOG)
            young.replace(path)
            try:
                yield listener
            finally:
                path.unlink(missing_ok=True)
    finally:
        os.close(lock)


@contextlib.contextmanager
def beating(path: Path, every_s: float) -> Iterator[None]:
    """Touch the lock beside a socket while the block runs: a sign of life while no request is answered yet."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(every_s):
            with contextlib.suppress(OSError):
                os.utime(path.with_name(path.name + ".lock"))

    thread = threading.Thread(target=beat, name="beat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _take_lock(lock: int, path: Path) -> None:
    """Take the lock and write our pid; `client.is_running` may hold it for a moment, so try more than once."""
    for attempt in range(_ATTEMPTS):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if attempt == _ATTEMPTS - 1:
                raise AlreadyRunning(f"another moectl already listens on {path}", hint="moectl stop") from None
            time.sleep(_ATTEMPT_S)
    os.truncate(lock, 0)
    os.write(lock, f"{os.getpid()}\n".encode())


def _unfit(directory: Path, error: OSError) -> UsageError:
    return UsageError(
        f"cannot use {directory} for the controller's socket: {error.strerror}",
        hint="set XDG_RUNTIME_DIR to a directory of your own that can be written to",
    )


def _open_directory(directory: Path) -> None:
    try:
        make_private_directory(directory)
        status = directory.stat()
    except OSError as error:
        raise _unfit(directory, error) from None
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o022:
        raise UsageError(
            f"{directory} cannot hold the controller's socket: other users can write there",
            hint=f"chmod 700 {directory}",
        )


def listen_tcp(host: str, port: int, *, has_key: bool) -> socket.socket:
    """Listen on a TCP port (0: any free one) of one interface.

    Raises UsageError as `find_interface` does; StateError when the port is taken.
    """
    family, address = find_interface(host, port, has_key=has_key)
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise StateError(
            f"cannot listen on {host} port {port}: {error.strerror}", hint="choose another --port"
        ) from None
    return listener


def find_interface(host: str, port: int, *, has_key: bool) -> tuple[socket.AddressFamily, Any]:
    """Return (family, address) to listen at.

    Raises UsageError when others could come in without a key, or the name is none.
    """
    if not 0 <= port <= 65535:
        raise UsageError(f"port should be between 0 and 65535, it is {port}")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise UsageError(f"cannot listen on {host!r} port {port}: {error}") from None
    family, _, _, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)  # IPv4 if there is one
    if not (has_key or ipaddress.ip_address(address[0]).is_loopback):
        raise UsageError(
            f"refusing to listen on {host} without an API key: every machine that reaches it could use the model",
            hint="give --api-key or --api-key-file, or keep to --host 127.0.0.1",
        )
    return family, address
