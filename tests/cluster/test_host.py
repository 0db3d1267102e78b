"""One host's ladder over real sshd: a host that is right, and each way in which it can be wrong."""

from __future__ import annotations

import os
import pwd
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moectl.cluster.deploy.task import FileSurvey
from moectl.cluster.doctor import host as doctor_host, login
from moectl.cluster.doctor.finding import Finding, Level, at_host
from moectl.cluster.doctor.host import (
    Expected,
    Visit,
    check_addresses,
    check_disk,
    check_memory,
    check_rdma_of_mlx,
    check_shards,
    check_versions,
    visit_host,
)
from moectl.cluster.doctor.login import check_agent, check_clock, check_locale, check_noise, check_sshd_limits
from moectl.hosts.hardware import Hardware
from moectl.hosts.hostfile import Host
from moectl.hosts.remote import LocalRemote
from moectl.hosts.ssh.config import read_ssh_settings
from moectl.hosts.ssh.remote import SSHRemote
from moectl.hosts.survey import Survey
from moectl.model.manifest import FileEntry, Manifest
from tests.support.beside import run_agent
from tests.support.sshd import Server, find_free_port, make_key, run_sshd
from tests.support.structures import structure_of
from tests.support.tiny import make_config

MAC = Host("mac1")


def visit(host: Host) -> dict[str, Finding]:
    seen = Visit(host, 0, LocalRemote() if host.is_local else SSHRemote(host))
    try:
        visit_host(seen, Expected())
    finally:
        seen.remote.close()
    return {finding.check: finding for finding in seen.findings}


def test_a_host_that_is_right(ssh_host: Host) -> None:
    found = visit(ssh_host)
    checks = ("ssh", "clock", "system", "memory", "python", "versions", "disk")
    assert {check: found[check].level.word for check in checks} == dict.fromkeys(checks, "ok")
    assert 0 < found["ssh"].values["latency_s"] < 5
    assert found["python"].values["path"] == sys.executable
    assert found["versions"].values["packages"]["mlx"]
    assert found["disk"].values["free_bytes"] > 0


def test_this_machine_needs_no_ssh() -> None:
    found = visit(Host("localhost"))
    assert set(found) >= {"system", "memory", "python", "versions", "disk"}
    assert not {"ssh", "clock", "agent"} & set(found)


def test_a_wrong_key(sshd: Server, tmp_path: Path) -> None:
    other = make_key(tmp_path / "other")
    alias = sshd.add_alias("stranger", f"IdentityFile {other}", "IdentitiesOnly yes", "IdentityAgent none", base=False)
    with sshd.config.open("a") as f:
        f.write(f"  HostName 127.0.0.1\n  Port {sshd.port}\n  User {sshd.user}\n")
        f.write(f"  UserKnownHostsFile {sshd.known_hosts}\n")
    found = visit(Host(alias))
    assert list(found) == ["ssh"]
    assert found["ssh"].level is Level.FAIL
    assert found["ssh"].text.endswith("no key was accepted (tried other)")
    assert (found["ssh"].fix or "").startswith("ssh-copy-id ")


def test_an_unknown_host_key(sshd: Server, tmp_path: Path) -> None:
    found = visit(Host(sshd.add_alias("new", f"UserKnownHostsFile {tmp_path / 'none'}")))
    assert found["ssh"].level is Level.FAIL
    assert "its host key is not known here" in found["ssh"].text
    assert "compare the fingerprint" in (found["ssh"].fix or "")


def test_nobody_at_home(sshd: Server) -> None:
    found = visit(Host(sshd.add_alias("off", port=find_free_port())))
    assert list(found) == ["ssh"]
    assert "refused the connection" in found["ssh"].text


