"""Thunderbolt ports, interfaces and cables read from recorded outputs, and from text that is none."""

from __future__ import annotations

import json
from ipaddress import IPv4Interface
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from moectl.hosts.thunderbolt import (
    Port,
    find_cables,
    find_generation,
    parse_hardware_ports,
    parse_ibv_devices,
    parse_ibv_devinfo,
    parse_ifconfig,
    parse_ports,
    read_ports,
)
from tests.support import cabling
from tests.support.tiny import json_values

RECORDINGS = Path(__file__).parent.parent / "recordings" / "thunderbolt"
GBIT = 10**9


def read(name: str) -> str:
    return (RECORDINGS / name).read_text()


def studio(letter: str) -> tuple[Port, ...]:
    return parse_ports(read(f"studio-pair-{letter}.json"), read("hardware-ports.txt"), read("ibv_devices.txt"))


def test_a_mac_studio_with_a_cable_and_a_dock() -> None:
    ports = studio("a")
    assert [port.receptacle for port in ports] == ["1", "2", "3", "4"]
    assert [port.interface for port in ports] == ["en2", "en3", "en4", "en5"]
    assert [port.rdma for port in ports] == ["rdma_en2", "rdma_en3", "rdma_en4", "rdma_en5"]
    idle, cabled, _, dock = ports
    assert (idle.link_bit_s, idle.most_bit_s, idle.is_connected, idle.is_thunderbolt_5) == (
        None,
        120 * GBIT,
        False,
        True,
    )
    assert (cabled.link_bit_s, cabled.most_bit_s, cabled.is_thunderbolt_5) == (80 * GBIT, None, True)
    assert cabled.domain == cabling.domain(0, 2)
    assert (cabled.peer_domain, cabled.peer_name, cabled.devices) == (cabling.domain(1, 2), "Mac Studio", ())
    assert (dock.peer_domain, dock.devices) == (None, ("TB5 Dock",))  # the Mac behind it has no cable of its own


def test_a_slow_link_says_so() -> None:
    disk = studio("b")[2]
    assert (disk.link_bit_s, disk.is_thunderbolt_5, disk.devices) == (40 * GBIT, False, ("TB4 Disk",))


def test_both_ends_name_one_cable() -> None:
    (cable,) = find_cables([studio("a"), studio("b")])
    assert (cable.a, cable.b, cable.a_port.interface, cable.b_port.interface) == (0, 1, "en3", "en3")
    assert cable.link_bit_s == 80 * GBIT


def test_rdma_that_is_off_leaves_no_device() -> None:
    ports = parse_ports(read("studio-pair-a.json"), read("hardware-ports.txt"), read("ibv_devices-off.txt"))
    assert [port.rdma for port in ports] == [None] * 4
    assert [port.interface for port in ports] == ["en2", "en3", "en4", "en5"]


def test_ports_without_interfaces_have_no_rdma_either() -> None:
    ports = parse_ports(read("studio-pair-a.json"), "", read("ibv_devices.txt"))
    assert {(port.interface, port.rdma) for port in ports} == {(None, None)}


def test_the_list_of_hardware_ports() -> None:
    assert parse_hardware_ports(read("hardware-ports.txt")) == {
        "Ethernet": "en0",
        "Thunderbolt Bridge": "bridge0",
        "Wi-Fi": "en1",
        "Thunderbolt 1": "en2",
        "Thunderbolt 2": "en3",
        "Thunderbolt 3": "en4",
        "Thunderbolt 4": "en5",
    }
    assert parse_hardware_ports("Hardware Port: Orphan\n\nHardware Port: X\nDevice: en9\n") == {"X": "en9"}


def test_the_list_of_rdma_devices() -> None:
    assert parse_ibv_devices(read("ibv_devices.txt")) == ("rdma_en2", "rdma_en3", "rdma_en4", "rdma_en5")
    assert parse_ibv_devices(read("ibv_devices-off.txt")) == ()


def test_the_states_of_rdma_devices() -> None:
    assert parse_ibv_devinfo(read("ibv_devinfo.txt")) == {
        "rdma_en2": "PORT_DOWN",
        "rdma_en3": "PORT_ACTIVE",
        "rdma_en4": "PORT_DOWN",
        "rdma_en5": "PORT_DOWN",
    }


