"""Settings of Macs judged from recorded outputs: what is right says so, what is wrong says what mends it."""

from __future__ import annotations

import json
from dataclasses import replace
from ipaddress import IPv4Interface
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from moectl.cluster.doctor.finding import Finding, Level
from moectl.cluster.doctor.macos import (
    check_bridge,
    check_devices,
    check_display,
    check_firewall,
    check_held_memory,
    check_mac,
    check_mlx,
    check_port_addresses,
    check_power,
    check_rdma,
    check_sleep,
    check_thunderbolt,
    check_version,
    check_wired_limit,
)
from moectl.errors import CommandFailed
from moectl.hosts.hardware import Hardware
from moectl.hosts.hostfile import Host
from moectl.hosts.survey import Survey, parse_ip, parse_sshd, read_survey
from moectl.hosts.thunderbolt import Interface, Port, parse_ports
from tests.support import cabling

RECORDINGS = Path(__file__).parent.parent / "recordings" / "doctor"
GIB = 1 << 30
MAC = Host("mac1", user="ada")
RDMA_MAC = replace(MAC, rdma=(None, "rdma_en3"))


def read(name: str) -> Survey:
    return read_survey((RECORDINGS / name).read_text())


def levels(findings: list[Finding]) -> dict[str, str]:
    return {finding.check: finding.level.word for finding in findings}


def only(finding: Finding | None) -> Finding:
    assert finding is not None
    return finding


def test_a_mac_that_is_ready_for_rdma() -> None:
    survey = read("studio-ready.txt")
    found = check_mac(RDMA_MAC, survey, among_others=True)
    assert {f.level for f in found} == {Level.OK}
    assert [f.text for f in found] == [
        "macOS 26.2 (25C56)",
        "never sleeps",
        "Thunderbolt 5, port 2 80 Gb/s",
        "RDMA on",
        "rdma_en3 active",
        "bridge0 off",
        "en3 (port 2) 192.168.0.1",
    ]
    assert survey.addresses == ("127.0.0.1", "192.168.1.181", "192.168.0.1")
    assert survey.workers_bytes == 0


def test_a_mac_as_it_comes() -> None:
    survey = read("mini-fresh.txt")
    found = check_mac(replace(MAC, rdma=("rdma_en3", None)), survey, among_others=True)
    assert levels(found) == {
        "system": "FAIL",
        "sleep": "warn",
        "wired_limit": "warn",
        "thunderbolt": "ok",
        "rdma": "FAIL",
        "rdma_device": "FAIL",
        "bridge": "FAIL",
        "port_address": "FAIL",
    }
    assert all(f.fix for f in found if f.level > Level.OK)
    fixes = {f.check: f.fix or "" for f in found}
    assert fixes["sleep"].startswith("ssh -t ada@mac1 'sudo pmset -a sleep 0'; for one run: ssh ada@mac1 'caffeinate")
    assert "rdma_ctl enable" in fixes["rdma"]
    assert "sudo ifconfig bridge0 down" in fixes["bridge"]
    assert survey.workers_bytes == 512000 << 10


def test_a_mac_as_it_comes_without_rdma_in_the_hosts_file_can_work() -> None:
    found = check_mac(MAC, read("mini-fresh.txt"), among_others=True)
    assert max(f.level for f in found) is Level.WARN
    bridge = next(f for f in found if f.check == "bridge")
    assert bridge.text == "bridge0 joins 2 cables: packets go round where cables form a loop"
    assert "TCP is many times slower" in next(f for f in found if f.check == "rdma").text


def test_a_mac_alone_is_not_asked_for_its_network() -> None:
    assert set(levels(check_mac(MAC, read("mini-fresh.txt"), among_others=False))) == {
        "system",
        "sleep",
        "wired_limit",
    }


@pytest.mark.parametrize(
    ("pmset", "level", "text"),
    [
        (" sleep                0\n", "ok", "never sleeps"),
        ("System-wide power settings:\n SleepDisabled\t\t1\nCurrently in use:\n sleep 1\n", "ok", "never sleeps"),
        (" displaysleep 10\n sleep                10\n", "warn", "sleeps after 10 min without a user; "),
        (" sleep 1 (sleep prevented by caffeinate)\n", "warn", "kept awake by caffeinate for now"),
    ],
)
def test_sleep(pmset: str, level: str, text: str) -> None:
    found = only(check_sleep(MAC, pmset))
    assert found.level.word == level
    assert text in found.text


@pytest.mark.parametrize("setting", ["lowpowermode", "powermode"])
def test_low_power_mode_is_named_and_the_fix_switches_it_off(setting: str) -> None:
    pmset = "Currently in use:\n standby 1\n {}         {}\n"
    found = only(check_power(MAC, pmset.format(setting, 1)))
    assert (found.level, found.text) == (
        Level.WARN,
        "Low Power Mode is on: it computes slower, and all others wait for it",
    )
    assert found.fix == f"ssh -t ada@mac1 'sudo pmset -a {setting} 0'"
    assert [check_power(MAC, pmset.format(setting, value)) for value in (0, 2)] == [None, None]


