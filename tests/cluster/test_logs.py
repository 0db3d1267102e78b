"""The logs of several hosts: past and present, over real SSH, over rotation; and that no reader stays behind."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from moectl.cli.verbs import logs as report_observe
from moectl.cluster import logs
from moectl.cluster.logs import LOCAL, LogFile, LogLine, LogQuery, LogReader, Trouble, find_sources, in_order
from moectl.errors import UsageError
from moectl.hosts.hostfile import Host
from moectl.hosts.onhost.logs import Log, last_launch, parse_line, pick
from moectl.paths import state_dir
from moectl.session.deployment import DeployedRank, Deployment, write_deployment
from moectl.session.target import target_key
from tests.cli.test_cli import run
from tests.support.ring import process_env
from tests.support.running import wait_for
from tests.support.sshd import Server, find_free_port

NAME = "tiny-hidden-2"


def write_log(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as f:
        f.writelines(f"{line}\n" for line in lines)
    return path


def make_deployment(sshd: Server, root: Path, count: int) -> Deployment:
    hosts = [Host(sshd.add_alias(f"node{i}"), dir=str(root / f"node{i}")) for i in range(count)]
    return Deployment(NAME, "/x", tuple(DeployedRank(h, sys.executable, str(h.dir), f"{h.dir}/shards") for h in hosts))


def log_of(deployment: Deployment, rank: int) -> Path:
    return Path(deployment.ranks[rank].root, "logs", f"{NAME}-rank-{rank}.log")


def read(sources: list[LogFile], asked: LogQuery) -> tuple[list[tuple[str, str]], list[Trouble]]:
    with LogReader(sources, asked) as reader:
        items = list(reader.read())
    lines = [(item.source.label, item.text) for item in items if isinstance(item, LogLine)]
    return lines, [item for item in items if isinstance(item, Trouble)]


def readers_of(path: Path) -> list[int]:
    """Return the processes, other than this one, that have a file open."""
    found = []
    for process in (p for p in Path("/proc").iterdir() if p.name.isdigit() and int(p.name) != os.getpid()):
        with contextlib.suppress(OSError):
            if any(fd.resolve() == path for fd in (process / "fd").iterdir()):
                found.append(int(process.name))
    return found


def test_the_past_of_all_hosts_in_order_of_time(sshd: Server, tmp_path: Path) -> None:
    deployment = make_deployment(sshd, tmp_path, 3)
    write_log(log_of(deployment, 0), "2026-11-20T17:40:02+0000 one", "trace", "2026-11-20T17:40:06+0000 four")
    write_log(log_of(deployment, 1), "2026-11-20T18:40:04+0100 two", "2026-11-20T17:40:05+0000 three")
    lines, trouble = read(find_sources(deployment), LogQuery())
    assert lines == [("node0", "one"), ("node0", "trace"), ("node1", "two"), ("node1", "three"), ("node0", "four")]
    assert [(t.label, t.error) for t in trouble] == [("node2", None)]
    assert read(find_sources(deployment, ["node1"]), LogQuery(tail=1))[0] == [("node1", "three")]
    assert read(find_sources(deployment, ["node1"]), LogQuery(since_s=60.0))[0] == []
    with pytest.raises(UsageError, match="there are no logs of 'node9'"):
        find_sources(deployment, ["node9"])


def test_a_host_that_is_gone_does_not_hide_the_others(sshd: Server, tmp_path: Path) -> None:
    deployment = make_deployment(sshd, tmp_path, 1)
    write_log(log_of(deployment, 0), "2026-11-20T17:40:02+0000 one")
    dead = Host(sshd.add_alias("dead", f"Port {find_free_port()}"))
    sources = [*find_sources(deployment), LogFile("dead", dead, "/x.log", 1), LogFile("here", LOCAL, "/no.log")]
    lines, trouble = read(sources, LogQuery(follow=False))
    assert lines == [("node0", "one")]
    assert {(t.label, type(t.error).__name__) for t in trouble} == {("dead", "Unreachable"), ("here", "NoneType")}


def test_following_survives_rotation_and_leaves_no_reader(sshd: Server, tmp_path: Path) -> None:
    deployment = make_deployment(sshd, tmp_path, 2)
    write_log(log_of(deployment, 0), "2026-11-20T17:40:02+0000 past")
    handler = open_rotating(log_of(deployment, 0), 100)
    log = logging.Logger("rotating")
    log.addHandler(handler)
    heard: list[tuple[str, str]] = []
    with LogReader(find_sources(deployment), LogQuery(tail=10, follow=True)) as reader:

        def listen() -> None:
            for item in reader.read():
                if isinstance(item, LogLine):
                    heard.append((item.source.label, item.text))

        threading.Thread(target=listen, daemon=True).start()
        wait_for(lambda: heard == [("node0", "past")])
        for number in range(6):  # some 35 bytes each: several rotations
            log.warning("line %d", number)
            wait_for(lambda: ("node0", f"line {number}") in heard)  # noqa: B023
        write_log(log_of(deployment, 1), "2026-11-20T17:40:02+0000 late")  # a log that was not there
        wait_for(lambda: ("node1", "late") in heard)
        log_of(deployment, 1).write_text("anew\n")  # truncated
        wait_for(lambda: ("node1", "anew") in heard)
        assert readers_of(log_of(deployment, 0))
    handler.close()
    assert log_of(deployment, 0).with_name(f"{NAME}-rank-0.log.1").exists()
    assert [text for label, text in heard if label == "node0"] == ["past", *(f"line {n}" for n in range(6))]
    wait_for(lambda: not readers_of(log_of(deployment, 0)) and not readers_of(log_of(deployment, 1)))


def open_rotating(path: Path, max_bytes: int) -> RotatingFileHandler:
    handler = RotatingFileHandler(path, maxBytes=max_bytes, backupCount=1, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%dT%H:%M:%S%z"))
    return handler


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 6), max_size=30))
def test_no_line_is_lost_or_told_twice(bursts: list[int]) -> None:
    """However a worker writes between two looks, as long as it rotates no more than twice."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "x-rank-0.log"
        handler = open_rotating(path, 160)  # three or four lines
        log = logging.Logger("rotating")
        log.addHandler(handler)
        reader = Log(str(path))
        told = [text for _, text in reader.read_past() or []]
        said: list[str] = []
        for burst in bursts:
            for _ in range(burst):
                said.append(f"line {len(said)}")
                log.warning(said[-1])
            lines = reader.read_new()
            more, _ = reader.turn()
            told += [text for _, text in lines + more]
        told += [text for _, text in reader.read_new()]
        handler.close()
        assert told == said


