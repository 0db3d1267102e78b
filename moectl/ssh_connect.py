"""From a host's settings to a trusted connection: dial, jump, check the host key, notice when the host is gone.

It behaves as `ssh HOST` would: same configuration, jumps and known_hosts. It never asks a question and never accepts a
host key by itself. Which key opens the door is `ssh_login`'s; what the connection is for, `ssh`'s.
"""

from __future__ import annotations

import contextlib
import errno
import math
import shlex
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import paramiko

from moectl.errors import HostError, HostKeyError, Unreachable
from moectl.hosts import parse_host_string
from moectl.ssh_config import SSHSettings, find_known_keys, read_ssh_settings
from moectl.ssh_login import log_in

FAST_CIPHERS = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com")  # 3.6 times the default's speed in paramiko
WINDOW_BYTES = 16 << 20
KEEPALIVE_S = 5.0
DEAD_AFTER_S = 15.0
MAX_JUMPS = 8


def open_transport(
    settings: SSHSettings, config: str | None, opened: contextlib.ExitStack, through: tuple[str, ...] = ()
) -> paramiko.Transport:
    """Connect, check the host key and log in; `opened` closes what was opened, jump hosts last.

    `through` names the hosts to which this one is the jump. The transport ends by itself when nothing was heard of the
    host for DEAD_AFTER_S. Raises Unreachable, HostKeyError, AuthFailed, HostError.
    """
    with _explain(settings, through):
        line = _Line(_dial(settings, config, opened, through))
        transport = paramiko.Transport(cast(paramiko.Channel, line))  # anything like a socket will do
        opened.callback(transport.close)
        options = transport.get_security_options()
        options.ciphers = (*FAST_CIPHERS, *(c for c in options.ciphers if c not in FAST_CIPHERS))
        transport.banner_timeout = 2 * settings.connect_timeout_s  # start_client's time is up first, see below
        transport.auth_timeout = 30.0
        _check_host_key(transport, settings)
        log_in(transport, settings)
        line.watch(transport)
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
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
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
    transport = open_transport(inner, config, opened, (*through, settings.name))
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


class _Line:
    """A socket, or a channel through a jump host, that breaks when the other end falls silent.

    The kernel's own timers see the first hop only, so this asks sshd itself, as ssh's ServerAliveInterval does.
    """

    def __init__(self, sock: Any) -> None:
        self._sock = sock
        self._heard = math.inf  # not watched yet: until the login, paramiko has timeouts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def watch(self, transport: paramiko.Transport) -> None:
        """Ask the host for a sign of life again and again, and expect to hear something from now on."""
        self._heard = time.monotonic()

        def ask() -> None:
            with contextlib.suppress(paramiko.SSHException, OSError, EOFError):
                while transport.is_active():
                    transport.global_request("keepalive@openssh.com", wait=True)
                    time.sleep(KEEPALIVE_S)

        threading.Thread(target=ask, daemon=True).start()

    # paramiko calls these with a timeout of 0.1 s, over and over.
    def recv(self, count: int) -> bytes:
        try:
            data: bytes = self._sock.recv(count)
        except TimeoutError:
            self._give_up()
            raise
        if self._heard != math.inf:
            self._heard = time.monotonic()
        return data

    def send(self, data: bytes) -> int:
        try:
            sent: int = self._sock.send(data)
        except TimeoutError:
            self._give_up()
            raise
        return sent

    def close(self) -> None:
        # A channel says goodbye through the jump host, which may be gone first.
        with contextlib.suppress(paramiko.SSHException, OSError, EOFError):
            self._sock.close()

    def _give_up(self) -> None:
        if time.monotonic() - self._heard > DEAD_AFTER_S:
            # With a number: paramiko formats both parts of an OSError.
            raise ConnectionError(errno.EHOSTDOWN, f"nothing was heard for {DEAD_AFTER_S:g} s")


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
    if not transport.initial_kex_done:  # it returns when the time is up, and says nothing
        raise TimeoutError
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
