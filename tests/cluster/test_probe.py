"""Asking and measuring hosts: this machine, a real sshd, four namespaced hosts; what never answers ends in an error."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from moectl.cluster import probe
from moectl.cluster.probe import (
    LEAST_MEMORY_BYTES,
    Site,
    Tried,
    is_next,
    measure_links,
    measure_speed,
    memory_to_use,
    plan_rounds,
    try_links,
)
from moectl.demo import demo_dir
from moectl.errors import CommandFailed, MoectlError, PlanError, RemoteError, Unreachable
from moectl.hosts import survey
from moectl.hosts.hardware import Hardware
from moectl.hosts.hostfile import Host
from moectl.hosts.onhost import links
from moectl.hosts.onhost.prelude import ANSWER, parse_answer
from moectl.hosts.remote import LocalRemote, Remote, read_program
from moectl.hosts.ssh.remote import SSHRemote
from moectl.hosts.survey import read_all_hardware, read_hardware
from moectl.model.placement import make_placement
from moectl.model.structure import Quantization, Structure
from moectl.planner.measured import Job, Pass, RankSpeed, Speed, read_job, read_speeds
from moectl.session.liveness import StepDeadline
from tests.support.families import config_of
from tests.support.netns import Cluster
from tests.support.ring import rank_env
from tests.support.running import processes
from tests.support.structures import structure_of
from tests.support.tiny import json_values, make_config

CONFIG = make_config()
TINY = structure_of(CONFIG)
LOOPBACK = "127.0.0.1"


@pytest.fixture(params=["local", "ssh"])
def remote(request: pytest.FixtureRequest) -> Iterator[Remote]:
    made: Remote = LocalRemote() if request.param == "local" else SSHRemote(request.getfixturevalue("ssh_host"))
    yield made
    made.close()


def sites(count: int, *, python: str = sys.executable) -> list[Site]:
    return [Site(Host(f"host{i}"), LocalRemote(f"host{i}"), python, (LOOPBACK,), rank_env()) for i in range(count)]


# Hardware.


def test_hardware_of_this_machine(remote: Remote) -> None:
    found = read_hardware(remote)
    assert found.memory_bytes is not None
    assert found.in_use_bytes is not None
    assert 0 < found.in_use_bytes < found.memory_bytes
    assert found.cores is not None
    assert found.cores > 0
    assert found.os == {"linux": "Linux", "darwin": "macOS"}[sys.platform]
    assert found.os_version


def test_a_system_that_is_neither_is_named_with_its_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "HARDWARE_SCRIPT", "echo moectl-probe system; echo FreeBSD")
    with pytest.raises(CommandFailed, match=r"^mac1: it is neither macOS nor Linux: it calls itself 'FreeBSD'$"):
        read_all_hardware([LocalRemote("mac1")])


def test_a_system_that_hangs_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "HARDWARE_SCRIPT", "sleep 1000")
    monkeypatch.setattr(survey, "HARDWARE_S", 0.2)
    with pytest.raises(CommandFailed, match=r"did not finish within 0\.2 s"):
        read_hardware(LocalRemote())


def test_memory_for_a_measurement_is_a_part_of_the_least_that_is_free() -> None:
    big, small = (
        Hardware(memory_bytes=100 << 30, in_use_bytes=0),
        Hardware(memory_bytes=50 << 30, in_use_bytes=10 << 30),
    )
    assert memory_to_use([big, small, Hardware()]) == 4 << 30
    assert memory_to_use([Hardware()]) == LEAST_MEMORY_BYTES


# Links.


@given(st.integers(1, 12))
def test_rounds_have_every_pair_once_and_no_host_twice(count: int) -> None:
    rounds = plan_rounds(count)
    assert sorted(pair for pairs in rounds for pair in pairs) == list(combinations(range(count), 2))
    assert all(len({host for pair in pairs for host in pair}) == 2 * len(pairs) for pairs in rounds)
    assert len(rounds) <= count


def check_links(found: tuple[tuple[tuple[float, ...], ...], ...], count: int) -> None:
    rtt, bandwidth = found
    for matrix in (rtt, bandwidth):
        assert [len(row) for row in matrix] == [count] * count
        assert all((matrix[i][j] > 0) == (i != j) for i in range(count) for j in range(count))
    assert all(rtt[i][j] == rtt[j][i] for i in range(count) for j in range(count))


def test_links_between_places_on_this_machine() -> None:
    check_links(measure_links(sites(3), budget_s=0.05), 3)
    assert not processes("moectl-links")


def test_one_host_has_no_links() -> None:
    assert measure_links(sites(1)) == (((0.0,),), ((0.0,),))


def test_links_over_ssh(ssh_host: Host) -> None:
    with_ssh = [Site(ssh_host, SSHRemote(ssh_host), sys.executable, (LOOPBACK,)) for _ in range(2)]
    try:
        check_links(measure_links(with_ssh, budget_s=0.05), 2)
        assert with_ssh[0].remote.run(["echo", "still there"]).stdout == b"still there\n"
    finally:
        for site in with_ssh:
            site.remote.close()


def test_an_address_of_another_host_is_refused() -> None:
    wrong = [replace(site, addresses=("192.0.2.1",)) for site in sites(2)]
    with pytest.raises(CommandFailed, match=r"^host0: cannot listen on 192\.0\.2\.1: ") as caught:
        measure_links(wrong)
    assert caught.value.hint == "give this host's own address with ip="
    check_links(measure_links([replace(site, addresses=(LOOPBACK,)) for site in wrong], budget_s=0.05), 2)


def test_a_python_that_is_none_is_named() -> None:
    with pytest.raises(MoectlError, match="host0"):
        measure_links(sites(2, python="/bin/false"))


def test_a_way_that_does_not_exist_is_named() -> None:
    two = sites(2)
    with pytest.raises(Unreachable, match=r"^host1: no TCP connection to host0 at 127\.0\.0\.1: Connection refused$"):
        probe._dial(two[1], two[0], free_port(), "secret", 0.1)


def free_port() -> int:
    with socket.socket() as s:
        s.bind((LOOPBACK, 0))
        return int(s.getsockname()[1])


def test_a_peer_that_says_nothing_ends_in_a_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "WAIT_S", 0.2)
    with socket.create_server((LOOPBACK, 0)) as silent, pytest.raises(TimeoutError):
        links.dial(LOOPBACK, silent.getsockname()[1], "secret", 0.1)


def test_who_does_not_know_the_secret_is_not_served() -> None:
    [one] = sites(1)
    with probe._listener(one, "a" * 32) as port:
        with pytest.raises(ConnectionError):
            links.dial(LOOPBACK, port, "b" * 32, 0.1)
        assert links.dial(LOOPBACK, port, "a" * 32, 0.1)["rtt_s"] > 0  # and it goes on for who does


@given(st.binary(max_size=40))
def test_any_request_ends_its_connection_and_no_more(request: bytes) -> None:
    here, there = socket.socketpair()
    with here, there:
        here.settimeout(5)
        there.settimeout(5)
        served = threading.Thread(target=serve_until_it_ends, args=(there,))
        served.start()
        with contextlib.suppress(ConnectionError):
            here.sendall(request)
            here.shutdown(socket.SHUT_WR)
            while here.recv(1 << 16):
                pass
        served.join(5)
        assert not served.is_alive()


def serve_until_it_ends(client: socket.socket) -> None:
    with client, contextlib.suppress(OSError):  # as `listen` does; anything else would fail the test by its warning
        links._serve(client)


def test_both_ends_go_when_their_stdin_does() -> None:
    process = LocalRemote().start([sys.executable, "-c", read_program("links"), "listen"])
    request = {"address": LOOPBACK, "secret": "s", "limit_s": 100.0}
    process.stdin.write(json.dumps(request).encode() + b"\n")
    process.stdin.flush()
    assert any(parse_answer(line) for line in (process.stdout.readline(), process.stdout.readline()))
    process.stdin.close()
    assert process.wait(10) == 0
    process.close()


@pytest.mark.parametrize("line", [b"", b"welcome", ANSWER + b"{", ANSWER + b"[1]", ANSWER])
def test_what_is_no_answer(line: bytes) -> None:
    assert probe._parse(line) is None


@pytest.mark.netns
def test_links_between_four_hosts(netns: Cluster) -> None:
    four = [Site(h, SSHRemote(h), sys.executable, h.ips) for h in netns.hosts()]
    try:
        check_links(measure_links(four, budget_s=0.1), 4)
        assert all(h.os == "Linux" for h in read_all_hardware([site.remote for site in four]))
    finally:
        for site in four:
            site.remote.close()


@pytest.mark.netns
def test_a_host_behind_a_wall_ends_in_an_error(netns: Cluster) -> None:
    first, second = (Site(h, SSHRemote(h), sys.executable, h.ips) for h in netns.hosts()[:2])
    third = netns.nodes[1].address
    netns.run(0, ["iptables", "-I", "INPUT", "-s", third, "-j", "DROP"])  # ssh goes on, the peer is silent
    try:
        with pytest.raises(Unreachable, match="node1: no TCP connection to node0 at "):
            measure_links([first, second], budget_s=0.1)
    finally:
        first.remote.close()
        second.remote.close()


@pytest.mark.netns
def test_a_ring_needs_a_way_to_the_next_one_only(netns: Cluster) -> None:
    four = [Site(h, SSHRemote(h), sys.executable, h.ips) for h in netns.hosts()]

    def close(here: int, there: int) -> None:
        source = netns.nodes[here].address
        rule = ["-s", source, "-p", "tcp", "--syn", "-j", "REJECT", "--reject-with", "tcp-reset"]
        netns.run(there, ["iptables", "-I", "INPUT", *rule])

    told: list[Tried] = []
    try:
        for here, there in permutations(range(4), 2):
            if not is_next(here, there, 4):
                close(here, there)
        rtt, bandwidth = measure_links(four, ring=True, budget_s=0.05)
        check_links((rtt, bandwidth), 4)
        assert rtt[0][2] == max(map(max, rtt))
        try_links(four, told.append, transfers=True, ring=True, budget_s=0.05)
        assert {(way.here, way.there) for way in told if not way.why} == {(0, 1), (1, 2), (2, 3), (3, 0)}
        assert all(way.out_bytes_s for way in told if not way.why)
        with pytest.raises(Unreachable, match="no TCP connection to node"):
            measure_links(four, budget_s=0.05)
        close(2, 3)
        with pytest.raises(Unreachable, match="node2: no TCP connection to node3"):
            measure_links(four, ring=True, budget_s=0.05)
    finally:
        for site in four:
            site.remote.close()


# Speed.


def check_speed(speed: Speed, split: str, ranks: int, structure: Structure) -> None:
    assert (speed.split, len(speed.ranks)) == (split, ranks)
    assert speed.decode.tokens == 1
    assert speed.prefill.tokens == speed.context >= 8
    for one in (speed.decode, speed.prefill):
        assert one.layer_s >= 0  # a difference of two times: 0 where the machine is busy
        assert one.outer_s >= 0
        assert one.total_s(3) == one.outer_s + 3 * one.layer_s
    for rank in speed.ranks:
        assert rank.layer_s >= 0
        assert min(rank.bytes_s, rank.flops_s) > 0
    tokens = {1, speed.prefill.tokens} if ranks > 1 else set()
    assert {size // (4 * structure.width) for size in speed.collective_s} == tokens  # float32 on a CPU
    assert all(seconds > 0 for seconds in speed.collective_s.values())


def test_every_split_is_measured() -> None:
    config = json.loads((demo_dir() / "config.json").read_text())
    structure = structure_of(config)
    splits = ("hidden", "experts", "tensor", "layers")
    placements = tuple(make_placement(structure, split, 2) for split in splits)
    speeds = measure_speed(sites(2), Job(placements, config, None, 1 << 30, 16, 0.1))
    for split, placement, speed in zip(splits, placements, speeds, strict=True):
        check_speed(speed, split, 2, structure)
        assert speed.is_of(placement)
    assert not processes("moectl.engine.measure")


def test_a_measurement_may_tell_nothing_while_it_makes_weights_and_measures_ranks_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Four ranks on a busy machine were ended after 5 s without a token."""
    made: list[dict[str, Any]] = []

    def refuse(ranks: object, options: object, **how: Any) -> None:
        made.append(how)
        raise PlanError("enough is known")

    monkeypatch.setattr(probe, "Session", refuse)
    with pytest.raises(PlanError):
        measure_speed(sites(2), Job((make_placement(TINY, "hidden", 2),), CONFIG, None, 1 << 30, 16, 0.1))
    deadline = StepDeadline(made[0]["step_timeout_s"], 512, made[0].get("patience", 1.0))
    deadline.expect(1, is_first=True)
    for _ in range(9):
        deadline.step(1)  # quick ones
    assert deadline.seconds >= 30


