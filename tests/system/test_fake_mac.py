"""Macs as their owners have them, each from the first question to the removal of all that moectl put there.

They are fakes behind a real sshd (`tests.support.fake_mac`): what is tested is what moectl asks of macOS's tools and
pythons, and what it makes of the answers.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from moectl.cluster import probed_plan
from moectl.cluster.deploy.deploy import deploy, wanted_versions
from moectl.cluster.deploy.task import HostTask
from moectl.cluster.deploy.uninstall import clear_hosts
from moectl.cluster.deploy.wheelhouse import ask_platforms
from moectl.cluster.status import IDLE, RUNNING, Observer
from moectl.errors import MoectlError, StateError
from moectl.hosts.connect import open_remotes
from moectl.hosts.hostfile import HostList
from moectl.hosts.programs import find_python, list_pythons
from moectl.hosts.survey import read_hardware, survey_host
from moectl.model.manifest import FileEntry
from moectl.planner.questions import PlanOptions, plan_cluster
from moectl.session.deployment import read_deployment
from moectl.shards.prepare import Wanted
from tests.cli.test_cli import run
from tests.cluster.test_deploy import assert_holds, make_shards
from tests.support.cabling import mesh
from tests.support.fake_mac import STUDIO, FakeMac, record_mac, start_mac
from tests.support.lone_host import deploy_host
from tests.support.macs import (
    FRAMEWORK,
    HOMEBREW,
    INTEL,
    MACPORTS,
    MACS,
    MINIFORGE,
    MINIFORGE_OF_HOMEBREW,
    PYENV,
    UV,
    Mac,
    MacPython,
)
from tests.support.sshd import Server

RING = "Thunderbolt ring of 2 Macs, 1 cable: TCP (ring)"
RDMA = "Thunderbolt mesh of 2 Macs, 1 cable: RDMA (jaccl)"
RDMA_IS_OFF = "RDMA is off. Only a person at the Mac can switch it on"
TOO_OLD = "its Thunderbolt is of generation 4 or older: RDMA needs 5"
NO_PYTHON = "no python 3.11 or newer was found"
AS_IT_COMES = {"sleep": "warn", "versions": "warn"}  # it sleeps after ten minutes, and moectl is not there yet


@dataclass(frozen=True)
class Expected:
    """What moectl finds on a Mac, proposes, and says."""

    chip: str
    plan: str  # whether two of them hold DBRX in 4 bits
    setup: str
    advice: str = ""
    wrong: dict[str, str] = field(default_factory=lambda: AS_IT_COMES)
    python: MacPython | None = None  # that the environment is made with
    refused: str = ""
    wheel: str = ""  # of MLX, that pip takes
    tag: str = "macosx_26_0_arm64"  # that a wheelhouse is filled for


EXPECTED = {
    "mini-m1": Expected("m1", "too_much", RING, TOO_OLD, wrong={"sleep": "warn", "python": "fail"}, refused=NO_PYTHON),
    "studio-m2-ultra": Expected(
        "m2-ultra", "fits", RING, TOO_OLD, python=HOMEBREW, wheel="macosx_15_0_arm64", tag="macosx_15_0_arm64"
    ),
    "mini-m4-pro": Expected(
        "m4-pro",
        "too_much",
        RING,
        "macOS 26.1: RDMA over Thunderbolt needs 26.2 or newer",
        wrong={**AS_IT_COMES, "firewall": "warn", "system": "warn"},
        python=HOMEBREW,
        wheel="macosx_26_0_arm64",
        tag="macosx_15_0_arm64",  # MLX's wheel for 26 is built for 26.2
    ),
    "studio-m4-max": Expected("m4-max", "fits", RDMA, python=UV, wheel="macosx_26_0_arm64"),
    "studio-m3-ultra": Expected("m3-ultra", "fits", RDMA, python=FRAMEWORK, wheel="macosx_26_0_arm64"),
    "macbook-m5-max": Expected(
        "m5-max",
        "fits",
        RING,
        RDMA_IS_OFF,
        wrong={**AS_IT_COMES, "rdma": "warn"},
        python=HOMEBREW,
        wheel="macosx_26_0_arm64",
    ),
    "mini-rosetta": Expected(
        "m4",
        "too_much",
        RING,
        TOO_OLD,
        wrong={"sleep": "warn", "python": "fail"},
        refused="mlx runs on Apple silicon only",
    ),
}
SHORT = ("mini-m1", "studio-m4-max")


def cases() -> list[object]:
    return [pytest.param(name, marks=[] if name in SHORT else [pytest.mark.long]) for name in MACS]


def start_pair(sshd: Server, directory: Path, mac: Mac) -> list[FakeMac]:
    """Start two equal Macs with a cable between their first ports; hosts.txt names them."""
    (directory / "hosts.txt").write_text("mac0\nmac1\n")
    return [start_mac(sshd, directory / f"mac{i}", i, record_mac(mac, i, mesh(2)), mac) for i in range(2)]


def make_task(mac: FakeMac, directory: Path) -> HostTask:
    """Return what `deploy` asks of a host, without a model."""
    wheel = directory / "moectl-0.1.0-py3-none-any.whl"
    wheel.write_bytes(b"a wheel")
    entry = FileEntry(wheel.stat().st_size, hashlib.sha256(wheel.read_bytes()).hexdigest())
    return HostTask(0, mac.host, directory, "none", {}, wanted_versions(), "", {wheel: entry}, False, False)


def paths_below(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*")}


@pytest.mark.parametrize("name", cases())
def test_a_mac_from_the_first_question_to_the_last(
    name: str, sshd: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    expected, mac = EXPECTED[name], MACS[name]
    macs = start_pair(sshd, tmp_path, mac)
    first, host = macs[0], macs[0].host
    before = paths_below(first.home)

    _, out, _ = run(capsys, monkeypatch, "doctor", "hosts.txt", "--fast", "--json")
    document = json.loads(out)
    for found in document["hosts"]:
        assert {c["check"]: c["level"] for c in found["checks"] if c["level"] != "ok"} == expected.wrong, found
    # With a python on both, each connects to the other; how long that takes is not the matter here.
    links = [(check["check"], check["level"] == "fail") for pair in document["pairs"] for check in pair["checks"]]
    assert links == [("tcp", False)] * bool(expected.python)

    code, out, _ = run(capsys, monkeypatch, "setup", "hosts.txt")
    assert (code, out.split("\n")[0]) == (0, expected.setup)
    assert expected.advice in out
    assert ("rdma=" in out) == (expected.setup == RDMA)

    with open_remotes([host]) as remotes:
        hardware = read_hardware(remotes[0])
        assert (hardware.chip, hardware.memory_bytes) == (expected.chip, mac.memory_gib << 30)
        hosts = [replace(host, name=f"mac{i}") for i in range(2)]
        asked = PlanOptions(found={one.name: hardware for one in hosts})
        planned = plan_cluster("databricks/dbrx-instruct", Wanted(bits=4), asked, hosts).plan
        assert planned.verdict.name.lower() == expected.plan
        if expected.python is None:
            with pytest.raises(MoectlError, match=expected.refused):
                ask_platforms([host], remotes)
        else:
            [platform] = ask_platforms([host], remotes)
            assert (platform.python, platform.tags[0]) == (expected.python.version[:4], expected.tag)

    if expected.python is None:
        with pytest.raises(MoectlError, match=expected.refused):
            deploy_host(make_task(first, tmp_path))
    else:
        made = deploy_host(make_task(first, tmp_path))
        assert first.own(made.python) == "/Users/ada/.moectl/env/bin/python"
        file = expected.python.paths[0].replace("~", "/Users/ada", 1)
        assert first.own(str(Path(made.python).resolve())) == file
        assert {row["wheel"] for row in first.pip} == {expected.wheel}
        assert clear_hosts([host], dry_run=False)[0].error is None
    assert paths_below(first.home) == before
    assert [one.dialogs for one in macs] == [[], []]
    assert [one.refused for one in macs] == [[], []]


@pytest.mark.long
def test_a_model_on_two_macs(sshd: Server, tmp_path: Path) -> None:
    """Deploy it, find it there, let a worker run, and remove it: by the pythons, ps and lsof of Macs."""
    macs = start_pair(sshd, tmp_path, MACS["studio-m2-ultra"])
    hosts = [mac.host for mac in macs]
    before = [paths_below(mac.home) for mac in macs]
    shards = tmp_path / "tiny-experts-2"
    manifest = make_shards(shards, 2)
    made = deploy(hosts, shards, manifest)
    made.raise_failures()
    for rank, (mac, result) in enumerate(zip(macs, made.results, strict=True)):
        assert mac.own(result.directory) == "/Users/ada/.moectl/shards/tiny-experts-2"
        assert_holds(Path(result.directory), manifest, rank)
    assert sum(result.relayed_bytes for result in made.results) > 0
    assert [result.copied_bytes for result in deploy(hosts, shards, manifest).results] == [0, 0]

    log = Path(made.results[1].root, "logs", "tiny-experts-2-rank-1.log")
    with macs[1].running(501, f"{HOMEBREW.runs_as} -m moectl worker", log, kib=73600000):
        with Observer(read_deployment()) as observer:
            rows = observer.look().rows
        assert [(row.state, row.memory_bytes, row.up_s) for row in rows] == [
            (IDLE, None, None),
            (RUNNING, 73600000 << 10, 8047.0),
        ]
        assert [type(one.error) for one in clear_hosts(hosts, dry_run=False)] == [type(None), StateError]
    assert clear_hosts(hosts[1:], dry_run=False)[0].error is None
    assert [paths_below(mac.home) for mac in macs] == before
    assert [mac.refused for mac in macs] == [[], []]


@pytest.mark.long
def test_each_usual_python_is_found(sshd: Server, tmp_path: Path) -> None:
    mac = start_mac(sshd, tmp_path / "mac0", 0, record_mac(STUDIO, 0))
    with open_remotes([mac.host]) as remotes:
        for python in (HOMEBREW, FRAMEWORK, UV, MACPORTS, PYENV, MINIFORGE, MINIFORGE_OF_HOMEBREW):
            with mac.with_python(python) as file:
                assert Path(find_python(remotes[0], list_pythons(mac.host))).resolve() == file
        for python in (INTEL, MacPython(("/opt/homebrew/bin/python3.8",), "3.8.18")):
            with mac.with_python(python):
                assert find_python(remotes[0], list_pythons(mac.host)) == ""
    assert mac.dialogs == []


def test_links_are_timed_by_a_python_that_is_there(sshd: Server, tmp_path: Path) -> None:
    """On a Mac without Command Line Tools, `python3` opens a dialog; Homebrew's is not in the PATH of a command."""
    macs = [
        start_mac(sshd, tmp_path / f"mac{i}", i, record_mac(MACS[name], i), MACS[name])
        for i, name in enumerate(("macbook-m5-max", "mini-m1"))
    ]
    said: list[str] = []
    with probed_plan._open_sites(HostList(tuple(mac.host for mac in macs))) as (sites, missing):
        assert missing == ["mac0", "mac1"]
        assert macs[0].own(str(Path(sites[0].python).resolve())) == HOMEBREW.paths[0]
        assert sites[1].python == ""
        assert probed_plan._measure_links(sites, said.append) == ((), ())
    assert said == ["mac1: no python was found there: links are assumed to be as --link says."]


