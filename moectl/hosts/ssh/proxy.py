"""A ProxyCommand: the user's own program that carries a connection, and what it said when it could not.

It is run as ssh runs it: by the user's shell, in the place of that shell.
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

GRACE_S = 2.0  # for a program that hung up to end, and to say why


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
        """Raise Unreachable with its exit code and last words where a connection failed since the command ended."""
        try:
            yield
        except (paramiko.SSHException, OSError, EOFError):
            try:
                code = self._child.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                raise  # it runs, so it is not the one to blame
            self._listener.join(GRACE_S)
            last = self._said.decode("utf-8", "replace").strip().split("\n")[-1].strip()
            raise Unreachable(
                f"its ProxyCommand ended with exit code {code}: {last or 'it said nothing'}",
                host=settings.name,
                hint=f"this has to greet with SSH-2.0: {self.command}",
            ) from None

    def _listen(self) -> None:
        """Keep the last words, and pass none on: they would stand in the middle of moectl's own."""
        assert self._child.stderr is not None
        with self._child.stderr as stderr:
            for line in stderr:
                if line.strip():
                    self._said = line[-4096:]