@pytest.mark.parametrize(
    ("screens", "count"),
    [
        ([{"spdisplays_online": "spdisplays_yes"}], 1),
        ([{"spdisplays_online": "spdisplays_yes", "spdisplays_asleep": "spdisplays_yes"}], 0),
        ([{"spdisplays_online": "spdisplays_no"}, "?"], 0),
        (None, 0),
    ],
)
def test_a_display_that_is_on_is_named(screens: object, count: int) -> None:
    told = json.dumps({"SPDisplaysDataType": [{"spdisplays_ndrvs": screens}]})
    found = check_display(told)
    assert (0 if found is None else found.values["displays"]) == count
    assert check_display("") is None


@pytest.mark.parametrize(
    ("version", "machine", "level", "text"),
    [
        ("13.7", "arm64", "FAIL", "it has macOS 13.7, and mlx needs 14 or newer"),
        ("15.5", "x86_64", "FAIL", "it is a Mac with an Intel processor, and mlx runs on Apple silicon only"),
        ("26.1", "arm64", "warn", "mlx's wheel for macOS 26 is built for 26.2"),
        ("15.5", "arm64", "ok", "macOS 15.5"),
        ("14.0", "", "ok", "macOS 14.0"),
        ("26.2", "arm64", "ok", "macOS 26.2"),
    ],
)
def test_macs_that_mlx_runs_on(version: str, machine: str, level: str, text: str) -> None:
    survey = Survey(Hardware(os="macOS", os_version=version), {"machine": f"{machine}\n"})
    found = check_version(MAC, survey, wants_rdma=False)
    assert (found.level.word, text in found.text) == (level, True)
    assert (found.fix is None) == (level == "ok")


def test_an_mlx_for_an_older_macos_is_named() -> None:
    for wants, level in ((False, "warn"), (True, "FAIL")):
        found = only(check_mlx("macosx_15_0_arm64", (26, 2), "moectl deploy", wants_rdma=wants))
        assert (found.level.word, found.fix) == (level, "moectl deploy")
        assert found.text == "its mlx is the wheel for macOS 15: without RDMA, and slower on an M5"
    assert check_mlx("macosx_26_0_arm64", (26, 2), "", wants_rdma=True) is None
    assert check_mlx("macosx_15_0_arm64", (15, 7), "", wants_rdma=True) is None


def test_nothing_told_says_nothing() -> None:
    assert check_sleep(MAC, "") is None
    assert check_firewall(MAC, "", None) is None
    assert check_wired_limit(MAC, Hardware(memory_bytes=24 * GIB)) is None
    assert check_thunderbolt((), wants_rdma=True) == []
    assert check_bridge(MAC, (), (), wants_rdma=True) is None
    assert check_rdma(MAC, "", ()) is None


@pytest.mark.parametrize(
    ("text", "level"),
    [
        ("Firewall is disabled. (State = 0)", "ok"),
        ("Firewall is enabled. (State = 1)\nFirewall has block all state set to disabled.", "warn"),
        ("Firewall is enabled. (State = 1)\nFirewall has block all state set to enabled.", "FAIL"),
        ("Firewall is enabled. (State = 1)\nFirewall is blocking all non-essential incoming connections.", "FAIL"),
        ("Firewall is enabled. (State = 2)", "FAIL"),
    ],
)
def test_firewall(text: str, level: str) -> None:
    assert only(check_firewall(MAC, text, None)).level.word == level


def test_the_firewall_is_told_of_the_python_that_is_there() -> None:
    fix = only(check_firewall(replace(MAC, dir="/opt/moectl"), "(State = 1)", None)).fix
    assert fix is not None
    assert "--unblockapp /opt/moectl/env/bin/python" in fix
    # What runs is a program inside the framework, not the link in the environment.
    real = "/Library/Frameworks/Python.framework/Versions/3.12/Resources/Python.app/Contents/MacOS/Python"
    assert f"--add {real} --unblockapp {real}" in str(only(check_firewall(MAC, "(State = 1)", real)).fix)


@pytest.mark.parametrize(
    ("limit_gib", "level", "text"),
    [
        (12, "warn", "lowered to 12.0 GiB (default 16.0)"),
        (18, "ok", "18.0 GiB (default 16.0)"),
        (23, "warn", "leaves macOS too little of 24 GiB"),
    ],
)
def test_wired_limit(limit_gib: int, level: str, text: str) -> None:
    found = only(check_wired_limit(MAC, Hardware(memory_bytes=24 * GIB, wired_limit_bytes=limit_gib * GIB)))
    assert found.level.word == level
    assert text in found.text


def test_wired_memory_that_an_earlier_worker_has_left() -> None:
    """The Studio's own vm_stat, with 40 GiB in the place of what macOS itself had wired."""
    survey = read("studio-ready.txt")
    assert check_held_memory(survey) is None
    vm_stat = survey.sections["vm_stat"].replace("160412.", f"{40 * GIB // 16384}.")
    left = Survey(survey.hardware, {**survey.sections, "vm_stat": vm_stat})
    found = only(check_held_memory(left))
    assert (found.level, found.text) == (
        Level.WARN,
        "40.0 GiB of wired memory are still held although no worker runs",
    )
    fix = "end other programs that use its GPU (Ollama, LM Studio); if that changes nothing, restart that Mac"
    assert found.fix == fix
    assert found in check_mac(MAC, left, among_others=False)
    at_work = {**left.sections, "workers": "512000 /opt/python -m moectl worker"}
    assert check_held_memory(Survey(left.hardware, at_work)) is None
    assert check_held_memory(Survey(left.hardware, {"vm_stat": "nothing"})) is None


