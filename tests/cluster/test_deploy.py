"""deploy and connect over real SSH: what arrives, what is skipped, who fails, what is remembered."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest

import moectl
import moectl.cluster.deploy.deploy
from moectl.cluster.deploy.deploy import DeployResult, deploy
from moectl.cluster.deploy.task import Advanced, Event, HostResult, Planned, Working
from moectl.cluster.deploy.wheel import pack_wheel, write_wheel
from moectl.errors import (
    AuthFailed,
    CommandFailed,
    IntegrityError,
    MoectlError,
    NotDeployed,
    PartialFailure,
    PlanError,
    StateError,
    Unreachable,
    UsageError,
    VersionMismatch,
)
from moectl.hosts.connect import connect, make_remote, raise_failures
from moectl.hosts.hostfile import Host
from moectl.hosts.onhost.files import RECORD, hash_file, make_stamp, read_record, write_record
from moectl.model.manifest import NAME, FileEntry, Manifest, write_manifest
from moectl.session.deployment import deployment_path, find_deployment, read_deployment
from moectl.session.session import RankSpec, Session
from moectl.shards.verified import check_files
from tests.support.netns import Cluster
from tests.support.sshd import Server, find_free_port
from tests.support.structures import structure_of
from tests.support.tiny import make_config

LAYER_BYTES = 200_000


def make_shards(directory: Path, ranks: int, *, layer_bytes: int = LAYER_BYTES) -> Manifest:
    """Write a shard set whose weights are random bytes: deploy does not look into them."""
    names = ["config.json", "common/outer.safetensors", "common/layer-000.safetensors"]
    names += [f"rank-{rank}/layer-{layer:03}.safetensors" for rank in range(ranks) for layer in range(2)]
    files = {}
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(layer_bytes))
        files[name] = FileEntry(layer_bytes, hash_file(str(path)))
    config = make_config()
    structure, shares = structure_of(config), (1,) * ranks
    manifest = Manifest(directory.name, "tiny", None, "", config, structure, None, None, "experts", shares, files)
    write_manifest(directory, manifest)
    return manifest


def total_bytes(shards: Path, manifest: Manifest, rank: int) -> int:
    return sum(f.bytes for f in manifest.files_of(rank).values()) + (shards / NAME).stat().st_size


def make_hosts(sshd: Server, root: Path, count: int) -> list[Host]:
    """Several hosts behind one sshd, told apart by their directory."""
    return [Host(sshd.add_alias(f"node{i}"), python=sys.executable, dir=str(root / f"node{i}")) for i in range(count)]


def assert_holds(directory: Path, manifest: Manifest, rank: int) -> None:
    """The directory holds exactly the rank's files, with the right bytes, and the manifest."""
    there = {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()}
    assert there == {*manifest.files_of(rank), NAME, RECORD}
    for name, entry in manifest.files_of(rank).items():
        assert hash_file(str(directory / name)) == entry.sha256


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return tmp_path / "tiny-experts-2"


def test_deploy_brings_each_host_its_files_then_moves_nothing(sshd: Server, tmp_path: Path, shards: Path) -> None:
    manifest, hosts = make_shards(shards, 2), make_hosts(sshd, tmp_path / "it's a $(disk) -x", 2)
    events: list[Event] = []
    result = deploy(hosts, shards, manifest, on_event=events.append)
    result.raise_failures()
    for rank, r in enumerate(result.results):
        directory = Path(str(hosts[rank].dir), "shards", shards.name)
        assert_holds(directory, manifest, rank)
        assert (r.python, r.directory, r.kept_bytes) == (sys.executable, str(directory), 0)
        assert r.copied_bytes == total_bytes(shards, manifest, rank)
        assert sum(e.bytes for e in events if isinstance(e, Advanced) and e.rank == rank) == r.copied_bytes
        assert Planned(rank, f"node{rank}", r.copied_bytes, 0) in events
        assert r in events
    again = deploy(hosts, shards, manifest)
    assert [(r.error, r.copied_bytes) for r in again.results] == [(None, 0), (None, 0)]
    assert [r.kept_bytes for r in again.results] == [r.copied_bytes for r in result.results]


