"""A host over SSH: the `Remote` contract on paramiko, which is imported here and nowhere else.

It behaves as `ssh HOST` would: same configuration, agent, keys, jumps and known_hosts. It never asks a
question and never accepts a host key by itself. It knows nothing of models, shards or ranks.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, cast

import paramiko
from paramiko.agent import AgentSSH

from moectl.errors import AuthFailed, CommandFailed, HostError, HostKeyError, IntegrityError, Unreachable
from moectl.hosts import Host, parse_host_string
from moectl.node import ANSWER
from moectl.remote import (
    Completed,
    check_completed,
    node_text,
    put_error,
    refuse_nul,
    source_size,
    timeout_error,
)
from moectl.ssh_config import SSHSettings, find_known_keys, read_ssh_settings

FAST_CIPHERS = (
    "aes128-gcm@openssh.com",
    "aes256-gcm@openssh.com",
)  # 3.6 times the default's speed in paramiko
BLOCK_BYTES = 1 << 20
WINDOW_BYTES = 16 << 20
KEEPALIVE_S = 5
DEAD_AFTER_S = 15  # a peer that acknowledges nothing for so long is gone
STALL_S = 120.0
VERDICT_S = 600.0  # the host may have to flush gigabytes to a slow disk before it answers
MAX_JUMPS = 8

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
        self._opened = contextlib.ExitStack()
        self._lock = threading.Lock()
        self._receiver: tuple[paramiko.Channel, _Answers] | None = None

    def connect(self) -> None:
        """Connect and log in now. Raises Unreachable, AuthFailed, HostKeyError, HostError."""
        self._connected()

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        timeout_s: float | None = 60.0,
        check: bool = True,
        mutates: bool = False,
    ) -> Completed:
        del mutates  # only a dry run asks
        channel = self._execute(argv)
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            channel.close()

        timer = threading.Timer(timeout_s, expire) if timeout_s is not None else None
        try:
            if timer:
                timer.start()
            done = _communicate(channel, stdin)
        finally:
            if timer:
                timer.cancel()
            channel.close()
        if expired.is_set():
            raise timeout_error(argv, timeout_s, self.name)
        if done.code == -1 and not cast(paramiko.Transport, channel.transport).is_active():
            raise Unreachable(f"the connection was lost while {shlex.quote(argv[0])} ran", host=self.name)
        return check_completed(done, argv, self.name) if check else done

    def start(self, argv: Sequence[str], *, env: Mapping[str, str] | None = None) -> SSHProcess:
        return SSHProcess(self._execute(argv, env), self.name)

    def put(
        self, source: Path, destination: str, *, sha256: str, on_bytes: Callable[[int], None] | None = None
    ) -> None:
        size = source_size(source)
        count = on_bytes or (lambda _count: None)
        answer = self._send(source, size, destination, sha256, count)
        if answer.get("error") == "mismatch" and answer["kept"]:
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
                    self._transport = _open_transport(settings, self._config, opening, ())
                    self._opened = opening.pop_all()
            return self._transport

    def _execute(self, argv: Sequence[str], env: Mapping[str, str] | None = None) -> paramiko.Channel:
        refuse_nul(argv, self.name)
        transport = self._connected()
        try:
            channel = transport.open_session(window_size=WINDOW_BYTES, timeout=STALL_S)
            channel.exec_command(quote_command(argv, env))
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
                count(answer["kept"])
                # A host that stops reading has already said why: its answer tells.
                with contextlib.suppress(OSError):
                    channel.settimeout(STALL_S)
                    _stream_file(source, answer["kept"], size, channel, count)
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
        channel = self._execute([self.python, "-c", node_text(), "receive"])
        self._receiver = channel, _Answers(channel, self.name)
        try:
            return *self._receiver, _offer(*self._receiver, header)
        except OSError:
            # It ended at once; its last words say why.
            return *self._receiver, self._receiver[1].read()

    def _drop_receiver(self) -> None:
        if self._receiver is not None:
            self._receiver[0].close()
            self._receiver = None


class SSHProcess:
    """A child at the other end of an exec channel without a terminal."""

    def __init__(self, channel: paramiko.Channel, host: str) -> None:
        self._channel = channel
        self._host = host
        self._killed = False
        self.stdin: IO[bytes] = io.BufferedWriter(_ChannelWriter(channel))
        self.stdout: IO[bytes] = io.BufferedReader(_ChannelReader(channel.recv), 1 << 16)
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
        self._channel.close()

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
                if line.startswith(ANSWER):
                    return cast(dict[str, Any], json.loads(line[len(ANSWER) :]))
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


def quote_command(argv: Sequence[str], env: Mapping[str, str] | None = None) -> str:
    """Return argv as one line for the login shell of the host, in which nothing is interpreted.

    Every word is quoted, plain ones too: zsh expands `=word`, and a leading `~/` of argv[0] becomes $HOME.
    """
    program = f'"$HOME"/{_quote(argv[0][2:])}' if argv[0].startswith("~/") else _quote(argv[0])
    words = [program, *map(_quote, argv[1:])]
    if env:
        # sshd's AcceptEnv is not to be relied on.
        words = ["env", *(_quote(f"{key}={value}") for key, value in env.items()), *words]
    return " ".join(["exec", *words])


def _quote(word: str) -> str:
    return "'" + word.replace("'", "'\"'\"'") + "'"


def _communicate(channel: paramiko.Channel, stdin: bytes) -> Completed:
    """Feed stdin and drain both outputs at once, so that neither end waits for the other."""
    stderr: list[bytes] = []

    def feed() -> None:
        with contextlib.suppress(OSError, EOFError, paramiko.SSHException):  # a command need not read its stdin
            channel.sendall(stdin)
            channel.shutdown_write()

    def drain() -> None:
        while block := channel.recv_stderr(1 << 16):
            stderr.append(block)

    threads = [threading.Thread(target=feed, daemon=True), threading.Thread(target=drain, daemon=True)]
    for thread in threads:
        thread.start()
    stdout = []
    while block := channel.recv(1 << 16):
        stdout.append(block)
    threads[1].join()
    code = channel.recv_exit_status()
    return Completed(code, b"".join(stdout), b"".join(stderr))


def _offer(channel: paramiko.Channel, answers: _Answers, header: bytes) -> dict[str, Any]:
    channel.settimeout(VERDICT_S)  # it first hashes what an earlier push left
    channel.sendall(header)
    return answers.read()


def _stream_file(source: Path, start: int, size: int, channel: paramiko.Channel, count: Callable[[int], None]) -> None:
    block = memoryview(bytearray(BLOCK_BYTES))
    with _open_source(source) as f:
        f.seek(start)
        left = size - start
        while left and (got := f.readinto(block[: min(BLOCK_BYTES, left)])):
            channel.sendall(cast(bytes, block[:got]))  # a view saves paramiko a copy of all that is left
            left -= got
            count(got)
    if left:
        raise IntegrityError(f"{source} got shorter while it was sent", hint="moectl shard --verify")


def _open_source(source: Path) -> io.FileIO:
    try:
        return source.open("rb", buffering=0)
    except OSError as error:
        raise IntegrityError(f"{source} cannot be read: {error.strerror}", hint="moectl shard --verify") from None


def _open_transport(
    settings: SSHSettings, config: str | None, opened: contextlib.ExitStack, through: tuple[str, ...]
) -> paramiko.Transport:
    """Connect, check the host key and log in; `opened` closes what was opened, jump hosts last."""
    with _explain(settings, through):
        sock = _dial(settings, config, opened, through)
        transport = paramiko.Transport(sock)
        opened.callback(transport.close)
        options = transport.get_security_options()
        options.ciphers = (*FAST_CIPHERS, *(c for c in options.ciphers if c not in FAST_CIPHERS))
        transport.banner_timeout = settings.connect_timeout_s
        transport.auth_timeout = 30.0
        transport.set_keepalive(KEEPALIVE_S)
        _check_host_key(transport, settings)
        _log_in(transport, settings)
    return transport


@contextlib.contextmanager
def _explain(settings: SSHSettings, through: tuple[str, ...]) -> Iterator[None]:
    """Map what paramiko and the sockets raise to the most specific of our errors."""
    way = f" (jump host to {through[0]})" if through else ""
    name = settings.name
    try:
        yield
    except socket.gaierror as error:
        raise Unreachable(
            f"{settings.hostname} has no known address: {error.strerror}{way}",
            host=name,
            hint="check the name in the hosts file, or give it a HostName in ~/.ssh/config",
        ) from None
    except ConnectionRefusedError:
        raise Unreachable(
            f"port {settings.port} refused the connection{way}",
            host=name,
            hint=f"turn on Remote Login there (System Settings, Sharing), then try: {settings.command}",
        ) from None
    except TimeoutError:
        raise Unreachable(
            f"no answer on port {settings.port} within {settings.connect_timeout_s:g} s{way}",
            host=name,
            hint=f"is it on, awake and on this network? Try: {settings.command}",
        ) from None
    except (paramiko.SSHException, OSError, EOFError) as error:
        reason = str(error) or type(error).__name__
        raise Unreachable(f"cannot connect: {reason}{way}", host=name, hint=f"try: {settings.command}") from None


def _dial(settings: SSHSettings, config: str | None, opened: contextlib.ExitStack, through: tuple[str, ...]) -> Any:
    """Return something like a socket to the host's sshd: direct, by ProxyJump or by ProxyCommand."""
    if settings.proxy_jump and settings.proxy_jump[-1] != settings.name:
        return _jump(settings, config, opened, through)
    if settings.proxy_command is not None:
        return _run_proxy(settings.proxy_command, opened)
    sock = socket.create_connection((settings.hostname, settings.port), settings.connect_timeout_s)
    opened.callback(sock.close)
    _watch_peer(sock)
    return sock


