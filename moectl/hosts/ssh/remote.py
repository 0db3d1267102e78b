"""A host over SSH: the `Remote` contract on paramiko.

It runs commands and sends files; the way to the host is `ssh_connect`'s. It knows nothing of models, shards or ranks.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shlex
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, cast

import paramiko

from moectl.errors import CommandFailed, IntegrityError, Unreachable
from moectl.hosts.hostfile import Host
from moectl.hosts.login_shell import ANNOUNCE, NOISE_BYTES, ShellError, encode_line, explain_shell, split_noise
from moectl.hosts.onhost.prelude import parse_answer
from moectl.hosts.remote import (
    Completed,
    check_completed,
    put_error,
    read_failure,
    read_program,
    refuse_unfit,
    source_size,
    timeout_error,
)
from moectl.hosts.ssh.config import read_ssh_settings
from moectl.hosts.ssh.connect import WINDOW_BYTES, open_transport

BLOCK_BYTES = 1 << 20
STALL_S = 120.0
VERDICT_S = 600.0  # the host may have to flush gigabytes to a slow disk before it answers

# Everything that goes wrong becomes one of our errors; paramiko's own log would print tracebacks beside it.
logging.getLogger("paramiko").setLevel(logging.CRITICAL + 1)


class SSHRemote:
    """One host over SSH. It connects when first used, and again when the connection was lost."""

    def __init__(self, host: Host, *, config: str | None = None) -> None:
        self.name = host.address
        self.python = host.python or "python3"
        self._host = host
        self._config = config
        self._transport: paramiko.Transport | None = None
        self._environment: Mapping[str, str] = {}  # of SetEnv and SendEnv
        self._opened = contextlib.ExitStack()
        self._lock = threading.Lock()
        self._receiver: tuple[paramiko.Channel, _Answers] | None = None

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        timeout_s: float | None = 60.0,
        check: bool = True,
        leash: bool = False,
    ) -> Completed:
        channel = self._execute(argv)
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            _close(channel)

        timer = threading.Timer(timeout_s, expire) if timeout_s is not None else None
        try:
            if timer:
                timer.start()
            done = _communicate(channel, stdin, leash)
        finally:
            if timer:
                timer.cancel()
            _close(channel)
        if expired.is_set():
            raise timeout_error(argv, timeout_s, self.name)
        if done.code == -1 and not cast(paramiko.Transport, channel.transport).is_active():
            raise Unreachable(f"the connection was lost while {shlex.quote(argv[0])} ran", host=self.name)
        noise, stdout = split_noise(done.stdout)
        if stdout is None:
            raise explain_shell(noise, done.stderr, done.code, self.name)
        done = replace(done, stdout=stdout, noise=noise)
        return check_completed(done, argv, self.name) if check else done

    def start(self, argv: Sequence[str], *, env: Mapping[str, str] | None = None) -> SSHProcess:
        return SSHProcess(self._execute(argv, env), self.name)

    def put(
        self, source: Path, destination: str, *, sha256: str, on_bytes: Callable[[int], None] | None = None
    ) -> None:
        size = source_size(source)
        count = on_bytes or (lambda _count: None)
        answer = self._send(source, size, destination, sha256, count)
        if answer.get("error") == "mismatch" and read_failure(answer, self.name).kept:
            count(-size)  # what an earlier push had left was wrong, and is gone now
            answer = self._send(source, size, destination, sha256, count)
        if "error" in answer:
            raise put_error(answer, source, destination, sha256, self.name)

    def close(self) -> None:
        self._drop_receiver()
        with self._lock:
            self._transport = None
            self._opened.close()

    def _connected(self) -> paramiko.Transport:
        with self._lock:
            if self._transport is None or not self._transport.is_active():
                self._opened.close()
                settings = read_ssh_settings(
                    self._host.name, user=self._host.user, port=self._host.port, config=self._config
                )
                with contextlib.ExitStack() as opening:
                    self._transport = open_transport(settings, self._config, opening)
                    self._environment = settings.environment
                    self._opened = opening.pop_all()
            return self._transport

    def _execute(self, argv: Sequence[str], env: Mapping[str, str] | None = None) -> paramiko.Channel:
        refuse_unfit(argv, env, self.name)
        transport = self._connected()
        try:
            channel = transport.open_session(window_size=WINDOW_BYTES, timeout=STALL_S)
            channel.update_environment(self._environment)
            channel.exec_command(quote_command(argv, env, announce=True))
        except paramiko.ChannelException as error:
            raise CommandFailed(f"sshd refused a session: {error.text}", host=self.name) from None
        except (paramiko.SSHException, OSError, EOFError) as error:
            raise Unreachable(f"the connection was lost: {error}", host=self.name) from None
        return channel

    def _send(
        self, source: Path, size: int, destination: str, sha256: str, count: Callable[[int], None]
    ) -> dict[str, Any]:
        """Stream one file into `node.receive` on the host and return its verdict."""
        header = json.dumps({"path": destination, "bytes": size, "sha256": sha256}).encode() + b"\n"
        try:
            channel, answers, answer = self._ask_receiver(header)
            if "error" not in answer:
                kept = _read_kept(answer, size, self.name)
                count(kept)
                channel.settimeout(STALL_S)
                _stream_file(source, kept, size, channel, count)
                channel.settimeout(VERDICT_S)
                answer = answers.read()
        except BaseException:
            self._drop_receiver()
            raise
        if answer.get("error", "mismatch") != "mismatch":
            self._drop_receiver()
        return answer

    def _ask_receiver(self, header: bytes) -> tuple[paramiko.Channel, _Answers, dict[str, Any]]:
        """Offer a file to the program that receives on the host, started on first use; one serves many files."""
        if self._receiver is not None:
            with contextlib.suppress(OSError, Unreachable, CommandFailed):  # idle for too long: start another
                return *self._receiver, _offer(*self._receiver, header)
            self._drop_receiver()
        channel = self._execute([self.python, "-c", read_program("files"), "receive"])
        self._receiver = channel, _Answers(channel, self.name)
        try:
            return *self._receiver, _offer(*self._receiver, header)
        except OSError:
            # It ended at once; its last words say why.
            return *self._receiver, self._receiver[1].read()

    def _drop_receiver(self) -> None:
        if self._receiver is not None:
            _close(self._receiver[0])
            self._receiver = None


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
        _close(self._channel)

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
    """A command's own output: what the login shell prints before it is left out, and told where no command comes."""

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
                if noise.strip():  # without a word it is a connection that was lost, or a shell that says why on stderr
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
        except (OSError, EOFError, paramiko.SSHException) as error:
            raise BrokenPipeError(f"the process is gone: {error}") from None
        return len(data)

    def close(self) -> None:
        if not self.closed:
            with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
                self._channel.shutdown_write()
        super().close()


