"""From a name to a connection: what macOS refuses to a program that its user started, and Bonjour's names."""

from __future__ import annotations

import errno
import os
import socket
import sys
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest

from moectl.errors import Unreachable
from moectl.hosts.ssh.config import SSHSettings, read_ssh_settings
from moectl.hosts.ssh.connect import _connect, _explain


@pytest.fixture
def settings() -> SSHSettings:
    return read_ssh_settings("mac1", user=None, port=None, config=os.devnull)


@pytest.mark.parametrize(
    ("system", "number", "hint"),
    [
        (
            "darwin",
            errno.EHOSTUNREACH,  # 65 on a Mac
            "if 'ssh mac1' works, macOS's Local Network privacy refuses it to moectl. "
            "System Settings, Privacy & Security, Local Network: allow the terminal that you use, then open it again",
        ),
        ("darwin", errno.ENETUNREACH, "try: ssh mac1"),
        ("linux", errno.EHOSTUNREACH, "try: ssh mac1"),
    ],
)
def test_what_local_network_privacy_refuses(
    settings: SSHSettings, monkeypatch: pytest.MonkeyPatch, system: str, number: int, hint: str
) -> None:
    """Apple's own ssh is exempt, so that trying it shows nothing."""
    monkeypatch.setattr(sys, "platform", system)
    settings = replace(settings, command="ssh mac1")
    with (
        pytest.raises(Unreachable, match="cannot connect: ") as caught,
        _explain(settings, ()),
    ):
        raise OSError(number, os.strerror(number))
    assert caught.value.hint == hint


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("mac1.local", socket.AF_INET),
        ("Mac1.Local.", socket.AF_INET),
        ("mac1.example.org", socket.AF_INET6),  # in the order of the system, as ssh does
    ],
)
def test_bonjours_names_connect_by_ipv4(
    settings: SSHSettings, monkeypatch: pytest.MonkeyPatch, name: str, family: socket.AddressFamily
) -> None:
    """With a link-local IPv6 address in SSH_CONNECTION, the ring would have no address for the host."""
    with ExitStack() as opened:
        found: list[Any] = []
        for kind, address in ((socket.AF_INET6, "::1"), (socket.AF_INET, "127.0.0.1")):
            listener = opened.enter_context(socket.socket(kind))
            try:
                listener.bind((address, 0))
            except OSError:
                pytest.skip("this machine has no IPv6")
            listener.listen()
            found.append((kind, socket.SOCK_STREAM, 0, "", listener.getsockname()))
        monkeypatch.setattr(socket, "getaddrinfo", lambda *asked: found)
        sock = opened.enter_context(_connect(replace(settings, hostname=name)))
        assert sock.family == family
