"""A shard set reads and writes within its directory: whatever its manifest says, and wherever links in it lead."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from moectl.cluster.deploy import deploy
from moectl.cluster.deploy.task import HostTask
from moectl.errors import CommandFailed, IntegrityError, MoectlError
from moectl.hosts.hostfile import Host
from moectl.hosts.onhost import files as node
from moectl.hosts.onhost.prelude import parse_answer
from moectl.hosts.remote import LocalRemote, read_program
from moectl.hosts.ssh.remote import SSHRemote
from moectl.model.manifest import NAME, is_inside, parse_manifest, read_manifest
from moectl.session.session import RankSpec, Session
from moectl.shards import build
from tests.model.test_manifest import PATH, RAW
from tests.support import cutting
from tests.support.lone_host import deploy_host
from tests.support.tiny import write_checkpoint

LEADING = [
    "rank-0",
    "common",
    "tokenizer_config.json",
    "rank-0/layer-000.safetensors",
    f".{NAME}.partial",
    ".moectl-lock",
]


def cut(source: Path, directory: Path, *, force: bool = False) -> None:
    cutting.cut(source, directory, force=force, split="hidden", nodes=2)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", n_layers=1)


@pytest.fixture
def made(source: Path, tmp_path: Path) -> Path:
    cut(source, tmp_path / "set")
    return tmp_path / "set"


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    """Somebody's directory, whose files have the names of a shard set's."""
    directory = tmp_path / "precious"
    directory.mkdir()
    for name in (
        "layer-000.safetensors",
        "head.safetensors",
        "tokenizer_config.json",
        ".layer-000.safetensors.partial",
    ):
        (directory / name).write_text("mine")
    return directory


def lead_out(made: Path, name: str, precious: Path) -> None:
    """Replace a part of a shard set by a link to something of somebody else's."""
    path = made / name
    target = precious if name in ("rank-0", "common") else precious / "tokenizer_config.json"
    if path.is_dir():
        path.rename(made / "moved")
    elif path.exists():
        path.unlink()
    path.symlink_to(target)


def state(directory: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in directory.iterdir()}


@given(
    st.lists(st.sampled_from(["..", ".", "", "a", "/", "\\", "\0", "~", "rank-0", "$(id)", "\n"]), max_size=5).map(
        "/".join
    )
    | st.text(max_size=12)
)
def test_no_name_that_is_taken_leads_out(name: str) -> None:
    raw = json.loads(json.dumps(RAW))
    raw["files"][name] = {"bytes": 1, "sha256": "0" * 64}
    try:
        manifest = parse_manifest(json.dumps(raw), PATH)
    except IntegrityError:
        return
    assert is_inside(name)
    assert os.path.normpath(os.path.join("/set", name)).startswith("/set/")  # noqa: PTH118
    assert name in manifest.files
    node.refuse_names_outside([name])  # the host agrees


@pytest.mark.parametrize("name", LEADING)
@pytest.mark.parametrize("force", [False, True])
def test_cutting_follows_no_link_out(
    source: Path, made: Path, precious: Path, name: str, force: bool, tmp_path: Path
) -> None:
    lead_out(made, name, precious)
    before = state(precious)
    with pytest.raises(IntegrityError, match="leads out of the shard set"):
        cut(source, made, force=force)
    assert state(precious) == before
    assert (made / name).is_symlink()


@pytest.mark.parametrize("name", LEADING[:4])
def test_nothing_is_read_or_sent_through_a_link_out(made: Path, precious: Path, name: str) -> None:
    from moectl.engine.network.load import load_rank

    lead_out(made, name, precious)
    manifest = read_manifest(made)
    reads: list[Callable[[], Any]] = [
        lambda: build.verify(made),
        lambda: load_rank(made, manifest, 0),
        lambda: deploy.deploy([Host("a"), Host("b")], made, manifest),
    ]
    for read in reads:
        with pytest.raises(IntegrityError, match="leads out of the shard set"):
            read()


def test_a_worker_reads_nothing_through_a_link_out(made: Path, precious: Path) -> None:
    lead_out(made, "tokenizer_config.json", precious)
    worker = (sys.executable, "-m", "moectl", "worker")
    ranks = [RankSpec(Host(f"mac{n}"), LocalRemote(), worker, str(made), ("127.0.0.1",)) for n in range(2)]
    with pytest.raises(IntegrityError, match="leads out of the shard set"), Session(ranks):
        pass


