"""A ProxyCommand: the user's own program that carries a connection, and its last line when it fails.

It is run as ssh runs it: by the user's shell, which it replaces.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import threading
from collections.abc import Iterator

import paramiko

from moectl.errors import Unreachable
from moectl.hosts.ssh.config import SSHSettings
from moectl.text import last_line

GRACE_S = 2.0  # for a program that closed the connection to end, and to say why


class Proxy:
    """A running ProxyCommand with `sock` as its stdin and stdout."""

    def __init__(self, command: str) -> None:
        self.command = command
        self._said = b""
        self.sock, theirs = socket.socketpair()
        try:
            with theirs:
                self._child = subprocess.Popen(
                    [os.environ.get("SHELL") or "/bin/sh", "-c", f"exec {command}"],
                    stdin=theirs.fileno(),
                    stdout=theirs.fileno(),
                    stderr=subprocess.PIPE,
                    start_new_session=True,
                )
        except BaseException:
            self.sock.close()
            raise
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def close(self) -> None:
        self.sock.close()
        self._child.terminate()
        self._child.wait()

    @contextlib.contextmanager
    def explain(self, settings: SSHSettings) -> Iterator[None]:
        """Raise Unreachable with its exit code and its last line where a connection failed because it ended."""
        try:
            yield
        except (paramiko.SSHException, OSError, EOFError):
            try:
                code = self._child.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                raise  # it still runs, so it is not the cause
            self._listener.join(GRACE_S)
            raise Unreachable(
                f"its ProxyCommand ended with exit code {code}: {last_line(self._said) or 'it printed no reason'}",
                host=settings.name,
                hint=f"this has to greet with SSH-2.0: {self.command}",
            ) from None

    def _listen(self) -> None:
        """Keep the last line, and print none: they would mix with moectl's own output."""
        assert self._child.stderr is not None
        with self._child.stderr as stderr:
            for line in stderr:
                if line.strip():
                    self._said = line[-4096:]
