"""The records of what was deployed: the current deployment, and those before it."""

from __future__ import annotations

import stat
from dataclasses import replace
from pathlib import Path

from moectl.hosts.hostfile import Host
from moectl.paths import state_dir
from moectl.session.deployment import (
    DeployedRank,
    Deployment,
    deployment_path,
    encode_deployment,
    find_deployment,
    find_deployments,
    forget_hosts,
    write_deployment,
)


def deploy(name: str, *addresses: str, shards: str = "/sets") -> Deployment:
    ranks = tuple(DeployedRank(Host(a), "/python", "/root", f"/root/shards/{name}") for a in addresses)
    return Deployment(name, f"{shards}/{name}", ranks)


def test_earlier_deployments_are_kept_and_the_same_set_has_one_record() -> None:
    assert find_deployments() == []
    first, second, elsewhere = deploy("a", "x", "y"), deploy("b", "x", "y"), deploy("a", "z")
    for one in (first, second, elsewhere):
        write_deployment(one)
    assert find_deployment() == elsewhere
    assert find_deployments() == [elsewhere, second, first]
    again = replace(first, shards="/other/a")
    write_deployment(again)
    assert find_deployments() == [again, elsewhere, second]
    kept = state_dir() / "deployments"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in kept.iterdir()} == {0o600}


def test_a_record_from_before_there_were_several_is_read(tmp_path: Path) -> None:
    only = deploy("a", "x")
    deployment_path().parent.mkdir(parents=True)
    deployment_path().write_text(encode_deployment(only))
    assert find_deployments() == [only]
    write_deployment(deploy("b", "x"))
    assert find_deployments()[1] == only


def test_what_is_removed_from_hosts_goes_from_every_record() -> None:
    write_deployment(deploy("a", "x", "y"))
    write_deployment(deploy("b", "x", "y"))
    forget_hosts({"x": "/root"})
    assert [one.missing for one in find_deployments()] == [("x",), ("x",)]
    forget_hosts({"y": "/root"})
    assert find_deployments() == []


def test_a_damaged_record_is_replaced_by_the_next_deployment() -> None:
    deployment_path().parent.mkdir(parents=True)
    deployment_path().write_text("{")
    write_deployment(deploy("a", "x"))
    assert find_deployments() == [deploy("a", "x")]
