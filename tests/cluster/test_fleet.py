"""Hosts that pass shared files on: each byte leaves this machine once, and whatever fails, everything arrives."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

import moectl
from moectl.cluster.deploy import fleet, relay
from moectl.cluster.deploy.deploy import DeployResult, deploy, manifest_entry
from moectl.cluster.deploy.push import Found, PeerLink, Push
from moectl.cluster.deploy.relay import Admit, More, TakeFrom, Wants
from moectl.cluster.deploy.task import Advanced, Event, HostTask, Working
from moectl.errors import Unreachable
from moectl.hosts.remote import LocalRemote
from moectl.model.manifest import NAME, Manifest, is_shared
from tests.cluster.test_deploy import assert_holds, make_hosts, make_shards
from tests.support.netns import Cluster
from tests.support.running import wait_for
from tests.support.sshd import Server

SLACK = 1.05  # headers, acknowledgements, the programs' texts
CHATTER_BYTES = 600_000


def once_bytes(manifest: Manifest) -> int:
    """What this machine has to send at least: every file once."""
    return sum(f.bytes for f in manifest.files.values())


def assert_arrived(cluster: Cluster, shards: Path, manifest: Manifest, result: DeployResult) -> None:
    result.raise_failures()
    for rank, node in enumerate(cluster.nodes):
        directory = node.directory / "moectl" / "shards" / shards.name
        assert_holds(directory, manifest, rank)
        assert (directory / NAME).read_bytes() == (shards / NAME).read_bytes()


def relays(cluster: Cluster) -> list[str]:
    found = [line for rank in range(len(cluster.nodes)) for line in cluster.processes(rank).values()]
    return [line for line in found if "moectl.hosts.onhost.relay" in line and not line.startswith("sshd")]


def refusals(events: list[Event]) -> list[tuple[str, str]]:
    """Return (host, what it said) for every host that could not be taken from."""
    return [(e.host, e.what.split(":")[0]) for e in events if isinstance(e, Working)]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return tmp_path / f"tiny-{secrets.token_hex(4)}"  # the hosts keep what earlier tests brought


def shared_bytes(manifest: Manifest) -> int:
    return sum(f.bytes for name, f in manifest.files.items() if is_shared(name))


@pytest.mark.netns
def test_every_byte_leaves_this_machine_once_and_no_token_is_seen(
    netns: Cluster, tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    manifest = make_shards(shards, 4, layer_bytes=2_000_000)
    tokens: list[str] = []
    seen: list[str] = []

    def remember(count: int) -> str:
        tokens.append(os.urandom(count).hex())
        return tokens[-1]

    def look(event: Event) -> None:
        if isinstance(event, Advanced):
            for rank in range(4):
                for pid, line in netns.processes(rank).items():
                    seen.append(line)
                    with contextlib.suppress(OSError):  # it has ended
                        seen.append(Path(f"/proc/{pid}/environ").read_text())

    monkeypatch.setattr(secrets, "token_hex", remember)
    before = netns.sent_bytes
    result = deploy(netns.hosts(), shards, manifest, on_event=look)
    sent = netns.sent_bytes - before
    assert_arrived(netns, shards, manifest, result)
    assert sent <= SLACK * once_bytes(manifest) + CHATTER_BYTES
    # On a busy machine another host than the first may be ready first, and get the files from here.
    assert sorted(r.relayed_bytes for r in result.results) == [0] + 3 * [shared_bytes(manifest)]
    assert any("moectl.hosts.onhost.relay serve" in line for line in seen)
    assert any("moectl.hosts.onhost.relay take" in line for line in seen)
    assert len(tokens) == 3
    said = [*capfd.readouterr(), *(p.read_text() for p in netns.config.parent.glob("*.log"))]
    for token in tokens:
        assert not any(token in text for text in [*seen, *said])
    wait_for(lambda: not relays(netns))


def test_a_token_is_not_shown() -> None:
    for message in (Admit(1, "hush"), TakeFrom(0, (("10.0.0.1", 1),), "hush")):
        assert "hush" not in repr(message)


@pytest.mark.long
@pytest.mark.netns
def test_a_host_that_cannot_reach_another_takes_from_the_next(
    netns: Cluster, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "HOLD_S", 120.0)  # so that the order is that of ranks on a busy machine, too
    manifest = make_shards(shards, 4, layer_bytes=1_000_000)
    netns.deafen(1, 2)
    events: list[Event] = []
    before = netns.sent_bytes
    result = deploy(netns.hosts(), shards, manifest, on_event=events.append)
    assert_arrived(netns, shards, manifest, result)
    assert refusals(events) == [("node2", "cannot take files from node1")]
    assert netns.sent_bytes - before <= SLACK * once_bytes(manifest) + CHATTER_BYTES


@pytest.mark.netns
def test_behind_firewalls_this_machine_sends_everything(netns: Cluster, shards: Path) -> None:
    manifest = make_shards(shards, 4)
    for rank, other in permutations(range(4), 2):
        netns.deafen(rank, other, "-p", "tcp", "-j", "REJECT", "--reject-with", "tcp-reset")
    events: list[Event] = []
    result = deploy(netns.hosts(), shards, manifest, on_event=events.append)
    assert_arrived(netns, shards, manifest, result)
    assert len({host for host, _ in refusals(events)}) == 3  # all but the one that is first
    assert sum(r.relayed_bytes for r in result.results) == 0
    for rank in range(4):  # what was counted for a source that failed was taken back
        arrived = sum(e.bytes for e in events if isinstance(e, Advanced) and e.rank == rank)
        assert arrived == result.results[rank].copied_bytes


@pytest.mark.long
@pytest.mark.netns
def test_hosts_that_have_all_serve_one_that_has_nothing(netns: Cluster, shards: Path) -> None:
    manifest = make_shards(shards, 4, layer_bytes=2_000_000)
    deploy(netns.hosts(), shards, manifest).raise_failures()
    shutil.rmtree(netns.nodes[2].directory / "moectl" / "shards" / shards.name)
    before = netns.sent_bytes
    result = deploy(netns.hosts(), shards, manifest)
    own = sum(f.bytes for f in manifest.files.values()) - shared_bytes(manifest)
    assert netns.sent_bytes - before <= SLACK * own / 4 + CHATTER_BYTES
    assert_arrived(netns, shards, manifest, result)
    assert [r.relayed_bytes for r in result.results] == [0, 0, shared_bytes(manifest), 0]


def once(work: Callable[[], bool]) -> Callable[[Event], None]:
    """Return what does something at progress, until it could."""
    done = threading.Event()

    def on_event(event: Event) -> None:
        if isinstance(event, Advanced) and not done.is_set() and work():
            done.set()

    return on_event


@pytest.mark.long
@pytest.mark.netns
def test_a_source_that_dies_in_the_middle_is_replaced(netns: Cluster, shards: Path) -> None:
    manifest = make_shards(shards, 4, layer_bytes=2_000_000)
    netns.limit_uplink("40mbit")
    events: list[Event] = []

    def kill() -> bool:
        there = [n.directory / "moectl" / "shards" / shards.name / "common/layer-000.safetensors" for n in netns.nodes]
        if sum(path.exists() for path in there) < 2:
            return False  # nobody has taken anything yet
        for rank in range(4):
            for pid, line in netns.processes(rank).items():
                if line.endswith("moectl.hosts.onhost.relay serve"):
                    os.kill(pid, signal.SIGKILL)
        return True

    on_progress = once(kill)

    def on_event(event: Event) -> None:
        on_progress(event)
        events.append(event)

    result = deploy(netns.hosts(), shards, manifest, on_event=on_event)
    assert_arrived(netns, shards, manifest, result)
    assert refusals(events)
    assert sum(r.relayed_bytes for r in result.results) > 0


@pytest.mark.netns
@pytest.mark.long
def test_after_kill_9_nothing_is_left_and_the_next_run_goes_on(netns: Cluster, shards: Path, tmp_path: Path) -> None:
    manifest = make_shards(shards, 4, layer_bytes=2_000_000)
    hosts = netns.hosts()
    listed = tmp_path / "hosts.txt"
    listed.write_text("".join(f"{h.name} ip={h.ips[0]} python={h.python} dir={h.dir}\n" for h in hosts))
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(moectl.__file__).parent.parent)!r})\n"
        "from pathlib import Path\n"
        "from moectl.cluster.deploy.deploy import deploy\n"
        "from moectl.hosts.hostfile import parse_hosts\n"
        "from moectl.model.manifest import read_manifest\n"
        "from moectl.cluster.deploy.task import Advanced\n"
        "def main():\n"
        "    hosts = parse_hosts(Path(sys.argv[1]).read_text()).hosts\n"
        "    say = lambda e: isinstance(e, Advanced) and print(e.bytes, flush=True)\n"
        "    deploy(hosts, Path(sys.argv[2]), read_manifest(Path(sys.argv[2])), on_event=say)\n"
        "if __name__ == '__main__':\n"
        "    main()\n"
    )
    netns.limit_uplink("40mbit")
    before = netns.sent_bytes
    command = [sys.executable, str(script), str(listed), str(shards)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        arrived = 0
        while arrived < once_bytes(manifest) // 2:
            arrived += int(child.stdout.readline())
        child.kill()
    wait_for(lambda: not relays(netns))
    for node in netns.nodes:
        assert not (node.directory / "moectl" / "shards" / shards.name / NAME).exists()
    netns.mend()
    result = deploy(hosts, shards, manifest)
    tries = 100
    while result.failed and tries:  # a receiver may need a moment to notice
        assert all("another push" in str(r.error) for r in result.failed)
        tries -= 1
        result = deploy(hosts, shards, manifest)
    assert_arrived(netns, shards, manifest, result)
    # What had arrived was not sent again; what was under way in the queue may have been.
    assert netns.sent_bytes - before <= SLACK * once_bytes(manifest) + 4 * CHATTER_BYTES


@pytest.mark.long
def test_hosts_without_ip_are_reached_where_ssh_reached_them(sshd: Server, tmp_path: Path, shards: Path) -> None:
    manifest, hosts = make_shards(shards, 3), make_hosts(sshd, tmp_path, 3)
    result = deploy(hosts, shards, manifest)
    result.raise_failures()
    assert sorted(r.relayed_bytes for r in result.results) == [0, *2 * [shared_bytes(manifest)]]
    for rank in range(3):
        assert_holds(tmp_path / f"node{rank}" / "shards" / shards.name, manifest, rank)


def test_a_promise_is_taken_back_before_anything_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An old manifest must not vouch for files of a new set."""
    (tmp_path / NAME).write_text("of an older set")
    there: list[bool] = []

    class Taker:
        def __init__(self, *_: object) -> None:
            there.append((tmp_path / NAME).exists())
            raise Unreachable("enough was seen")

    monkeypatch.setattr("moectl.cluster.deploy.push.Taker", Taker)
    told: list[object] = []
    found = Found(str(tmp_path), {}, {}, may_lie=True)
    push = Push(LocalRemote(), tmp_path, found, lambda _: None, PeerLink(1, (), told.append, 0.0))
    push.take_from(TakeFrom(0, (("127.0.0.1", 1),), "token"))
    wait_for(lambda: bool(told))
    assert there == [False]
    assert told == [Wants(1, 0, "enough was seen")]


