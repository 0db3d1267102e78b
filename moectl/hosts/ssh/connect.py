"""From a host's settings to a trusted connection: connect, jump, check the host key, notice when the host is gone.

It behaves as `ssh HOST` does: same configuration, jumps and known_hosts. It never asks a question and never accepts a
host key by itself. `ssh.trust` checks the host's key, `ssh.login` logs in.
"""

from __future__ import annotations

import contextlib
import errno
import math
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import paramiko

from moectl.errors import HostError, HostsError, Unreachable
from moectl.hosts.hostfile import Host, parse_host_string
from moectl.hosts.macos import LOCAL_NETWORK, LOCAL_NETWORK_FIX
from moectl.hosts.ssh.algorithms import Transport, nothing_in_common, restrict
from moectl.hosts.ssh.config import SSHSettings, read_ssh_settings
from moectl.hosts.ssh.login import log_in
from moectl.hosts.ssh.proxy import Proxy
from moectl.hosts.ssh.trust import Shown, check_host_key, find_known_keys

WINDOW_BYTES = 16 << 20
KEEPALIVE_S = 5.0
DEAD_AFTER_S = 15.0
MAX_JUMPS = 8


def open_transport(
    settings: SSHSettings, config: str | None, opened: contextlib.ExitStack, through: tuple[str, ...] = ()
) -> paramiko.Transport:
    """Connect, check the host key and log in; `opened` closes what was opened, jump hosts last.

    `through` names the hosts for which this one is the jump host. The transport ends by itself when the host has sent
    nothing for DEAD_AFTER_S. Raises Unreachable, HostKeyError, AuthFailed, HostError.
    """
    with _explain(settings, through), contextlib.ExitStack() as explained:
        line = _Line(_dial(settings, config, opened, through, explained))
        transport = Transport(cast(paramiko.Channel, line))  # paramiko takes any object like a socket
        opened.callback(transport.close)
        transport.banner_timeout = 2 * settings.connect_timeout_s  # longer than the timeout of start_client in `_start`
        transport.auth_timeout = 30.0
        _start(transport, settings, line)
        log_in(transport, settings)
        line.watch(transport)
    return transport


@contextlib.contextmanager
def _explain(settings: SSHSettings, through: tuple[str, ...]) -> Iterator[None]:
    """Turn the errors of paramiko and of sockets into the most specific of ours."""
    way = f" (jump host to {through[0]})" if through else ""
    name = settings.name
    try:
        yield
    except socket.gaierror as error:
        hint, family = "check the name in the hosts file, or give it a HostName in ~/.ssh/config", ""
        if (wanted := settings.values.get("addressfamily", "any")) != "any":
            hint = "remove AddressFamily from ~/.ssh/config for this host, or give it another HostName there"
            family = f" of AddressFamily {wanted}"
        subject = "the name" if settings.hostname == name else settings.hostname  # the name stands before the message
        message = f"{subject} has no known address{family}: {error.strerror}{way}"
        raise Unreachable(message, host=name, hint=hint) from None
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
        hint = f"try: {settings.command}"
        if sys.platform == "darwin" and getattr(error, "errno", None) == errno.EHOSTUNREACH:
            hint = f"if '{settings.command}' works, {LOCAL_NETWORK} to moectl. {LOCAL_NETWORK_FIX}"
        raise Unreachable(f"cannot connect: {reason}{way}", host=name, hint=hint) from None


def _dial(
    settings: SSHSettings,
    config: str | None,
    opened: contextlib.ExitStack,
    through: tuple[str, ...],
    explained: contextlib.ExitStack,
) -> Any:
    """Return a socket, or an object like one, to the host's sshd: direct, by ProxyJump or by ProxyCommand."""
    if settings.proxy_jump and settings.proxy_jump[-1] != settings.name:
        return _jump(settings, config, opened, through)
    if settings.proxy_command is not None:
        proxy = Proxy(settings.proxy_command)
        opened.callback(proxy.close)
        explained.enter_context(proxy.explain(settings))
        return proxy.sock
    sock = _connect(settings)
    opened.callback(sock.close)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def _connect(settings: SSHSettings) -> socket.socket:
    """Try each address of the host, as many times as ConnectionAttempts says."""
    values = settings.values
    family = {"inet": socket.AF_INET, "inet6": socket.AF_INET6}.get(values.get("addressfamily", ""), socket.AF_UNSPEC)
    attempts = int(values.get("connectionattempts", 1))
    while True:
        attempts -= 1
        problem: OSError | None = None
        for found in _resolve(settings.hostname, settings.port, family):
            try:
                return _connect_to(found[0], found[4], settings)
            except OSError as error:
                problem = error
        if attempts <= 0:
            raise problem or TimeoutError()
        time.sleep(1)


