"""Talk to a controller over its Unix socket: the HTTP API that all clients have, and what only its owner may do.

It finds controllers by their sockets and raises the errors that they send. `background` starts them.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import os
import select
import signal
import socket
import threading
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moectl.engine.protocol import Done
from moectl.engine.request import Stats
from moectl.errors import MoectlError, RemoteError, StateError, from_json
from moectl.paths import runtime_dir
from moectl.server.contracts import NOTICE, SILENCE_S, Notice, Thinking
from moectl.server.replies import hint_suffix

Events = Generator[str | Thinking | Done | Notice, None, None]  # of an answer: pieces of its text, then Done

SUFFIX = ".sock"
_NOTICE = f": {NOTICE}".encode()
_CONNECT_S = 5.0
_ANSWER_S = 30.0  # for what needs no computing
_BUSY_S = 3.0  # a controller that does not answer a stop within this time loads, or hangs
_SILENT_S = 4 * SILENCE_S  # a controller without a sign of life for this long is frozen


def socket_path(key: str) -> Path:
    """Return where the controller of this key listens (`target.target_key`)."""
    return runtime_dir() / f"{key}{SUFFIX}"


def find_running() -> list[Path]:
    """Return the sockets of all controllers of this user that live; stale ones are left out."""
    return [path for path in sorted(runtime_dir().glob(f"*{SUFFIX}")) if is_running(path)]


def is_running(path: Path) -> bool:
    """Whether a controller has this socket: it holds the lock beside it for as long as it lives."""
    try:
        lock = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return path.exists()
    finally:
        os.close(lock)
    return False


def last_beat(path: Path) -> int:
    """Return a number that changes while the controller of this socket lives and cannot answer (`sockets.beating`)."""
    try:
        return path.with_name(path.name + ".lock").stat().st_mtime_ns
    except OSError:
        return 0


@dataclass(frozen=True, slots=True)
class Client:
    """A controller, by its socket."""

    path: Path

    def describe(self, *, timeout_s: float | None = _ANSWER_S) -> dict[str, Any]:
        """Return what it runs and how it is; with None, waits for as long as it loads.

        Raises StateError when it does not answer, or gives no sign of life.
        """
        return self._ask("GET", "/moectl", timeout_s=timeout_s)

    def keep_alive(self, seconds: float, *, asks: bool) -> None:
        """Let it stay for this long when idle, below 0 for ever; `asks`: a question is about to come."""
        self._ask("POST", f"/moectl/keep-alive?seconds={seconds}&asks={int(asks)}")

    def stop(self, grace_s: float) -> dict[str, Any] | None:
        """End it, after answers in progress had this many seconds; return its last description once it has gone.

        A controller that does not answer, because it loads, is leaving or was stopped, gets SIGTERM; then there is no
        description. With 0 s it is killed if it does not end by itself. Raises StateError when it does not end.
        """
        described: dict[str, Any] | None = None
        try:
            described = self._ask("POST", f"/moectl/stop?grace_s={grace_s}", timeout_s=_BUSY_S)
        except (StateError, RemoteError):
            self._signal(signal.SIGTERM, signal.SIGCONT)  # the second lets it hear the first
        if self.wait_until_gone(grace_s + _ANSWER_S):
            return described
        if grace_s:
            raise StateError("the controller does not end", hint="moectl stop --now")
        self._signal(signal.SIGKILL)  # its links to the workers end with it, and so do they
        if not self.wait_until_gone(_ANSWER_S):
            raise StateError("the controller cannot be killed", hint=f"ps -p {self._pid()} says what holds it")
        return described

    def _signal(self, *numbers: int) -> None:
        if is_running(self.path) and (pid := self._pid()) is not None:
            with contextlib.suppress(OSError):
                for number in numbers:
                    os.kill(pid, number)

    def _pid(self) -> int | None:
        with contextlib.suppress(OSError, ValueError):
            return int(self.path.with_name(self.path.name + ".lock").read_text())
        return None

    def wait_until_gone(self, timeout_s: float) -> bool:
        """Return whether it has ended within this time."""
        gone = threading.Thread(target=_wait_for_lock, args=(self.path,), daemon=True)
        gone.start()
        gone.join(timeout_s)
        return not gone.is_alive()

    def chat(self, fields: Mapping[str, Any]) -> Events:
        """Yield a chat completion as it comes; closing the iterator cancels it. `fields` are the API's."""
        return self._stream("/v1/chat/completions", fields)

    def complete(self, fields: Mapping[str, Any]) -> Events:
        """Yield a completion of a raw prompt as it comes; closing the iterator cancels it."""
        return self._stream("/v1/completions", fields)

    def _ask(self, method: str, path: str, *, timeout_s: float | None = _ANSWER_S) -> dict[str, Any]:
        with contextlib.closing(_Connection(self.path, timeout_s or _SILENT_S)) as connection:
            _send(connection, method, path)
            if timeout_s is None:
                self._wait_for_sign(connection.sock)
            return _read_json(_receive(connection))

    def _wait_for_sign(self, connection: socket.socket) -> None:
        """Wait until something can be read, for as long as the controller lives and cannot answer yet."""
        beat = last_beat(self.path)
        while not select.select([connection], [], [], _SILENT_S)[0]:
            before, beat = beat, last_beat(self.path)
            if beat == before:
                raise _silent()

    def _stream(self, path: str, fields: Mapping[str, Any]) -> Events:
        body = json.dumps({**fields, "stream": True}).encode()
        with contextlib.closing(_Connection(self.path, _SILENT_S)) as connection:
            _send(connection, "POST", path, body)
            response = _receive(connection)
            if response.status != 200:
                _read_json(response)
            for line in _lines(response):
                if line.startswith(b"data: {"):
                    yield from _read_chunk(json.loads(line[len(b"data: ") :]))
                elif line.startswith(b"data: [DONE]"):
                    return
                elif line.startswith(_NOTICE):
                    yield Notice(line[len(_NOTICE) :].decode("utf-8", "replace").strip())
        raise _lost()


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("localhost")
        self._path = path
        self._timeout_s = timeout_s

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(_CONNECT_S)
        self.sock.connect(str(self._path))
        self.sock.settimeout(self._timeout_s)


