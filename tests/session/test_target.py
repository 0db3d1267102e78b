"""From a deployment to ranks: whose word counts when the hosts file has changed, and by which address ranks meet."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest

from moectl.errors import HostsError, NotDeployed
from moectl.hosts.hostfile import Host, HostList, parse_host_string, parse_hosts
from moectl.hosts.mlx_hostfile import to_mlx_json
from moectl.hosts.remote import Completed
from moectl.session.deployment import DeployedRank, Deployment, write_deployment
from moectl.session.target import find_addresses, find_deployment, split_envs


@pytest.fixture
def deployed() -> Deployment:
    hosts = [Host("a", ips=("10.0.0.1",)), Host("b", ips=("10.0.0.2",))]
    ranks = tuple(DeployedRank(h, "/env/bin/python", "/root", "/root/shards/x") for h in hosts)
    deployment = Deployment("x", "/shards/x", ranks, "ring", ("A=1",))
    write_deployment(deployment)
    return deployment


def test_nothing_wanted_and_nothing_deployed() -> None:
    assert find_deployment(None) is None


def test_the_current_deployment_is_used(deployed: Deployment) -> None:
    assert find_deployment(None) == deployed
    assert find_deployment(parse_host_string("a,b")) == deployed


def test_the_hosts_file_of_today_counts(deployed: Deployment) -> None:
    found = find_deployment(parse_hosts("a ip=10.0.9.1\nb ip=10.0.9.2\n"))
    assert found is not None
    assert [rank.host.ips for rank in found.ranks] == [("10.0.9.1",), ("10.0.9.2",)]
    assert [rank.directory for rank in found.ranks] == [rank.directory for rank in deployed.ranks]


def test_other_hosts_are_not_deployed(deployed: Deployment) -> None:
    with pytest.raises(NotDeployed, match="x is deployed on a, b, not on b, a"):
        find_deployment(parse_host_string("b,a"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a ip=10.0.0.1\n", "not on a"),
        ("a ip=10.0.0.1\nb ip=10.0.0.2\nc\n", "not on a, b, c"),
        ("b ip=10.0.0.2\na ip=10.0.0.1\n", "not on b, a"),  # other ranks
        ("a ip=10.0.0.1\nc ip=10.0.0.2\n", "not on a, c"),
        ("a ip=10.0.0.1\nme@b ip=10.0.0.2\n", "not on a, me@b"),
        ("a ip=10.0.0.1\nb:2222 ip=10.0.0.2\n", "not on a, b:2222"),
        ("a ip=10.0.0.1\nb ip=10.0.0.2 dir=/elsewhere\n", "b: x is deployed in /root, not in /elsewhere"),
        (
            "a ip=10.0.0.1\nb ip=10.0.0.2 python=/opt/python3\n",
            "b: .* for /env/bin/python, not for python=/opt/python3",
        ),
    ],
)
def test_changes_of_the_hosts_file_that_need_a_deploy(deployed: Deployment, text: str, message: str) -> None:
    with pytest.raises(NotDeployed) as caught:
        find_deployment(parse_hosts(text, source="hosts.txt"))
    assert re.search(message, str(caught.value))
    assert caught.value.hint == "moectl deploy hosts.txt"


@pytest.mark.parametrize(
    "text",
    [
        "# a comment\n\n  a   ip=10.0.9.1 # moved\nb ip=10.0.9.2,10.0.8.2\n",
        "a memory=64GB chip=m4-max price=9\nb\n",
        "a rdma=-,rdma_en2\nb rdma=rdma_en3,-\n",
    ],
)
def test_changes_of_the_hosts_file_that_count_at_once(deployed: Deployment, text: str) -> None:
    wanted = parse_hosts(text, source="hosts.txt")
    found = find_deployment(wanted)
    assert found is not None
    assert [rank.host for rank in found.ranks] == list(wanted.hosts)
    assert [(r.python, r.directory) for r in found.ranks] == [(r.python, r.directory) for r in deployed.ranks]


def test_variables_of_a_hostfile_count_at_once(deployed: Deployment) -> None:
    """So `bench` compares settings of Metal's command buffers, without a deploy for each."""
    hosts = HostList(tuple(rank.host for rank in deployed.ranks), "ring", ("MLX_MAX_OPS_PER_BUFFER=100",))
    found = find_deployment(parse_hosts(to_mlx_json(hosts), source="hosts.json"))
    assert found is not None
    assert (found.envs, found.addresses) == (("MLX_MAX_OPS_PER_BUFFER=100",), deployed.addresses)


def test_an_unfinished_deployment_is_named() -> None:
    write_deployment(Deployment("x", "/x", (DeployedRank(Host("a"), "/p", "/r", "/d"), DeployedRank(Host("b")))))
    with pytest.raises(NotDeployed, match="x is not deployed on b yet"):
        find_deployment(None)


class Answering:
    """A remote whose sshd says how it was reached; nothing else is asked of it here."""

    def __init__(self, connection: str) -> None:
        self.connection = connection

    def run(self, argv: Sequence[str], **_: Any) -> Completed:
        assert list(argv) == ["printenv", "SSH_CONNECTION"]
        return Completed(0 if self.connection else 1, self.connection.encode(), b"")


def addresses(*pairs: tuple[Host, str]) -> list[tuple[str, ...]]:
    remotes: list[Any] = [Answering(connection) for _, connection in pairs]
    return find_addresses([host for host, _ in pairs], remotes)


def test_addresses_are_those_by_which_ssh_came() -> None:
    two = addresses((Host("a"), "10.0.0.9 5 10.0.0.1 22\n"), (Host("b", ips=("10.1.0.2", "10.2.0.2")), ""))
    assert two == [("10.0.0.1",), ("10.1.0.2", "10.2.0.2")]


def test_this_machine_meets_others_by_the_address_that_they_see() -> None:
    here, there = Host("localhost"), Host("b", ips=("10.0.0.2",))
    assert addresses((here, ""), (there, "10.0.0.9 5 10.0.0.2 22")) == [("10.0.0.9",), ("10.0.0.2",)]
    assert addresses((here, "")) == [("127.0.0.1",)]


@pytest.mark.parametrize("connection", ["", "fe80::1 5 fe80::2 22"])
def test_a_host_without_an_ipv4_address_is_refused(connection: str) -> None:
    with pytest.raises(HostsError, match="a: the ring needs an IPv4 address") as caught:
        addresses((Host("a"), connection))
    assert "a ip=10.0.0.1" in str(caught.value.hint)


def test_envs_of_an_mlx_hostfile() -> None:
    assert split_envs(["A=1", "B=x=y", "C"]) == {"A": "1", "B": "x=y", "C": ""}
