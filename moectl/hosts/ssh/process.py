"""A process on a host behind an SSH channel: its three streams, its exit code, its end."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import IO, Any, cast

import paramiko

from moectl.errors import Unreachable
from moectl.hosts.login_shell import NOISE_BYTES, ShellError, explain_shell, split_noise

GONE = (OSError, EOFError, paramiko.SSHException)  # what paramiko raises on a connection that ends


class SSHProcess:
    """A child at the other end of an exec channel without a terminal."""

    def __init__(self, channel: paramiko.Channel, host: str) -> None:
        self._channel = channel
        self._host = host
        self._killed = False
        self.stdin: IO[bytes] = io.BufferedWriter(_ChannelWriter(channel))
        self.stdout: IO[bytes] = io.BufferedReader(_CommandReader(channel.recv, host), 1 << 16)
        self.stderr: IO[bytes] = io.BufferedReader(_ChannelReader(channel.recv_stderr), 1 << 16)

    def wait(self, timeout_s: float | None = None) -> int:
        if not self._channel.status_event.wait(timeout_s):
            raise TimeoutError(f"still running after {timeout_s:g} s")
        code = self._channel.exit_status
        if code != -1:
            return code
        if self._killed:
            return -9
        if not self._transport.is_active():
            raise Unreachable("the connection was lost", host=self._host)
        return -1

    def kill(self) -> None:
        if self._channel.status_event.is_set():
            return
        self._killed = True
        # Closing the channel alone would wait for a peer that may be gone.
        self._transport.close()

    def close(self) -> None:
        self.kill()
        for stream in (self.stdin, self.stdout, self.stderr):
            with contextlib.suppress(OSError):
                stream.close()
        close_channel(self._channel)

    @property
    def _transport(self) -> paramiko.Transport:
        return cast(paramiko.Transport, self._channel.transport)


class _ChannelReader(io.RawIOBase):
    def __init__(self, receive: Callable[[int], bytes]) -> None:
        self._receive = receive

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._receive(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class _CommandReader(_ChannelReader):
    """A command's own output, without what the login shell prints before it; an error where no command begins."""

    def __init__(self, receive: Callable[[int], bytes], host: str) -> None:
        super().__init__(receive)
        self._host = host
        self._held: bytes | None = b""  # what the shell has said so far; None once the command has begun

    def readinto(self, buffer: Any) -> int:
        while self._held is not None:
            data = self._receive(len(buffer))
            noise, own = split_noise(self._held + data)
            if own is None and (not data or len(noise) > NOISE_BYTES):
                self._held = None
                if noise.strip():  # otherwise the connection was lost, or stderr says why
                    raise ShellError(explain_shell(noise, b"", 0, self._host).message)
                return 0
            self._held = noise if own is None else None
            if own:
                buffer[: len(own)] = own
                return len(own)
        return super().readinto(buffer)


class _ChannelWriter(io.RawIOBase):
    def __init__(self, channel: paramiko.Channel) -> None:
        self._channel = channel

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        try:
            self._channel.sendall(bytes(data))
        except GONE as error:
            raise BrokenPipeError(f"the process is gone: {error}") from None
        return len(data)

    def close(self) -> None:
        if not self.closed:
            with contextlib.suppress(*GONE):
                self._channel.shutdown_write()
        super().close()


def close_channel(channel: paramiko.Channel) -> None:
    """Close a channel, though its connection may just have gone."""
    with contextlib.suppress(*GONE):
        channel.close()
