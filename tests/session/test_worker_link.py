"""The controller's end of its link to a worker, over processes that stand in for workers."""

from __future__ import annotations

import os
import queue
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from moectl.engine.protocol import Cancel, Generate, Load, Order
from moectl.engine.request import Request
from moectl.hosts.hostfile import Host
from moectl.hosts.remote import Completed, LocalRemote
from moectl.session.worker_link import _KILL, Ended, Heard, WorkerLink, end_all
from tests.support.running import wait_for


class Noted(LocalRemote):
    """This machine, which notes what is run on it instead."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[list[str]] = []

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        timeout_s: float | None = 60.0,
        check: bool = True,
        hold_stdin: bool = False,
    ) -> Completed:
        self.ran.append(list(argv))
        return Completed(0, b"", b"")


def tie(
    *argv: str, host: str = "localhost", remote: LocalRemote | None = None
) -> tuple[WorkerLink, queue.SimpleQueue[Heard]]:
    events: queue.SimpleQueue[Heard] = queue.SimpleQueue()
    remote = remote or LocalRemote()
    link = WorkerLink(3, Host(host), remote, events, lambda host, line: None)
    link.hold(remote.start(argv))
    return link, events


def test_all_orders_go_out_before_it_is_let_go() -> None:
    link, events = tie("cat")
    orders: list[Order] = [Load(7), Generate(Request(1, "x" * 500_000, 4)), Cancel(1)]
    for order in orders:
        link.send(order)
    end_all([link])
    heard = [events.get_nowait() for _ in range(4)]
    assert heard == [*((3, order) for order in orders), (3, Ended())]
    assert link.find_exit_code() == 0


def test_an_order_on_its_way_is_as_good_as_a_beat_while_it_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moectl.session.worker_link.STUCK_S", 0.1)
    link, _ = tie("sleep", "1000")
    assert link.beat()
    link.send(Generate(Request(1, "x" * 1_000_000, 4)))
    wait_for(lambda: not link.beat())  # the pipe takes the first of it
    wait_for(link.beat)  # and no more
    end_all([link])
    assert link.find_exit_code() == -9


def test_what_was_never_started_has_no_end() -> None:
    link = WorkerLink(0, Host("mac1"), LocalRemote(), queue.SimpleQueue(), lambda host, line: None)
    assert not link.beat()
    end_all([link])


@pytest.mark.parametrize("silent", [True, False])
def test_a_worker_that_ignores_its_link_is_killed_on_its_host(silent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moectl.session.worker_link.EXIT_GRACE_S", 0.3)
    remote = Noted()
    links = [tie("sleep", "1000", host=host, remote=remote)[0] for host in ("mac1", "mac2")]
    for pid, link in enumerate(links, 41):
        link.pid, link.is_silent = pid, silent
    end_all(links)
    assert sorted(argv[-2] for argv in remote.ran) == ["41", "42"]
    assert [link.find_exit_code() for link in links] == [-9, -9]


def run_kill(pid: int, directory: Path, system: str) -> None:
    """Kill a worker's process on a host of this system."""
    uname = directory / "uname"
    uname.write_text(f"#!/bin/sh\necho {system}\n")
    uname.chmod(0o755)
    argv = ["env", f"PATH={directory}:{os.environ['PATH']}", "sh", "-c", _KILL, str(pid), "2"]
    LocalRemote().run(argv, check=False)


@pytest.mark.parametrize("system", ["Linux", "Darwin"])
def test_a_number_that_is_another_process_now_is_left_alone(system: str, tmp_path: Path) -> None:
    with (
        subprocess.Popen(["sleep", "1000"]) as other,
        subprocess.Popen(["sh", "-c", "sleep 1000; :", "moectl worker"]) as own,
    ):
        run_kill(other.pid, tmp_path, system)
        run_kill(own.pid, tmp_path, system)
        assert own.wait(20) == -9
        assert other.poll() is None
        other.kill()


def test_a_worker_on_a_mac_has_a_last_chance_to_end_by_itself(tmp_path: Path) -> None:
    with subprocess.Popen(["sh", "-c", "read word; exit 7", "moectl worker"], stdin=subprocess.PIPE) as own:
        assert own.stdin is not None
        threading.Timer(0.2, own.stdin.close).start()  # the end of its link is seen late
        run_kill(own.pid, tmp_path, "Darwin")
        assert own.wait(20) == 7
