"""Cutting and pushing at once: the same bytes as one after the other, and whichever fails, the other ends well."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from moectl.cli.app import cli
from moectl.cli.options import Failed
from moectl.cluster.deploy.feed import shard_and_deploy
from moectl.cluster.deploy.task import Event, HostResult
from moectl.errors import CheckpointError, PartialFailure, UsageError
from moectl.hosts.hostfile import Host
from moectl.hosts.onhost.files import RECORD, hash_file
from moectl.model.manifest import NAME, read_manifest
from moectl.shards import prepare
from moectl.shards.prepare import Made, Wanted
from tests.cluster.test_deploy import assert_holds, make_hosts
from tests.support.ring import process_env
from tests.support.running import wait_for
from tests.support.sshd import Server, find_free_port
from tests.support.tiny import write_checkpoint, write_words

MOECTL = (sys.executable, "-m", "moectl")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_words(write_checkpoint(tmp_path / "tiny", n_layers=3))


@pytest.fixture
def hosts(sshd: Server, tmp_path: Path) -> list[Host]:
    return make_hosts(sshd, tmp_path, 2)


def cutting(model: Path, directory: Path) -> Callable[..., Made]:
    return partial(prepare.shard, str(model), Wanted(nodes=2), directory=directory)


def write_hosts(hosts: list[Host], path: Path) -> str:
    path.write_text("".join(f"{h.name} python={h.python} dir={h.dir}\n" for h in hosts))
    return str(path)


def moectl(*words: str, check: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*MOECTL, *words], capture_output=True, text=True, env=process_env(), timeout=120, check=False
    )
    assert done.returncode == check, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def test_deploy_shard_brings_what_shard_and_deploy_bring(model: Path, hosts: list[Host], tmp_path: Path) -> None:
    listed = write_hosts(hosts, tmp_path / "hosts.txt")
    words = ("deploy", listed, "--shard", str(model), "--split", "experts", "--shares", "5,11", "--q-bits", "8")
    first = json.loads(moectl(*words, "--json").stdout)
    assert [h["ok"] for h in first["hosts"]] == [True, True]
    assert sum(h["relayed_bytes"] for h in first["hosts"]) > 0
    assert first["name"] == "tiny-q8-experts-2-5.11"
    made = prepare.shard(
        str(model),
        Wanted(split="experts", nodes=2, shares=(5, 11), bits=8),
        directory=tmp_path / "alone",
    )
    alone = read_manifest(made.directory)
    for rank, host in enumerate(hosts):
        directory = Path(str(host.dir), "shards", first["name"])
        assert_holds(directory, alone, rank)
        assert replace(read_manifest(directory), canary=None) == alone
        there = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file() and path.name != RECORD)
        assert first["hosts"][rank]["copied_bytes"] == there  # once
    again = json.loads(moectl(*words, "--no-relay", "--json").stdout)
    assert [h["copied_bytes"] for h in again["hosts"]] == [0, 0]


def test_a_dry_run_tells_and_makes_nothing(model: Path, hosts: list[Host], tmp_path: Path) -> None:
    shard = partial(cutting(model, tmp_path / "set"), dry_run=True)
    fed = shard_and_deploy(shard, hosts, dry_run=True)
    assert fed.made is not None
    assert sum(r.copied_bytes for r in fed.result.results) >= fed.made.bytes  # what both need counts twice
    assert not (tmp_path / "set").exists()
    assert not (tmp_path / "node0").exists()


@pytest.mark.parametrize("words", [("--q-bits", "4"), ("--split", "experts"), ("--revision", "main"), ("-o", "x")])
def test_flags_of_the_cut_need_a_cut(words: tuple[str, ...], hosts: list[Host], tmp_path: Path) -> None:
    with pytest.raises(Failed, match=r"needs --shard MODEL"):
        CliRunner().invoke(
            cli, ["deploy", write_hosts(hosts, tmp_path / "h"), *words], standalone_mode=False, catch_exceptions=False
        )


def test_a_cut_that_fails_ends_the_push_and_the_next_run_goes_on(
    model: Path, hosts: list[Host], tmp_path: Path
) -> None:
    told: list[Event] = []
    files: list[str] = []

    def fail(on_file: Callable[..., None], name: str, entry: Any) -> None:
        on_file(name, entry)
        files.append(name)
        if len(files) == 3:
            raise CheckpointError("the source is gone")

    def shard(on_file: Callable[..., None], **options: Any) -> Made:
        return cutting(model, tmp_path / "set")(on_file=partial(fail, on_file), **options)

    with pytest.raises(CheckpointError, match="the source is gone"):
        shard_and_deploy(shard, hosts, on_event=told.append)
    assert not any(isinstance(e, HostResult) for e in told)
    assert not list(tmp_path.glob("node*/shards/*/" + NAME))
    kept = {name: (tmp_path / "set" / name).stat().st_mtime_ns for name in files}
    fed = shard_and_deploy(cutting(model, tmp_path / "set"), hosts)
    fed.result.raise_failures()
    for rank, host in enumerate(hosts):
        assert_holds(Path(str(host.dir), "shards", fed.name), read_manifest(tmp_path / "set"), rank)
    assert kept == {name: (tmp_path / "set" / name).stat().st_mtime_ns for name in files}


@pytest.mark.long
def test_a_host_that_fails_keeps_nothing_from_the_others(sshd: Server, model: Path, tmp_path: Path) -> None:
    hosts = [Host(sshd.add_alias("dead", port=find_free_port())), Host("localhost", dir=str(tmp_path / "here"))]
    fed = shard_and_deploy(cutting(model, tmp_path / "set"), hosts)
    assert [r.ok for r in fed.result.results] == [False, True]
    assert fed.made is not None
    with pytest.raises(PartialFailure, match="1 of 2 hosts failed: dead"):
        fed.result.raise_failures()
    assert_holds(Path(str(hosts[1].dir), "shards", fed.name), read_manifest(tmp_path / "set"), 1)


@pytest.mark.long
def test_with_no_host_left_the_cut_stops(sshd: Server, model: Path, tmp_path: Path) -> None:
    hosts = [Host(sshd.add_alias(f"dead{i}", port=find_free_port())) for i in range(2)]

    def shard(on_file: Callable[..., None], **options: Any) -> Made:
        def slowly(name: str, entry: Any) -> None:  # as a large model's files come
            wait_for(lambda: "push" not in [thread.name for thread in threading.enumerate()])
            on_file(name, entry)

        return cutting(model, tmp_path / "set")(on_file=slowly, **options)

    fed = shard_and_deploy(shard, hosts)
    assert fed.made is None
    assert [r.ok for r in fed.result.results] == [False, False]
    assert not (tmp_path / "set" / NAME).exists()
    assert (tmp_path / "set" / ".moectl-journal.jsonl").exists()  # the next run goes on


def test_what_concerns_all_hosts_ends_the_cut(model: Path, hosts: list[Host], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nobody is not among the hosts"):
        shard_and_deploy(cutting(model, tmp_path / "set"), hosts, only=["nobody"])


@pytest.mark.long
def test_ctrl_c_ends_both_and_both_are_resumed(hosts: list[Host], tmp_path: Path) -> None:
    model = write_words(write_checkpoint(tmp_path / "larger", n_layers=6, d_model=256, ffn_hidden=1536, files=6))
    listed = write_hosts(hosts, tmp_path / "hosts.txt")
    words = ("deploy", listed, "--shard", str(model), "--q-bits", "4", "-o", str(tmp_path / "set"))
    with subprocess.Popen([*MOECTL, *words], stderr=subprocess.PIPE, env=process_env(), text=True) as child:
        wait_for(lambda: (tmp_path / "set" / "common" / "layer-000.safetensors").exists(), 60)
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=60)
    assert child.returncode == 130, said
    assert said.endswith("Interrupted.\n")
    assert not list(tmp_path.glob("node*/shards/*/" + NAME))
    whole = {p: p.stat().st_mtime_ns for p in (tmp_path / "set").glob("*/*.safetensors")}
    tries = 100
    done = subprocess.run([*MOECTL, *words], capture_output=True, text=True, env=process_env(), check=False)
    while "another push" in done.stdout and tries:  # a receiver may need a moment to notice
        tries -= 1
        done = subprocess.run([*MOECTL, *words], capture_output=True, text=True, env=process_env(), check=False)
    assert done.returncode == 0, done.stderr
    assert all(p.stat().st_mtime_ns == before for p, before in whole.items())
    manifest = read_manifest(tmp_path / "set")
    for rank, host in enumerate(hosts):
        directory = Path(str(host.dir), "shards", manifest.name)
        assert_holds(directory, manifest, rank)
        assert hash_file(str(directory / NAME)) == hash_file(str(tmp_path / "set" / NAME))


@pytest.mark.long
def test_what_the_hint_about_another_set_says_is_done(model: Path, hosts: list[Host], tmp_path: Path) -> None:
    cut = ("--split", "experts", "--shares", "8,8", "--no-canary", "-o", str(tmp_path / "set"))
    moectl("shard", str(model), "--nodes", "2", "--q-bits", "4", *cut)
    words = ("deploy", write_hosts(hosts, tmp_path / "hosts.txt"), "--shard", str(model), "--q-bits", "8", *cut)
    hint = "Hint: choose another directory with -o, or make it again first: moectl shard --force\n"
    assert hint in moectl(*words, check=2).stderr
    there = Path(str(hosts[0].dir), "shards", "tiny-q8-experts-2")
    moectl(*words[:-1], str(tmp_path / "other"))
    assert_holds(there, read_manifest(tmp_path / "other"), 0)
    moectl("shard", str(model), "--nodes", "2", "--q-bits", "8", *cut, "--force")
    moectl(*words)
    assert_holds(there, read_manifest(tmp_path / "set"), 0)
