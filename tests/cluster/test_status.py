"""What `status` sees: workers on hosts over real SSH, what controllers say, and how both become rows and exit codes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from moectl.cli.terminal import cut_line, on_ctrl_t
from moectl.cli.verbs import status
from moectl.cluster import status as status_module
from moectl.cluster.deploy.uninstall import FRAMEWORK
from moectl.cluster.status import DOWN, IDLE, RUNNING, UNKNOWN, Observer, Status, StatusRow
from moectl.engine.network.exchange import GATHER_BELOW_BYTES
from moectl.errors import NotDeployed, PartialFailure, StateError, Unreachable, VersionMismatch
from moectl.hosts import connect
from moectl.hosts.connect import close_all, on_each
from moectl.hosts.hostfile import Host
from moectl.hosts.onhost import workers
from moectl.hosts.programs import ask, list_pythons
from moectl.hosts.remote import LocalRemote
from moectl.model.placement import make_placement
from moectl.planner import speed
from moectl.server.metrics import WINDOW_S, Throughput
from moectl.session.deployment import DeployedRank, Deployment, find_deployment, forget_hosts, write_deployment
from tests.support.running import wait_for
from tests.support.sshd import Server, find_free_port
from tests.support.structures import structure_of
from tests.support.tiny import make_config

NAME = "tiny-hidden-2"
# A process whose command line ends as a worker's does, and which marks its log as a worker does.
WORKER = """
import sys
from moectl.hosts.onhost.workers import mark_running
open(sys.argv[1], "a").close()
mark_running(sys.argv[1])
print(1, flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def run_worker(log: Path) -> Iterator[int]:
    log.parent.mkdir(parents=True, exist_ok=True)
    argv = [sys.executable, "-c", WORKER, str(log), "-m", "moectl", "worker"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
        assert process.stdin is not None
        process.stdin.close()


def deploy_to(hosts: list[Host], *, missing: int | None = None) -> Deployment:
    """Return a deployment whose hosts hold an empty set, but for one."""
    ranks = []
    for number, host in enumerate(hosts):
        directory = Path(str(host.dir), "shards", NAME)
        directory.mkdir(parents=True)
        if number != missing:
            (directory / "moectl.json").write_text("{}")
        ranks.append(DeployedRank(host, sys.executable, str(host.dir), str(directory)))
    return Deployment(NAME, "/nowhere", tuple(ranks))


def make_hosts(sshd: Server, root: Path, count: int) -> list[Host]:
    return [Host(sshd.add_alias(f"node{i}"), dir=str(root / f"node{i}")) for i in range(count)]


def test_workers_are_told_from_idle_hosts_and_strangers(sshd: Server, tmp_path: Path) -> None:
    hosts = make_hosts(sshd, tmp_path, 3)
    deployment = deploy_to(hosts, missing=2)
    logs = [tmp_path / f"node{i}" / "logs" for i in range(2)]
    with (
        run_worker(logs[0] / f"{NAME}-rank-0.log"),
        run_worker(logs[1] / "other-rank-3.log"),
        run_worker(tmp_path / "elsewhere" / "logs" / f"{NAME}-rank-1.log"),
        Observer(deployment) as observer,
    ):
        rows = observer.look().rows
    assert [(r.host, r.rank, r.state, r.model) for r in rows] == [
        ("node0", 0, RUNNING, NAME),
        ("node1", 1, IDLE, NAME),
        ("node2", 2, DOWN, NAME),
        ("node1", 3, RUNNING, "other"),
    ]
    assert rows[0].memory_bytes is not None
    assert rows[0].memory_bytes > 1_000_000
    assert rows[0].up_s is not None
    assert isinstance(rows[2].error, NotDeployed)


def test_hosts_that_cannot_be_reached_are_down(sshd: Server, tmp_path: Path) -> None:
    hosts = make_hosts(sshd, tmp_path, 1)
    dead = Host(sshd.add_alias("dead", f"Port {find_free_port()}"), dir=str(tmp_path / "dead"))
    # The record says what is there; a host that moectl knows nothing of is asked all the same.
    with Observer(None, [*hosts, dead]) as observer:
        first = observer.look()
        again = observer.look()
    for found in (first, again):
        assert [(r.host, r.rank, r.state, r.model) for r in found.rows] == [
            ("node0", None, IDLE, None),
            ("dead", None, DOWN, None),
        ]
    with pytest.raises(PartialFailure, match="1 of 2 hosts failed: dead"):
        connect.raise_failures(found.errors, then=".")
    with Observer(None, [dead]) as observer, pytest.raises(Unreachable):  # all alike: their own code, 5
        connect.raise_failures(observer.look().errors, then=".")


def test_a_host_without_python_is_unknown() -> None:
    error = VersionMismatch("no python", host="a")
    with Observer(None, [Host("a")]) as observer:
        assert observer._row(0, error).state == UNKNOWN
    with pytest.raises(VersionMismatch, match=r"no python 3\.9"):
        ask(LocalRemote(), ["/no/python"], "workers", {"root": "~", "directory": ""}, timeout_s=20)
    assert list_pythons(Host("a", python="p"), "q", "")[:2] == ("q", "p")


def test_no_host_waits_for_a_silent_one(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    silent = fifo.read_text  # waits for somebody who writes
    found = on_each([Host("a"), Host("b")], lambda i, _: silent() if i else "here", limit_s=0.2)
    assert found[0] == "here"
    assert isinstance(found[1], Unreachable)
    fifo.write_text("")


def test_a_host_that_does_not_answer_is_asked_once_at_a_time(tmp_path: Path) -> None:
    let_go, asked = threading.Event(), []

    class Silent(LocalRemote):
        def run(self, *_: Any, **__: Any) -> Any:
            asked.append(1)
            let_go.wait()
            raise Unreachable("gone", host="a")

    with Observer(None, [Host("a")], limit_s=0.1) as observer:
        observer._remotes[0] = Silent()
        errors = [observer.look().rows[0].error for _ in range(3)]
        assert [type(error) for error in errors] == [Unreachable] * 3
        assert len(asked) == 1
        let_go.set()
        wait_for(lambda: not observer._asking)
        observer.look()
        assert len(asked) == 2


def test_leaving_does_not_wait_for_a_connection_that_is_being_made() -> None:
    never = threading.Event()

    class Silent(LocalRemote):
        def close(self) -> None:
            never.wait()

    close_all([Silent(), LocalRemote()])  # returns


DESCRIBED: dict[str, Any] = {
    "name": NAME,
    "hosts": ["localhost", "localhost"],
    "shards": "/nowhere",
    "options": {"dtype": None},
    "memory_bytes": [70, 0],
    "ranks_answered": 2,
    "healthy": True,
    "restarts": 0,
    "running": 1,
    "queued": 0,
    "up_s": 8040.0,
    "tokens": 18204,
    "tok_s": 6.2,
}


def look(
    monkeypatch: pytest.MonkeyPatch,
    deployment: Deployment | None,
    *described: dict[str, Any],
    others: Sequence[Deployment] = (),
) -> Status:
    monkeypatch.setattr(status_module, "_describe_all", lambda: (list(described), ()))
    with Observer(deployment, others=others) as observer:
        return observer.look()


def test_a_controller_knows_more_than_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hosts = [Host("localhost", dir=str(tmp_path / "a")), Host("localhost", dir=str(tmp_path / "b"))]
    deployment = deploy_to(hosts, missing=1)
    rows = look(monkeypatch, deployment, DESCRIBED).rows
    assert [(r.state, r.memory_bytes, r.tokens, r.tok_s, r.error) for r in rows] == [
        (RUNNING, 70, 18204, 6.2, None),
        (RUNNING, None, None, None, None),
    ]
    silent = {**DESCRIBED, "ranks_answered": 1}
    assert [r.state for r in look(monkeypatch, deployment, silent).rows] == [IDLE, DOWN]
    alone = look(monkeypatch, None, DESCRIBED, {**silent, "name": "other"}).rows
    assert [(r.model, r.rank, r.state) for r in alone] == [
        (NAME, 0, RUNNING),
        (NAME, 1, RUNNING),
        ("other", 0, UNKNOWN),
        ("other", 1, UNKNOWN),
    ]


def test_the_deployment_that_a_server_has_loaded_is_looked_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    current = deploy_to([Host("localhost", dir=str(tmp_path / name)) for name in "ab"])
    earlier = replace(current, name="earlier")
    for told, shown in ((DESCRIBED, NAME), ({**DESCRIBED, "name": "earlier"}, "earlier")):
        rows = look(monkeypatch, current, told, others=[earlier]).rows
        assert [(row.model, row.rank, row.state) for row in rows] == [(shown, 0, RUNNING), (shown, 1, RUNNING)]
    unloaded = {**DESCRIBED, "name": "earlier", "hosts": [], "memory_bytes": [], "ranks_answered": 0}
    rows = look(monkeypatch, current, unloaded, others=[earlier]).rows
    assert [(row.model, row.state) for row in rows] == [(NAME, IDLE), (NAME, IDLE)]


ROWS = (
    StatusRow("mac1", 0, RUNNING, "dbrx", 73_600_000_000, 8040, 18204, 6.2, 4.9e6),
    StatusRow("mac2", 1, DOWN, "dbrx", error=Unreachable("no route to host", host="mac2")),
)


def test_the_table_and_its_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Status(0.0, ROWS, ({**DESCRIBED, "restarts": 2},), ("/run/x.sock",))
    assert status.status_text(found, width=100).split("\n") == [
        "RANK  HOST  STATE    MODEL   MEMORY     UP  TOKENS  TOK/S      LINK",
        "   0  mac1  \x1b[32mrunning\x1b[0m  dbrx   73.6 GB  2h14m  18,204    6.2  4.9 MB/s",
        "   1  mac2  \x1b[31mdown\x1b[0m     dbrx         -      -",
        "mac2: no route to host",
        f"{NAME}: 1 answers in progress, 0 waiting, restarted 2 times",
        "a controller does not answer: it loads, or hangs (/run/x.sock)",
    ]
    assert "LINK" not in status.status_text(found, width=60)
    assert "STATE" not in status.status_text(found, width=14)
    document = status.status_json(found)
    assert document["schema"] == "moectl.status/1"
    assert document["hosts"][1]["error"] == {
        "code": 5,
        "kind": "Unreachable",
        "message": "no route to host",
        "hint": None,
    }
    assert status.changed_lines(found, None) == [
        "1970-01-01T00:00:00Z 0 mac1 running dbrx 73.6 GB 2h14m 18,204 6.2 4.9 MB/s",
        "1970-01-01T00:00:00Z 1 mac2 down dbrx no route to host",
    ]
    later = replace(found, rows=(replace(ROWS[0], up_s=8042.0), replace(ROWS[1], state=IDLE, error=None)))
    assert status.changed_lines(later, found) == ["1970-01-01T00:00:00Z 1 mac2 idle dbrx"]
    assert status.changed_lines(replace(found, rows=()), found) == ["1970-01-01T00:00:00Z Nothing is running."]
    assert [status.up_text(s) for s in (41, 750, 8040, 280000)] == ["41s", "12m", "2h14m", "3d5h"]


@given(st.lists(st.tuples(st.floats(0, 1000), st.integers(1, 9))))
def test_throughput_counts_all_and_forgets_the_past(events: list[tuple[float, int]]) -> None:
    events.sort()
    counter = Throughput(0.0)
    for now_s, tokens in events:
        counter.add(now_s, tokens)
    assert counter.tokens == sum(tokens for _, tokens in events)
    end_s = events[-1][0] if events else 0.0
    recent = sum(tokens for now_s, tokens in events if int(now_s) > end_s - WINDOW_S)
    assert 0 <= counter.rate(end_s) <= recent
    assert (counter.rate(end_s) > 0) == (recent > 0)
    assert counter.rate(end_s + 2 * WINDOW_S) == 0


def test_throughput_of_a_steady_stream() -> None:
    counter = Throughput(5.0)
    for second in range(100):
        counter.add(5.0 + second / 4)
    assert counter.rate(30.0) == pytest.approx(4.0, rel=0.1)


def test_bytes_per_token_follow_the_exchange() -> None:
    assert speed.GATHER_BELOW_BYTES == GATHER_BELOW_BYTES
    structure = structure_of(make_config())
    row, layers = 4 * structure.width, structure.n_layers
    counted = {
        split: speed.count_token_bytes(make_placement(structure, split, 2), 4)
        for split in ("hidden", "tensor", "layers")
    }
    assert counted == {"hidden": layers * row, "tensor": 2 * layers * row, "layers": row}
    assert speed.count_token_bytes(make_placement(structure, "experts", 4), 4) == 3 * layers * row
    assert speed.count_token_bytes(make_placement(structure, "hidden", 1), 4) == 0
    wide = replace(structure, width=1 << 16)
    assert speed.count_token_bytes(make_placement(wide, "experts", 4), 2) == (layers * 2 * 3 * (2 << 16) // 4)


# As macOS's ps(1) prints these columns.
PS = """\
  501  12480 03-02:14:07 /opt/homebrew/bin/python3 -m moectl serve
 2210 73600000    02:14:07 /Users/ada/.moectl/env/bin/python -m moectl worker
 2216    800       00:41 sh -c exec python -m moectl worker now
 2217 800  00:09 /opt/homebrew/Frameworks/Python.framework/Versions/3.12/Resources/Python.app/Contents/MacOS/Python \
-m moectl worker
"""


def test_workers_in_what_ps_prints() -> None:
    assert workers.parse_ps(PS) == [
        {
            "pid": 2210,
            "memory_bytes": 73600000 * 1024,
            "up_s": 8047.0,
            "python": "/Users/ada/.moectl/env/bin/python",
        },
        {
            "pid": 2217,
            "memory_bytes": 800 * 1024,
            "up_s": 9.0,
            "python": f"/opt/homebrew/Frameworks/Python.framework/Versions/3.12/Resources{FRAMEWORK}",
        },
    ]
    assert [worker["pid"] for worker in workers.parse_ps(PS, {501})] == [501, 2210, 2217]
    assert workers.parse_elapsed("03-02:14:07") == 3 * 86400 + 8047


def interrupted(_: str) -> None:
    """Write as Python does when a signal came while it was writing to that stream."""
    raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")


def test_ctrl_t_says_how_things_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    with on_ctrl_t(lambda: "so far", said.append):  # where there is no such signal, nothing happens
        pass
    monkeypatch.setattr(signal, "SIGINFO", signal.SIGUSR1, raising=False)
    before = signal.getsignal(signal.SIGUSR1)
    with on_ctrl_t(lambda: "so far", said.append):
        os.kill(os.getpid(), signal.SIGUSR1)
    assert said == ["so far"]
    assert signal.getsignal(signal.SIGUSR1) == before
    with on_ctrl_t(lambda: "so far", interrupted):
        os.kill(os.getpid(), signal.SIGUSR1)


def test_lines_are_cut_where_the_window_ends() -> None:
    assert cut_line("a \x1b[31mdown\x1b[0m b", 4) == "a \x1b[31mdo\x1b[0m"
    assert cut_line("plain", 99) == "plain"


def test_what_was_removed_is_not_deployed_any_more(tmp_path: Path) -> None:
    hosts = [Host("a", dir=str(tmp_path / "a")), Host("b", dir=str(tmp_path / "b"))]
    forget_hosts({"a": str(tmp_path / "a")})  # nothing is recorded
    write_deployment(deploy_to(hosts))
    forget_hosts({"a": "/another/root"})
    assert find_deployment() is not None
    forget_hosts({"a": str(tmp_path / "a")})
    left = find_deployment()
    assert left is not None
    assert left.missing == ("a",)
    forget_hosts({"b": str(tmp_path / "b")})
    assert find_deployment() is None
    with pytest.raises(StateError):
        connect.raise_failures({"a": StateError("x")}, then=".")