def test_copies_of_experts_are_measured() -> None:
    placement = make_placement(TINY, "experts", 2, replicas=2)
    [speed] = measure_speed(sites(2), Job((placement,), CONFIG, None, 1 << 30, 16, 0.1))
    assert speed.is_of(placement)
    assert not speed.is_of(make_placement(TINY, "experts", 2))


@pytest.mark.parametrize(
    "family", [*(pytest.param(name, marks=pytest.mark.long) for name in ("deepseek_v3", "gpt_oss")), "qwen3_next"]
)
def test_layers_of_different_kinds_are_measured(family: str) -> None:
    config = config_of(family)
    structure = structure_of(config)
    [speed] = measure_speed(sites(2), Job((make_placement(structure, "hidden", 2),), config, None, 1 << 30, 16, 0.1))
    check_speed(speed, "hidden", 2, structure)


@pytest.mark.long
def test_a_quantised_rank_whose_layers_share_weights() -> None:
    config = make_config(n_layers=6, d_model=256, ffn_hidden=1024)
    structure, q = structure_of(config).quantised(Quantization(4, 64)), Quantization(4, 64)
    job = Job((make_placement(structure, "experts", 1),), config, q, 16 << 20, 16, 0.1)
    [speed] = measure_speed(sites(1), job)
    check_speed(speed, "experts", 1, structure)