def test_a_host_that_takes_the_call_and_says_nothing(sshd: Server) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        alias = sshd.add_alias("mute", "ConnectTimeout 1", port=mute.getsockname()[1])
        found = visit(Host(alias))
    assert found["ssh"].level is Level.FAIL
    assert found["ssh"].text.startswith("no answer on port ")
    assert "is it on, awake" in (found["ssh"].fix or "")


def test_a_shell_that_never_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(login, "PING_S", 0.5)
    with run_sshd(tmp_path / "sshd", "ForceCommand sleep 60") as server:
        monkeypatch.setenv("MOECTL_SSH_CONFIG", str(server.config))
        found = visit(Host(server.add_alias("stuck")))
    assert list(found) == ["shell"]
    assert found["shell"].level is Level.FAIL
    assert "did not finish within 0.5 s" in found["shell"].text


def test_no_python_that_is_new_enough(sshd: Server, tmp_path: Path) -> None:
    found = visit(Host(sshd.add_alias("old"), python=str(tmp_path / "nothing")))
    assert found["python"].level is Level.FAIL
    assert found["python"].text == "no python 3.11 or newer was found"
    assert "disk" not in found
    assert found["python"].fix == "install one there, or name it in the hosts file: python=/path/to/python3"
    assert visit(Host("old", python=sys.executable, dir=str(tmp_path / "root")))["python"].level is Level.OK


def test_one_session_is_too_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with run_sshd(tmp_path / "sshd", "MaxSessions 1") as server:
        monkeypatch.setenv("MOECTL_SSH_CONFIG", str(server.config))
        found = visit(Host(server.add_alias("narrow"), python=sys.executable))
    assert [(check, found[check].level) for check in found] == [("sessions", Level.FAIL)], found
    assert "MaxSessions 10" in (found["sessions"].fix or "")
    assert not {"system", "python"} & set(found)  # they would be refused too


@pytest.mark.skipif(not pwd.getpwuid(os.getuid()).pw_shell.endswith("bash"), reason="the login shell is no bash")
@pytest.mark.parametrize(("line", "where"), [("echo Welcome home", "stdout"), ("echo Welcome home >&2", "stderr")])
def test_a_noisy_bashrc(line: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / ".bashrc").write_text(f"{line}\n")
    with run_sshd(tmp_path / "sshd", f"SetEnv HOME={home}") as server:
        monkeypatch.setenv("MOECTL_SSH_CONFIG", str(server.config))
        host = Host(server.add_alias("noisy"), python=sys.executable, dir=str(tmp_path / "root"))
        found = visit(host)
        (home / ".bashrc").write_text(f"case $- in *i*) ;; *) return;; esac\n{line}\n")  # what the fix says
        mended = visit(host)
    assert found["noise"].level is Level.WARN
    assert found["noise"].text == f"its shell prints on {where} without a terminal: 'Welcome home'"
    assert found["python"].level is found["ssh"].level is Level.OK  # noise does not stop moectl
    assert "noise" not in mended


def test_a_silent_shell_is_no_finding() -> None:
    assert check_noise(MAC, b"", b"\n") == []
    [found] = check_noise(MAC, b"", b"bash: warning: setlocale: LC_ALL: cannot change locale (xx_YY)\n")
    assert "SetEnv LC_ALL=C" in (found.fix or "")


def test_a_locale_that_the_host_does_not_know() -> None:
    [found] = check_locale(MAC, "locale: Cannot set LC_ALL to default locale: No such file or directory\n")
    assert found.level is Level.WARN
    assert check_locale(MAC, "\n") == []


def test_an_agent_that_is_gone(sshd: Server, tmp_path: Path) -> None:
    alias = sshd.add_alias("agent", f"IdentityAgent {tmp_path / 'gone'}")
    [found] = check_agent(read_ssh_settings(alias))
    assert (found.level, "does not answer" in found.text) == (Level.WARN, True)
    assert check_agent(read_ssh_settings(sshd.add_alias("none"))) == []