def _resolve(name: str, port: int, family: int) -> list[tuple[Any, ...]]:
    """Return the addresses of a name in the order to try them: of Bonjour's names (.local), those of IPv4 first.

    They have link-local IPv6 addresses as well, and the ring would learn such a one as the host's own.
    """
    found: list[tuple[Any, ...]] = list(socket.getaddrinfo(name, port, family, socket.SOCK_STREAM))
    if name.lower().rstrip(".").endswith(".local"):
        found.sort(key=lambda address: address[0] != socket.AF_INET)
    return found


def _connect_to(family: int, address: Any, settings: SSHSettings) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(settings.connect_timeout_s)
        if bind := settings.values.get("bindaddress"):
            try:
                sock.bind(socket.getaddrinfo(bind, None, family, socket.SOCK_STREAM)[0][4])
            except OSError as error:
                hint = "correct BindAddress in ~/.ssh/config: it has to be an address of this machine"
                raise HostError(f"BindAddress {bind}: {error.strerror}", host=settings.name, hint=hint) from None
        sock.connect(address)
    except BaseException:
        sock.close()
        raise
    return sock


def _jump(
    settings: SSHSettings, config: str | None, opened: contextlib.ExitStack, through: tuple[str, ...]
) -> paramiko.Channel:
    if len(through) >= MAX_JUMPS:
        raise HostError(f"ProxyJump goes round in a circle: {' → '.join(through)}", host=settings.name)
    *earlier, last = settings.proxy_jump
    hop = _parse_hop(last, settings)
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


def _parse_hop(text: str, settings: SSHSettings) -> Host:
    """Read one hop of ProxyJump: [user@]host[:port], or the same as a URI."""
    try:
        return parse_host_string(text.removeprefix("ssh://").rstrip("/")).hosts[0]
    except HostsError:
        raise HostError(
            f"ProxyJump {text} is not [user@]host[:port]",
            host=settings.name,
            hint="correct ProxyJump in ~/.ssh/config; it takes the tokens %%, %h, %n, %p and %r",
        ) from None


class _Line:
    """A socket, or a channel through a jump host, that breaks when the other end stops answering.

    The kernel's own timers see only the first hop, so this asks sshd itself, as ssh's ServerAliveInterval does.
    """

    def __init__(self, sock: Any) -> None:
        self._sock = sock
        direct = isinstance(sock, socket.socket) and sock.family in (socket.AF_INET, socket.AF_INET6)
        self.address = str(sock.getpeername()[0]) if direct else None
        self.first = b""  # the beginning of its greeting: SSH-2.0, or a reason
        self._heard = math.inf  # not watched yet: until the login, paramiko's timeouts are enough

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def watch(self, transport: paramiko.Transport) -> None:
        """Send keepalive requests, and expect that the host sends something from now on."""
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
        else:
            self.first = (self.first + data)[:400]
        return data

    def send(self, data: bytes) -> int:
        try:
            sent: int = self._sock.send(data)
        except TimeoutError:
            self._give_up()
            raise
        return sent

    def close(self) -> None:
        # Closing a channel sends a message through the jump host, which may be gone already.
        with contextlib.suppress(paramiko.SSHException, OSError, EOFError):
            self._sock.close()

    def _give_up(self) -> None:
        if time.monotonic() - self._heard > DEAD_AFTER_S:
            # With a number, because paramiko prints both parts of an OSError.
            raise ConnectionError(errno.EHOSTDOWN, f"the host sent nothing for {DEAD_AFTER_S:g} s")


def _start(transport: Transport, settings: SSHSettings, line: _Line) -> None:
    """Do the key exchange and check the host key. Raises HostKeyError, HostError, Unreachable."""
    known = find_known_keys(settings)
    restrict(transport, known, settings)
    try:
        transport.start_client(timeout=settings.connect_timeout_s)
    except paramiko.SSHException:
        if found := nothing_in_common(transport, settings):
            raise found from None
        if not transport.remote_version:
            said = " ".join(line.first.decode("utf-8", "replace").split())[:200]
            silent = "it closed the connection before it greeted"
            reason = f"it does not greet as an SSH server: {said}" if said else silent
            raise paramiko.SSHException(reason) from None
        raise
    if not transport.initial_kex_done:  # it returns after its timeout, without an error
        raise TimeoutError
    key = transport.get_remote_server_key()
    blob = getattr(key, "public_blob", None)
    check_host_key(Shown(key, blob.key_blob if blob else None), known, settings, line.address)
