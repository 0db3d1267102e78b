"""A controller in the background: how one process starts it, and how the new one says that it is ready, or why not.

The first writes a line of JSON to the other's stdin and reads lines from its stdout. After that each may end without
the other. `client` talks to a controller that runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from moectl.errors import MoectlError, RemoteError, StateError, from_json, to_json
from moectl.files import make_private_directory
from moectl.paths import state_dir

VERB = "controller"
SERVICE = "service"  # the name of the log of `serve` that launchd or systemd starts
_MOST_BYTES = 1_000_000  # of a log that is continued
_SILENT_S = 60.0  # without a sign of life: Python itself may take long to start on a busy machine
_TERM_S = 15.0  # for a controller that is told to end while it starts


def start(
    order: Mapping[str, Any], *, name: str, on_log: Callable[[str, str], None], sign: Callable[[], object]
) -> int | None:
    """Start a controller, wait until it is ready, return its TCP port; Ctrl-C ends both. Raises what went wrong there.

    `take_order` returns `order` there; `on_log` gets a host's name and a line of its worker's log until it is ready;
    `sign()` returns a new value from time to time while it lives. Its log is in the state directory, under logs/.
    """
    log = _open_log(name)
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "moectl", VERB],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd="/",
            start_new_session=True,  # Ctrl-C and the terminal's end are not meant for it
        )
    finally:
        os.close(log)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        with contextlib.suppress(BrokenPipeError), process.stdin:
            process.stdin.write(json.dumps(order).encode() + b"\n")
        with process.stdout:
            port = _read_answer(_read_lines(process.stdout.fileno(), sign), name, on_log)
    except BaseException:
        process.terminate()
        try:
            process.wait(_TERM_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise
    # It goes on by itself: without this, Popen would warn that it still runs.
    threading.Thread(target=_reap, args=(process.pid,), daemon=True).start()
    process.returncode = 0
    return port


def _reap(pid: int) -> None:
    with contextlib.suppress(OSError):
        os.waitpid(pid, 0)


def _read_lines(pipe: int, sign: Callable[[], object]) -> Iterator[bytes]:
    """Yield a pipe's lines until its end. Raises StateError when the process that writes gives no sign of life."""
    seen, rest = sign(), b""
    while True:
        if not select.select([pipe], [], [], _SILENT_S)[0]:
            before, seen = seen, sign()
            if seen == before:
                raise StateError("the controller does not answer", hint="run it again; its log may say more")
            continue
        if not (chunk := os.read(pipe, 1 << 16)):
            return
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines


def _read_answer(lines: Iterable[bytes], name: str, on_log: Callable[[str, str], None]) -> int | None:
    for line in lines:
        answer = json.loads(line)
        if "log" in answer:
            on_log(*answer["log"])
        elif "error" in answer:
            raise from_json(answer["error"])
        else:
            port: int | None = answer["ready"]
            return port
    raise RemoteError(f"the controller ended before it was ready{_last_words(name)}", hint=f"see {log_path(name)}")


def _last_words(name: str) -> str:
    with contextlib.suppress(OSError):
        lines = log_path(name).read_text(errors="replace").split("\n")
        return next((f": {line.strip()}" for line in reversed(lines) if line.strip()), "")
    return ""


def log_path(name: str) -> Path:
    """Return the log file of a controller in the background."""
    return state_dir() / "logs" / f"controller-{name}.log"


def _open_log(name: str) -> int:
    path = log_path(name)
    try:
        make_private_directory(path.parent)
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_size > _MOST_BYTES:
                path.unlink()
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except OSError:
        return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)  # without a log it can still run


def bound_log() -> None:
    """Empty the service's log if it has grown long: launchd and systemd only append to it."""
    with contextlib.suppress(OSError):
        log = os.fstat(2)
        if os.path.samestat(log, log_path(SERVICE).stat()) and log.st_size > _MOST_BYTES:
            os.ftruncate(2, 0)


# The other end.

_ready = False


def take_order() -> dict[str, Any]:
    """Return the order of the process that started this one. Raises ValueError when stdin has none."""
    order = json.loads(sys.stdin.buffer.readline())
    if not isinstance(order, dict):
        raise ValueError("not an order")
    return order


def tell_ready(port: int | None) -> None:
    """Say that the controller is ready; nothing more is written to stdout after that."""
    global _ready
    _ready = True
    _tell({"ready": port})
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def tell_log(host: str, line: str) -> None:
    """Pass on a line of a worker's log until all is ready; every rank keeps a log of its own."""
    if _ready:
        return
    print(f"[{host}] {line}", file=sys.stderr, flush=True)  # noqa: T201 - this process's log
    _tell({"log": [host, line]})


def note(text: str) -> None:
    """Write a line to this process's log."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - this process's log


def tell_failure(error: MoectlError) -> None:
    """Say why there will be no controller."""
    _tell({"error": to_json(error)})


def _tell(answer: dict[str, Any]) -> None:
    with contextlib.suppress(OSError, ValueError):  # the process that started it may be gone
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()
