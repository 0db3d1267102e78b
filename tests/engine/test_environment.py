"""What a worker does for itself before MLX is imported: variables, and a Mac that stays awake."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moectl.engine import environment
from moectl.engine.environment import keep_awake, list_unwanted, prepare_environment
from tests.support.ring import rank_env
from tests.support.running import wait_for


def test_variables_of_another_group_do_not_reach_this_one() -> None:
    # As libjaccl.dylib and libmlx.dylib of the macOS wheels 0.32.4 look them up.
    theirs = [
        *("JACCL_IBV_DEVICES", "JACCL_COORDINATOR", "JACCL_RANK", "JACCL_RING"),
        *("MLX_IBV_DEVICES", "MLX_JACCL_COORDINATOR", "MLX_RANK", "MLX_JACCL_RING", "MLX_HOSTFILE"),
        "MLX_METAL_FAST_SYNCH",
    ]
    ours = {"PATH": "/bin", "MLX_MAX_OPS_PER_BUFFER": "20"}
    found = ours | dict.fromkeys(theirs, "1")
    assert prepare_environment(found) == sorted(theirs)
    assert found == ours | {"MLX_METAL_RESIDENCY_REFRESH_INTERVAL_MS": "0"}
    assert list_unwanted(found) == []


def test_an_interval_that_was_chosen_stays() -> None:
    found = {"MLX_METAL_RESIDENCY_REFRESH_INTERVAL_MS": "500"}
    assert prepare_environment(found) == []
    assert found["MLX_METAL_RESIDENCY_REFRESH_INTERVAL_MS"] == "500"


def test_a_worker_says_which_variables_it_does_not_use() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "moectl", "worker"],
        input=b"",
        capture_output=True,
        env={**os.environ, **rank_env(), "JACCL_RANK": "3"},
        timeout=60,
        check=False,
    )
    assert b"the variable JACCL_RANK is not used" in done.stderr


@pytest.fixture
def darwin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(environment, "_awake", [])


@pytest.mark.usefixtures("darwin")
def test_a_mac_is_kept_awake_by_one_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = tmp_path / "told"
    fake = tmp_path / "caffeinate"
    fake.write_text(f'#!/bin/sh\necho "$@" >> {told}\n')
    fake.chmod(0o755)
    monkeypatch.setattr(environment, "CAFFEINATE", str(fake))
    for _ in range(2):
        keep_awake()
    [process] = environment._awake
    assert process.wait(20) == 0
    wait_for(told.exists)
    assert told.read_text() == f"-is -w {os.getpid()}\n"


@pytest.mark.usefixtures("darwin")
def test_a_mac_without_that_program_works_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "CAFFEINATE", str(tmp_path / "nothing"))
    keep_awake()
    assert environment._awake == []


def test_nothing_is_started_on_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(environment, "_awake", [])
    keep_awake()
    assert environment._awake == []
