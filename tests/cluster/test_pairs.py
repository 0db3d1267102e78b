"""Ways between hosts judged, and rounds of neighbours; the trying itself is over real sockets."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, strategies as st

from moectl.cluster import probe
from moectl.cluster.doctor.diagnose import _why_not
from moectl.cluster.doctor.finding import Level
from moectl.cluster.doctor.host import Visit
from moectl.cluster.doctor.pairs import Pair, face, judge_links, plan_neighbours, try_collective
from moectl.cluster.probe import Site, Tried, try_links
from moectl.cluster.probed_plan import _find_busy
from moectl.engine.backend_errors import explain_backend
from moectl.hosts.hardware import Hardware
from moectl.hosts.hostfile import Host
from moectl.hosts.remote import LocalRemote
from moectl.hosts.survey import Survey
from moectl.hosts.thunderbolt import parse_ifconfig
from tests.support.fake_mac import ifconfig_text
from tests.support.ring import rank_env

LOOPBACK = "127.0.0.1"
GBIT = 125e6


def sites(count: int, *addresses: str) -> list[Site]:
    return [
        Site(
            Host(f"mac{i}"),
            LocalRemote(f"mac{i}"),
            sys.executable,
            (addresses[i] if addresses else LOOPBACK,),
            rank_env(),
        )
        for i in range(count)
    ]


def ways(a: int, b: int, *, gbit: float = 10.0, rtt_s: float = 1e-4) -> list[Tried]:
    return [Tried(b, a, rtt_s, gbit * GBIT, gbit * GBIT), Tried(a, b, rtt_s)]


def judge(count: int, *tried: list[Tried], macos: bool = True) -> dict[Pair, list[tuple[str, str]]]:
    found = judge_links(sites(count), [way for some in tried for way in some], mac=lambda place: macos)
    return {pair: [(f.level.word, f.text) for f in findings] for pair, findings in found.items()}


def test_good_ways() -> None:
    assert judge(2, ways(0, 1)) == {Pair(0, 1): [("ok", "10.0 Gb/s 0.10 ms")]}


def test_a_slow_one_among_fast_ones() -> None:
    found = judge(3, ways(0, 1), ways(0, 2), ways(1, 2, gbit=0.94))
    assert found[Pair(0, 2)][0][0] == "ok"
    assert found[Pair(1, 2)] == [("warn", "0.94 Gb/s 0.10 ms: slow")]


def test_slow_whatever_the_others_do() -> None:
    assert judge(2, ways(0, 1, gbit=0.3))[Pair(0, 1)][0][0] == "warn"
    assert judge(2, ways(0, 1, rtt_s=5e-3)) == {Pair(0, 1): [("warn", "10.0 Gb/s 5.00 ms: slow round trips")]}


def test_without_transfers_the_round_trip_is_told() -> None:
    assert judge(2, [Tried(1, 0, 1e-4), Tried(0, 1, 1e-4)]) == {Pair(0, 1): [("ok", "0.10 ms")]}


def test_a_way_that_nobody_told_of() -> None:
    [(level, text)] = judge(2, ways(0, 1)[:1])[Pair(0, 1)]
    assert (level, text) == ("FAIL", "mac0 cannot connect to mac1 at 127.0.0.1: no answer in time")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("ETIMEDOUT", "a firewall, a VPN"),
        ("ECONNREFUSED", "not up"),
        ("EHOSTUNREACH", "cannot be reached: the cable"),
    ],
)
def test_errors_are_explained(name: str, why: str) -> None:
    [(level, text)] = judge(2, [Tried(1, 0, why="it failed", errno=name), *ways(0, 1)[1:]])[Pair(0, 1)]
    assert level == "FAIL"
    assert text.startswith("mac1 cannot connect to mac0 at 127.0.0.1: it failed (")
    assert why in text


def test_a_program_of_this_mac_may_lack_leave() -> None:
    here = Site(Host("localhost"), LocalRemote(), sys.executable, ("10.0.0.1",))
    there = Site(Host("mac1"), LocalRemote("mac1"), sys.executable, ("10.0.0.2",))
    tried = [Tried(0, 1, why="No route to host", errno="EHOSTUNREACH"), Tried(1, 0, 1e-4)]
    [found] = judge_links([here, there], tried, mac=lambda place: True)[Pair(0, 1)]
    assert "Local Network privacy" in found.text
    assert found.values == {"errno": "EHOSTUNREACH"}


def test_a_ring_over_cables_of_their_own_has_no_other_ways() -> None:
    tried = [Tried(i, (i + 1) % 4, 1e-4, 10 * GBIT, 10 * GBIT) for i in range(4)]
    found = judge_links(sites(4), tried, mac=lambda place: True, needed=lambda a, b: probe.is_next(a, b, 4))
    assert {(p.a, p.b): [(f.level.word, f.text) for f in some] for p, some in found.items()} == {
        **{pair: [("ok", "10.0 Gb/s 0.10 ms")] for pair in ((0, 1), (1, 2), (2, 3), (0, 3))},
        **{
            pair: [("skip", "not connected: they are not neighbours, and a ring needs no more")]
            for pair in ((0, 2), (1, 3))
        },
    }
    found = judge_links(sites(4), tried[1:], mac=lambda place: True, needed=lambda a, b: probe.is_next(a, b, 4))
    assert [f.level for f in found[Pair(0, 1)]] == [Level.FAIL]


def test_neighbours_meet_by_the_addresses_of_their_own_cable() -> None:
    first, second = sites(2, "192.168.0.5", "192.168.0.2")  # of three: the first one's ip= is that of another cable
    interfaces = parse_ifconfig(
        ifconfig_text(
            {"en0": {"inet": ["10.0.0.1/24"]}, "en2": {"inet": ["192.168.0.1/30"]}, "en3": {"inet": ["192.168.0.5/30"]}}
        )
    )
    assert face(first, interfaces, second).addresses == ("192.168.0.1",)
    assert face(second, parse_ifconfig(ifconfig_text({"en2": {"inet": ["192.168.0.2/30"]}})), first) == second
    assert face(first, (), second) == first
    on_lan = sites(2, "10.0.0.1", "10.0.0.2")
    assert face(on_lan[0], interfaces, on_lan[1]) == on_lan[0]


@given(st.integers(2, 12))
def test_neighbours_meet_once_and_nobody_is_in_two_pairs(count: int) -> None:
    rounds = plan_neighbours(count)
    pairs = [pair for some in rounds for pair in some]
    ring = {(min(i, (i + 1) % count), max(i, (i + 1) % count)) for i in range(count)}
    assert sorted((p.a, p.b) for p in pairs) == sorted(ring)
    assert all(len({end for p in some for end in (p.a, p.b)}) == 2 * len(some) for some in rounds)
    assert len(rounds) <= 3


# Over real sockets.


def test_every_way_is_tried() -> None:
    collected: list[Tried] = []
    try_links(sites(3), collected.append, transfers=True, budget_s=0.05)
    tried = collected
    assert sorted((way.here, way.there) for way in tried) == [(i, j) for i in range(3) for j in range(3) if i != j]
    assert all(way.rtt_s and not way.why for way in tried)
    assert all(bool(way.out_bytes_s) == (way.here > way.there) for way in tried)


def test_without_transfers() -> None:
    collected: list[Tried] = []
    try_links(sites(2), collected.append, transfers=False, budget_s=0.05)
    assert [way.out_bytes_s for way in collected] == [None, None]


def test_an_address_that_is_not_its_own_fails_on_its_pairs_only() -> None:
    collected: list[Tried] = []
    try_links(sites(3, LOOPBACK, LOOPBACK, "192.0.2.1"), collected.append, transfers=False, budget_s=0.05)
    wrong = {(way.here, way.there) for way in collected if way.why}
    assert wrong >= {(0, 2), (1, 2)}
    assert not wrong & {(0, 1), (1, 0)}


def test_a_port_that_nobody_serves_is_refused_by_name() -> None:
    one, other = sites(2)
    answer = probe._ask_dialler(one, other, 1, "s", 0.05)
    assert answer.errno == "ECONNREFUSED"


def test_a_sum_that_cannot_be() -> None:
    one, other = sites(2)
    broken = Site(other.host, other.remote, "/nowhere/python", other.addresses, other.env)
    found = try_collective([one, broken], (0, 1), "ring", macos=False)
    assert found.level is Level.FAIL
    assert "two ranks cannot work together: mac1: " in found.text


def test_a_sum_over_rdma_that_cannot_be_says_what_mends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    error = explain_backend("[jaccl] Changing queue pair to RTR failed with errno 22")
    assert error is not None

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(probe, "measure_speed", fail)
    found = try_collective(sites(2), (0, 1), "ring", macos=True)
    assert found.level is Level.FAIL
    assert found.text.count("errno 22") == 1
    assert found.fix == "moectl setup shows the commands that mend it; if that changes nothing, restart that Mac"


@pytest.mark.parametrize(
    ("backend", "workers", "why"),
    [
        ("jaccl", "9 python -m moectl worker", "a worker on mac1 uses RDMA; 'moectl stop' ends it"),
        ("ring", "9 python -m moectl worker", ""),
        ("jaccl", "", ""),
    ],
)
def test_no_sum_over_rdma_is_tried_beside_a_worker(backend: str, workers: str, why: str) -> None:
    by_rank = {}
    for rank, site in enumerate(sites(2)):
        visit = Visit(site.host, rank, site.remote, is_ready=True)
        visit.survey = Survey(Hardware(os="macOS"), {"workers": workers if rank else ""})
        by_rank[rank] = (visit, site)
    assert _why_not(Pair(0, 1), by_rank, [], backend) == why


def test_nothing_is_measured_over_rdma_beside_a_worker() -> None:
    argv = ["sh", "-c", "sleep 1000; :", "moectl worker"]
    with subprocess.Popen(argv) as worker:
        try:
            assert _find_busy(sites(2)) == ["mac0", "mac1"]
        finally:
            worker.kill()
