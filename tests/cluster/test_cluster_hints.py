"""What the hints about several hosts say is done, over real SSH, and then it succeeds."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from moectl.cluster.deploy.deploy import deploy
from moectl.cluster.deploy.uninstall import clear_hosts
from moectl.cluster.doctor.finding import Level
from moectl.cluster.doctor.login import check_locale, check_sessions, check_sshd_limits
from moectl.cluster.logs import LogQuery, find_sources
from moectl.cluster.setup.record import open_record
from moectl.errors import CommandFailed, IntegrityError, PlanError, StateError, UsageError
from moectl.hosts.connect import make_remote
from moectl.hosts.hostfile import Host
from moectl.hosts.survey import parse_sshd
from moectl.model.manifest import NAME
from tests.cluster.test_deploy import assert_holds, make_hosts, make_shards
from tests.cluster.test_host import visit
from tests.cluster.test_logs import log_of, make_deployment, read, write_log
from tests.cluster.test_status import run_worker
from tests.cluster.test_uninstall import note_root
from tests.support.running import make_python
from tests.support.sshd import Server, run_sshd

MAC = Host("mac1")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return tmp_path / "tiny-experts"


def make_own_host(sshd: Server, tmp_path: Path) -> Host:
    """Return a host with a python of its own: a worker of a test beside this one could not be of its root."""
    return replace(make_hosts(sshd, tmp_path, 1)[0], python=str(make_python(tmp_path / "python")))


def test_a_set_for_as_many_hosts_as_the_hint_says_is_deployed(sshd: Server, tmp_path: Path, shards: Path) -> None:
    manifest, hosts = make_shards(shards, 2), make_hosts(sshd, tmp_path, 2)
    with pytest.raises(PlanError) as caught:
        deploy(hosts[:1], shards, manifest)
    assert caught.value.hint == "moectl shard --nodes 1, or list 2 hosts"
    one = tmp_path / "tiny-experts-1"
    deploy(hosts[:1], one, make_shards(one, 1)).raise_failures()
    deploy(hosts, shards, manifest).raise_failures()


def test_a_set_made_again_as_the_hint_says_is_deployed(tmp_path: Path, shards: Path) -> None:
    manifest, hosts = make_shards(shards, 1), [Host("localhost", dir=str(tmp_path / "root"))]
    (shards / NAME).unlink()
    with pytest.raises(IntegrityError) as caught:
        deploy(hosts, shards, manifest)
    assert caught.value.hint == "moectl shard MODEL"
    deploy(hosts, shards, make_shards(shards, 1)).raise_failures()


def test_without_the_link_that_the_hint_names_shards_are_deployed(sshd: Server, tmp_path: Path, shards: Path) -> None:
    manifest, hosts = make_shards(shards, 1), make_hosts(sshd, tmp_path, 1)
    link, disk = tmp_path / "node0" / "shards" / shards.name / "common", tmp_path / "disk"
    link.parent.mkdir(parents=True)
    disk.mkdir()
    link.symlink_to(disk)
    error = deploy(hosts, shards, manifest).results[0].error
    assert isinstance(error, IntegrityError)
    assert error.hint == "remove that symbolic link there; to keep shards on another disk, name it with dir="
    elsewhere = [replace(hosts[0], dir=str(disk))]
    deploy(elsewhere, shards, manifest).raise_failures()
    assert_holds(disk / "shards" / shards.name, manifest, 0)
    link.unlink()
    deploy(hosts, shards, manifest).raise_failures()
    assert_holds(link.parent, manifest, 0)


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A disk that cannot be written to."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.getuid() != 0:
        place.chmod(0o500)
        yield place
        place.chmod(0o700)
        return
    mount = ["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_another_place_as_the_hint_says_takes_the_shards(
    sshd: Server, tmp_path: Path, shards: Path, read_only: Path
) -> None:
    manifest, hosts = make_shards(shards, 1), make_hosts(sshd, read_only, 1)
    error = deploy(hosts, shards, manifest).results[0].error
    assert isinstance(error, CommandFailed)
    assert error.hint == "name another place in the hosts file: dir=/path"
    deploy([replace(hosts[0], dir=str(tmp_path / "other"))], shards, manifest).raise_failures()


def test_the_logs_of_a_host_named_as_the_hint_asks_are_read(sshd: Server, tmp_path: Path) -> None:
    deployment = make_deployment(sshd, tmp_path, 2)
    write_log(log_of(deployment, 1), "2026-11-20T17:40:02+0000 one")
    with pytest.raises(UsageError) as caught:
        find_sources(deployment, ["node9"])
    assert caught.value.hint == "name a host of the deployment"
    assert read(find_sources(deployment, ["node1"]), LogQuery())[0] == [("node1", "one")]


def test_a_host_whose_worker_was_ended_as_the_hint_says_is_cleared(sshd: Server, tmp_path: Path) -> None:
    host = make_own_host(sshd, tmp_path)
    root = Path(str(host.dir))
    (root / "logs").mkdir(parents=True)
    note_root(root)
    with run_worker(root / "logs" / "tiny-rank-0.log") as pid:
        error = clear_hosts([host], dry_run=False)[0].error
    assert isinstance(error, StateError)
    assert error.hint == f"stop it where it was started, or end {pid} there"
    assert clear_hosts([host], dry_run=False)[0].error is None


def test_a_host_whose_deploy_has_ended_as_the_hint_says_is_cleared(sshd: Server, tmp_path: Path) -> None:
    host = make_own_host(sshd, tmp_path)
    root = Path(str(host.dir))
    root.mkdir()
    note_root(root)
    with (root / "env.lock").open("a") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        error = clear_hosts([host], dry_run=False)[0].error
    assert isinstance(error, StateError)
    assert error.hint == "wait for the other deploy to end"
    assert clear_hosts([host], dry_run=False)[0].error is None


def test_a_setup_that_waits_as_the_hint_says_holds_the_record() -> None:
    with open_record():
        with pytest.raises(StateError) as caught, open_record():
            pass
        assert caught.value.hint == "wait until it has finished"
    with open_record():
        pass


# What doctor says mends a host.


def test_the_sessions_that_doctor_asks_for_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for count in (1, 10):
        with run_sshd(tmp_path / f"sshd{count}", f"MaxSessions {count}") as server:
            monkeypatch.setenv("MOECTL_SSH_CONFIG", str(server.config))
            host = Host(server.add_alias("narrow"))
            with contextlib.closing(make_remote(host)) as remote:
                found += check_sessions(host, remote)
    assert str(found[0].fix).startswith("set MaxSessions 10 in its /etc/ssh/sshd_config ("), found
    assert [finding.level for finding in found] == [Level.FAIL, Level.OK]


def test_limits_set_as_doctor_says_are_no_finding() -> None:
    tight = check_sshd_limits(parse_sshd("MaxSessions 1\nMaxStartups 1\n"))
    fixes = [str(finding.fix) for finding in tight]
    assert fixes == [
        "set MaxSessions 10 in its /etc/ssh/sshd_config, then restart sshd",
        "set MaxStartups 10:30:100 in its /etc/ssh/sshd_config, then restart sshd",
    ]
    lines = [fix.removeprefix("set ").partition(" in its")[0] for fix in fixes]
    assert check_sshd_limits(parse_sshd("\n".join(lines) + "\n")) == []


@pytest.mark.skipif(not pwd.getpwuid(os.getuid()).pw_shell.endswith("bash"), reason="the login shell is no bash")
def test_the_locale_that_doctor_says_is_sent_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "xx_YY.UTF-8")
    with run_sshd(tmp_path / "sshd", "AcceptEnv LC_*") as server:
        monkeypatch.setenv("MOECTL_SSH_CONFIG", str(server.config))
        command = ["ssh", "-F", str(server.config), "mac1", "locale"]
        server.add_alias("mac1", "SendEnv LC_ALL")
        done = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
        fix = str(check_locale(MAC, done.stdout + done.stderr)[0].fix)
        assert fix == "ssh sends this machine's locale: put 'SetEnv LC_ALL=C' under 'Host mac1' in ~/.ssh/config"
        server.config.write_text("")
        server.add_alias("mac1", "SendEnv LC_ALL", fix.split("put '")[1].partition("'")[0])
        done = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
        assert check_locale(MAC, done.stdout + done.stderr) == []


def test_a_shell_that_says_nothing_as_doctor_demands_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for name, lines in (("one", ("ForceCommand echo 'not available'; exit 1",)), ("two", ())):
        with run_sshd(tmp_path / name, *lines) as server:
            monkeypatch.setenv("MOECTL_SSH_CONFIG", str(server.config))
            found[name] = visit(Host(server.add_alias("node0"), python=sys.executable, dir=str(tmp_path / "root")))
    fix = str(found["one"]["shell"].fix)
    assert fix == "ssh node0 true should say nothing and end at once: look at its shell's startup files"
    assert "shell" not in found["two"]
    assert found["two"]["ssh"].fix is None