def test_what_the_hint_about_an_agent_says_mends_it(
    sshd: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "gone"))
    alias = sshd.add_alias("agent", "IdentityAgent SSH_AUTH_SOCK")
    [found] = check_agent(read_ssh_settings(alias))
    assert found.fix == "eval $(ssh-agent) && ssh-add, or unset SSH_AUTH_SOCK"
    with run_agent(sshd.key) as agent:
        monkeypatch.setenv("SSH_AUTH_SOCK", str(agent))
        [found] = check_agent(read_ssh_settings(alias))
    assert (found.level, found.text) == (Level.OK, "agent with 1 key")
    monkeypatch.delenv("SSH_AUTH_SOCK")
    assert check_agent(read_ssh_settings(alias)) == []


def test_what_the_hint_about_another_noisy_shell_says_mends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def look(name: str, *lines: str) -> dict[str, Finding]:
        with run_sshd(tmp_path / name, "SetEnv SHELL=/bin/another", *lines) as server:
            monkeypatch.setenv("MOECTL_SSH_CONFIG", str(server.config))
            return visit(Host(server.add_alias("noisy"), python=sys.executable, dir=str(tmp_path / "root")))

    found = look("forced", 'ForceCommand echo Welcome home; eval "$SSH_ORIGINAL_COMMAND"')["noise"]
    assert found.fix == "look at the startup files of its login shell, and at sshd's ForceCommand"
    mended = look("free")
    assert "noise" not in mended
    assert mended["ssh"].level is Level.OK


def test_limits_of_sshd() -> None:
    assert check_sshd_limits({}) == []
    assert check_sshd_limits({"maxsessions": "10", "maxstartups": "10:30:100"}) == []
    found = check_sshd_limits({"maxsessions": "1", "maxstartups": "1"})
    assert [f.level for f in found] == [Level.WARN, Level.WARN]


def test_a_clock_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_clock(LocalRemote()).text == "clock right"
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 3600)
    found = check_clock(LocalRemote())
    assert found.level is Level.OK  # moectl does not depend on it
    assert found.text.startswith("clock 3600 s behind")


# The software and the shard set.


def environment(**changes: Any) -> FileSurvey:
    """What a host tells that has everything."""
    packages = {"moectl": "1", "mlx": "2", "mlx-lm": "3"}
    usual = FileSurvey(
        python="/p",
        version="3.12.4",
        root="/r",
        directory="/r/shards/tiny",
        free=10**12,
        device=1,
        env=True,
        writable=True,
        packages=packages,
        code="c",
        stamp="",
        wheels={},
        missing={},
        kept=[],
        corrupt=[],
        known={},
        begun={},
    )
    return replace(usual, **changes)


def a_mac(version: str = "26.3", **sections: str) -> Survey:
    return Survey(Hardware(os="macOS", os_version=version), sections)


@pytest.mark.parametrize(
    ("says", "wheel", "rdma", "findings"),
    [
        ("True", "macosx_26_0_arm64", True, []),
        ("False", "macosx_26_0_arm64", True, ["its mlx has no RDMA (JACCL): it is the wheel macosx_26_0_arm64"]),
        ("False", "macosx_26_0_arm64", False, []),  # the hosts file does not ask for it
        ("", "macosx_26_0_arm64", True, []),  # it does not start: another check says so
        ("False", "macosx_15_0_arm64", True, ["its mlx is the wheel for macOS 15: without RDMA, and slower on an M5"]),
    ],
)
def test_an_mlx_without_rdma_is_named(says: str, wheel: str, rdma: bool, findings: list[str], tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\ncase $2 in *is_available*jaccl*) echo {says};; esac\n")
    python.chmod(0o755)
    host = Host("localhost", rdma=(None, "rdma_en3") if rdma else ())
    there = environment(python=str(python), wheel=wheel)
    found = check_rdma_of_mlx(LocalRemote(), host, a_mac(), there, "moectl deploy")
    assert [finding.text for finding in found] == findings
    assert {finding.level for finding in found} <= {Level.FAIL}
    assert check_rdma_of_mlx(LocalRemote(), host, Survey(Hardware(os="Linux")), there, "moectl deploy") == []