def test_a_long_past_is_in_two_files(tmp_path: Path) -> None:
    path = tmp_path / "x-rank-0.log"
    write_log(path.with_name(path.name + ".1"), "a", "b")
    assert [text for _, text in Log(str(path)).read_past() or []] == ["a", "b"]
    path.write_text("c\nd")
    log = Log(str(path))
    assert [text for _, text in log.read_past() or []] == ["a", "b", "c"]
    assert log.rest() == [[None, "d"]]
    assert Log(str(tmp_path / "none")).read_past() is None


def test_lines_and_their_times() -> None:
    assert parse_line("2026-11-20T17:40:02+0000 rank 2") == [1795196402.0, "rank 2"]
    assert parse_line("[mac1] 2026-11-20T17:40:02Z rank 2") == [1795196402.0, "[mac1] rank 2"]
    for text in ("Traceback", "2026-99-20T17:40:02+0000 x", ""):
        assert parse_line(text) == [None, text]
    lines: list[list[Any]] = [[None, "a"], [10.0, "b"], [None, "c"], [20.0, "d"]]
    assert pick(lines, None, 12.0, 22.0) == lines[1:]
    assert pick(lines, 2, None, 22.0) == lines[2:]
    assert pick(lines, 0, None, 22.0) == []
    two: list[list[Any]] = [[None, f"[a] rank {rank} of 2 starts on /x"] for rank in (0, 1, 0, 1)]
    assert last_launch(two) == two[2:]  # as in a controller's log
    assert last_launch(two[1::2]) == two[3:]  # of one rank
    assert last_launch(lines) == lines


@given(st.lists(st.tuples(st.sampled_from("ab"), st.one_of(st.none(), st.floats(0, 9))), max_size=20))
def test_merging_keeps_each_source_in_its_order(said: list[tuple[str, float | None]]) -> None:
    sources = {label: LogFile(label, LOCAL, "/x") for label in "ab"}
    lines = [LogLine(sources[label], when, str(number)) for number, (label, when) in enumerate(said)]
    merged = in_order(lines)
    assert sorted(merged, key=lines.index) == lines
    for label in "ab":
        numbers = [int(line.text) for line in merged if line.source.label == label]
        assert numbers == sorted(numbers)