def test_links_within_a_set_and_to_a_whole_set_are_fine(source: Path, made: Path, tmp_path: Path) -> None:
    (made / "rank-0").rename(made / "really")
    (made / "rank-0").symlink_to("really")
    (tmp_path / "link").symlink_to(made)
    assert build.verify(tmp_path / "link").files
    cut(source, tmp_path / "link")


# On a host.


def ask(command: str, request: dict[str, Any]) -> dict[str, Any]:
    """Ask the program that is sent to hosts, as a process."""
    stdin = json.dumps(request).encode() + b"\n"
    done = LocalRemote().run(
        [sys.executable, "-c", read_program("deploy" if command == "survey" else "files"), command],
        stdin=stdin,
        hold_stdin=command == "survey",
    )
    answer = parse_answer(done.stdout.strip().split(b"\n")[-1])
    assert answer is not None
    return answer


NAMES = ["../precious/a", "/precious/a", "a/../../precious/a", "", "a\0b"]


@pytest.mark.parametrize("name", NAMES)
def test_a_host_refuses_names_that_lead_out(name: str, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    survey = {"root": str(tmp_path), "directory": "set", "files": {name: [1, "0" * 64]}, "verify": False}
    survey |= {"remember": True, "packages": [], "stamp": "stamp", "wheels": {}}
    assert ask("survey", survey) == {"error": "outside", "path": name}
    assert ask("survey", survey | {"files": {}, "wheels": {name: [1, "0" * 64]}})["error"] == "outside"
    assert ask("survey", survey | {"files": {}, "directory": name})["error"] == "outside"
    assert ask("record", {"directory": str(tmp_path / "set"), "files": {name: "0" * 64}})["error"] == "outside"


@pytest.mark.parametrize("kind", ["local", "ssh"])
def test_a_host_writes_through_no_link_out(
    kind: str, made: Path, precious: Path, tmp_path: Path, ssh_host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "node"
    there = root / "shards" / "set"
    there.mkdir(parents=True)
    (there / "rank-0").symlink_to(precious)
    host = replace(ssh_host, dir=str(root)) if kind == "ssh" else Host("localhost", dir=str(root))
    manifest = read_manifest(made)
    monkeypatch.setattr(
        "moectl.cluster.deploy.provision._find_python", lambda *_: sys.executable
    )  # nothing has to be installed
    task = HostTask(
        0,
        host,
        made,
        "set",
        manifest.files_of(0),
        {},
        "",
        {made / NAME: manifest.files_of(0)["config.json"]},
        False,
        False,
    )
    before = state(precious)
    with pytest.raises(MoectlError, match="leads out of the shard set's directory"):
        deploy_host(task)
    assert state(precious) == before
    (there / "rank-0").unlink()
    assert deploy_host(task).copied_bytes > 0
    assert (there / "rank-0" / "layer-000.safetensors").is_file()


@pytest.mark.parametrize("kind", ["local", "ssh"])
def test_a_file_is_not_received_through_a_link(
    kind: str, tmp_path: Path, precious: Path, ssh_host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse_link(*_: object) -> None:
        raise OSError(18, "as between two file systems")

    monkeypatch.setattr(Path, "hardlink_to", refuse_link)
    source = tmp_path / "source"
    source.write_text("new")
    (tmp_path / "target.partial").symlink_to(precious / "head.safetensors")
    remote = SSHRemote(ssh_host) if kind == "ssh" else LocalRemote()
    with pytest.raises(CommandFailed, match="cannot write"):
        remote.put(source, str(tmp_path / "target"), sha256=node.hash_file(str(source)))
    remote.close()
    assert (precious / "head.safetensors").read_text() == "mine"


def test_what_is_put_on_a_host_is_its_users_alone(tmp_path: Path, ssh_host: Host) -> None:
    source = tmp_path / "source"
    source.write_text("new")
    remote = SSHRemote(ssh_host)
    remote.put(source, str(tmp_path / "root" / "shards" / "file"), sha256=node.hash_file(str(source)))
    remote.close()
    for path in (tmp_path / "root", tmp_path / "root" / "shards", tmp_path / "root" / "shards" / "file"):
        assert path.stat().st_mode & 0o077 == 0, path