@pytest.mark.parametrize(
    ("there", "named"),
    [
        (environment(executable="/opt/Python.app/Contents/MacOS/Python"), "/opt/Python.app/Contents/MacOS/Python"),
        (None, "~/.moectl/env/bin/python"),  # it has no python yet
    ],
)
def test_the_firewall_is_told_of_the_program_that_really_runs(there: FileSurvey | None, named: str) -> None:
    seen = Visit(MAC, 0, LocalRemote(), survey=a_mac(firewall="Firewall is enabled. (State = 1)"), environment=there)
    doctor_host._look_at_firewall(seen, Expected(among_others=True))
    [finding] = seen.findings
    assert f"--add {named} --unblockapp {named}" in str(finding.fix)
    seen.findings.clear()
    doctor_host._look_at_firewall(seen, Expected())  # a Mac alone
    assert seen.findings == []


EXPECTED = Expected({"moectl": "1", "mlx": "2", "mlx-lm": "3"}, "c", deploy="moectl deploy hosts.txt")


def test_equal_versions() -> None:
    found = check_versions(environment(), EXPECTED, deployed=True)
    assert (found.level, found.text) == (Level.OK, "moectl 1 · mlx 2 · mlx-lm 3")
    assert check_versions(environment(code="d"), Expected(), deployed=True).level is Level.OK  # nothing to compare with


@pytest.mark.parametrize(
    ("changes", "deployed", "level", "text"),
    [
        ({"packages": {"moectl": "0", "mlx": "2", "mlx-lm": "3"}}, True, "FAIL", "moectl 0 here is 1 on this machine"),
        ({"code": "d"}, True, "FAIL", "moectl 1 here has other code than on this machine"),
        ({"packages": {}}, False, "warn", "moectl is not there yet"),
        ({"packages": {"moectl": "1", "mlx-lm": "3"}}, True, "FAIL", "mlx is not installed for /p"),
    ],
)
def test_other_versions(changes: dict[str, Any], deployed: bool, level: str, text: str) -> None:
    found = check_versions(environment(**changes), EXPECTED, deployed=deployed)
    assert (found.level.word, found.text, found.fix) == (level, text, "moectl deploy hosts.txt")


def manifest(size: int) -> Manifest:
    config = make_config()
    structure = structure_of(config)
    files = {
        "rank-0/layer-000.safetensors": FileEntry(size, "0" * 64),
        "rank-1/layer-000.safetensors": FileEntry(10**15, "0" * 64),  # no matter of rank 0's
    }
    return Manifest("tiny", "tiny", None, "f" * 64, config, structure, None, None, "hidden", (1, 1), files)


def test_an_incomplete_shard_set() -> None:
    assert check_shards(0, 100, manifest(100), "moectl deploy").level is Level.OK
    found = check_shards(0, 99, manifest(100), "moectl deploy")
    assert (found.level, found.fix) == (Level.FAIL, "moectl deploy")


@pytest.mark.parametrize(
    ("free", "size", "there", "level"),
    [
        (10**12, 10**11, 0, "ok"),
        (10**11, 10**12, 0, "FAIL"),
        (10**11, 10**12, 10**12, "ok"),  # it is there already
        (10**11 + 10**9, 10**11, 0, "warn"),
        (10**6, 0, 0, "FAIL"),
    ],
)
def test_room_on_the_disk(free: int, size: int, there: int, level: str) -> None:
    found = check_disk(MAC, 0, environment(free=free), manifest(size), there)
    assert found.level.word == level
    assert bool(found.fix) == (level != "ok")


