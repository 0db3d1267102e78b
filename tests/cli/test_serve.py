"""`moectl serve`'s flags about models, and which deployments it offers; servers that run are in tests/system."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moectl.cli.target import find_others
from moectl.errors import StateError
from moectl.hosts.hostfile import Host
from moectl.server import attach
from moectl.server.client import Client
from moectl.session.deployment import DeployedRank, Deployment, write_deployment
from moectl.session.target import Local, target_key
from tests.cli.test_cli import run

PLACE = ("/python", "/root", "/root/shards/set")


class Said(list[str]):
    """Stands for the common flags: it keeps what is said."""

    say = list.append


def deploy(name: str, *ranks: DeployedRank) -> Deployment:
    made = Deployment(name, f"/sets/{name}", ranks)
    write_deployment(made)
    return made


def test_the_deployments_on_the_same_hosts_are_offered_with_the_hosts_as_they_are_now() -> None:
    a, b = Host("a"), Host("b")
    deploy("elsewhere", DeployedRank(b, *PLACE), DeployedRank(a, *PLACE))
    deploy("half", DeployedRank(a, *PLACE), DeployedRank(b))
    earlier = deploy("earlier", DeployedRank(a, *PLACE), DeployedRank(b, *PLACE))
    now = Host("a", ips=("10.0.9.1",))
    current = deploy("current", DeployedRank(now, *PLACE), DeployedRank(b, *PLACE))
    said: Any = Said()
    [found] = find_others(said, current)
    assert found == Deployment("earlier", earlier.shards, (DeployedRank(now, *PLACE), earlier.ranks[1]))
    assert said == ["half is not offered: it is not deployed on b yet."]
    assert find_others(said, Local(Path("/x"), None)) == []  # type: ignore[arg-type]


def test_a_server_that_offers_a_deployment_is_found_by_any_of_its_models(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = (Deployment(name, f"/sets/{name}", (DeployedRank(Host("a"), *PLACE),)) for name in "abc")
    place = attach.place_of(first)
    offers = [target_key(each) for each in (first, second)]
    monkeypatch.setattr(attach, "find_running", lambda: [place])
    monkeypatch.setattr(attach, "is_running", lambda path: path == place)
    monkeypatch.setattr(Client, "describe", lambda self, **how: {"offers": offers})
    assert [attach.find_place(each) for each in (first, second, third)] == [place, place, None]
    with pytest.raises(StateError, match="b is loaded already"):
        attach.refuse_second(second)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--pin", "nope"), "--pin names 'nope', and this server has moectl-demo"),
        (("--alias", "x=nope"), "--alias names 'nope', and this server has moectl-demo"),
        (("--alias", "=x"), "--alias should be NAME or NAME=MODEL"),
        (("--pin", "moectl-demo", "--keep-alive", "5m"), "--pin and --keep-alive exclude each other"),
    ],
)
def test_wrong_flags_are_refused_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], told: str
) -> None:
    code, _, err = run(capsys, monkeypatch, "serve", "--demo", "--local", "1", "--port", "0", *flags)
    assert code == 2
    assert told in err
