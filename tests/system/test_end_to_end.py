"""shard → deploy → run as a user types it, over real sshd: on localhost, and on four hosts of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.alphabet import VOCAB_SIZE, write_tokenizer
from tests.support.netns import Cluster
from tests.support.ring import process_env
from tests.support.running import wait_for, workers
from tests.support.sshd import Server
from tests.support.tiny import write_checkpoint

MOECTL = (sys.executable, "-m", "moectl")
PROMPT = ("run", "the quick brown fox", "--max-tokens", "32")


def moectl(*words: str, check: int | None = 0, stdin: str = "", **env: Any) -> subprocess.CompletedProcess[str]:
    """Run moectl as a process of its own and check its exit code."""
    done = subprocess.run(
        [*MOECTL, *words], capture_output=True, text=True, input=stdin, env=process_env(**env), timeout=300, check=False
    )
    assert check is None or done.returncode == check, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "tiny-dbrx"
    write_checkpoint(directory, vocab_size=VOCAB_SIZE, n_layers=4)
    write_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The answer of one process."""
    data = str(tmp_path_factory.mktemp("alone"))
    return moectl(*PROMPT, "--local", "1", "--keep-alive", "0", "--model", str(model), XDG_DATA_HOME=data).stdout


@pytest.mark.long
def test_shard_deploy_run_over_localhost_sshd(sshd: Server, model: Path, alone: str, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts.txt"
    lines = [f"{sshd.add_alias(name)} python={sys.executable} dir={tmp_path / name}" for name in ("left", "right")]
    hosts.write_text("\n".join(["# two names of one machine", *lines]) + "\n")
    at = ("--hostfile", str(hosts))
    made = json.loads(moectl("shard", str(model), *at, "--json").stdout)
    assert made["shares"] == [1, 1]

    dry = moectl("deploy", str(hosts), "--dry-run")
    assert "Dry run: nothing was copied." in dry.stdout
    assert not (tmp_path / "left" / "shards").exists()
    refused = moectl(*PROMPT, *at, check=8).stderr
    assert refused.splitlines() == ["Error: no model is deployed on left, right.", f"Hint: moectl deploy {hosts}"]

    before = sshd.count_logins()
    deployed = moectl("deploy", str(hosts), "--json", MOECTL_DEPLOY_NO_CHECK="0")
    # One of this machine for all that it asks and starts there, one of the process that fills the host.
    assert sshd.count_logins() - before == 2 * len(lines)
    assert "Checked: every rank computes what it should" in deployed.stderr
    first = json.loads(deployed.stdout)
    assert [h["ok"] for h in first["hosts"]] == [True, True]
    assert all(h["copied_bytes"] > 0 for h in first["hosts"])
    before = sshd.count_logins()
    second = json.loads(moectl("deploy", str(hosts), "--json", MOECTL_DEPLOY_NO_CHECK="0").stdout)
    assert [h["copied_bytes"] for h in second["hosts"]] == [0, 0]
    assert sshd.count_logins() - before == len(lines)  # nothing to copy: one, the start for the check included

    assert moectl(*PROMPT).stdout == alone  # the deployment is remembered
    assert moectl(*PROMPT, *at).stdout == alone
    measured = json.loads(moectl("bench", *at, "-p", "8", "-g", "3", "--num-trials", "1", "--json").stdout)
    assert measured["model"] == "tiny-dbrx-bf16-hidden-2"
    assert [rank["host"] for rank in measured["ranks"]] == ["left", "right"]
    elsewhere = moectl(*PROMPT, "--hosts", "left", check=8).stderr
    assert "is deployed on left, right, not on left." in elsewhere


@pytest.mark.long
def test_experts_are_placed_by_what_bench_counted(model: Path, alone: str, tmp_path: Path) -> None:
    stats = tmp_path / "routing.json"
    busy = [*[4] * 3, *[0] * 8, *[1] * 4, 0]  # of four tokens, in each layer
    counts = {"model": "tiny", "tokens": 4, "top_k": 4, "counts": [busy] * 4}
    stats.write_text(json.dumps({"schema": "moectl.routing/1", **counts}))
    cut = ("shard", str(model), "--nodes", "3", "--routing-stats", str(stats), "--json")
    made = json.loads(moectl(*cut, "-o", str(tmp_path / "set")).stdout)
    assert made["split"] == "experts"
    held = json.loads((tmp_path / "set" / "moectl.json").read_text())["held"]
    assert [sum(e < 3 for e in experts) for experts in held] == [1, 1, 1]
    assert moectl(*PROMPT, "--shards", str(tmp_path / "set")).stdout == alone
    stats.write_text("{}")
    assert "does not hold routing statistics" in moectl(*cut, "-o", str(tmp_path / "none"), check=2).stderr


def test_copies_of_experts_on_this_machine(model: Path, alone: str) -> None:
    where = ("--local", "2", "--model", str(model), "--replicas", "2")
    assert moectl(*PROMPT, *where, "--shares", "16,12").stdout == alone
    assert "2 copies of an expert need 2 nodes" in moectl(*PROMPT, *where[:1], "1", *where[2:], check=4).stderr


@pytest.mark.parametrize("split", [pytest.param("tensor", marks=pytest.mark.long), "layers"])
def test_one_step_on_this_machine(split: str, model: Path, alone: str, tmp_path: Path) -> None:
    """`run --local N --model DIR --split …` cuts and answers; what it cut is never deployed."""
    where = ("--local", "2", "--model", str(model), "--split", split)
    assert moectl(*PROMPT, *where).stdout == alone
    hosts = tmp_path / "hosts.txt"
    hosts.write_text("a\nb\n")
    assert "there is no shard set for 2 hosts" in moectl("deploy", str(hosts), check=8).stderr


def test_mixing_this_machine_with_another(sshd: Server, model: Path, alone: str, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts.txt"
    remote = sshd.add_alias("other")
    root = f"python={sys.executable} dir={tmp_path}"
    hosts.write_text(f"localhost {root}/here\n{remote} {root}/there\n")
    moectl("shard", str(model), "--hostfile", str(hosts), "--split", "experts", "--shares", "5,11", "-q")
    moectl("deploy", str(hosts))
    assert moectl(*PROMPT).stdout == alone


@pytest.fixture
def four_hosts(netns: Cluster, hostfile: Path) -> Iterator[Path]:
    """The four hosts, on which no worker is left."""
    yield hostfile
    for rank in range(4):
        left = [line for line in netns.processes(rank).values() if "moectl worker" in line]
        assert left == [], f"node{rank} still runs {left}"


@pytest.fixture(scope="module")
def deployed(
    netns_session: Cluster, hostfile: Path, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """The variables under which one set, of hidden units, is deployed to the four hosts for all tests here."""
    home = tmp_path_factory.mktemp("deployed")
    env: dict[str, Any] = {"XDG_STATE_HOME": str(home / "state"), "XDG_DATA_HOME": str(home / "data")}
    env |= {"MOECTL_SSH_CONFIG": str(netns_session.config), "MOECTL_DEPLOY_NO_CHECK": "1"}
    at = ("--hostfile", str(hostfile))
    moectl("shard", str(model), *at, "--split", "hidden", "-q", **env)
    result = json.loads(moectl("deploy", *at, "--json", **env).stdout)
    assert [h["ok"] for h in result["hosts"]] == [True] * 4
    return env


@pytest.mark.netns
@pytest.mark.parametrize(
    ("split", "shares", "copies"),
    [
        pytest.param("hidden", "2,1,1,2", 1, marks=pytest.mark.long),
        pytest.param("experts", "7,1,2,6", 1, marks=pytest.mark.long),
        ("experts", "9,6,8,7", 2),
        pytest.param("layers", "1,1,1,1", 1, marks=pytest.mark.long),
    ],
)
def test_four_hosts_answer_like_one_process(
    split: str, shares: str, copies: int, four_hosts: Path, model: Path, alone: str
) -> None:
    at = ("--hostfile", str(four_hosts))
    moectl("shard", str(model), *at, "--split", split, "--shares", shares, "--replicas", str(copies))
    result = json.loads(moectl("deploy", *at, "--json").stdout)
    assert [h["ok"] for h in result["hosts"]] == [True] * 4
    answer = moectl(*PROMPT, *at, "--stats")
    assert answer.stdout == alone
    assert "prompt tokens at" in answer.stderr


@pytest.mark.netns
@pytest.mark.long
def test_a_probe_measures_deployed_hosts_and_bench_compares(
    four_hosts: Path, model: Path, alone: str, deployed: dict[str, Any]
) -> None:
    at = ("--hostfile", str(four_hosts))
    assert moectl(*PROMPT, *at, **deployed).stdout == alone
    words = ("--probe", "--chip", "linux-cpu", "--split", "hidden", "--ctx", "64", "--json")
    planned = json.loads(moectl("plan", str(model), *at, *words, **deployed).stdout)
    measured = planned["measured"]
    assert all(rtt > 0 for i, row in enumerate(measured["rtt_s"]) for j, rtt in enumerate(row) if i != j)
    assert [speed["split"] for speed in measured["speeds"]] == ["hidden"]
    assert len(measured["speeds"][0]["ranks"]) == 4
    found = json.loads(moectl("bench", *at, "-p", "16", "-g", "8", "--num-trials", "1", "--json", **deployed).stdout)
    assert found["predicted"]["decode_tok_s"] > 0


@pytest.mark.netns
def test_ctrl_c_leaves_nothing_on_any_host(four_hosts: Path, netns: Cluster, deployed: dict[str, Any]) -> None:
    command = [*MOECTL, "run", "tell me everything", "--max-tokens", "480", "--hostfile", str(four_hosts)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=process_env(**deployed))
    assert process.stdout is not None
    assert process.stdout.read(1)
    running = [any("moectl worker" in line for line in netns.processes(rank).values()) for rank in range(4)]
    assert running == [True] * 4
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stderr.decode().endswith("Interrupted.\n")


@pytest.mark.netns
def test_a_dead_host_is_named(four_hosts: Path, netns: Cluster, deployed: dict[str, Any]) -> None:
    netns.unplug(2)
    done = moectl(*PROMPT, "--hostfile", str(four_hosts), check=5, **deployed)
    assert "\nError: node2: " in done.stderr


@pytest.fixture
def answering(model: Path) -> Iterator[tuple[subprocess.Popen[bytes], list[int]]]:
    """A moectl in the middle of a long answer on two local ranks, and its workers."""
    command = [*MOECTL, "run", "tell me everything", "--max-tokens", "480", "--local", "2", "--model", str(model)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=process_env())
    assert process.stdout is not None
    assert process.stdout.read(1)
    pids = workers()
    assert len(pids) == 2
    yield process, pids
    process.kill()
    process.communicate()
    wait_for(lambda: not workers())


@pytest.mark.parametrize(
    ("number", "code"),
    [
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.long),  # on four hosts above
        (signal.SIGTERM, 143),
        (signal.SIGKILL, -9),
    ],
)
def test_signals_end_everything(number: int, code: int, answering: tuple[subprocess.Popen[bytes], list[int]]) -> None:
    process, _ = answering
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == code
    wait_for(lambda: not workers())


def test_a_second_ctrl_c_ends_at_once(answering: tuple[subprocess.Popen[bytes], list[int]]) -> None:
    process, pids = answering
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)  # so that the first Ctrl-C cannot end the answer
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    wait_for(lambda: not workers())  # the controller gives up waiting for them


def run_local(model: Path, *words: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return moectl("run", "--local", "2", "--model", str(model), *words, **more)


def test_json_and_stdin(model: Path) -> None:
    words = ("--raw", "--json", "--max-tokens", "4")
    piped = json.loads(run_local(model, *words, "--keep-alive", "1m", "fox", stdin="the quick").stdout)
    typed = json.loads(run_local(model, *words, "--keep-alive", "0", "the quick fox").stdout)
    assert piped["schema"] == "moectl.run/1"
    assert piped["text"] == typed["text"]
    assert piped["finish_reason"] == "length"
    assert piped["stats"]["prompt_tokens"] == len("the quick fox")