def _send(connection: _Connection, method: str, path: str, body: bytes | None = None) -> None:
    with _explained():
        connection.request(method, path, body, {"content-type": "application/json"} if body is not None else {})


def _receive(connection: _Connection) -> http.client.HTTPResponse:
    with _explained():
        return connection.getresponse()


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Explain a controller that does not answer, or that has broken the connection."""
    try:
        yield
    except TimeoutError:
        raise _silent() from None
    except (OSError, http.client.HTTPException):
        raise _lost() from None


def _read_json(response: http.client.HTTPResponse) -> dict[str, Any]:
    try:
        with _explained():
            body: dict[str, Any] = json.loads(response.read())
    except ValueError:
        raise _lost() from None
    if response.status != 200:
        raise _rebuild(body.get("error", {}))
    return body


def _lines(response: http.client.HTTPResponse) -> Iterator[bytes]:
    while True:
        with _explained():
            line = response.readline()
        if not line:
            return
        yield line


def _read_chunk(chunk: dict[str, Any]) -> Iterator[str | Thinking | Done]:
    if "error" in chunk:
        raise _rebuild(chunk["error"])
    for choice in chunk["choices"]:
        text = choice["delta"].get("content") if "delta" in choice else choice.get("text")
        if thinking := choice.get("delta", {}).get("reasoning_content"):
            yield Thinking(thinking)
        if text:
            yield text
        if choice.get("finish_reason") is not None:
            yield Done(0, choice["finish_reason"], Stats(**choice["stats"]))


def _rebuild(error: Mapping[str, Any]) -> MoectlError:
    """Return the error that a controller sent, of the same class."""
    message = str(error.get("message", "the controller failed")).removesuffix(hint_suffix(error.get("hint")))
    if host := error.get("host"):
        message = message.removeprefix(f"{host}: ")  # the error puts it there again
    return from_json({**error, "message": message})


def _silent() -> MoectlError:
    return StateError("the controller does not answer", hint="moectl stop --now, then run it again")


def _lost() -> MoectlError:
    return RemoteError("the controller has gone", hint="run the command again: it starts a new one")


def _wait_for_lock(path: Path) -> None:
    with contextlib.suppress(OSError):
        lock = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_SH)
        finally:
            os.close(lock)
