"""status, logs, stop, list and uninstall as a user types them, around a model that runs on two hosts over real sshd."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moectl.demo import demo_dir
from tests.cli.test_cli import run
from tests.cluster.test_uninstall import read_tree
from tests.support.ring import process_env
from tests.support.running import make_python, wait_for, workers
from tests.support.sshd import Server
from tests.support.terminal import Terminal

MOECTL = [sys.executable, "-m", "moectl"]
NAME = "moectl-demo-bf16-hidden-2"


def moectl(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*MOECTL, *words], capture_output=True, text=True, input="", env=process_env(), timeout=120, check=False
    )


@pytest.mark.long
def test_a_deployment_from_its_beginning_to_its_end(
    sshd: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(*words: str) -> tuple[int, str, str]:
        return run(capsys, monkeypatch, *words)

    monkeypatch.chdir(tmp_path)
    code, out, err = call("status")
    assert (code, out) == (8, "")
    assert err.startswith("Error: nothing is running, and no model is deployed.")
    assert "Hint: moectl deploy hosts.txt\n" in err
    code, _, err = call("logs")
    assert (code, "Hint: moectl run\n" in err) == (8, True)

    names = ("left", "right")
    python = make_python(tmp_path / "python")
    lines = [f"{sshd.add_alias(name)} python={python} dir={tmp_path / name}" for name in names]
    (tmp_path / "hosts.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "left").mkdir()
    (tmp_path / "left" / "mine.txt").write_text("mine")
    assert [(row["state"], row["model"]) for row in json.loads(call("ps", "--json")[1])["hosts"]] == [
        ("idle", None)
    ] * 2
    assert call("shard", str(demo_dir()))[0] == 0
    assert call("deploy", "hosts.txt")[0] == 0
    assert [line.split()[:4] for line in call("status")[1].splitlines()[1:]] == [
        ["0", "left", "idle", NAME],
        ["1", "right", "idle", NAME],
    ]
    assert call("status", "--hosts", "left")[1].splitlines()[1].split() == ["left", "idle", "-", "-", "-"]

    answered = moectl("run", "What is an expert?", "--max-tokens", "8", "--keep-alive", "2m")
    assert answered.returncode == 0, answered.stderr
    document = json.loads(call("status", "--json")[1])
    assert document["schema"] == "moectl.status/1"
    assert [(row["rank"], row["host"], row["state"]) for row in document["hosts"]] == [
        (0, "left", "running"),
        (1, "right", "running"),
    ]
    assert document["hosts"][0]["tokens"] >= 8 > 0 == document["controllers"][0]["restarts"]
    assert all(row["memory_bytes"] > 1_000_000 and row["up_s"] > 0 for row in document["hosts"])
    assert document["hosts"][1]["link_bytes_s"] is not None
    assert [one["use"] for one in json.loads(call("list", "--json")[1])["sets"]] == ["running"]

    assert "\x1b[32mrunning\x1b[0m" in call("status", "--color", "always")[1]
    assert "\x1b" not in call("status")[1]

    # A live view on a terminal, a line per change elsewhere.
    with Terminal([*MOECTL, "status", "--watch"], tmp_path) as terminal:
        terminal.wait_for("Ctrl-C leaves.")
        terminal.wait(lambda: any(line.startswith("   1  right  running") for line in terminal.lines))
        terminal.type("\x03")
        assert terminal.end() == 130
        assert terminal.sent.count(b"\x1b[?1049h") == terminal.sent.count(b"\x1b[?1049l") == 1
        assert b"\x1b[2J" not in terminal.sent.split(b"\x1b[?2026h", 1)[1]  # never cleared: that would flicker
    watch = subprocess.Popen([*MOECTL, "status", "-w"], stdout=subprocess.PIPE, text=True, env=process_env())
    assert watch.stdout is not None
    assert watch.stdout.readline().split()[1:5] == ["0", "left", "running", NAME]

    refused = call("uninstall", "hosts.txt", "--yes", "--json")
    assert refused[0] == 8
    assert "a worker runs there" in refused[1]
    assert (tmp_path / "right" / "shards" / NAME / "moectl.json").exists()

    follow = subprocess.Popen(
        [*MOECTL, "logs", "-f", "--tail", "1"], stdout=subprocess.PIPE, text=True, env=process_env()
    )
    assert follow.stdout is not None
    assert {follow.stdout.readline().split("]")[0] for _ in range(2)} == {"[left", "[right"}

    stopped = json.loads(call("stop", "--json")[1])
    assert (stopped["schema"], stopped["workers"]) == ("moectl.stop/1", 2)
    assert call("stop") == (0, "Nothing is running.\n", "")
    said = [follow.stdout.readline(), follow.stdout.readline()]
    assert sorted(line.split(":")[0] for line in said) == ["[left] ends", "[right] ends"]
    changed = [watch.stdout.readline().split()[1:4] for _ in range(2)]
    assert changed[-1][-1] in ("running", "idle")
    for process in (follow, watch):
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
        assert process.returncode == 130
    wait_for(lambda: not workers())

    cleared = call("uninstall", "hosts.txt", "--yes")
    assert cleared[0] == 0, cleared
    assert read_tree(tmp_path / "left") == {"mine.txt": b"mine"}
    assert not (tmp_path / "right").exists()
    assert call("status", "--hosts", "left,right")[0] == 0
