"""What this machine can give, and a worker that refuses to load what it cannot hold."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from moectl.demo import demo_dir
from moectl.engine.protocol import Done, RunOptions
from moectl.engine.request import Request
from moectl.errors import PlanError
from moectl.hosts.hostfile import Host
from moectl.hosts.remote import LocalRemote
from moectl.model.manifest import Manifest
from moectl.planner import this_machine
from moectl.planner.chips import default_working_set_bytes
from moectl.planner.memory import Memory
from moectl.session.session import RankSpec, Session
from moectl.shards.prepare import Wanted, shard

RECORDINGS = Path(__file__).parent.parent / "recordings"
# A worker on a machine of 300 MB.
SMALL = """
import runpy, sys
from moectl.planner import this_machine as machine
from moectl.planner.memory import Memory
machine.own_memory = lambda: Memory(300_000_000)
sys.argv = ["moectl", "worker"]
runpy.run_module("moectl", run_name="__main__")
"""


@pytest.fixture
def manifest(tmp_path: Path) -> tuple[Path, Manifest]:
    made = shard(str(demo_dir()), Wanted(nodes=1), directory=tmp_path / "set")
    from moectl.model.manifest import read_manifest

    return made.directory, read_manifest(made.directory)


def test_this_machine_has_memory() -> None:
    memory = this_machine.own_memory()
    assert memory is not None
    assert 0 <= memory.in_use < memory.total


def test_a_rank_that_does_not_fit(monkeypatch: pytest.MonkeyPatch, manifest: tuple[Path, Manifest]) -> None:
    this_machine.check_own_memory(manifest[1], 0)
    monkeypatch.setattr(this_machine, "own_memory", lambda: Memory(300_000_000))
    with pytest.raises(PlanError, match=r"does not fit: 0\.5 GB are needed, 0\.2 GB usable \(0\.2 GB too little\)"):
        this_machine.check_own_memory(manifest[1], 0)
    monkeypatch.setattr(this_machine, "own_memory", lambda: Memory(64 << 30))
    this_machine.check_own_memory(manifest[1], 0)
    with pytest.raises(PlanError, match="does not fit"):  # what the GPU says of itself counts as well
        this_machine.check_own_memory(manifest[1], 0, working_set_bytes=1 << 20)
    monkeypatch.setattr(this_machine, "own_memory", lambda: None)
    this_machine.check_own_memory(manifest[1], 0, working_set_bytes=1)


def test_a_worker_refuses_what_its_host_cannot_hold(manifest: tuple[Path, Manifest]) -> None:
    spec = RankSpec(Host("mac1"), LocalRemote("mac1"), (sys.executable, "-c", SMALL), str(manifest[0]), ("127.0.0.1",))
    with (
        pytest.raises(PlanError, match=r"^mac1: rank 0: .* does not fit: 0\.5 GB are needed") as caught,
        Session([spec]),
    ):
        pass
    assert caught.value.hint == "'moectl plan' says what would fit; --force tries it all the same"
    with Session([spec], RunOptions(force=True)) as session:
        assert isinstance(list(session.generate(Request(1, "Hello", 2)))[-1], Done)


def make_mac(monkeypatch: pytest.MonkeyPatch, directory: Path, limit_mb: int, *, wired_gib: float = 2.5) -> None:
    """Let this process think that it is a Mac of 24 GiB whose owner set iogpu.wired_limit_mb; 0: macOS chooses."""
    vm_stat = (RECORDINGS / "mac-mini-m4-pro.txt").read_text().partition("moectl-probe vm_stat\n")[2]
    vm_stat = vm_stat.replace("160412.", f"{int(wired_gib * (1 << 30) / 16384)}.")
    told = {"SYSCTL": f'echo "$1: {limit_mb}"', "VM_STAT": f"cat <<'END'\n{vm_stat}\nEND"}
    for name, script in told.items():
        program = directory / name
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setattr(this_machine, name, str(program))
    monkeypatch.setattr(sys, "platform", "darwin")
    pages = {"SC_PAGE_SIZE": 16384, "SC_PHYS_PAGES": (24 << 30) // 16384}
    monkeypatch.setattr("os.sysconf", lambda name: pages[name])


def test_a_mac_whose_gpu_may_have_more_has_more_room(
    monkeypatch: pytest.MonkeyPatch, manifest: tuple[Path, Manifest], tmp_path: Path
) -> None:
    usual, rooms = default_working_set_bytes(24 << 30), []
    for limit_mb, working_set in ((0, usual), (20480, 20480 << 20), (1024, 1 << 30)):
        make_mac(monkeypatch, tmp_path, limit_mb)
        memory = this_machine.own_memory()
        assert memory is not None
        assert (memory.total, memory.working_set) == (24 << 30, working_set)
        monkeypatch.setattr(this_machine, "MOST_ANSWERS", 1 << 20)
        rooms.append(this_machine.count_kv_tokens(manifest[1], 0, ranks_here=1) or 0)
    assert rooms[2] < rooms[0] < rooms[1]


def test_a_mac_without_that_tool_has_what_macos_chooses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make_mac(monkeypatch, tmp_path, 20480)
    for name in ("SYSCTL", "VM_STAT"):
        monkeypatch.setattr(this_machine, name, str(tmp_path / "nothing"))
    memory = this_machine.own_memory()
    assert memory is not None
    assert memory.working_set == default_working_set_bytes(24 << 30)
    assert memory.in_use == 0


def test_wired_memory_that_is_still_held_is_named_at_a_restart(
    monkeypatch: pytest.MonkeyPatch, manifest: tuple[Path, Manifest], tmp_path: Path
) -> None:
    """Loading beside it may let macOS panic."""
    monkeypatch.setattr(this_machine, "least_need", lambda *_: 6 << 30)
    make_mac(monkeypatch, tmp_path, 0)
    this_machine.check_own_memory(manifest[1], 0, working_set_bytes=16 << 30)
    make_mac(monkeypatch, tmp_path, 0, wired_gib=23)
    with pytest.raises(PlanError) as caught:
        this_machine.check_own_memory(manifest[1], 0, working_set_bytes=16 << 30)
    held = "18.8 GB of wired memory are still held by a program, or by one that was killed"
    assert caught.value.message.endswith(held)
    assert caught.value.hint == this_machine.HELD_HINT
    # Two ranks on one Mac: the other one may have wired its part already.
    this_machine.check_own_memory(manifest[1], 0, ranks_here=2, working_set_bytes=16 << 30)
