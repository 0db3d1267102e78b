"""Hosts that offer few algorithms: what works, and what an error says to set where nothing is in common."""

from __future__ import annotations

from pathlib import Path

import pytest

from moectl.errors import HostError, Unreachable
from tests.support.beside import ask_moectl, both_get_in, both_refuse, compare
from tests.support.sshd import Server, run_sshd

AEAD = "Ciphers aes256-gcm@openssh.com,aes128-gcm@openssh.com"


@pytest.mark.parametrize(
    "lines",
    [
        ("KexAlgorithms curve25519-sha256",),
        ("KexAlgorithms curve25519-sha256@libssh.org",),
        ("KexAlgorithms diffie-hellman-group16-sha512",),
        ("KexAlgorithms ecdh-sha2-nistp521",),
        ("Ciphers aes256-gcm@openssh.com", "MACs umac-128-etm@openssh.com"),  # GCM needs no MAC
        (AEAD, "MACs hmac-sha1"),
        ("Ciphers aes256-ctr", "MACs hmac-sha2-512-etm@openssh.com"),
        (  # what a well-known guide leaves
            "KexAlgorithms sntrup761x25519-sha512@openssh.com,curve25519-sha256,diffie-hellman-group16-sha512",
            "Ciphers chacha20-poly1305@openssh.com,aes256-gcm@openssh.com,aes128-gcm@openssh.com,aes256-ctr",
            "MACs hmac-sha2-256-etm@openssh.com,hmac-sha2-512-etm@openssh.com,umac-128-etm@openssh.com",
            "HostKeyAlgorithms ssh-ed25519,rsa-sha2-512",
            "PubkeyAcceptedAlgorithms ssh-ed25519,rsa-sha2-512",
        ),
    ],
    ids=lambda lines: " ".join(lines)[:40],
)
def test_a_hardened_sshd(tmp_path: Path, lines: tuple[str, ...]) -> None:
    with run_sshd(tmp_path / "server", *lines) as server:
        both_get_in(server, server.add_alias("node0"))


@pytest.mark.parametrize(
    "line",
    [
        "Ciphers chacha20-poly1305@openssh.com",
        "KexAlgorithms sntrup761x25519-sha512@openssh.com",
        "KexAlgorithms diffie-hellman-group18-sha512",
    ],
)
def test_nothing_in_common_names_both_sides_and_the_hint_mends_it(tmp_path: Path, line: str) -> None:
    keyword, offered = line.split()
    with run_sshd(tmp_path / "one", line) as server:
        error = compare(server, server.add_alias("node0"), keyword)
        assert isinstance(error, Unreachable)
        assert f"no {keyword} in common: the host offers {offered}; this side has " in error.message
        assert error.hint is not None
        mended = error.hint.split("'")[1]
        assert mended.startswith(line)
    with run_sshd(tmp_path / "two", mended) as server:
        both_get_in(server, server.add_alias("node0"))


def test_no_mac_in_common_names_both_sides_and_the_hint_mends_it(tmp_path: Path) -> None:
    lines = ("Ciphers aes256-ctr", "MACs umac-64@openssh.com")
    with run_sshd(tmp_path / "one", *lines) as server:
        error = compare(server, server.add_alias("node0"), "MACs")
        assert error is not None
        assert "no MACs in common: the host offers umac-64@openssh.com; this side has" in error.message
        assert error.hint is not None
    with run_sshd(tmp_path / "two", lines[0], error.hint.split("'")[1]) as server:
        both_get_in(server, server.add_alias("node0"))


@pytest.mark.parametrize(
    "line",
    [
        "Ciphers chacha20-poly1305@openssh.com",
        "MACs umac-64@openssh.com",
        "KexAlgorithms sntrup761x25519-sha512@openssh.com",
        "HostKeyAlgorithms sk-ssh-ed25519@openssh.com",
    ],
)
def test_a_configuration_that_leaves_nothing_names_the_keyword_and_the_hint_mends_it(sshd: Server, line: str) -> None:
    keyword, value = line.split()
    error = compare(sshd, sshd.add_alias("node0", line), keyword)
    assert isinstance(error, HostError)
    assert error.hint is not None
    added = error.hint.split()[1]
    assert f"add {added} to {keyword} in ~/.ssh/config" in error.hint
    both_get_in(sshd, sshd.add_alias("node1", f"{keyword} {value},{added}"))


def test_what_the_configuration_leaves_out_is_not_used(tmp_path: Path) -> None:
    with run_sshd(tmp_path / "server", "Ciphers aes128-ctr") as server:
        error = both_refuse(server, server.add_alias("node0", "Ciphers aes256-ctr"))
        assert "no Ciphers in common: the host offers aes128-ctr; this side has aes256-ctr" in error.message
        assert error.hint == "add aes128-ctr to Ciphers in ~/.ssh/config"
        assert ask_moectl(server.config, server.add_alias("node1", "Ciphers aes256-ctr,aes128-ctr")) is None
