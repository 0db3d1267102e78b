"""Hosts beside each other: systems, interpreters, and cables that go where rdma= says, or do not."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from moectl.cluster.doctor.compare import (
    check_backend,
    check_cables,
    check_cluster,
    check_packages,
    check_pythons,
    check_systems,
    check_variables,
)
from moectl.cluster.doctor.finding import Finding, Level
from moectl.cluster.doctor.host import Visit
from moectl.hosts.hardware import Hardware
from moectl.hosts.hostfile import Host, HostList
from moectl.hosts.remote import LocalRemote
from moectl.hosts.survey import Survey
from tests.cluster.test_host import environment
from tests.support import cabling

INTERFACES = {1: "en2", 2: "en3", 3: "en4", 4: "en5"}


def mac(
    number: int,
    *,
    build: str = "25C56",
    python: str = "3.12.4",
    cables: Sequence[tuple[cabling.End, cabling.End]] | None = None,
) -> Visit:
    sections = {"sw_vers": f"BuildVersion:\t{build}\n"}
    if cables is not None:
        sections["system_profiler"] = cabling.profiler_json(number, cables)
        sections["networksetup"] = cabling.hardware_ports_text(INTERFACES)
        sections["ibv_devices"] = cabling.ibv_devices_text(list(INTERFACES.values()))
    visit = Visit(Host(f"mac{number}"), number, LocalRemote())
    visit.survey = Survey(Hardware(os="macOS", os_version="26.2"), sections)
    visit.environment = environment(version=python, packages={"moectl": "0.1.0", "mlx": "0.32.4"})
    return visit


def test_macs_before_and_after_26_3_do_no_rdma_together() -> None:
    visits = [mac(0), mac(1)]
    visits[1].survey = Survey(Hardware(os="macOS", os_version="26.4"), {})
    found = only(check_systems(visits, wants_rdma=True))
    assert (found.level, found.text.endswith(": 26.2 on mac0, 26.4 on mac1")) == (Level.FAIL, True)
    assert found.fix == "sudo softwareupdate -ia -R on those with 26.2, or use --backend ring"
    assert only(check_systems(visits)).level is Level.WARN  # over TCP they can work together
    assert check_cluster(hosts(2, rows_of(2)), visits)[0].level is Level.FAIL


def hosts(count: int, rdma: list[list[str | None]] | None = None) -> HostList:
    rows = rdma or [[] for _ in range(count)]
    return HostList(tuple(Host(f"mac{i}", rdma=tuple(row)) for i, row in enumerate(rows)))


def rows_of(count: int) -> list[list[str | None]]:
    """Return the rdma= rows of `cabling.mesh`: towards a later Mac by its number, towards an earlier one by its own."""
    port = {(a, b): b for a in range(count) for b in range(a + 1, count)}
    port |= {(b, a): a + 1 for a in range(count) for b in range(a + 1, count)}
    return [[None if a == b else f"rdma_{INTERFACES[port[a, b]]}" for b in range(count)] for a in range(count)]


def only(finding: Finding | None) -> Finding:
    assert finding is not None
    return finding


def test_equal_macs() -> None:
    visits = [mac(i) for i in range(3)]
    assert only(check_systems(visits)).text == "all Macs run macOS 26.2 (25C56)"
    assert only(check_pythons(visits)).text == "python 3.12 everywhere"
    assert check_packages(visits) is None


def test_another_build_and_another_python() -> None:
    visits = [mac(0), mac(1), mac(2, build="25A1", python="3.13.1")]
    systems, pythons = only(check_systems(visits)), only(check_pythons(visits))
    assert systems.level is pythons.level is Level.WARN
    assert systems.text == "macOS differs: 26.2 (25C56) on mac0, mac1; 26.2 (25A1) on mac2"
    assert pythons.text == "interpreters differ: python 3.12 on mac0, mac1; python 3.13 on mac2"


def test_other_packages() -> None:
    other = mac(1)
    other.environment = environment(version="3.12.0", packages={"moectl": "0.1.0", "mlx": "0.31.0"})
    found = only(check_packages([mac(0), other]))
    assert (found.level, "mlx 0.31.0, moectl 0.1.0 on mac1" in found.text) == (Level.FAIL, True)


def test_hosts_that_told_nothing_are_left_out() -> None:
    silent = Visit(Host("mac1"), 1, LocalRemote())
    visits = [mac(0), silent]
    assert check_systems(visits) is check_pythons(visits) is check_packages(visits) is None
    assert check_cluster(HostList((Host("localhost"),)), [silent]) == []


@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_mesh_whose_rows_are_right(count: int) -> None:
    where = hosts(count, rows_of(count))
    visits = [mac(i, cables=cabling.mesh(count)) for i in range(count)]
    assert only(check_backend(where)).text == "RDMA mesh"
    cables = count * (count - 1) // 2
    assert [f.text for f in check_cables(where, visits)] == [
        f"Thunderbolt mesh, {cables} Thunderbolt cable{'s' * (cables != 1)}"
    ]


def test_rows_that_name_the_wrong_port() -> None:
    rows = rows_of(3)
    rows[0][1], rows[0][2] = rows[0][2], rows[0][1]
    found = check_cables(hosts(3, rows), [mac(i, cables=cabling.mesh(3)) for i in range(3)])
    assert [f.level for f in found] == [Level.OK, Level.FAIL, Level.FAIL]
    assert found[1].text == "mac0: rdma_en3 should lead to mac1, it leads to mac2"


def test_a_cable_that_was_pulled() -> None:
    where, cables = hosts(4, rows_of(4)), [c for c in cabling.mesh(4) if {end[0] for end in c} != {1, 2}]
    found = check_cables(where, [mac(i, cables=cables) for i in range(4)])
    assert found[0].level is Level.WARN
    assert "neither mesh nor ring: no cable between mac1 and mac2" in found[0].text
    assert {f.text.split(": ")[1] for f in found[1:]} == {
        "rdma_en3 should lead to mac2, it leads to no host of the list",
        "rdma_en3 should lead to mac1, it leads to no host of the list",
    }


def test_a_ring_in_rank_order() -> None:
    visits = [mac(i, cables=cabling.ring(4)) for i in range(4)]
    [found] = check_cables(hosts(4), visits)
    assert (found.level, found.text) == (Level.OK, "Thunderbolt ring, 4 Thunderbolt cables")
    crossed = HostList(tuple(Host(f"mac{i}") for i in (0, 2, 1, 3)))
    [found] = check_cables(crossed, [visits[i] for i in (0, 2, 1, 3)])
    assert found.level is Level.WARN
    assert "no cable between mac0 and mac2" in found.text


def test_backends() -> None:
    assert only(check_backend(hosts(3))).text == "ring over TCP"
    partly = only(check_backend(hosts(2, [[None, "rdma_en2"], []])))
    assert (partly.level, partly.text) == (Level.WARN, "rdma= is not complete for mac1: the ring over TCP is used")
    neighbours: list[list[str | None]] = [
        [None, "a", None, "b"],
        ["a", None, "b", None],
        [None, "a", None, "b"],
        ["a", None, "b", None],
    ]
    assert only(check_backend(hosts(4, neighbours))).text == "RDMA ring"
    neighbours[2][3] = None
    broken = only(check_backend(hosts(4, neighbours)))
    assert (broken.level, broken.text) == (Level.FAIL, "no RDMA device is listed for mac2 to mac3")


def test_no_cables_no_findings() -> None:
    assert check_cables(hosts(2), [mac(0, cables=[]), mac(1, cables=[])]) == []
    assert json.dumps([f.values for f in check_cluster(hosts(2), [mac(0), mac(1)])])


def test_what_a_hint_about_interpreters_says_is_done() -> None:
    found = only(check_pythons([mac(0), mac(1, python="3.13.1")]))
    assert found.fix == ("install one python everywhere, or name it with python= in the hosts file; then moectl deploy")
    assert only(check_pythons([mac(0), mac(1)])).level is Level.OK


def test_variables_of_a_hostfile_that_no_worker_gets() -> None:
    where = HostList(hosts(2).hosts, envs=("MLX_METAL_FAST_SYNCH=1", "MLX_MAX_OPS_PER_BUFFER=20", "JACCL_RING=1"))
    found = only(check_variables(where))
    assert found.level is Level.WARN
    assert "JACCL_RING, MLX_METAL_FAST_SYNCH: moectl sets" in found.text
    assert found.fix == "remove it from envs; MLX_METAL_FAST_SYNCH may hang a rank"
    assert check_variables(HostList(where.hosts, envs=where.envs[1:2])) is None
    assert found in check_cluster(where, [mac(0), mac(1)])
