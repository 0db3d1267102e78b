"""Wheelhouses: what is needed where, the list of hashes, and that pip takes these bytes and no others.

The index is a directory of stub wheels, read by the real pip: real wheels are hundreds of megabytes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from moectl.cluster.deploy.wheel import write_wheel
from moectl.cluster.deploy.wheelhouse import (
    LIST,
    Platform,
    ask_platforms,
    build,
    check,
    find_closure,
    make_list,
    make_platform,
)
from moectl.errors import CommandFailed, IntegrityError, StateError, Unreachable, UsageError, VersionMismatch
from moectl.hosts.connect import open_remotes
from moectl.hosts.hostfile import Host
from moectl.hosts.onhost import platform
from tests.cli.test_cli import run
from tests.cluster.test_deploy import make_shards
from tests.support.sshd import Server, find_free_port

HERE = platform.describe()
MAC = {
    **HERE,
    "python": "3.12",
    "system": "darwin",
    "machine": "arm64",
    "mac": "15.5",
    "libc": ["", ""],
    "environment": {**HERE["environment"], "sys_platform": "darwin", "platform_system": "Darwin"},
}


def make_wheel(directory: Path, name: str, version: str, tag: str = "py3-none-any", *needs: str) -> Path:
    """Write an empty wheel that pip takes for a real one."""
    directory.mkdir(parents=True, exist_ok=True)
    info = f"{name}-{version}.dist-info"
    lines = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}", *(f"Requires-Dist: {need}" for need in needs)]
    wheel = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\n"
    wheel += f"Tag: {tag}\n"
    path = directory / f"{name}-{version}-{tag}.whl"
    files = {f"{info}/METADATA": "\n".join([*lines, ""]).encode(), f"{info}/WHEEL": wheel.encode()}
    write_wheel(path, info, files)
    return path


def test_platforms_of_hosts_are_asked_over_ssh(sshd: Server, tmp_path: Path) -> None:
    hosts = [Host(sshd.add_alias(f"node{i}"), python=sys.executable, dir=str(tmp_path)) for i in range(2)]
    dead = Host(sshd.add_alias("dead", f"Port {find_free_port()}"))
    listed = [*hosts, dead, Host("localhost")]
    with open_remotes(listed) as remotes:
        assert ask_platforms(listed, remotes) == [make_platform(HERE)]
        with pytest.raises(Unreachable):
            ask_platforms([dead], remotes[2:3])
        assert ask_platforms([Host("localhost")], remotes[3:]) == []


def test_tags_that_a_host_takes() -> None:
    tags = {mac: make_platform({**MAC, "mac": mac}).tags for mac in ("14.6", "15.5", "26.1", "26.2", "16.3", "27.0")}
    assert tags == {
        "14.6": ("macosx_14_0_arm64",),
        "15.5": ("macosx_15_0_arm64",),
        "26.1": ("macosx_15_0_arm64",),  # mlx's wheel for 26 is built for 26.2
        "26.2": ("macosx_26_0_arm64",),
        "16.3": ("macosx_26_0_arm64",),  # as macOS 26 calls itself to an older python
        "27.0": ("macosx_27_0_arm64",),
    }
    with pytest.raises(VersionMismatch, match=r"it has macOS 13\.7, and mlx needs 14 or newer"):
        make_platform({**MAC, "mac": "13.7"})
    with pytest.raises(VersionMismatch, match="Intel processor, and mlx runs on Apple silicon only"):
        make_platform({**MAC, "machine": "x86_64"})
    linux = {**HERE, "system": "linux", "machine": "aarch64", "libc": ["glibc", "2.39"]}  # a DGX Spark
    assert make_platform(linux).tags[:2] == ("manylinux_2_39_aarch64", "manylinux_2_38_aarch64")
    assert {"manylinux_2_35_aarch64", "manylinux2014_aarch64"} <= set(make_platform(linux).tags)
    with pytest.raises(VersionMismatch, match=r"glibc 2\.31, and mlx's wheels need 2\.35 or newer"):
        make_platform({**linux, "libc": ["glibc", "2.31"]})
    assert make_platform(linux).tags[-1] == "linux_aarch64"
    with pytest.raises(VersionMismatch, match="not glibc"):
        make_platform({**linux, "libc": ["", ""]})
    with pytest.raises(VersionMismatch, match="pypy"):
        make_platform({**linux, "implementation": "pypy"})


def test_everything_that_moectl_leads_to_here() -> None:
    """The closure for this machine is what is installed here, and complete."""

    def read(requirement: Requirement) -> tuple[str, list[str]]:
        raise AssertionError(f"{requirement} is not installed here")

    found = find_closure(metadata.requires("moectl") or [], HERE["environment"], {}, read)
    assert {"mlx", "mlx-lm", "transformers", "numpy", "click", "paramiko", "cryptography"} <= set(found)
    assert {name: metadata.version(name) for name in found} == found
    assert not {"pytest", "torch"} & set(found)
    if HERE["system"] == "linux":
        assert "mlx-cpu" in found


def test_another_system_needs_other_wheels() -> None:
    asked = []

    def read(requirement: Requirement) -> tuple[str, list[str]]:
        asked.append(str(requirement))
        return "9.0", ["click", "extra-only; extra == 'x'"]

    lines = ["mac-only[x]>=9; sys_platform == 'darwin'", "linux-only; sys_platform == 'linux'", "click>=1", "tqdm>=999"]
    found = find_closure(lines, MAC["environment"], {}, read)
    assert found == {"mac-only": "9.0", "click": metadata.version("click"), "tqdm": "9.0", "extra-only": "9.0"}
    assert sorted(asked) == ['extra-only; extra == "x"', 'mac-only[x]>=9; sys_platform == "darwin"', "tqdm>=999"]
    assert find_closure(["click"], MAC["environment"], {"click": "9.0"}, read)["click"] == "9.0"


def test_on_an_arm_linux_it_is_mlx_for_the_cpu() -> None:
    """CUDA's library is put in by hand (guide `deploying`): with pip, it and the CPU's overwrite each other."""
    environment = {**HERE["environment"], "sys_platform": "linux", "platform_machine": "aarch64"}
    environment["platform_system"] = "Linux"

    def read(requirement: Requirement) -> tuple[str, list[str]]:
        return "9.0", []

    found = find_closure(metadata.requires("moectl") or [], environment, {}, read)
    assert "mlx-cpu" in found
    assert not [name for name in found if name.startswith(("mlx-cuda", "mlx-metal"))]


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that is all that pip can see, and a moectl that needs little."""
    directory = tmp_path / "index"
    for name in list(os.environ):
        if name.startswith("PIP_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    click = metadata.version("click")
    make_wheel(directory, "click", click)
    make_wheel(directory, "moe_core", "2.0", "cp312-cp312-macosx_14_0_arm64", "moe-metal==2.0; sys_platform=='darwin'")
    make_wheel(directory, "moe_core", "2.0", "cp311-cp311-manylinux_2_17_x86_64")
    make_wheel(directory, "moe_metal", "2.0", "py3-none-macosx_14_0_arm64", "click")
    monkeypatch.setattr(metadata, "requires", lambda name: ["click", "moe-core>=1"])
    return directory


def linux() -> Platform:
    answer: dict[str, Any] = {**HERE, "system": "linux", "machine": "x86_64", "libc": ["glibc", "2.36"]}
    return make_platform({**answer, "python": "3.11", "environment": {**HERE["environment"], "sys_platform": "linux"}})


@pytest.mark.long
def test_a_wheelhouse_for_two_systems_is_built_and_checked(index: Path, tmp_path: Path) -> None:
    house, said = tmp_path / "house", list[str]()
    build(house, [make_platform(MAC), linux()], {}, say=said.append)
    assert {p.name for p in house.iterdir()} == {LIST, *(p.name for p in index.iterdir())}
    lines = [line for line in (house / LIST).read_text().split("\n") if not line.startswith("#")]
    heads = [line.partition(" --hash")[0] for line in lines if line]
    assert heads == [
        f"click=={metadata.version('click')}",
        'moe-core==2.0 ; (sys_platform == "darwin" or sys_platform == "linux") and '
        '(python_version == "3.11" or python_version == "3.12")',
        'moe-metal==2.0 ; sys_platform == "darwin"',
    ]
    assert said[0] == "fetching moe-core for python 3.12 on macosx_15_0_arm64"
    check(house)
    # Another one beside them is added to the list, one that was changed is refused, and so is one that has gone.
    make_wheel(house, "more", "1")
    check(house)
    assert "more==1 --hash=sha256:" in (house / LIST).read_text()
    metal = next(house.glob("moe_metal*"))
    content = metal.read_bytes()
    metal.write_bytes(content + b"x")
    with pytest.raises(IntegrityError, match=r"moe_metal.* is not the file"):
        check(house)
    metal.unlink()
    with pytest.raises(IntegrityError, match="is gone") as caught:
        check(house)
    assert str(caught.value.hint).startswith(f"fetch it again: rm -f {metal}, then --wheelhouse-build; or remove ")
    build(house, [make_platform(MAC)], {})  # fetches it again
    assert metal.read_bytes() == content
    check(house)


@pytest.mark.long
def test_an_unfinished_wheelhouse_has_no_name_yet(index: Path, tmp_path: Path) -> None:
    for wheel in index.glob("moe_metal*"):
        wheel.unlink()
    with pytest.raises(CommandFailed, match=r"No matching distribution found for moe-metal==2\.0"):
        build(tmp_path / "house", [make_platform(MAC)], {})
    assert not (tmp_path / "house").exists()
    make_wheel(index, "moe_metal", "2.0", "py3-none-macosx_14_0_arm64")
    build(tmp_path / "house", [make_platform(MAC)], {})
    assert (tmp_path / "house" / LIST).exists()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_pip_takes_what_is_listed_and_nothing_else(tmp_path: Path) -> None:
    house = tmp_path / "house"
    make_wheel(house, "moe_a", "1.0", "py3-none-any", "moe-b>=1")
    make_wheel(house, "moe_b", "1.0")
    (house / LIST).write_text(make_list(house.glob("*.whl")))
    options = ["--quiet", "--dry-run", "--no-index", "--find-links", str(house)]
    options += ["--require-hashes", "-r", str(house / LIST)]
    argv = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", *options]
    subprocess.run(argv, check=True, capture_output=True)
    make_wheel(house, "moe_b", "1.0", "py3-none-any", "click")
    done = subprocess.run(argv, check=False, capture_output=True, text=True)
    assert done.returncode
    assert "DO NOT MATCH THE HASHES" in done.stderr


def test_what_is_no_wheelhouse(tmp_path: Path) -> None:
    make_wheel(tmp_path, "moe_a", "1.0")
    make_wheel(tmp_path, "moe_a", "1.1")
    with pytest.raises(UsageError, match=r"several versions of moe-a: 1\.0, 1\.1"):
        check(tmp_path)
    (tmp_path / "broken.whl").touch()
    with pytest.raises(UsageError, match="does not have the name of a wheel"):
        make_list([tmp_path / "broken.whl"])
    (tmp_path / LIST).write_text("somebody's own\n")
    check(tmp_path)
    assert (tmp_path / LIST).read_text() == "somebody's own\n"


def test_what_the_disk_refuses_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, kind in ((tmp_path / "file" / "wheels", UsageError), (Path("/proc/none/wheels"), StateError)):
        with pytest.raises(kind) as refused:
            build(name, [], {})
        assert name.parent.name in refused.value.message
    (tmp_path / "lost-1-py3-none-any.whl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"lost-1-py3-none-any\.whl cannot be read"):
        check(tmp_path)


def test_deploy_fetches_a_wheelhouse_that_is_not_there(
    index: Path,
    sshd: Server,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shards = tmp_path / "tiny-experts-1"
    make_shards(shards, 1)
    hosts = tmp_path / "hosts.txt"
    hosts.write_text(f"{sshd.add_alias('node0')} python={sys.executable} dir={tmp_path / 'node0'} chip=linux-cpu\n")
    make_wheel(index, "moe_core", "2.0", "py3-none-any")
    house = tmp_path / "house"
    words = ("deploy", str(hosts), "--shards", str(shards), "--force", "--wheelhouse", str(house))
    code, _, err = run(capsys, monkeypatch, *words, "--dry-run")
    assert code == 0
    assert f"{house} would be filled with wheels." in err
    assert not house.exists()
    code, _, err = run(capsys, monkeypatch, *words)
    assert code == 0
    assert "fetching 2 wheels for python" in err
    assert {wheel.name.split("-")[0] for wheel in house.glob("*.whl")} == {"click", "moe_core"}
    code, _, err = run(capsys, monkeypatch, *words[:4], "--force", "--wheelhouse-build")
    assert (code, "Hint: add --wheelhouse DIR\n" in err) == (2, True)
    assert run(capsys, monkeypatch, *words, "--wheelhouse-build")[0] == 0


@pytest.mark.long
def test_what_a_hint_about_wheels_says_is_done(index: Path, tmp_path: Path) -> None:
    metal = next(index.glob("moe_metal*"))
    content = metal.read_bytes()
    metal.unlink()
    platforms = [make_platform(MAC), linux()]
    with pytest.raises(CommandFailed) as caught:
        build(tmp_path / "house", platforms, {})
    assert caught.value.hint == (
        "internet is needed here, and pip (python -m ensurepip); or take a directory of wheels that has them"
    )
    metal.write_bytes(content)
    build(tmp_path / "house", platforms, {})
    check(tmp_path / "house")
    check(index)  # the directory of wheels
    (index / LIST).unlink()
    older = make_wheel(index, "moe_core", "1.0")
    with pytest.raises(UsageError) as refused:
        check(index)
    assert refused.value.hint == "keep one: hosts have to agree"
    older.unlink()
    check(index)