class _Answers:
    """The lines that `node` prints, told from whatever the host's login shell prints beside them."""

    def __init__(self, channel: paramiko.Channel, host: str) -> None:
        self._channel = channel
        self._host = host
        self._buffer = b""

    def read(self) -> dict[str, Any]:
        while True:
            line, newline, rest = self._buffer.partition(b"\n")
            if newline:
                self._buffer = rest
                answer = parse_answer(line)
                if answer is not None:
                    return answer
                continue
            self._buffer += self._receive()

    def _receive(self) -> bytes:
        try:
            data = self._channel.recv(1 << 16)
        except TimeoutError:
            raise Unreachable("the host stopped answering", host=self._host) from None
        if data:
            return data
        code = self._channel.recv_exit_status()
        if code == -1:
            raise Unreachable("the connection was lost", host=self._host)
        said = self._channel.recv_stderr(1 << 16).strip().decode("utf-8", "replace").split("\n")[-1]
        raise CommandFailed(f"its python cannot receive files: {said or f'exit code {code}'}", host=self._host)


def quote_command(argv: Sequence[str], env: Mapping[str, str] | None = None, *, announce: bool = False) -> str:
    """Return argv as one line for the login shell of the host, in which nothing is interpreted.

    A leading `~/` of argv[0] becomes $HOME. `announce` has `BEGUN` printed before the command begins.
    """
    program = f'"$HOME"/{shlex.quote(argv[0][2:])}' if argv[0].startswith("~/") else shlex.quote(argv[0])
    words = [program, *map(shlex.quote, argv[1:])]
    if env:
        # sshd's AcceptEnv is not to be relied on. A path with `=` in it would be one more variable to env, not to sh.
        variables = [shlex.quote(f"{key}={value}") for key, value in env.items()]
        words = ["env", *variables, "sh", "-c", """'exec "$0" "$@"'""", *words]
    return encode_line((ANNOUNCE if announce else "") + " ".join(["exec", *words]))