def test_a_file_that_is_told_twice_is_sent_once(tmp_path: Path) -> None:
    """A cut tells each file as it is made, and all of them at its end."""
    manifest = make_shards(tmp_path / "set", 1)
    files = {**manifest.files, NAME: manifest_entry(tmp_path / "set")}
    first = dict(list(manifest.files.items())[:2])
    sent: list[str] = []

    class Remote(LocalRemote):
        def put(self, source: Path, destination: str, **options: Any) -> None:
            sent.append(source.relative_to(tmp_path / "set").as_posix())
            super().put(source, destination, **options)

    moved: list[int] = []
    push = Push(Remote(), tmp_path / "set", Found(str(tmp_path / "host"), {}, {}, may_lie=True), moved.append, None)
    for more in (More(first, False), More(first, False), More(files, True)):
        push.add(more)
    arrived = push.run()
    assert sorted(sent) == sorted(files)
    assert sent[-1] == NAME
    assert (arrived.copied_bytes, arrived.kept_bytes) == (sum(f.bytes for f in files.values()), 0)
    assert sum(moved) == arrived.copied_bytes


def test_many_hosts_that_hang_are_waited_for_together(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hung:
        """A host's process that ends by SIGKILL only."""

        now_s, killed = 100.0, 0

        def join(self, timeout_s: float | None = None) -> None:
            Hung.now_s += timeout_s or 0.0

        def kill(self) -> None:
            Hung.killed += 1

        def terminate(self) -> None:
            pass

        close = terminate

    monkeypatch.setattr("moectl.cluster.deploy.fleet.time", SimpleNamespace(monotonic=lambda: Hung.now_s))
    whole = fleet._Fleet([], 1, lambda event: None, None)
    task = cast(HostTask, SimpleNamespace(rank=0))
    whole._processes = {multiprocessing.Pipe()[0]: (Hung(), task) for _ in range(8)}
    whole.end()
    assert Hung.killed == 8
    assert Hung.now_s == 100.0 + fleet.END_GRACE_S
