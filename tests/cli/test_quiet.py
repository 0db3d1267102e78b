"""`--quiet` of every verb: its result on stdout, and nothing on stderr."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moectl.cli.app import cli
from moectl.demo import demo_dir
from tests.support.hub import Hub
from tests.support.ring import process_env

# In this order on one host: each verb finds what those before it left. A word of what it prints.
STEPS: list[tuple[tuple[str, ...], str]] = [
    (("pull", "some/model"), "model"),
    (("plan", str(demo_dir()), "--local", "1"), "Fits"),
    (("shard", str(demo_dir()), "--nodes", "1"), "moectl-demo"),
    (("models", "dbrx"), "dbrx"),
    (("hosts",), "localhost"),
    (("setup", "hosts.txt"), "localhost"),
    (("deploy", "hosts.txt"), "localhost"),
    (("upgrade", "--hosts-only"), "as before"),
    (("list",), "moectl-demo"),
    (("list", "--prune", "--dry-run"), "nothing old"),
    (("ls",), "moectl-demo"),
    (("show", "moectl-demo-bf16-hidden-1"), "hidden"),
    (("version",), "mlx"),
    (("service", "status"), "No service is installed."),
    (("doctor", "--fast"), "ok"),
    (("completion", "bash"), "complete"),
    (("help",), "daily"),
    (("bench", "-p", "8", "-g", "4", "--num-trials", "1"), "generate"),
    (("serve", "-d", "--port", "0"), "http://127.0.0.1:"),
    (("run", "--raw", "a", "--max-tokens", "2"), "\n"),
    (("status",), "running"),
    (("logs",), "request"),
    (("stop",), "Stopped 1 worker"),
    (("uninstall", "hosts.txt", "--yes"), "localhost"),
    (("rm", "moectl-demo-bf16-hidden-1", "--yes"), "Deleted"),
]


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    hub.add("some/model", demo_dir())
    yield hub
    hub.close()


def test_quiet_verbs_print_their_results_and_nothing_else(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "hosts.txt").write_text(f"localhost dir={tmp_path}/here chip=m4-max memory=64GB\n")
    env = process_env(HOME=str(tmp_path), HF_HOME=str(tmp_path), HF_ENDPOINT=hub.endpoint, HF_HUB_OFFLINE="0")

    def call(words: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "moectl", *words, "-q"],
            cwd=tmp_path, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=180, check=False,
        )  # fmt: skip

    for words, said in STEPS:
        done = call(words)
        while "a worker runs there" in done.stderr:  # of a test beside this one
            done = call(words)
        assert (done.returncode, done.stderr) == (0, ""), words
        assert said in done.stdout, words


def test_every_verb_that_can_be_quiet_is_here() -> None:
    quiet = {name for name, verb in cli.commands.items() if any("--quiet" in p.opts for p in verb.params)}
    assert quiet - {"ps"} == {words[0] for words, _ in STEPS}
