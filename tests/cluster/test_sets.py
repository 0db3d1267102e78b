"""`list`: what is on this machine, how large, in use or not; and what `--prune` may delete."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moectl.cli.verbs import list as report_observe
from moectl.cluster.sets import choose_old, delete_set, make_listing
from moectl.errors import StateError
from moectl.hosts.hostfile import Host
from moectl.model.manifest import NAME
from moectl.paths import cache_dir, data_dir
from moectl.server import client
from moectl.server.client import socket_path
from moectl.server.sockets import listen_unix
from moectl.session.deployment import DeployedRank, Deployment, write_deployment
from moectl.shards.journal import lock_directory
from tests.cli.test_cli import run
from tests.cluster.test_deploy import make_shards

LAYER_BYTES = 1000


def make_set(root: Path, name: str, ranks: int, age_s: int) -> Path:
    directory = root / "shards" / name
    make_shards(directory, ranks, layer_bytes=LAYER_BYTES)
    os.utime(directory / NAME, (2_000_000 - age_s, 2_000_000 - age_s))
    return directory


@pytest.fixture
def sets(tmp_path: Path) -> dict[str, Path]:
    """Sets of several ages, one of them deployed on two hosts, and what is no set."""
    found = {
        name: make_set(data_dir(), name, ranks, age)
        for name, ranks, age in [
            ("newest", 2, 10),
            ("old", 2, 20),
            ("deployed", 2, 30),
            ("older", 2, 40),
            ("four", 4, 50),
        ]
    }
    found |= {name: make_set(cache_dir(), name, 2, age) for name, age in [("cached", 60), ("cached-old", 70)]}
    found["away"] = make_set(tmp_path, "away", 2, 80)
    for name in ("half", ".model.source"):
        (data_dir() / "shards" / name).mkdir()
        (data_dir() / "shards" / name / "part").write_bytes(bytes(7))
    ranks = tuple(DeployedRank(Host(f"mac{i}"), "/python", "/root", "/root/shards/deployed") for i in range(2))
    write_deployment(Deployment("deployed", str(found["deployed"]), ranks))
    return found


def test_what_is_here(sets: dict[str, Path]) -> None:
    found = make_listing()
    complete = [one for one in found.sets if one.state == "complete"]
    assert [(one.name, one.place, one.use, one.ranks) for one in complete] == [
        ("newest", "data", "", 2),
        ("old", "data", "", 2),
        ("deployed", "data", "deployed", 2),
        ("older", "data", "", 2),
        ("four", "data", "", 4),
        ("cached", "cache", "", 2),
        ("cached-old", "cache", "", 2),
    ]
    by_name = {one.name: one for one in found.sets}
    assert set(by_name) == {*sets, "half", ".model.source"} - {"away"}
    assert (by_name["half"].state, by_name["half"].bytes) == ("unfinished", 7)
    assert by_name[".model.source"].state == "download"
    assert by_name["old"].bytes == sum(p.stat().st_size for p in sets["old"].rglob("*") if p.is_file())
    assert [(one.name, one.use) for one in found.sets if one.use] == [("deployed", "deployed")]
    assert found.deployment is not None
    # Each host has the small files, the common ones and its own: 5 of the 7.
    assert [(r.host, r.bytes) for r in found.deployment.ranks] == [("mac0", 5 * LAYER_BYTES), ("mac1", 5 * LAYER_BYTES)]
    text = report_observe.list_text(found, width=60)
    assert "SHARD SET" in text
    assert "DIRECTORY" not in text.split("\n")[0]
    assert "\nDeployed: deployed\n" in text


def test_a_set_that_was_deployed_before_is_not_pruned_and_may_be_deleted_by_name(sets: dict[str, Path]) -> None:
    for name in ("older", "old"):
        ranks = (DeployedRank(Host("mac0"), "/python", "/root", f"/root/shards/{name}"),)
        write_deployment(Deployment(name, str(sets[name]), ranks))
    found = make_listing()
    uses = {one.name: one.use for one in found.sets if one.use}
    assert uses == {"old": "deployed", "older": "deployed before", "deployed": "deployed before"}
    assert [one.name for one in choose_old(found)] == ["cached-old"]
    assert found.deployment is not None
    assert found.deployment.name == "old"
    delete_set(next(one for one in found.sets if one.name == "older"))
    assert not sets["older"].exists()


def test_a_deployed_set_elsewhere_and_one_that_is_gone(sets: dict[str, Path]) -> None:
    ranks = (DeployedRank(Host("mac0"), "/python", "/root", "/root/shards/away"), DeployedRank(Host("mac1")))
    write_deployment(Deployment("away", str(sets["away"]), ranks))
    found = make_listing()
    assert [(one.name, one.place) for one in found.sets if one.use == "deployed"] == [("away", "elsewhere")]
    assert found.deployment is not None
    assert [r.bytes for r in found.deployment.ranks] == [5 * LAYER_BYTES, None]
    (sets["away"] / NAME).write_text("{}")
    assert {one.state for one in make_listing().sets if one.name == "away"} == {"damaged"}
    assert "not deployed yet" in report_observe.list_text(make_listing())


def test_what_is_old(sets: dict[str, Path]) -> None:
    """The newest for each number of hosts is what `deploy` takes next; what is in use stays, whatever its age."""
    assert [one.name for one in choose_old(make_listing())] == ["old", "older", "cached-old"]
    target = sets["older"].rename(sets["older"].with_name("moved"))
    sets["older"].symlink_to(target)
    assert "older" not in [one.name for one in choose_old(make_listing())]


@contextlib.contextmanager
def controller(monkeypatch: pytest.MonkeyPatch, answer: dict[str, Any] | None) -> Iterator[None]:
    """A controller that lives, as far as its lock tells, and answers so, or not at all."""

    def describe(self: object, *, timeout_s: float | None = None) -> dict[str, Any]:
        if answer is None:
            raise StateError("the controller does not answer")
        return answer

    monkeypatch.setattr(client.Client, "describe", describe)
    with listen_unix(socket_path("abc")):
        yield


def test_what_runs_is_never_deleted(sets: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    before = {one.name: one for one in make_listing().sets}
    with controller(monkeypatch, {"shards": str(sets["old"])}):
        assert [one.name for one in choose_old(make_listing())] == ["older", "cached-old"]
        with pytest.raises(StateError, match="old is running by now"):
            delete_set(before["old"])
    with controller(monkeypatch, None), pytest.raises(StateError, match="does not say which shard set it uses"):
        delete_set(before["old"])
    with pytest.raises(StateError, match="deployed is deployed by now"):
        delete_set(before["deployed"])
    with lock_directory(sets["old"]), pytest.raises(StateError, match="another moectl shard"):
        delete_set(before["old"])
    assert all(path.is_dir() for path in sets.values())
    delete_set(before["old"])
    assert not sets["old"].exists()
    with pytest.raises(StateError, match="old is gone by now"):
        delete_set(before["old"])


def test_prune_as_a_user_types_it(
    sets: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = run(capsys, monkeypatch, "list", "--prune", "-n")
    assert (code, out.split(".")[0]) == (0, "Dry run: nothing was deleted")
    assert str(sets["older"]) in err
    code, out, err = run(capsys, monkeypatch, "list", "--prune")
    assert (code, out) == (2, "")
    assert "use --yes to skip confirmation" in err
    assert run(capsys, monkeypatch, "list", "-y")[0] == 2
    code, out, _ = run(capsys, monkeypatch, "list", "--prune", "-y", "--json")
    document = json.loads(out)
    assert (code, document["schema"]) == (0, "moectl.list/1")
    assert [one["name"] for one in document["pruned"]] == ["old", "older", "cached-old"]
    assert not {"old", "older", "cached-old"} & {one["name"] for one in document["sets"]}
    code, out, _ = run(capsys, monkeypatch, "list", "--prune", "-y")
    assert (code, out) == (0, "There is nothing old to delete.\n")
    code, out, _ = run(capsys, monkeypatch, "list", "-q")
    assert set(out.split()) == {"half", ".model.source", "newest", "deployed", "four", "cached"}


def test_an_empty_machine(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = run(capsys, monkeypatch, "list")
    assert (code, out) == (0, "There are no shard sets here.\n")