def test_deploy_remembers_what_it_did(sshd: Server, tmp_path: Path, shards: Path) -> None:
    manifest, hosts = make_shards(shards, 2), make_hosts(sshd, tmp_path, 2)
    with pytest.raises(NotDeployed, match="no model is deployed"):
        read_deployment()
    deploy(hosts, shards, manifest, only=["node1"], backend="ring", envs=["A=b"]).raise_failures()
    with pytest.raises(NotDeployed, match=r"is not deployed on node0 yet"):
        read_deployment()
    deploy(hosts, shards, manifest, only=["node0"]).raise_failures()
    found = read_deployment()
    assert (found.name, found.shards) == (shards.name, str(shards))
    assert [r.host for r in found.ranks] == hosts
    assert [r.root for r in found.ranks] == [h.dir for h in hosts]
    assert {r.python for r in found.ranks} == {sys.executable}
    assert deployment_path().stat().st_mode & 0o777 == 0o600
    assert deployment_path().parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": "moectl.deployment/1"}', '{"schema": "x", "ranks": []}'])
def test_a_damaged_record_is_one_clear_error(text: str) -> None:
    deployment_path().parent.mkdir(parents=True)
    deployment_path().write_text(text)
    with pytest.raises(StateError, match="is damaged"):
        find_deployment()


def test_a_dry_run_tells_and_changes_nothing(sshd: Server, tmp_path: Path, shards: Path) -> None:
    manifest, hosts = make_shards(shards, 2), make_hosts(sshd, tmp_path, 2)
    result = deploy(hosts, shards, manifest, dry_run=True)
    assert [r.copied_bytes for r in result.results] == [total_bytes(shards, manifest, r) for r in (0, 1)]
    assert all(r.free_after_bytes > 0 for r in result.results)
    assert not (tmp_path / "node0").exists()
    assert find_deployment() is None


def test_one_failing_host_does_not_stop_the_others(sshd: Server, tmp_path: Path, shards: Path) -> None:
    manifest, hosts = make_shards(shards, 4), make_hosts(sshd, tmp_path, 4)
    hosts[2] = replace(hosts[2], name=sshd.add_alias("dead", port=find_free_port()))
    result = deploy(hosts, shards, manifest, jobs=2)
    assert [r.ok for r in result.results] == [True, True, False, True]
    assert [r.host.name for r in result.failed] == ["dead"]
    assert isinstance(result.failed[0].error, Unreachable)
    with pytest.raises(PartialFailure, match=r"^1 of 4 hosts failed: dead\.$") as caught:
        result.raise_failures()
    assert caught.value.hint is not None
    assert caught.value.hint.endswith("then run it again: the other hosts will be skipped.")
    for rank in (0, 1, 3):
        assert_holds(tmp_path / f"node{rank}" / "shards" / shards.name, manifest, rank)
    with pytest.raises(NotDeployed, match="dead"):
        read_deployment()


def test_hosts_that_all_fail_alike_give_that_error() -> None:
    def codes(*errors: MoectlError | None) -> int:
        results = tuple(HostResult(i, Host(f"mac{i}"), e) for i, e in enumerate(errors))
        with pytest.raises(MoectlError) as caught:
            DeployResult(results).raise_failures()
        return caught.value.exit_code

    auth, lost, disk = AuthFailed("no", host="mac0"), Unreachable("gone", host="mac0"), CommandFailed("full")
    assert codes(auth) == 5
    assert codes(lost, lost) == 5
    assert codes(disk, disk) == 6
    assert codes(auth, disk) == 3
    assert codes(lost, None) == 3
    raise_failures({"mac0": None, "mac1": None})


def test_two_ports_of_one_name_are_two_hosts(sshd: Server, tmp_path: Path, shards: Path) -> None:
    manifest = make_shards(shards, 2)
    sshd.add_alias("box")
    dead = Host("box", port=find_free_port(), python=sys.executable, dir=str(tmp_path / "dead"))
    alive = Host("box", port=sshd.port, python=sys.executable, dir=str(tmp_path / "alive"))
    events: list[Event] = []
    result = deploy([dead, alive], shards, manifest, on_event=events.append)
    with pytest.raises(PartialFailure, match=rf"^1 of 2 hosts failed: {dead.address}\.$"):
        result.raise_failures()
    assert {e.host for e in events if isinstance(e, Planned)} == {dead.address, alive.address}
    with pytest.raises(NotDeployed, match=rf"is not deployed on {dead.address} yet"):
        read_deployment()
    assert [r.rank for r in deploy([dead, alive], shards, manifest, only=[alive.address]).results] == [1]
    assert [r.rank for r in deploy([dead, alive], shards, manifest, only=["box"]).results] == [0, 1]