@pytest.mark.parametrize(("version", "level"), [("26.1", "FAIL"), ("15.5", "FAIL"), ("26.2", "ok"), ("27.0", "ok")])
def test_rdma_needs_a_new_macos(version: str, level: str) -> None:
    survey = Survey(Hardware(os="macOS", os_version=version))
    assert check_version(MAC, survey, wants_rdma=True).level.word == level
    assert check_version(MAC, survey, wants_rdma=False).level is not Level.FAIL


def test_a_slow_cable_between_fast_ports() -> None:
    ports = parse_ports(cabling.profiler_json(0, [((0, 1), (1, 1))], link_gbit=40))
    first, slow = check_thunderbolt(ports, wants_rdma=True)
    assert first.text == "Thunderbolt 5, port 1 40 Gb/s"
    assert (slow.level, slow.text) == (Level.WARN, "port 1 is linked at 40 Gb/s only")


def test_thunderbolt_4_cannot_do_rdma() -> None:
    ports = parse_ports(cabling.profiler_json(0, [((0, 1), (1, 1))], link_gbit=40, idle_gbit=40))
    assert [f.level for f in check_thunderbolt(ports, wants_rdma=True)] == [Level.FAIL]
    assert [f.level for f in check_thunderbolt(ports, wants_rdma=False)] == [Level.OK]


@pytest.mark.parametrize("told", ["enabled\n", "RDMA is enabled\n", " Enabled "])
def test_rdma_that_is_on(told: str) -> None:
    assert only(check_rdma(RDMA_MAC, told, ())).level is Level.OK


def test_a_device_without_a_link() -> None:
    [down] = check_devices(RDMA_MAC, (), {"rdma_en3": "PORT_DOWN"})
    assert (down.level, down.text) == (Level.FAIL, "rdma_en3 has no link (PORT_DOWN)")
    [gone] = check_devices(RDMA_MAC, (Port(rdma="rdma_en7"),), {})
    assert gone.text == "rdma=rdma_en3 is not there (ibv_devices lists rdma_en7)"


def test_a_port_without_an_address_matters_where_it_is_used() -> None:
    cabled = Port("2", "A", "B", link_bit_s=80 * 10**9, interface="en3")
    bare = (Interface("en3", is_up=True),)
    assert [f.level for f in check_port_addresses(RDMA_MAC, bare, [cabled])] == [Level.FAIL]
    assert [f.level for f in check_port_addresses(MAC, bare, [cabled])] == [Level.WARN]
    bridged = (*bare, Interface("bridge0", is_up=True, members=("en3",)))
    assert check_port_addresses(MAC, bridged, [cabled]) == []  # the bridge has the address
    own = (Interface("en3", is_up=True, ipv4=(IPv4Interface("192.168.0.1/30"),)),)
    assert [f.level for f in check_port_addresses(RDMA_MAC, own, [cabled])] == [Level.OK]


def test_a_bridge_of_one_cable_is_macos_own_way() -> None:
    bridge = (Interface("bridge0", is_up=True, members=("en2", "en3")),)
    one = [Port("2", "A", "B", interface="en3")]
    assert only(check_bridge(MAC, bridge, one, wants_rdma=False)).level is Level.OK
    assert only(check_bridge(MAC, bridge, one, wants_rdma=True)).level is Level.FAIL


def test_limits_of_sshd() -> None:
    assert parse_sshd("MaxSessions 2\nMaxSessions 9\n  maxstartups 10:30:100\n\njunk\n") == {
        "maxsessions": "2",
        "maxstartups": "10:30:100",
    }


def test_addresses_of_linux() -> None:
    text = (
        "1: lo    inet 127.0.0.1/8 scope host lo\n2: eth0    inet 10.0.0.7/24 brd 10.0.0.255 scope global\nx inet y\n"
    )
    assert parse_ip(text) == ("127.0.0.1", "10.0.0.7")
    # As iproute2 prints the end of a tunnel.
    tunnel = "3: tun0    inet 10.8.0.6 peer 10.8.0.5/32 scope global tun0\n"
    assert parse_ip(text + tunnel) == ("127.0.0.1", "10.0.0.7", "10.8.0.6")


@given(st.text(), st.integers(0, 6000))
def test_a_survey_that_is_cut_off_or_strange_ends_in_findings_or_one_error(noise: str, length: int) -> None:
    text = noise + "\n" + (RECORDINGS / "mini-fresh.txt").read_text()[:length] + noise
    try:
        survey = read_survey(text)
    except CommandFailed:
        return
    assert isinstance(survey.ports, tuple)
    for finding in check_mac(RDMA_MAC, survey, among_others=True):
        assert finding.text
