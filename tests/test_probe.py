"""Asking hosts what they are made of: this machine and a real sshd; what never answers ends in an error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from moectl import probe
from moectl.cli import cli
from moectl.demo import demo_dir
from moectl.errors import CommandFailed
from moectl.hosts import Host
from moectl.probe import read_all_hardware, read_hardware
from moectl.remote import LocalRemote, Remote
from moectl.ssh import SSHRemote


@pytest.fixture(params=["local", "ssh"])
def remote(request: pytest.FixtureRequest) -> Iterator[Remote]:
    made: Remote = LocalRemote() if request.param == "local" else SSHRemote(request.getfixturevalue("ssh_host"))
    yield made
    made.close()


def test_hardware_of_this_machine(remote: Remote) -> None:
    found = read_hardware(remote)
    assert found.memory_bytes is not None
    assert found.in_use_bytes is not None
    assert 0 < found.in_use_bytes < found.memory_bytes
    assert found.cores is not None
    assert found.cores > 0
    assert found.os == {"linux": "Linux", "darwin": "macOS"}[sys.platform]
    assert found.os_version


def test_a_system_that_is_neither_is_named_with_its_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "SCRIPT", "echo moectl-probe system; echo FreeBSD")
    with pytest.raises(CommandFailed, match=r"^mac1: it is neither macOS nor Linux: it calls itself 'FreeBSD'$"):
        read_all_hardware([LocalRemote("mac1")])


def test_a_system_that_hangs_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "SCRIPT", "sleep 1000")
    monkeypatch.setattr(probe, "HARDWARE_S", 0.2)
    with pytest.raises(CommandFailed, match=r"did not finish within 0\.2 s"):
        read_hardware(LocalRemote())


def test_plan_asks_the_hosts(ssh_host: Host, tmp_path: Path) -> None:
    """What a host says of itself takes the place of keys; what its owner wrote still counts first."""
    hosts = tmp_path / "hosts.txt"
    hosts.write_text(f"localhost\n{ssh_host.name} memory=1GB\n")
    words = ["plan", str(demo_dir()), "--hostfile", str(hosts), "--probe", "--json"]
    result = CliRunner().invoke(cli, words, catch_exceptions=False)
    first, second = json.loads(result.stdout)["nodes"]
    assert first["budget_bytes"] > second["budget_bytes"] == 1_000_000_000