def test_damage_on_a_host_is_found_and_mended(sshd: Server, tmp_path: Path, shards: Path) -> None:
    manifest, hosts = make_shards(shards, 1), make_hosts(sshd, tmp_path, 1)
    deploy(hosts, shards, manifest).raise_failures()
    directory = tmp_path / "node0" / "shards" / shards.name
    name = "rank-0/layer-001.safetensors"
    victim = directory / name
    # Another time stamp: looked at without being asked.
    victim.write_bytes(bytes(LAYER_BYTES))
    assert deploy(hosts, shards, manifest).results[0].copied_bytes == LAYER_BYTES
    # Size and modification time as recorded: whoever wrote has left another trace.
    status = victim.stat()
    victim.write_bytes(bytes(LAYER_BYTES))
    os.utime(victim, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert deploy(hosts, shards, manifest).results[0].copied_bytes == LAYER_BYTES
    # A bit that the disk itself has flipped leaves none: only --verify can know.
    victim.write_bytes(bytes(LAYER_BYTES))
    write_record(
        str(directory), {**read_record(str(directory)), name: make_stamp(victim.stat(), manifest.files[name].sha256)}
    )
    assert deploy(hosts, shards, manifest).results[0].copied_bytes == 0
    assert deploy(hosts, shards, manifest, verify=True).results[0].copied_bytes == LAYER_BYTES
    # Too short, and a lost record.
    victim.write_bytes(b"short")
    (directory / RECORD).write_text("not json")
    assert deploy(hosts, shards, manifest).results[0].copied_bytes == LAYER_BYTES
    assert_holds(directory, manifest, 0)


def test_a_new_set_of_the_same_name_is_never_half_promised(sshd: Server, tmp_path: Path, shards: Path) -> None:
    manifest, hosts = make_shards(shards, 1), make_hosts(sshd, tmp_path, 1)
    deploy(hosts, shards, manifest).raise_failures()
    shutil.rmtree(shards)
    manifest = make_shards(shards, 1)
    (shards / "rank-0/layer-001.safetensors").write_bytes(b"the operator's own disk is damaged")
    result = deploy(hosts, shards, manifest)
    assert isinstance(result.results[0].error, IntegrityError)
    directory = tmp_path / "node0" / "shards" / shards.name
    assert not (directory / NAME).exists()
    assert (directory / RECORD).exists()  # what was pushed before is not pushed again


def test_a_full_disk_is_told_before_anything_moves(
    sshd: Server, tmp_path: Path, shards: Path, request: pytest.FixtureRequest
) -> None:
    if os.getuid() != 0:
        pytest.skip("mounting a small file system needs root")
    small = tmp_path / "node0"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    request.addfinalizer(lambda: subprocess.run(["umount", "-l", str(small)], check=True))
    manifest, hosts = make_shards(shards, 1, layer_bytes=400_000), make_hosts(sshd, tmp_path, 1)
    error = deploy(hosts, shards, manifest).results[0].error
    assert isinstance(error, CommandFailed)
    assert str(error).startswith("node0: disk full: 1.0 MB free, 2.0 MB needed")
    assert list(small.iterdir()) == []


@pytest.fixture
def mount(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[..., Path]:
    """Mounts a small file system of its own at a name; once more with other options to change it."""
    if os.getuid() != 0:
        pytest.skip("mounting a small file system needs root")

    def mount(name: str, options: str) -> Path:
        place = tmp_path / name
        again = place.is_mount()
        place.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"remount,{options}" if again else options, "tmpfs", str(place)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("tmpfs cannot be mounted here")
        if not again:
            request.addfinalizer(lambda: subprocess.run(["umount", "-l", str(place)], check=True))
        return place

    return mount


def test_a_disk_that_fills_up_on_the_way(
    sshd: Server, tmp_path: Path, shards: Path, mount: Callable[..., Path]
) -> None:
    """Two hosts' shares fit one by one and not together; what is there under its name is whole, the rest follows."""
    disk = mount("nodes", "size=5m")
    manifest, hosts = make_shards(shards, 2, layer_bytes=600_000), make_hosts(sshd, disk, 2)
    failed = deploy(hosts, shards, manifest).failed
    assert failed
    for result in failed:
        assert isinstance(result.error, CommandFailed)
        assert "disk full: " in str(result.error)
        assert result.error.hint is not None
        assert result.error.exit_code == 6
    for path in (p for p in disk.rglob("*.safetensors") if p.is_file()):
        name = path.relative_to(path.parent.parent).as_posix()
        assert hash_file(str(path)) == manifest.files[name].sha256
    for result in failed:
        assert not (disk / result.host.name / "shards" / shards.name / NAME).exists()
    mount("nodes", "size=8m")
    deploy(hosts, shards, manifest).raise_failures()
    for rank in range(2):
        assert_holds(disk / f"node{rank}" / "shards" / shards.name, manifest, rank)


def test_a_disk_without_inodes(sshd: Server, tmp_path: Path, shards: Path, mount: Callable[..., Path]) -> None:
    mount("node0", "size=8m,nr_inodes=6")
    manifest, hosts = make_shards(shards, 1), make_hosts(sshd, tmp_path, 1)
    error = deploy(hosts, shards, manifest).results[0].error
    assert isinstance(error, CommandFailed)
    assert "No space left on device" in error.message
    assert str(error.hint).startswith("free space (or inodes) on node0")
    mount("node0", "nr_inodes=60")
    deploy(hosts, shards, manifest).raise_failures()
    assert_holds(tmp_path / "node0" / "shards" / shards.name, manifest, 0)


def test_read_only_homes(
    sshd: Server, tmp_path: Path, shards: Path, mount: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, hosts = make_shards(shards, 1), make_hosts(sshd, tmp_path, 1)
    mount("node0", "size=8m")
    mount("node0", "ro")
    error = deploy(hosts, shards, manifest).results[0].error
    assert isinstance(error, CommandFailed)
    assert "read-only disk" in error.message
    assert str(error.hint).endswith("dir=/path")
    mount("node0", "rw")
    # The operator's own: told before anything is copied.
    monkeypatch.setenv("XDG_STATE_HOME", str(mount("home", "size=1m")))
    mount("home", "ro")
    with pytest.raises(StateError, match=r"cannot write .*deployment\.json: "):
        deploy(hosts, shards, manifest)
    assert list((tmp_path / "node0").iterdir()) == []
    mount("home", "rw")
    deploy(hosts, shards, manifest).raise_failures()
    # Read-only again, all is as it should be: nothing needs to be written there.
    mount("node0", "ro")
    deploy(hosts, shards, manifest, verify=True).raise_failures()
    check_files(tmp_path / "node0" / "shards" / shards.name, manifest, 0)


def test_two_deploys_at_once_are_told_apart(sshd: Server, tmp_path: Path, shards: Path) -> None:
    """Who began first has the directory until all its files are there, also between two of them."""
    manifest, hosts = make_shards(shards, 1), make_hosts(sshd, tmp_path, 1)
    name = "common/layer-000.safetensors"
    directory = tmp_path / "node0" / "shards" / shards.name
    with contextlib.closing(make_remote(hosts[0])) as first:
        first.put(shards / name, f"{directory}/{name}", sha256=manifest.files[name].sha256)
        error = deploy(hosts, shards, manifest).results[0].error
        assert isinstance(error, CommandFailed)
        assert "another push is writing" in error.message
        assert str(error.hint).startswith("wait for the other deploy to end")
    deploy(hosts, shards, manifest).raise_failures()
    assert_holds(directory, manifest, 0)


def test_clocks_of_hosts_do_not_matter(sshd: Server, tmp_path: Path, shards: Path) -> None:
    """A host years ahead or behind: what is right there is not sent again, what is wrong is found."""
    manifest, hosts = make_shards(shards, 1), make_hosts(sshd, tmp_path, 1)
    deploy(hosts, shards, manifest).raise_failures()
    directory = tmp_path / "node0" / "shards" / shards.name
    for year_s in (1.0, 4e9):  # 1970 and 2096
        for path in (p for root in (shards, directory) for p in root.rglob("*") if p.is_file()):
            os.utime(path, (year_s, year_s))
        assert deploy(hosts, shards, manifest).results[0].copied_bytes == 0
        victim = directory / "rank-0/layer-001.safetensors"
        victim.write_bytes(bytes(LAYER_BYTES))
        os.utime(victim, (year_s, year_s))
        assert deploy(hosts, shards, manifest).results[0].copied_bytes == LAYER_BYTES


def test_this_machine_gets_hard_links(tmp_path: Path, shards: Path) -> None:
    manifest = make_shards(shards, 1)
    host = Host("localhost", dir=str(tmp_path / "root"))
    result = deploy([host], shards, manifest)
    result.raise_failures()
    directory = tmp_path / "root" / "shards" / shards.name
    assert_holds(directory, manifest, 0)
    assert (directory / "config.json").samefile(shards / "config.json")
    assert result.results[0].python == sys.executable
    assert deploy([host], shards, manifest).results[0].copied_bytes == 0


def test_shards_that_are_in_place_stay_there(tmp_path: Path) -> None:
    shards = tmp_path / "root" / "shards" / "here"
    manifest = make_shards(shards, 1)
    result = deploy([Host("localhost", dir=str(tmp_path / "root"))], shards, manifest)
    result.raise_failures()
    assert result.results[0].copied_bytes == 0
    assert_holds(shards, manifest, 0)


def test_what_concerns_all_hosts_is_raised_at_once(tmp_path: Path, shards: Path) -> None:
    manifest = make_shards(shards, 2)
    a, b = Host("a"), Host("b")
    with pytest.raises(PlanError, match="cut for 2 hosts, 1 are listed"):
        deploy([a], shards, manifest)
    with pytest.raises(UsageError, match="c is not among the hosts"):
        deploy([a, b], shards, manifest, only=["c"])
    with pytest.raises(UsageError, match="no wheels"):
        deploy([a, b], shards, manifest, wheelhouse=tmp_path)
    for name in ("../up", "", "..", "a/b"):
        with pytest.raises(IntegrityError, match="cannot be the name"):
            deploy([a, b], shards, replace(manifest, name=name))
    (shards / NAME).unlink()
    with pytest.raises(IntegrityError, match="cannot be read"):
        deploy([a, b], shards, manifest)


def test_a_host_tells_once_what_it_has(sshd: Server, tmp_path: Path, shards: Path) -> None:
    log, python = tmp_path / "log", tmp_path / "python"
    python.write_text(f'#!/bin/sh\nfor last; do :; done\necho "$last" >> {log}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    host = replace(make_hosts(sshd, tmp_path, 1)[0], python=str(python))
    result = deploy([host], shards, make_shards(shards, 1), verify=True)
    result.raise_failures()
    assert result.results[0].copied_bytes
    assert log.read_text().split().count("survey") == 1


# Interpreters.


def write_old_python(path: Path, version: str) -> Path:
    """A stand-in that says it is an old python, which is all that is asked of one."""
    path.write_text(f"#!/bin/sh\necho {version}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("version", ["2.7.18", "3.9.6", "3.10.14"])
def test_an_old_python_is_refused(sshd: Server, tmp_path: Path, shards: Path, version: str) -> None:
    old = write_old_python(tmp_path / "python", version)
    host = replace(make_hosts(sshd, tmp_path, 1)[0], python=str(old))
    error = deploy([host], shards, make_shards(shards, 1)).results[0].error
    assert isinstance(error, VersionMismatch)
    assert error.message == f"no python 3.11 or newer was found ({old} is {version})"
    assert error.hint == "install one there, or name it in the hosts file: python=/path/to/python3"


def test_a_missing_python_is_told(sshd: Server, tmp_path: Path, shards: Path) -> None:
    host = replace(make_hosts(sshd, tmp_path, 1)[0], python="/no/python")
    error = deploy([host], shards, make_shards(shards, 1)).results[0].error
    assert isinstance(error, VersionMismatch)


def make_wheelhouse(directory: Path) -> Path:
    """Empty wheels with the names and versions that the real environment would have.

    pip resolves, verifies and installs them as it would the real ones, without internet; only their content is
    missing (the real ones are hundreds of megabytes).
    """
    directory.mkdir()
    names = {"mlx", "mlx-lm"}
    for line in metadata.requires("moectl") or []:
        if "extra ==" not in line:
            names.add(re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0])
    for name in names:
        version, stem = metadata.version(name), name.replace("-", "_")
        info = f"{stem}-{version}.dist-info"
        content = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nProvides-Extra: cpu\n"
        wheel = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        files = {f"{info}/METADATA": content.encode(), f"{info}/WHEEL": wheel.encode()}
        write_wheel(directory / f"{stem}-{version}-py3-none-any.whl", info, files)
    return directory


def test_an_environment_is_made_once_from_a_wheelhouse(
    sshd: Server, tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One wheel for the whole test, whoever edits the source tree meanwhile.
    packed = pack_wheel(tmp_path)
    monkeypatch.setattr(moectl.cluster.deploy.deploy, "pack_wheel", lambda directory: packed)
    base = sysconfig.get_config_var("BINDIR") + "/python3"  # not a virtual environment that has the versions already
    manifest = make_shards(shards, 1)
    host = replace(make_hosts(sshd, tmp_path, 1)[0], python=base)
    house = make_wheelhouse(tmp_path / "wheels")
    events: list[Event] = []
    # A wheel is missing: pip fails without trying the internet, and nothing of the model moves.
    hidden = next(house.glob("mlx_lm-*.whl")).rename(tmp_path / "hidden")
    error = deploy([host], shards, manifest, wheelhouse=house).results[0].error
    assert isinstance(error, CommandFailed)
    assert "mlx-lm" in error.message
    assert error.hint is not None
    assert "--wheelhouse" in error.hint
    assert not (tmp_path / "node0" / "shards").exists()
    hidden.rename(house / f"mlx_lm-{metadata.version('mlx-lm')}-py3-none-any.whl")
    result = deploy([host], shards, manifest, wheelhouse=house, on_event=events.append)
    result.raise_failures()
    python = tmp_path / "node0" / "env" / "bin" / "python"
    assert result.results[0].python == str(python)
    assert [e.what for e in events if isinstance(e, Working)] == [
        f"installing moectl {moectl.__version__}, mlx {metadata.version('mlx')}, mlx-lm {metadata.version('mlx-lm')}"
    ]
    # What runs there is this moectl, not a stub.
    said = subprocess.run(
        [
            str(python),
            "-c",
            "import moectl.hosts.onhost.files, sys; print(moectl.__version__, moectl.hosts.onhost.files.__file__)",
        ],
        cwd="/",
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert said[0] == moectl.__version__
    assert Path(said[1]).is_relative_to(tmp_path / "node0" / "env")
    with zipfile.ZipFile(packed) as archive:
        assert Path(said[1]).read_bytes() == archive.read("moectl/hosts/onhost/files.py")
    # The second time there is nothing to do, and pip is not run.
    events.clear()
    again = deploy([host], shards, manifest, wheelhouse=house, on_event=events.append)
    again.raise_failures()
    assert again.results[0].python == str(python)
    assert not [e for e in events if isinstance(e, Working)]
    # Another moectl is another stamp, and would be installed over the old one.
    stamp = tmp_path / "node0" / "env" / "moectl-env.json"
    stamp.write_text(json.dumps({**json.loads(stamp.read_text()), "wheel": "of yesterday"}))
    assert deploy([host], shards, manifest, wheelhouse=house, dry_run=True).results[0].python == ""
    # What an interrupted install left is made again, by the environment's own python when there is no other. Wheels
    # that are there are not sent again.
    there = {w.name: w.stat().st_ino for w in (tmp_path / "node0" / "wheels").glob("*.whl")}
    stamp.unlink()
    own = replace(host, python=None)
    deploy([own], shards, manifest, wheelhouse=house, on_event=events.append).raise_failures()
    assert len([e for e in events if isinstance(e, Working)]) == 1
    assert {w.name: w.stat().st_ino for w in (tmp_path / "node0" / "wheels").glob("*.whl")} == there
    assert len(there) > 5
    assert json.loads(stamp.read_text())["versions"]["moectl"] == moectl.__version__
    # An environment that somebody deleted is told by whoever needs it, and made again.
    shutil.rmtree(tmp_path / "node0" / "env")
    with (
        contextlib.closing(make_remote(own)) as remote,
        pytest.raises(MoectlError, match="127 while starting") as caught,
    ):
        Session([RankSpec(own, remote, (str(python), "-m", "moectl", "worker"), "/", ("127.0.0.1",))]).__enter__()
    assert str(caught.value.hint).startswith("moectl deploy")
    assert deploy([host], shards, manifest, wheelhouse=house, dry_run=True).results[0].python == ""


def test_other_code_under_the_same_version_is_not_ours(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, host = make_shards(shards, 1), Host("localhost", dir=str(tmp_path / "root"))
    assert deploy([host], shards, manifest, dry_run=True).results[0].python == sys.executable
    monkeypatch.setattr(moectl.cluster.deploy.deploy, "hash_code", lambda: "of another source tree")
    assert deploy([host], shards, manifest, dry_run=True).results[0].python == ""


def test_a_host_that_fails_keeps_what_it_had(sshd: Server, tmp_path: Path, shards: Path) -> None:
    manifest, hosts = make_shards(shards, 2), make_hosts(sshd, tmp_path, 2)
    deploy(hosts, shards, manifest).raise_failures()
    before = read_deployment()
    own = "rank-1/layer-000.safetensors"  # what all need, the other host would pass on
    (tmp_path / "node1" / "shards" / shards.name / own).unlink()
    (shards / own).write_bytes(b"damaged here")
    result = deploy(hosts, shards, manifest)
    assert [r.ok for r in result.results] == [True, False]
    assert read_deployment() == before


def test_no_host_waits_for_a_silent_one(sshd: Server, tmp_path: Path, shards: Path) -> None:
    manifest, hosts = make_shards(shards, 2), make_hosts(sshd, tmp_path, 2)
    events: list[Event] = []
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        hosts[0] = replace(hosts[0], name=sshd.add_alias("silent", "ConnectTimeout 30", port=silent.getsockname()[1]))

        def on_event(event: Event) -> None:
            events.append(event)
            if isinstance(event, HostResult) and event.rank == 1:
                silent.close()

        result = deploy(hosts, shards, manifest, on_event=on_event)
    assert [r.ok for r in result.results] == [False, True]
    ends = [e.rank for e in events if isinstance(e, HostResult)]
    assert ends == [1, 0]


# Interruption.


def test_ctrl_c_ends_every_process_and_the_next_run_goes_on(sshd: Server, tmp_path: Path, shards: Path) -> None:
    manifest, hosts = make_shards(shards, 2, layer_bytes=20_000_000), make_hosts(sshd, tmp_path, 2)
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, signal\n"
        f"sys.path.insert(0, {str(Path(moectl.__file__).parent.parent)!r})\n"
        "from pathlib import Path\n"
        "from moectl.cluster.deploy.deploy import deploy\n"
        "from moectl.hosts.hostfile import parse_hosts\n"
        "from moectl.model.manifest import read_manifest\n"
        "from moectl.cluster.deploy.task import Advanced\n"
        "def main():\n"
        "    hosts = parse_hosts(Path(sys.argv[1]).read_text()).hosts\n"
        "    say = lambda e: isinstance(e, Advanced) and print('moving', flush=True)\n"
        "    try:\n"
        "        deploy(hosts, Path(sys.argv[2]), read_manifest(Path(sys.argv[2])), on_event=say)\n"
        "    except KeyboardInterrupt:\n"
        "        sys.exit(130)\n"
        "if __name__ == '__main__':\n"
        "    main()\n"
    )
    listed = tmp_path / "hosts.txt"
    listed.write_text("".join(f"{h.name} python={h.python} dir={h.dir}\n" for h in hosts))
    child = subprocess.Popen(
        [sys.executable, str(script), str(listed), str(shards)], stdout=subprocess.PIPE, start_new_session=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"moving\n"
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does: to the whole group
    child.stdout.read()
    assert child.wait(30) == 130
    child.stdout.close()
    for _ in range(500):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, 0)
            time.sleep(0.02)
            continue
        break
    else:
        pytest.fail("a deploy process outlived Ctrl-C")
    for rank in (0, 1):
        assert not (tmp_path / f"node{rank}" / "shards" / shards.name / NAME).exists()
    time_left = 500
    result = deploy(hosts, shards, manifest)
    while result.failed and time_left:  # the host's receiver may need a moment to notice
        assert all("another push" in str(r.error) for r in result.failed)
        time.sleep(0.02)
        time_left -= 1
        result = deploy(hosts, shards, manifest)
    result.raise_failures()
    for rank in (0, 1):
        assert_holds(tmp_path / f"node{rank}" / "shards" / shards.name, manifest, rank)


def processes_of(path: Path) -> list[str]:
    """Return the command lines of running programs that name a path."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(entry.read_text().replace("\0", " "))
    return [line for line in found if str(path) in line]


def test_ctrl_c_ends_an_install_on_this_machine_too(tmp_path: Path, shards: Path) -> None:
    make_shards(shards, 1)
    root = tmp_path / "root"
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(moectl.__file__).parent.parent)!r})\n"
        "from pathlib import Path\n"
        "from moectl.cluster.deploy import deploy as cluster\n"
        "from moectl.hosts.hostfile import Host\n"
        "from moectl.model.manifest import read_manifest\n"
        "def main():\n"
        "    cluster.hash_code = lambda: 'of no interpreter here'\n"
        f"    host = Host('localhost', dir={str(root)!r})\n"
        "    try: cluster.deploy([host], Path(sys.argv[1]), read_manifest(Path(sys.argv[1])))\n"
        "    except KeyboardInterrupt: sys.exit(130)\n"
        "if __name__ == '__main__': main()\n"
    )
    with socket.socket() as index:  # a package index that never answers
        index.bind(("127.0.0.1", 0))
        index.listen()
        index.settimeout(90)
        address = f"http://127.0.0.1:{index.getsockname()[1]}/"
        environ = {**os.environ, "PIP_INDEX_URL": address, "PIP_CONFIG_FILE": os.devnull, "NO_PROXY": "*"}
        child = subprocess.Popen([sys.executable, str(script), str(shards)], env=environ)
        asked, _ = index.accept()
        with asked:
            assert processes_of(root)
            child.send_signal(signal.SIGINT)
            assert child.wait(30) == 130
            for _ in range(500):
                if not processes_of(root):
                    break
                time.sleep(0.02)
            else:
                pytest.fail("pip outlived Ctrl-C")


# Connecting, and four hosts.


def test_connect_gives_all_hosts_or_names_the_bad_one(sshd: Server, tmp_path: Path) -> None:
    hosts = make_hosts(sshd, tmp_path, 2)
    with connect([*hosts, Host("localhost")]) as remotes:
        assert [r.run(["echo", r.name]).stdout.decode().strip() for r in remotes] == ["node0", "node1", "localhost"]
    dead = Host(sshd.add_alias("dead", port=find_free_port()))
    with pytest.raises(Unreachable, match=r"^dead: port \d+ refused the connection$"), connect([*hosts, dead]):
        pass
    also = Host(sshd.add_alias("dead2", port=find_free_port()))
    with (
        pytest.raises(
            Unreachable, match=r"^dead: port \d+ refused the connection \(and dead2 cannot be used either\)$"
        ),
        connect([dead, *hosts, also]),
    ):
        pass


def test_ctrl_c_does_not_wait_for_a_silent_host(sshd: Server, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(moectl.__file__).parent.parent)!r})\n"
        "from moectl.hosts.connect import connect\n"
        "from moectl.hosts.hostfile import Host\n"
        "try: connect([Host('silent')]).__enter__()\n"
        "except KeyboardInterrupt: sys.exit(130)\n"
    )
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        sshd.add_alias("silent", "ConnectTimeout 600", port=silent.getsockname()[1])
        child = subprocess.Popen([sys.executable, str(script)])
        accepted, _ = silent.accept()
        with accepted:
            assert accepted.recv(4) == b"SSH-"
            child.send_signal(signal.SIGINT)
            try:
                assert child.wait(30) == 130
            finally:
                child.kill()
                child.wait()


@pytest.mark.netns
def test_four_hosts_of_which_one_is_cut_off(netns: Cluster, tmp_path: Path) -> None:
    shards = tmp_path / "tiny-experts-4"
    manifest, hosts = make_shards(shards, 4), netns.hosts()
    netns.cut(3)
    result = deploy(hosts, shards, manifest)
    assert [type(r.error) for r in result.results] == [type(None)] * 3 + [Unreachable]
    netns.heal(3)
    result = deploy(hosts, shards, manifest)
    result.raise_failures()
    assert [r.copied_bytes for r in result.results] == [0, 0, 0, total_bytes(shards, manifest, 3)]
    for rank, node in enumerate(netns.nodes):
        assert_holds(node.directory / "moectl" / "shards" / shards.name, manifest, rank)
    assert [r.host for r in read_deployment().ranks] == list(hosts)