def test_a_disk_without_an_environment_needs_room_for_one() -> None:
    found = check_disk(MAC, 0, environment(free=10**9, packages={}), None, 0)
    assert found.level is Level.FAIL
    assert found.values["needed_bytes"] == doctor_host.ENVIRONMENT_BYTES


def test_a_place_that_is_not_ones_own() -> None:
    found = check_disk(MAC, 0, environment(writable=False), None, 0)
    assert found.text == "cannot write to /r: permission denied"
    assert found.fix == "give mac1 another dir="
    assert check_disk(MAC, 0, environment(root="/other"), None, 0).level is Level.OK


def survey(memory_gib: float, in_use_gib: float = 0.0, *, workers_kib: int = 0, mac: bool = False) -> Survey:
    hardware = Hardware(
        chip="m2-ultra" if mac else "linux-cpu",
        memory_bytes=int(memory_gib * 2**30),
        in_use_bytes=int(in_use_gib * 2**30),
        cores=4,
        os="macOS" if mac else "Linux",
    )
    workers = f"{workers_kib} python -m moectl worker\n" if workers_kib else ""
    return Survey(hardware, {"workers": workers})


def test_memory_for_the_shard_set() -> None:
    tiny = manifest(0)
    fits = check_memory(MAC, 0, survey(64), tiny)
    assert fits.level is Level.OK
    assert 0 < fits.values["need_bytes"] < fits.values["usable_bytes"]
    need_gib = fits.values["need_bytes"] / 2**30
    tight = check_memory(MAC, 0, survey(64, 60 - need_gib * 1.02), tiny)
    assert tight.level is Level.WARN
    full = check_memory(MAC, 0, survey(64, 60 - need_gib * 0.9), tiny)
    assert full.level is Level.FAIL
    assert "it does not fit" in full.text
    assert "moectl plan" in (full.fix or "")


@pytest.mark.parametrize("mac", [False, True])
def test_the_memory_of_its_own_workers_is_to_be_had(mac: bool) -> None:
    host = MAC if mac else Host("linux")
    tiny = manifest(0)
    assert check_memory(host, 0, survey(64, 60, mac=mac), tiny).level is Level.FAIL
    assert check_memory(host, 0, survey(64, 60, workers_kib=50 << 20, mac=mac), tiny).level is Level.OK


def test_memory_without_a_shard_set_is_told_only() -> None:
    assert check_memory(MAC, 0, survey(192, 10, mac=True), None).text == "M2 Ultra 192 GiB, 10.0 GiB in use"
    assert check_memory(MAC, 0, survey(24, 1), None).text == "4 cores, 24 GiB, 1.0 GiB in use"
    assert check_memory(MAC, 0, Survey(Hardware()), None).level is Level.SKIP


def test_addresses_have_to_be_its_own() -> None:
    text = "2: eth0    inet 10.0.0.7/24 scope global eth0\n"
    told = Survey(Hardware(os="Linux"), {"ip": text})
    assert check_addresses(replace(MAC, ips=("10.0.0.7",)), told) == []
    [found] = check_addresses(replace(MAC, ips=("10.0.0.7", "10.0.0.8")), told)
    assert (found.level, found.text) == (Level.FAIL, "ip=10.0.0.8 is not its own address (it has 10.0.0.7)")
    assert found.fix == "mend ip= in the hosts file; ifconfig's addresses are gone after a restart"
    assert check_addresses(replace(MAC, ips=("10.0.0.7",)), told) == []
    assert check_addresses(replace(MAC, ips=("10.0.0.8",)), Survey(Hardware())) == []  # it did not say


def test_commands_are_written_as_one_types_them() -> None:
    assert at_host(Host("localhost"), "sudo true") == "sudo true"
    assert at_host(Host("mac3", "ada", 2222), "uptime") == "ssh -p 2222 ada@mac3 uptime"
    assert at_host(MAC, "sudo pmset -a sleep 0") == "ssh -t mac1 'sudo pmset -a sleep 0'"