def test_a_log_cannot_command_the_terminal() -> None:
    line = LogLine(LogFile("a", LOCAL, "/x"), None, "\x1b]0;x\x07 é\tz")
    assert report_observe.line_text(line, prefix=True, timestamps=True) == f"[a] {'-' * 20} \\x1b]0;x\\x07 é\tz"


def test_logs_of_this_machine(tmp_path: Path) -> None:
    assert find_sources(None) == []
    logs = state_dir() / "logs"
    for name in ("old-rank-0.log", "new-rank-0.log", "new-rank-10.log", "new-rank-2.log", "controller-new-abc.log"):
        write_log(logs / name, "x")
    os.utime(logs / "old-rank-0.log", (1, 1))
    assert [s.label for s in find_sources(None)] == ["localhost/0", "localhost/2", "localhost/10"]
    assert [s.rank for s in find_sources(None, ["localhost/2"])] == [2]
    assert len(find_sources(None, ["localhost"])) == 3


def test_a_deployment_that_runs_brings_no_old_logs_from_here(
    sshd: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same set ran on this machine before: its logs are no ranks of what runs now."""
    deployment = make_deployment(sshd, tmp_path, 1)
    key = target_key(deployment)
    logs_here = state_dir() / "logs"
    for name in (f"{NAME}-rank-0.log", f"controller-{NAME}-{key}.log", f"controller-{NAME}-other.log"):
        write_log(logs_here / name, "x")
    running = [key]
    monkeypatch.setattr(logs, "find_running", lambda: [Path(f"/run/{one}.sock") for one in running])
    assert [s.label for s in find_sources(deployment)] == ["node0", "controller"]
    assert [s.label for s in find_sources(deployment, ["localhost"])] == ["controller", "localhost/0"]
    running.append("other")  # what runs here is told, too
    assert [s.label for s in find_sources(deployment)] == ["node0", "controller", "localhost/0", "controller"]


@pytest.fixture
def recorded(sshd: Server, tmp_path: Path) -> Iterator[Deployment]:
    deployment = make_deployment(sshd, tmp_path, 2)
    for rank in range(2):
        write_log(log_of(deployment, rank), f"2026-11-20T17:40:0{rank}+0000 rank {rank} starts")
    write_deployment(deployment)
    yield deployment
    for rank in range(2):
        wait_for(lambda: not readers_of(log_of(deployment, rank)))  # noqa: B023


def start_moectl(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "moectl", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=process_env())


def test_logs_as_a_user_types_it(
    sshd: Server, recorded: Deployment, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    follow = start_moectl("logs", "-f")
    assert follow.stdout is not None
    assert [follow.stdout.readline() for _ in range(2)] == [
        "[node0] 2026-11-20T17:40:00Z rank 0 starts\n",
        "[node1] 2026-11-20T17:40:01Z rank 1 starts\n",
    ]
    write_log(log_of(recorded, 1), "2026-11-20T17:41:00+0000 request 1")
    assert follow.stdout.readline() == "[node1] 2026-11-20T17:41:00Z request 1\n"
    follow.send_signal(signal.SIGINT)
    _, stderr = follow.communicate(timeout=30)
    assert (follow.returncode, stderr.strip()) == (130, "Interrupted.")
    wait_for(lambda: not any(readers_of(log_of(recorded, rank)) for rank in range(2)))

    out, _ = start_moectl("logs", "node1", "--tail", "1").communicate(timeout=30)
    assert out == "2026-11-20T17:41:00Z request 1\n"
    out, _ = start_moectl("logs", "--json", "--tail", "1").communicate(timeout=30)
    document = json.loads(out)
    assert document["schema"] == "moectl.logs/1"
    assert [(line["host"], line["rank"], line["text"]) for line in document["lines"]] == [
        ("node0", 0, "rank 0 starts"),
        ("node1", 1, "request 1"),
    ]
    # Hosts that cannot be reached: 5 when that is all of them, 3 when others could be read.
    dead = DeployedRank(Host(sshd.add_alias("dead", f"Port {find_free_port()}")), sys.executable, "/x", "/x")
    for ranks, code in (((recorded.ranks[0], dead), 3), ((dead,), 5)):
        write_deployment(replace(recorded, ranks=ranks))
        assert run(capsys, monkeypatch, "logs", "--tail", "1")[0] == code
    write_deployment(recorded)
    # A reader that was cut off, not let go: its leash tells it.
    killed = start_moectl("logs", "-f", "--json")
    assert killed.stdout is not None
    assert json.loads(killed.stdout.readline())["schema"] == "moectl.logs/1"
    killed.kill()
    killed.communicate(timeout=30)
