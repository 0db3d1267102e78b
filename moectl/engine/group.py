"""How a worker joins the group of all ranks: free ports, the backend's environment, and a check of who is there."""

from __future__ import annotations

import contextlib
import faulthandler
import importlib.metadata
import logging
import os
import platform
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import IO, Any

from moectl import __version__, errors
from moectl.engine.backend_errors import NO_JACCL, explain_backend
from moectl.engine.controller_link import ControllerLink
from moectl.engine.protocol import AllGather, Connect, Connected, Connecting, Listening, Start
from moectl.planner.this_machine import read_macos

_log = logging.getLogger("moectl.worker")


def open_group(link: ControllerLink, start: Start, **of_rank: Any) -> Any:
    """Tell the controller free ports and join the group of all ranks; return None for a single rank.

    `of_rank` is what else Listening tells.
    """
    with contextlib.ExitStack() as ports:
        numbers = [ports.enter_context(_free_port(address)) for address in start.addresses]
        alone = start.world_size == 1
        system: dict[str, Any] = {"macos": read_macos(), "wheel": read_wheel(), "jaccl": None if alone else has_jaccl()}
        link.tell(Listening(own_versions(), numbers, pid=os.getpid(), **system, **of_rank))
        return None if alone else _join(link, start, ports)


def _join(link: ControllerLink, start: Start, ports: contextlib.ExitStack) -> Any:
    """Join the group; the process ends if that takes longer than `init_timeout_s`.

    `ports` holds the ports until the backend takes them over.
    """
    connect: Connect = link.take(Connect)
    import mlx.core as mx

    os.environ.update(connect.env)
    files = {name: _hold(text) for name, text in connect.files.items()}
    os.environ.update({name: f"/dev/fd/{file.fileno()}" for name, file in files.items()})
    ports.close()
    link.tell(Connecting())
    # init holds the interpreter lock, so no Python thread could time it: faulthandler's timer is a C thread.
    faulthandler.dump_traceback_later(start.init_timeout_s, exit=True)
    try:
        with _link_watched():
            if connect.backend == "jaccl":
                if not has_jaccl():  # without macOS's RDMA library, init would crash
                    raise RuntimeError(NO_JACCL)
                group = mx.distributed.init(strict=True, backend="jaccl", all_gather_factory=side_channel(link))
            else:
                group = mx.distributed.init(strict=True, backend=connect.backend)
        _check_peers(group, start, connect.nonce)
    except (RuntimeError, ValueError) as error:
        known = explain_backend(str(error))
        if known is None or isinstance(known, errors.PeerLost):
            raise errors.Unreachable(f"cannot join the {connect.backend} group: {error}") from None
        raise known from None
    finally:
        faulthandler.cancel_dump_traceback_later()
        for file in files.values():
            file.close()
    from moectl.engine.network.exchange import use_backend  # it imports mlx, which reads the variables

    use_backend(connect.backend)
    _log.info("joined over %s as rank %d of %d", connect.backend, start.rank, start.world_size)
    link.tell(Connected(group.rank(), group.size()))
    return group


# Another process watches stdin for its end without reading it, and then kills the worker, which cannot look itself.
_WATCH = """
import os, select, signal, sys
worker = int(sys.argv[1])
if hasattr(select, "kqueue"):  # poll sees no hang-up there unless it waits for input, such as unread heartbeats
    hangs_up, wish = select.kqueue(), [select.kevent(0, select.KQ_FILTER_READ, select.KQ_EV_ADD | select.KQ_EV_CLEAR)]
    while not any(event.flags & select.KQ_EV_EOF for event in hangs_up.control(wish, 1)):
        wish = None
else:
    hangs_up = select.poll()
    hangs_up.register(0, getattr(select, "POLLRDHUP", 0))
    hangs_up.poll()
if os.getppid() == worker:
    os.kill(worker, signal.SIGKILL)
"""


@contextlib.contextmanager
def _link_watched() -> Iterator[None]:
    """Let another process watch the link while the block holds the interpreter lock, which stops our own thread."""
    watcher = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _WATCH, str(os.getpid())],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        watcher.kill()
        watcher.wait()


def _check_peers(group: Any, start: Start, nonce: int) -> None:
    """Check that every place in the group is taken by its rank of this launch, before anything is summed.

    The ring has no handshake: the first process that connects becomes the neighbour.
    """
    import mlx.core as mx

    own = mx.array([[nonce, start.rank, start.world_size]], dtype=mx.int32)
    rows: list[list[int]] = mx.distributed.all_gather(own, group=group).tolist()  # type: ignore[assignment]
    if rows != [[nonce, rank, start.world_size] for rank in range(start.world_size)]:
        raise errors.PeerLost(
            "a process that does not belong to this launch has joined the group",
            hint="run it again; if it fails again, look for the program that connects to this host's ports",
        )


def side_channel(link: ControllerLink) -> Any:
    """Return JACCL's `all_gather_factory`: its start-up exchange goes over the controller instead of a socket."""

    def factory(rank: int, size: int) -> Any:
        def all_gather(source: bytes, n_bytes: int) -> bytes:
            link.tell(AllGather(bytes(source[:n_bytes]).hex()))
            return bytes.fromhex(link.gathered.get().data)

        return all_gather

    return factory


@contextlib.contextmanager
def _free_port(address: str) -> Iterator[int]:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        try:
            listener.bind((address, 0))
        except OSError as error:
            raise errors.HostsError(
                f"cannot listen on {address}: {error.strerror}", hint="give this host's own address with ip="
            ) from None
        yield listener.getsockname()[1]


def _hold(text: str) -> IO[str]:
    """Return an unnamed file, to be read from its beginning: it is gone when this process ends."""
    file = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 - open while the backend starts
    file.write(text)
    file.flush()
    file.seek(0)
    return file


def own_versions() -> dict[str, str]:
    """Return this interpreter's versions of what has to be equal on every rank, and of Python."""
    names = ("mlx", "mlx-lm")
    return {
        "moectl": __version__,
        **{n: importlib.metadata.version(n) for n in names},
        "python": platform.python_version(),
    }


def has_jaccl() -> bool:
    """Return whether this mlx was linked with JACCL and finds macOS's RDMA library."""
    import mlx.core as mx

    return mx.distributed.is_available("jaccl")


def read_wheel() -> str:
    """Return the platform tag of the installed wheel of mlx, "macosx_26_0_arm64"; empty where it is not known."""
    for name in ("mlx-metal", "mlx"):  # on a Mac, the libraries are in the first
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            text = importlib.metadata.distribution(name).read_text("WHEEL") or ""
            if tag := re.search(r"^Tag: \S+-(\S+)$", text, re.MULTILINE):
                return tag[1]
    return ""