def test_too_little_memory_is_said() -> None:
    job = Job((make_placement(TINY, "hidden", 1),), CONFIG, None, 1000, 16, 0.1)
    with pytest.raises(PlanError, match=r"host0: rank 0: measuring needs 0\.0 GB, and may take 0\.0 GB here"):
        measure_speed(sites(1), job)


def test_an_interpreter_without_mlx_is_named(tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')
    bare.chmod(0o755)
    job = Job((make_placement(TINY, "hidden", 2),), CONFIG, None, 1 << 28, 16, 0.1)
    with pytest.raises(RemoteError, match=r"host[01]: rank [01]: ") as caught:
        measure_speed(sites(2, python=str(bare)), job)
    assert "No module named" in f"{caught.value} {caught.value.hint}"


# JSON between both sides.


@given(
    st.sampled_from([("hidden", (3, 3)), ("experts", (8, 8)), ("experts", (1, 15))]),
    st.none() | st.builds(Quantization, st.integers(2, 8), st.just(64), st.sampled_from(["affine", "mxfp4"])),
    st.integers(0, 1 << 40),
)
def test_jobs_arrive_as_they_were(where: tuple[str, tuple[int, ...]], q: Quantization | None, memory: int) -> None:
    placement = make_placement(TINY, where[0], len(where[1]), shares=where[1])
    job = Job((placement,), CONFIG, q, memory)
    assert read_job(job.to_json()) == job


def test_speeds_arrive_as_they_were() -> None:
    rank = RankSpeed(0.5, 1e9, 1e12)
    one = Speed("hidden", (1,), Pass(1, 0.5, 0.25), Pass(8, 1.0, 0.0), {256: 0.5}, (rank,), 8)
    assert read_speeds(json.dumps([one.to_json()])) == (one,)
    with pytest.raises(CommandFailed):  # nobody's speed
        read_speeds(json.dumps([{**one.to_json(), "ranks": []}]))


@given(st.text() | json_values.map(json.dumps))
def test_other_answers_are_refused(text: str) -> None:
    if text.strip() in ("[]", "{}", '""'):
        return
    with pytest.raises(CommandFailed, match="not the result of a measurement"):
        read_speeds(text)