def test_a_worker_of_a_framework_python_is_seen(sshd: Server, tmp_path: Path) -> None:
    """Such a python starts itself again as Python.app, which is what ps shows."""
    mac = start_mac(sshd, tmp_path / "mac0", 0, record_mac(MACS["studio-m3-ultra"], 0), MACS["studio-m3-ultra"])
    log = mac.home / ".moectl" / "logs" / "x-rank-0.log"
    with (
        mac.running(501, f"{FRAMEWORK.runs_as} -m moectl worker", log),
        mac.running(502, "/usr/libexec/sharingd"),
        open_remotes([mac.host]) as remotes,
    ):
        assert survey_host(remotes[0]).workers_bytes == 512000 << 10
        [found] = clear_hosts([mac.host], dry_run=True)
    assert isinstance(found.error, StateError)
    assert "process 501" in found.error.message


@pytest.mark.long
def test_a_directory_that_macos_keeps_from_ssh(sshd: Server, tmp_path: Path) -> None:
    mac = start_mac(sshd, tmp_path / "mac0", 0, record_mac(MACS["mini-m4-pro"], 0), MACS["mini-m4-pro"])
    task = make_task(mac, tmp_path)
    with pytest.raises(MoectlError) as caught:
        deploy_host(replace(task, host=replace(mac.host, dir="~/Documents/moectl")))
    assert mac.own(str(caught.value)) == "mac0: cannot write /Users/ada/Documents/moectl: Operation not permitted"
    assert str(caught.value.hint).startswith("name another place with dir=; on a Mac, ~/Desktop, ~/Documents")
    made = deploy_host(replace(task, host=replace(mac.host, dir="~/moectl")))
    assert mac.own(made.python) == "/Users/ada/moectl/env/bin/python"