def _jump(
    settings: SSHSettings, config: str | None, opened: contextlib.ExitStack, through: tuple[str, ...]
) -> paramiko.Channel:
    if len(through) >= MAX_JUMPS:
        raise HostError(f"ProxyJump goes round in a circle: {' → '.join(through)}", host=settings.name)
    *earlier, last = settings.proxy_jump
    hop = parse_host_string(last.removeprefix("ssh://").rstrip("/")).hosts[0]
    inner = read_ssh_settings(hop.name, user=hop.user, port=hop.port, config=config)
    if earlier:
        inner = replace(inner, proxy_jump=tuple(earlier))
    transport = _open_transport(inner, config, opened, (*through, settings.name))
    channel = transport.open_channel(
        "direct-tcpip",
        (settings.hostname, settings.port),
        ("127.0.0.1", 0),
        window_size=WINDOW_BYTES,
        timeout=settings.connect_timeout_s,
    )
    opened.callback(channel.close)
    return channel


def _run_proxy(command: str, opened: contextlib.ExitStack) -> socket.socket:
    """Start a ProxyCommand with a socket as its stdin and stdout."""
    ours, theirs = socket.socketpair()
    opened.callback(ours.close)
    with theirs:
        child = subprocess.Popen(
            ["/bin/sh", "-c", f"exec {command}"],
            stdin=theirs.fileno(),
            stdout=theirs.fileno(),
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def end() -> None:
        ours.close()
        child.terminate()
        child.wait()

    opened.callback(end)
    return ours


def _watch_peer(sock: socket.socket) -> None:
    """Let the kernel find out that a peer is gone, in seconds instead of a quarter of an hour."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "darwin":
        idle, connection_drop = 0x10, 0x80  # TCP_KEEPALIVE, TCP_RXT_CONNDROPTIME of <netinet/tcp.h>
        wanted = {idle: KEEPALIVE_S, connection_drop: DEAD_AFTER_S}
    else:
        wanted = {socket.TCP_KEEPIDLE: KEEPALIVE_S, socket.TCP_USER_TIMEOUT: DEAD_AFTER_S * 1000}
    wanted |= {socket.TCP_KEEPINTVL: KEEPALIVE_S, socket.TCP_KEEPCNT: 3}
    for option, value in wanted.items():
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, option, value)


def _check_host_key(transport: paramiko.Transport, settings: SSHSettings) -> None:
    """Do the key exchange and compare the host key with the known ones. Raises HostKeyError."""
    known = find_known_keys(settings)
    options = transport.get_security_options()
    types = {kind for kind, _ in known.accepted}
    if "ssh-rsa" in types:
        types |= {"rsa-sha2-512", "rsa-sha2-256"}
    # Ask for a type that is on file, or a host with several keys would look like a changed one.
    options.key_types = sorted(options.key_types, key=lambda kind: kind not in types)
    transport.start_client(timeout=settings.connect_timeout_s)
    key = transport.get_remote_server_key()
    found = (key.get_name(), key.get_base64())
    if found in known.revoked:
        raise HostKeyError("its host key was revoked in known_hosts.", host=settings.name)
    if found in known.accepted:
        return
    if known.accepted:
        remove = [["ssh-keygen", "-R", settings.host_key_name, "-f", str(f)] for f in known.files]
        if known.files == (Path("~/.ssh/known_hosts").expanduser(),):
            remove = [remove[0][:3]]
        commands = " && ".join(map(shlex.join, remove))
        raise HostKeyError(
            "host key changed since you last connected.",
            host=settings.name,
            hint=f"if you reinstalled {settings.name}, run '{commands}', "
            f"then '{settings.command}' once to accept the new key.",
        )
    raise HostKeyError(
        f"its host key is not known here ({key.fingerprint}).",
        host=settings.name,
        hint=f"run '{settings.command}' once, compare the fingerprint and accept the key.",
    )


class _Agent(AgentSSH):
    """The agent at a socket of our choice: IdentityAgent may name another than SSH_AUTH_SOCK."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.sock.settimeout(30.0)
            self.sock.connect(path)
            self._connect(self.sock)  # type: ignore[attr-defined]
        except BaseException:
            self.sock.close()
            raise


def _log_in(transport: paramiko.Transport, settings: SSHSettings) -> None:
    """Offer the agent's keys, then those in files, in ssh's order. Raises AuthFailed."""
    with contextlib.ExitStack() as opened:
        agent_keys = _list_agent_keys(settings, opened)
        tried: list[str] = []
        locked: list[Path] = []
        for label, key in _list_keys(settings, agent_keys, locked):
            if label not in tried:
                tried.append(label)
            try:
                more = transport.auth_publickey(settings.user, key)
            except paramiko.BadAuthenticationType:
                raise _auth_error(settings, "the host takes no keys, and moectl gives no passwords") from None
            except paramiko.AuthenticationException:
                if not transport.is_active():
                    raise _too_many(settings, tried) from None
                continue
            except (paramiko.SSHException, EOFError, OSError):
                raise _too_many(settings, tried) from None
            if more:
                raise _auth_error(settings, f"the host asks for more than a key ({', '.join(more)})")
            return
    raise _no_key_error(settings, tried, locked)


def _list_agent_keys(settings: SSHSettings, opened: contextlib.ExitStack) -> list[paramiko.AgentKey]:
    if settings.agent is None:
        return []
    try:
        agent = _Agent(settings.agent)
    except (OSError, paramiko.SSHException):
        return []
    opened.callback(agent.sock.close)
    return list(agent.get_keys())


def _list_keys(
    settings: SSHSettings, agent_keys: Sequence[paramiko.AgentKey], locked: list[Path]
) -> Iterator[tuple[str, paramiko.PKey]]:
    """Yield (label, key): agent keys that the configuration names, other agent keys, keys in files."""
    public = {blob: path for path in settings.identity_files if (blob := _read_public(path))}
    named = [key for key in agent_keys if key.asbytes() in public]
    others = [] if settings.identities_only else [key for key in agent_keys if key not in named]
    yield from (("agent", key) for key in (*named, *others))
    in_agent = {public[key.asbytes()] for key in named}
    for path in settings.identity_files:
        if path in in_agent or not path.is_file():
            continue
        try:
            yield path.name, paramiko.PKey.from_path(path)
        except (TypeError, paramiko.PasswordRequiredException):
            locked.append(path)
        except Exception:
            # Security keys, foreign formats, unreadable files: ssh skips them too.
            continue


def _read_public(path: Path) -> bytes | None:
    try:
        words = Path(f"{path}.pub").read_text(encoding="utf-8").split()
        return paramiko.pkey.PublicBlob.from_string(" ".join(words[:2])).key_blob
    except (OSError, ValueError, IndexError, UnicodeDecodeError):
        return None


def _auth_error(settings: SSHSettings, reason: str, hint: str | None = None) -> AuthFailed:
    hint = hint or f"this has to work without a question: {settings.command}"
    return AuthFailed(f"cannot log in as {settings.user}: {reason}.", host=settings.name, hint=hint)


def _too_many(settings: SSHSettings, tried: Sequence[str]) -> AuthFailed:
    hint = f"under 'Host {settings.name}' in ~/.ssh/config set IdentityFile and 'IdentitiesOnly yes'"
    return _auth_error(settings, f"the host hung up after too many keys (tried {', '.join(tried)})", hint)


def _no_key_error(settings: SSHSettings, tried: Sequence[str], locked: Sequence[Path]) -> AuthFailed:
    port = f"-p {settings.port} " if settings.port != 22 and settings.name == settings.hostname else ""
    copy = f"ssh-copy-id {port}{settings.user}@{settings.name}"
    if locked:
        names = ", ".join(path.name for path in locked)
        also = f", tried {', '.join(tried)}" if tried else ""
        reason = f"no key was accepted ({names} needs a passphrase and is not in an agent{also})"
        return _auth_error(settings, reason, f"ssh-add {shlex.quote(str(locked[0]))}")
    if not tried:
        return _auth_error(settings, "there is no key to offer", f"ssh-keygen -t ed25519, then {copy}")
    return _auth_error(settings, f"no key was accepted (tried {', '.join(tried)})", copy)