def _close(channel: paramiko.Channel) -> None:
    """Close a channel, though its connection may just have gone."""
    with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
        channel.close()


def _communicate(channel: paramiko.Channel, stdin: bytes, leash: bool) -> Completed:
    """Feed stdin and drain both outputs at once, so that neither end waits for the other."""
    stderr: list[bytes] = []

    def feed() -> None:
        with contextlib.suppress(OSError, EOFError, paramiko.SSHException):  # a command need not read its stdin
            channel.sendall(stdin)
            if not leash:
                channel.shutdown_write()

    def drain() -> None:
        while block := channel.recv_stderr(1 << 16):
            stderr.append(block)

    threads = [threading.Thread(target=feed, daemon=True), threading.Thread(target=drain, daemon=True)]
    for thread in threads:
        thread.start()
    stdout = bytearray()
    begun = False
    while block := channel.recv(1 << 16):
        stdout += block
        begun = begun or split_noise(bytes(stdout))[1] is not None
        if not begun and len(stdout) > NOISE_BYTES:
            _close(channel)  # a shell that prints without end
            break
    threads[1].join()
    code = channel.recv_exit_status()
    return Completed(code, bytes(stdout), b"".join(stderr))


def _offer(channel: paramiko.Channel, answers: _Answers, header: bytes) -> dict[str, Any]:
    channel.settimeout(VERDICT_S)  # it first hashes what an earlier push left
    channel.sendall(header)
    return answers.read()


def _read_kept(answer: Mapping[str, Any], size: int, host: str) -> int:
    kept = answer.get("kept")
    if not isinstance(kept, int) or not 0 <= kept <= size:
        raise CommandFailed("its python gave an answer that makes no sense", host=host)
    return kept


def _stream_file(source: Path, start: int, size: int, channel: paramiko.Channel, count: Callable[[int], None]) -> None:
    """Send a file from `start` on; stop where the host stops reading, since its answer tells why."""
    left = size - start
    for block in _read_blocks(source, start, left):
        try:
            channel.sendall(cast(bytes, block))  # a view saves paramiko a copy of all that is left
        except OSError:
            return
        left -= len(block)
        count(len(block))
    if left:
        raise IntegrityError(f"{source} got shorter while it was sent", hint="moectl shard --verify")


def _read_blocks(source: Path, start: int, left: int) -> Iterator[memoryview]:
    """Yield views of one buffer. Raises IntegrityError for what the disk refuses."""
    block = memoryview(bytearray(BLOCK_BYTES))
    try:
        with source.open("rb", buffering=0) as f:
            f.seek(start)
            while left and (got := f.readinto(block[: min(BLOCK_BYTES, left)])):
                left -= got
                yield block[:got]
    except OSError as error:
        raise IntegrityError(f"{source} cannot be read: {error.strerror}", hint="moectl shard --verify") from None
