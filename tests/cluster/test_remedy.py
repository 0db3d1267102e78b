"""When a host stays away, a set that the others hold already is what brings the model back."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from moectl.cluster.deploy.deploy import deploy
from moectl.cluster.deploy.remedy import find_remedy
from moectl.hosts.hostfile import Host, HostList, parse_host_string, parse_hosts
from moectl.model.manifest import read_manifest
from moectl.paths import data_dir
from moectl.session.deployment import DeployedRank, Deployment, read_deployment, recall_hosts, write_deployment
from tests.cli.test_cli import run
from tests.engine.test_lockstep import cut_case
from tests.support.sshd import Server
from tests.support.tiny import write_checkpoint


@pytest.fixture
def hosts(sshd: Server, tmp_path: Path) -> HostList:
    names = ("left", "right")
    lines = [f"{sshd.add_alias(name)} python={sys.executable} dir={tmp_path / name}" for name in names]
    return parse_hosts("\n".join(lines))


@pytest.fixture
def target(hosts: HostList, tmp_path: Path) -> Deployment:
    """Two hosts with a set for two; on this machine there is one for a single host, too."""
    write_checkpoint(tmp_path / "source")
    for name, shares in (("two", (3, 3)), ("one", (6,)), ("other", (2, 2, 2))):
        cut_case(tmp_path / "source", data_dir() / "shards" / name, "hidden", shares, 16)
    directory = data_dir() / "shards" / "two"
    deploy(hosts.hosts, directory, read_manifest(directory)).raise_failures()
    return read_deployment()


def test_a_set_for_the_others_is_found(hosts: HostList, target: Deployment) -> None:
    one = data_dir() / "shards" / "one"
    command = shlex.join(["moectl", "deploy", "--hosts", "left", "--shards", str(one)])
    found = find_remedy(target, "right")
    assert found is not None
    assert found.endswith(f"MB to copy: {command}")
    deploy(hosts.hosts[:1], one, read_manifest(one)).raise_failures()
    assert find_remedy(target, "right") == (
        f"if right stays away, the others can go on with one, which they hold on their disks: {command}"
    )
    assert find_remedy(target, "nobody") is None


def test_the_command_goes_where_the_hosts_keep_things(
    target: Deployment, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = shlex.split(str(find_remedy(target, "right")).rpartition(": ")[2])
    assert words[:2] == ["moectl", "deploy"]
    code, out, err = run(capsys, monkeypatch, *words[1:], "--dry-run", "--json")
    assert (code, json.loads(out)["hosts"][0]["directory"]) == (0, str(tmp_path / "left" / "shards" / "one")), err


def test_names_are_the_hosts_of_the_deployment() -> None:
    text = """
        a ip=10.0.0.1 rdma=-,en2,en3 dir=/a
        b ip=10.0.0.2 rdma=en2,-,en4 python=/b
        c ip=10.0.0.3 rdma=en2,en3,-
    """
    hosts = parse_hosts(text).hosts
    names = parse_host_string("c,a")
    assert recall_hosts(names) == names  # nothing is deployed
    write_deployment(Deployment("set", "/set", tuple(map(DeployedRank, hosts)), "jaccl", ("X=1",)))
    found = recall_hosts(names)
    assert found.hosts == (replace(hosts[2], rdma=(None, "en2")), replace(hosts[0], rdma=("en3", None)))
    assert (found.source, found.backend, found.envs) == ("--hosts", "", ("X=1",))
    with_new = recall_hosts(parse_host_string("b,new,ada@a"))  # another user is another host
    assert with_new.hosts == (replace(hosts[1], rdma=()), Host("new"), Host("a", user="ada"))
    listed = parse_hosts("a\nb")
    assert recall_hosts(listed) == listed  # a file says all


def test_without_one_it_has_to_be_cut(target: Deployment, tmp_path: Path) -> None:
    (data_dir() / "shards" / "one" / "moectl.json").unlink()
    assert find_remedy(target, "left") == (
        "if left stays away, cut the model for the others: moectl shard source --hosts right && "
        "moectl deploy --hosts right"
    )
