"""`moectl doctor` as a user types it: on this machine, over real sshd, on four hosts of which some are broken."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from moectl.cluster.doctor import diagnose as doctor, login
from moectl.cluster.doctor.diagnose import choose_hosts, diagnose
from moectl.cluster.doctor.finding import Level
from moectl.hosts.connect import run_at_once
from moectl.hosts.hostfile import Host, HostList
from moectl.session.deployment import DeployedRank, Deployment, write_deployment
from tests.support.interpreter import make_interpreter
from tests.support.netns import Cluster
from tests.support.ring import rank_env
from tests.support.running import processes
from tests.support.sshd import Server, run_sshd
from tests.support.tiny import write_checkpoint, write_words


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_interpreter(tmp_path_factory.mktemp("tree") / "env")


def run_doctor(*words: str, code: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "moectl", "doctor", "--json", *words],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    document: dict[str, Any] = json.loads(done.stdout)
    assert document["schema"] == "moectl.doctor/1"
    assert document["ok"] == (code == 0)
    if code:
        assert json.loads(done.stderr.splitlines()[-1])["error"]["code"] == code
    return document


def levels(document: dict[str, Any], place: int) -> dict[str, str]:
    return {check["check"]: check["level"] for check in document["hosts"][place]["checks"]}


def texts(document: dict[str, Any], place: int) -> dict[str, str]:
    return {check["check"]: check["text"] for check in document["hosts"][place]["checks"]}


def test_this_machine_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    document = run_doctor(code=0)
    assert document["source"] == "this machine"
    assert [host["host"] for host in document["hosts"]] == ["localhost"]
    assert document["pairs"] == document["cluster"] == []
    assert levels(document, 0)["versions"] == "ok"


def test_two_hosts_that_are_right(sshd: Server, python: str, tmp_path: Path) -> None:
    rows = [
        {"ssh": sshd.add_alias(name), "ips": ["127.0.0.1"], "rdma": [], "python": python, "dir": str(tmp_path / name)}
        for name in ("left", "right")
    ]
    envs = [f"{name}={value}" for name, value in rank_env().items()]
    (tmp_path / "hosts.json").write_text(json.dumps({"backend": "ring", "envs": envs, "hosts": rows}))
    document = run_doctor(str(tmp_path / "hosts.json"), code=0)
    assert document["counts"]["fail"] == 0
    [pair] = document["pairs"]
    assert [check["check"] for check in pair["checks"]] == ["tcp", "collective"]
    assert pair["checks"][0]["values"]["out_bytes_s"] > 0
    assert pair["checks"][1]["values"]["backend"] == "ring"
    assert not processes("moectl.engine.measure")


def test_a_deployed_shard_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_words(write_checkpoint(tmp_path / "tiny"))
    hosts = tmp_path / "hosts.txt"
    hosts.write_text(f"localhost dir={tmp_path}/here\n")
    for words in (("shard", str(tmp_path / "tiny"), "--nodes", "1", "-q"), ("deploy", str(hosts), "-q")):
        subprocess.run([sys.executable, "-m", "moectl", *words], check=True, capture_output=True, timeout=120)
    monkeypatch.chdir(tmp_path)
    document = run_doctor(code=0)
    assert "tiny-bf16-hidden-1 needs " in texts(document, 0)["memory"]
    assert levels(document, 0)["shards"] == "ok"
    weights = max((tmp_path / "here" / "shards").rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    weights.unlink()
    document = run_doctor(code=3)
    assert levels(document, 0)["shards"] == "fail"
    assert next(c["fix"] for c in document["hosts"][0]["checks"] if c["check"] == "shards") == "moectl deploy hosts.txt"


@pytest.fixture
def four(netns: Cluster, python: str, tmp_path: Path) -> list[dict[str, Any]]:
    """The rows of an MLX hostfile of the four hosts."""
    return [
        {"ssh": host.name, "ips": list(host.ips), "rdma": [], "python": python, "dir": "/node/doctor"}
        for host in netns.hosts()
    ]


def write_rows(directory: Path, rows: list[dict[str, Any]]) -> str:
    path = directory / "hosts.json"
    path.write_text(json.dumps({"backend": "ring", "envs": [], "hosts": rows}))
    return str(path)


@pytest.mark.netns
def test_four_hosts_of_which_three_are_wrong(netns: Cluster, four: list[dict[str, Any]], tmp_path: Path) -> None:
    four[1]["python"] = make_interpreter(tmp_path / "old", version="0.0.9")
    netns.run(2, ["mkdir", "-p", "/node/small"])
    netns.run(2, ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/node/small"])
    four[2]["dir"] = "/node/small/moectl"
    netns.cut(3)
    try:
        document = run_doctor(write_rows(tmp_path, four), code=3)
    finally:
        netns.run(2, ["umount", "/node/small"])
    assert {"ssh", "system", "python", "versions", "disk"} <= {
        c for c, level in levels(document, 0).items() if level == "ok"
    }
    assert levels(document, 1)["versions"] == "fail"
    assert texts(document, 1)["versions"].startswith("moectl 0.0.9 here is ")
    assert levels(document, 2)["disk"] == "fail"
    assert texts(document, 2)["disk"].startswith("disk full: 1.0 MB free, ")
    assert levels(document, 3) == {"ssh": "fail"}
    # The links between those that answer are tried all the same; a sum wants equal versions.
    checks = {(p["a"], p["b"]): {c["check"]: c["level"] for c in p["checks"]} for p in document["pairs"]}
    assert set(checks) == {("node0", "node1"), ("node0", "node2"), ("node1", "node2")}
    assert {some["tcp"] for some in checks.values()} <= {"ok", "warn"}
    assert checks["node0", "node1"]["collective"] == "skip"
    assert "links with node3: it could not be looked at" in [c["text"] for c in document["cluster"]]


@pytest.mark.netns
def test_a_wall_between_two_hosts_and_an_address_that_moved(
    netns: Cluster, four: list[dict[str, Any]], tmp_path: Path
) -> None:
    netns.run(0, ["iptables", "-I", "INPUT", "-s", netns.nodes[1].address, "-j", "DROP"])
    four[2]["ips"] = ["192.0.2.7"]
    document = run_doctor(write_rows(tmp_path, four[:3]), "--fast", code=3)
    assert texts(document, 2)["address"].startswith("ip=192.0.2.7 is not its own address (it has 10.77.")
    wall = next(pair for pair in document["pairs"] if (pair["a"], pair["b"]) == ("node0", "node1"))
    assert {check["level"] for check in wall["checks"]} == {"fail"}
    assert {check["values"]["errno"] for check in wall["checks"]} == {"ETIMEDOUT"}
    assert "nothing answers: a firewall" in wall["checks"][0]["text"]
    assert all(check["check"] == "tcp" for pair in document["pairs"] for check in pair["checks"])  # --fast


def test_a_host_that_hangs_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "HOST_S", 6.0)
    monkeypatch.setattr(login, "PING_S", 20.0)
    with run_sshd(tmp_path / "sshd", "ForceCommand sleep 60") as server:
        monkeypatch.setenv("MOECTL_SSH_CONFIG", str(server.config))
        where = HostList((Host("localhost"), Host(server.add_alias("stuck"))), source="hosts.txt")
        found = diagnose(where, None, fast=True)
    good, stuck = found.hosts
    assert max(f.level for f in good.findings) < Level.FAIL
    assert [(f.check, f.level) for f in stuck.findings][-1] == ("time", Level.FAIL)
    assert "no answer within 6 s" in stuck.findings[-1].text


def test_tasks_that_do_not_end_are_left() -> None:
    assert run_at_once([lambda: None, lambda: time.sleep(30)], 0.2) == [True, False]


def test_which_hosts_are_looked_at() -> None:
    alone, nothing = choose_hosts(None)
    assert ([host.name for host in alone.hosts], nothing) == (["localhost"], None)
    one, two = Host("mac1"), Host("mac2")
    deployment = Deployment("tiny", "/set", (DeployedRank(one, "/p", "/r", "/d"), DeployedRank(two)))
    write_deployment(deployment)
    deployed, found = choose_hosts(None)
    assert (deployed.hosts, deployed.source, found) == ((one, two), "the current deployment", deployment)
    assert choose_hosts(HostList((one, two)))[1] == deployment
    assert choose_hosts(HostList((two, one)))[1] is None


def test_a_deployed_interpreter_that_is_gone(sshd: Server, tmp_path: Path) -> None:
    host = Host(sshd.add_alias("node0"), dir=str(tmp_path))
    deployment = Deployment("tiny", "/nowhere", (DeployedRank(host, str(tmp_path / "env/bin/python"), "/r", "/d"),))
    found = diagnose(HostList((host,), source="hosts.txt"), deployment)
    [python] = [f for f in found.hosts[0].findings if f.check == "python"]
    assert (python.level, python.fix) == (Level.FAIL, "moectl deploy hosts.txt")
    assert "does not start" in python.text


def test_what_a_failing_line_says_mends_it(python: str, tmp_path: Path) -> None:
    file = tmp_path / "hosts.txt"
    file.write_text(f"localhost python=/no/python dir={tmp_path / 'root'}\n")
    command = [sys.executable, "-m", "moectl", "doctor", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "Hint: each FAIL line says what mends it.\n" in done.stderr
    said = " ".join(done.stdout.split())
    assert "FAIL" in said
    assert "python=/path/to/python3" in said
    file.write_text(f"localhost python={python} dir={tmp_path / 'root'}\n")
    assert run_doctor(str(file), code=0)["counts"]["fail"] == 0
