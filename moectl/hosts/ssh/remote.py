"""A host over SSH: the `Remote` contract on paramiko. It runs commands and sends files; `ssh.connect` connects."""

from __future__ import annotations

import contextlib
import json
import logging
import shlex
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import paramiko

from moectl.errors import CommandFailed, IntegrityError, Unreachable
from moectl.hosts.hostfile import Host
from moectl.hosts.login_shell import ANNOUNCE, NOISE_BYTES, encode_line, explain_shell, split_noise
from moectl.hosts.onhost.prelude import parse_answer
from moectl.hosts.refusals import put_error, read_failure, source_size
from moectl.hosts.remote import Completed, check_completed, read_program, refuse_unfit, timeout_error
from moectl.hosts.ssh.config import read_ssh_settings
from moectl.hosts.ssh.connect import WINDOW_BYTES, open_transport
from moectl.hosts.ssh.process import GONE, SSHProcess, close_channel
from moectl.text import last_line

BLOCK_BYTES = 1 << 20
STALL_S = 120.0
VERDICT_S = 600.0  # the host may have to flush gigabytes to a slow disk before it answers

# Every failure becomes one of our errors; paramiko's own log would print tracebacks beside it.
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
        hold_stdin: bool = False,
    ) -> Completed:
        channel = self._execute(argv)
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            close_channel(channel)

        timer = threading.Timer(threading.TIMEOUT_MAX if timeout_s is None else timeout_s, expire)
        timer.daemon = True  # a host that hangs must not keep this process
        try:
            timer.start()
            done = _communicate(channel, stdin, hold_stdin)
        finally:
            timer.cancel()
            close_channel(channel)
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
        told = 0

        def count(more: int) -> None:
            nonlocal told
            told += more
            if on_bytes:
                on_bytes(more)

        try:
            answer = self._send(source, size, destination, sha256, count)
        except _Lost:  # what has arrived is kept on the host
            count(-told)
            try:
                answer = self._send(source, size, destination, sha256, count)
            except _Lost as error:
                raise Unreachable(f"the connection was lost while a file was sent: {error}", host=self.name) from None
        if answer.get("error") == "mismatch" and read_failure(answer, self.name).kept:
            count(-size)  # the partial file of an earlier push was wrong, and has been removed
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
        except GONE as error:
            raise Unreachable(f"the connection was lost: {error}", host=self.name) from None
        return channel

    def _send(
        self, source: Path, size: int, destination: str, sha256: str, count: Callable[[int], None]
    ) -> dict[str, Any]:
        """Send one file to the program that receives on the host, and return its answer."""
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
            with contextlib.suppress(*GONE, _Lost, Unreachable, CommandFailed):  # idle for too long: start another
                return *self._receiver, _offer(*self._receiver, header)
            self._drop_receiver()
        channel = self._execute([self.python, "-c", read_program("files"), "receive"])
        self._receiver = channel, _Answers(channel, self.name)
        try:
            return *self._receiver, _offer(*self._receiver, header)
        except GONE:
            # It ended at once; its last line says why.
            return *self._receiver, self._receiver[1].read()

    def _drop_receiver(self) -> None:
        if self._receiver is not None:
            close_channel(self._receiver[0])
            self._receiver = None


class _Lost(Exception):
    """The receiving program, or the connection to it, ended without a word."""


class _Answers:
    """The answers of a program on the host, without the lines that its login shell prints."""

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
            there = cast(paramiko.Transport, self._channel.transport).is_active()
            raise _Lost("its python was killed" if there else "sshd, or the way to it, is gone")
        said = last_line(self._channel.recv_stderr(1 << 16))
        raise CommandFailed(f"its python cannot receive files: {said or f'exit code {code}'}", host=self._host)


def quote_command(argv: Sequence[str], env: Mapping[str, str] | None = None, *, announce: bool = False) -> str:
    """Return argv as one line for the login shell of the host, which interprets nothing in it.

    A leading `~/` of argv[0] becomes $HOME. With `announce` it prints `BEGUN` before the command begins.
    """
    program = f'"$HOME"/{shlex.quote(argv[0][2:])}' if argv[0].startswith("~/") else shlex.quote(argv[0])
    words = [program, *map(shlex.quote, argv[1:])]
    if env:
        # sshd's AcceptEnv may not allow them. env would read a path with `=` in it as one more variable, sh does not.
        variables = [shlex.quote(f"{key}={value}") for key, value in env.items()]
        words = ["env", *variables, "sh", "-c", """'exec "$0" "$@"'""", *words]
    return encode_line((ANNOUNCE if announce else "") + " ".join(["exec", *words]))


def _communicate(channel: paramiko.Channel, stdin: bytes, hold_stdin: bool) -> Completed:
    """Write stdin and read both outputs at once, so that neither side waits for the other."""
    stderr: list[bytes] = []

    def feed() -> None:
        with contextlib.suppress(*GONE):  # a command may leave its stdin unread
            channel.sendall(stdin)
            if not hold_stdin:
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
            close_channel(channel)  # a shell that prints without end
            break
    threads[1].join()
    code = channel.recv_exit_status()
    return Completed(code, bytes(stdout), b"".join(stderr))


def _offer(channel: paramiko.Channel, answers: _Answers, header: bytes) -> dict[str, Any]:
    channel.settimeout(VERDICT_S)  # it first hashes the partial file of an earlier push
    channel.sendall(header)
    return answers.read()


def _read_kept(answer: Mapping[str, Any], size: int, host: str) -> int:
    kept = answer.get("kept")
    if not isinstance(kept, int) or not 0 <= kept <= size:
        raise CommandFailed("its python gave an answer that makes no sense", host=host)
    return kept


def _stream_file(source: Path, start: int, size: int, channel: paramiko.Channel, count: Callable[[int], None]) -> None:
    """Send a file from `start` on; stop where the host stops reading: its answer says why."""
    left = size - start
    for block in _read_blocks(source, start, left):
        try:
            channel.sendall(cast(bytes, block))  # a view saves paramiko a copy of all that is left
        except GONE:
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