def test_the_bridge_that_macos_makes() -> None:
    interfaces = {interface.name: interface for interface in parse_ifconfig(read("ifconfig-bridge.txt"))}
    assert list(interfaces) == ["lo0", "en0", "en2", "en3", "en4", "en5", "bridge0"]
    bridge = interfaces["bridge0"]
    assert (bridge.is_up, bridge.is_active, bridge.members) == (True, True, ("en2", "en3", "en4", "en5"))
    assert bridge.ipv4 == (IPv4Interface("169.254.205.255/16"),)
    assert (interfaces["en3"].ipv4, interfaces["en3"].is_active) == ((), True)
    assert interfaces["lo0"].is_active is None
    assert interfaces["en0"].mtu == 1500


def test_an_address_per_port() -> None:
    interfaces = {interface.name: interface for interface in parse_ifconfig(read("ifconfig-ports.txt"))}
    assert (interfaces["bridge0"].is_up, interfaces["bridge0"].members) == (False, ())
    assert interfaces["en3"].ipv4 == (IPv4Interface("192.168.0.1/30"),)
    assert interfaces["en2"].is_active is False


@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_mesh_has_a_cable_between_every_two(count: int) -> None:
    hosts = [parse_ports(cabling.profiler_json(mac, cabling.mesh(count))) for mac in range(count)]
    cables = find_cables(hosts)
    assert [(c.a, c.b) for c in cables] == [(a, b) for a in range(count) for b in range(a + 1, count)]
    assert all((c.a_port.receptacle, c.b_port.receptacle) == (str(c.b), str(c.a + 1)) for c in cables)


def test_a_ring_has_a_cable_to_each_neighbour() -> None:
    hosts = [parse_ports(cabling.profiler_json(mac, cabling.ring(4))) for mac in range(4)]
    assert [(c.a, c.b) for c in find_cables(hosts)] == [(0, 1), (0, 3), (1, 2), (2, 3)]


def test_one_ends_word_is_enough_and_a_loop_is_no_cable() -> None:
    cable = [((0, 1), (1, 1))]
    one_sided = [parse_ports(cabling.profiler_json(0, cable)), parse_ports(cabling.profiler_json(1, []))]
    assert [(c.a, c.b) for c in find_cables(one_sided)] == [(0, 1)]
    assert find_cables([parse_ports(cabling.profiler_json(0, [((0, 1), (0, 2))]))]) == ()


def test_two_cables_between_two_macs_are_two() -> None:
    cables = [((0, 1), (1, 2)), ((0, 2), (1, 1))]
    hosts = [parse_ports(cabling.profiler_json(mac, cables)) for mac in range(2)]
    ends = [(c.a_port.receptacle, c.b_port.receptacle) for c in find_cables(hosts)]
    assert ends == [("1", "2"), ("2", "1")]


def test_a_domain_that_two_macs_claim_joins_nothing() -> None:
    twin = parse_ports(cabling.profiler_json(0, [((0, 1), (1, 1))]))
    assert find_cables([twin, twin, parse_ports(cabling.profiler_json(1, [((0, 1), (1, 1))]))]) == ()


def test_a_mac_of_thunderbolt_4() -> None:
    ports = parse_ports(cabling.profiler_json(0, [], idle_gbit=40))
    assert find_generation(ports) == 4
    assert find_generation(studio("b")) == 5
    assert find_generation(()) is None


def test_a_cut_text_has_no_ports() -> None:
    text = read("studio-pair-a.json")
    assert parse_ports(text[: len(text) // 2]) == ()


@given(json_values)
def test_any_json_gives_ports(document: object) -> None:
    ports = read_ports([document])
    assert find_cables([ports, ports]) == ()
    assert isinstance(parse_ports(json.dumps({"SPThunderboltDataType": [document]})), tuple)


@given(st.text(), st.text())
def test_any_text_gives_an_answer(before: str, after: str) -> None:
    for name, parse in (("ifconfig-bridge.txt", parse_ifconfig), ("hardware-ports.txt", parse_hardware_ports)):
        parse(before + read(name)[: len(after) * 40] + after)
    assert parse_ibv_devices(before + "\n" + read("ibv_devices.txt"))[-4:] == parse_ibv_devices(read("ibv_devices.txt"))
