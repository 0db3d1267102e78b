"""What a Mac's own settings mean for a cluster: sleep, firewall, GPU limit, Thunderbolt, RDMA, bridge, addresses.

Pure: texts of macOS's tools in, findings out. It changes no setting; `fix` says what a person would type.

Sources: pmset(1), socketfilterfw's own help, Apple's TN3205 (RDMA over Thunderbolt, bridge0, addresses, sleep).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from moectl.cluster.doctor.finding import Finding, at_host, fail, ok, warn
from moectl.hosts.connect import ROOT
from moectl.hosts.hardware import Hardware, parse_wired
from moectl.hosts.hostfile import Host, split_devices
from moectl.hosts.macos import (
    RDMA_MACOS,
    Version,
    is_older_wheel,
    refuse_mac,
    version_text,
    wheel_version,
)
from moectl.hosts.survey import Survey
from moectl.hosts.thunderbolt import (
    Interface,
    Port,
    find_generation,
    parse_ibv_devinfo,
    parse_ifconfig,
    read_items,
)
from moectl.planner.chips import default_working_set_bytes
from moectl.planner.memory import Memory
from moectl.planner.this_machine import HELD_HINT, find_held

_SETUP = "moectl setup shows the commands that mend it"
_FIREWALL = "/usr/libexec/ApplicationFirewall/socketfilterfw"
_GIB = 1 << 30


def check_mac(host: Host, survey: Survey, *, among_others: bool) -> list[Finding]:
    """Return all findings of one Mac's settings; `among_others`: others have to reach it."""
    sections, ports = survey.sections, survey.ports
    interfaces = parse_ifconfig(sections.get("ifconfig", ""))
    wanted = [device for entry in host.rdma for device in split_devices(entry)]
    found = [
        check_version(host, survey, wants_rdma=bool(wanted)),
        check_sleep(host, sections.get("pmset", "")),
        check_power(host, sections.get("pmset", "")),
        check_display(sections.get("system_profiler", "")),
        check_wired_limit(host, survey.hardware),
        check_held_memory(survey),
    ]
    if among_others:
        found += check_thunderbolt(ports, wants_rdma=bool(wanted))
        found.append(check_rdma(host, sections.get("rdma_ctl", ""), ports))
        found += check_devices(host, ports, parse_ibv_devinfo(sections.get("ibv_devinfo", "")))
        found.append(check_bridge(host, interfaces, ports, wants_rdma=bool(wanted)))
        found += check_port_addresses(host, interfaces, ports)
    return [finding for finding in found if finding is not None]


def check_version(host: Host, survey: Survey, *, wants_rdma: bool) -> Finding:
    """Say which macOS it is, and whether that can do what the hosts file asks."""
    version = survey.hardware.os_version or "?"
    text = f"macOS {version}" + (f" ({survey.build})" if survey.build else "")
    known, least = survey.macos_version or RDMA_MACOS, version_text(RDMA_MACOS)
    update = at_host(host, "sudo softwareupdate -ia -R")
    if refused := refuse_mac(survey.hardware.os_version, survey.sections.get("machine", "").strip() or "arm64"):
        return fail("system", f"{text}: {refused}", "use a Mac with Apple silicon and macOS 14 or newer")
    if wants_rdma and known < RDMA_MACOS:
        return fail("system", f"{text}: RDMA over Thunderbolt needs {least} or newer", f"{update}, or leave rdma= out")
    if RDMA_MACOS[0] == known[0] and known < RDMA_MACOS:
        return warn("system", f"{text}: mlx's wheel for macOS {known[0]} is built for {least}", update)
    return ok("system", text, version=version, build=survey.build)


def check_sleep(host: Host, pmset: str) -> Finding | None:
    """Say whether the Mac sleeps by itself; None where pmset told nothing."""
    if re.search(r"^\s*SleepDisabled\s+1\b", pmset, re.MULTILINE):
        return ok("sleep", "never sleeps")
    match = re.search(r"^\s*sleep\s+(\d{1,6})(.*)$", pmset, re.MULTILINE)
    if match is None:
        return None
    minutes = int(match[1])
    if minutes == 0:
        return ok("sleep", "never sleeps", sleep_minutes=0)
    held = re.search(r"\(sleep prevented by ([^)]*)\)", match[2])
    now = f", kept awake by {held[1]} for now" if held else ""
    fix = f"{at_host(host, 'sudo pmset -a sleep 0')}; for one run: {at_host(host, 'caffeinate -is')}"
    text = f"sleeps after {minutes} min without a user{now}; Thunderbolt cannot wake it"
    return warn("sleep", text, fix, sleep_minutes=minutes)


def check_power(host: Host, pmset: str) -> Finding | None:
    """Say whether the Mac saves power, which slows its processors; None where it does not."""
    match = re.search(r"^\s*(lowpowermode|powermode)\s+1\b", pmset, re.MULTILINE)
    if match is None:
        return None
    fix = at_host(host, f"sudo pmset -a {match[1]} 0")
    return warn("power", "Low Power Mode is on: it computes slower, and all others wait for it", fix)


def check_display(system_profiler: str) -> Finding | None:
    """Say that a display is on: it takes a part of the GPU, and macOS ends GPU work that keeps it waiting."""
    cards = read_items(system_profiler, "SPDisplaysDataType")
    screens = [screen for card in cards for screen in card.get("spdisplays_ndrvs") or [] if isinstance(screen, dict)]
    lit = [s for s in screens if s.get("spdisplays_online") == "spdisplays_yes" and "spdisplays_asleep" not in s]
    return ok("display", "display on, which shares the GPU", displays=len(lit)) if lit else None


def check_mlx(tag: str, version: Version | None, fix: str, *, wants_rdma: bool) -> Finding | None:
    """Say whether mlx was installed from the wheel for an older macOS; None where that is not so, or not known."""
    if not is_older_wheel(tag, version):
        return None
    built = wheel_version(tag) or RDMA_MACOS
    text = f"its mlx is the wheel for macOS {built[0]}: without RDMA, and slower on an M5"
    return (fail if wants_rdma else warn)("mlx", text, fix, wheel=tag)


def check_wired_limit(host: Host, hardware: Hardware) -> Finding | None:
    """Compare the GPU's limit with macOS's own choice and with the memory; None where it was left alone."""
    limit, memory = hardware.wired_limit_bytes, hardware.memory_bytes
    if limit is None or memory is None:
        return None
    default = default_working_set_bytes(memory, hardware.macos_major)
    sizes = f"{limit / _GIB:.1f} GiB (default {default / _GIB:.1f})"
    if limit > Memory(memory).budget:
        fix = at_host(host, "sudo sysctl iogpu.wired_limit_mb=0")
        text = f"wired memory limit {sizes} leaves macOS too little of {memory / _GIB:.0f} GiB: it may panic"
        return warn("wired_limit", text, fix, bytes=limit)
    if limit < default:
        fix = at_host(host, "sudo sysctl iogpu.wired_limit_mb=0")
        return warn("wired_limit", f"wired memory limit lowered to {sizes}", fix, bytes=limit)
    return ok("wired_limit", f"wired memory limit {sizes}", bytes=limit)


def check_held_memory(survey: Survey) -> Finding | None:
    """Say whether much memory is wired although no worker runs: macOS may keep what a killed process had wired."""
    memory, wired = survey.hardware.memory_bytes, parse_wired(survey.sections.get("vm_stat", ""))
    if memory is None or wired is None or survey.has_workers:
        return None
    if not find_held(wired, memory):
        return None
    text = f"{wired / _GIB:.1f} GiB of wired memory are still held although no worker runs"
    return warn("wired_memory", text, HELD_HINT, bytes=wired)


def check_firewall(host: Host, text: str, executable: str | None) -> Finding | None:
    """Say whether the application firewall may drop other hosts' connections; None where it told nothing.

    `executable` is the program that the worker's python really runs, which the firewall goes by; None: not known.
    """
    state = re.search(r"\(State = (\d)\)", text)
    if state is None:
        return None
    blocks_all = re.search(r"block all.*\benabled\b|is blocking all", text, re.IGNORECASE)
    if state[1] == "2" or blocks_all:
        fix = at_host(host, f"sudo {_FIREWALL} --setblockall off")
        return fail("firewall", "the firewall blocks all incoming connections", fix)
    if state[1] == "1":
        python = shlex.quote(executable) if executable else f"{host.dir or ROOT}/env/bin/python"
        add = f"sudo {_FIREWALL} --add {python} --unblockapp {python}"
        return warn("firewall", "the firewall is on: it may drop connections to moectl's python", at_host(host, add))
    return ok("firewall", "firewall off")


def check_thunderbolt(ports: Sequence[Port], *, wants_rdma: bool) -> list[Finding]:
    """Say what is cabled and how fast it is; nothing where there is no port."""
    generation = find_generation(ports)
    if generation is None:
        return []
    cabled = [port for port in ports if port.peer_domain]
    links = ", ".join(f"port {port.receptacle} {_speed(port.link_bit_s)}" for port in cabled) or "no Mac cabled"
    name = f"Thunderbolt {generation}" if generation == 5 else "Thunderbolt 4 or older"
    if wants_rdma and generation < 5:
        text = f"{name}: RDMA needs Thunderbolt 5 (M4 Pro, M4 Max, M3 Ultra or later)"
        return [fail("thunderbolt", text, "leave rdma= out of the hosts file: TCP over Thunderbolt works")]
    found = [ok("thunderbolt", f"{name}, {links}", generation=generation, links=len(cabled))]
    slow = [port for port in cabled if generation == 5 and port.link_bit_s and not port.is_thunderbolt_5]
    for port in slow:
        text = f"port {port.receptacle} is linked at {_speed(port.link_bit_s)} only"
        fix = "use a Thunderbolt 5 cable (80 Gb/s), and a Thunderbolt 5 Mac at its other end"
        found.append(warn("thunderbolt", text, fix, port=port.receptacle, bit_s=port.link_bit_s))
    return found


def check_rdma(host: Host, rdma_ctl: str, ports: Sequence[Port]) -> Finding | None:
    """Say whether RDMA is switched on, where that matters; older macOS has no rdma_ctl."""
    wanted = any(host.rdma)
    state = rdma_ctl.strip().lower().removeprefix("rdma is ")
    fix = "in macOS Recovery (hold the power button at start), Utilities, Terminal: rdma_ctl enable; then restart"
    if state == "enabled":
        return ok("rdma", "RDMA on")
    if wanted:
        return fail("rdma", f"RDMA is off ({state or 'no rdma_ctl'}), and the hosts file has rdma=", fix)
    cabled = any(port.peer_domain and port.is_thunderbolt_5 for port in ports)
    if state == "disabled" and cabled:
        return warn("rdma", "RDMA is off, although a Mac is cabled by Thunderbolt 5: TCP is many times slower", fix)
    return None


def check_devices(host: Host, ports: Sequence[Port], states: dict[str, str]) -> list[Finding]:
    """Say which devices of rdma= are not there or have no link; the numbers change when cables do."""
    known = {port.rdma for port in ports if port.rdma} | set(states)
    found = []
    for device in sorted({device for entry in host.rdma for device in split_devices(entry)}):
        state = states.get(device)
        if device not in known:
            listed = ", ".join(sorted(name for name in known if name)) or "none"
            text = f"rdma={device} is not there (ibv_devices lists {listed})"
            found.append(fail("rdma_device", text, "moectl setup writes the devices that are there"))
        elif state is not None and state != "PORT_ACTIVE":
            fix = "check its cable, and that RDMA is on at both ends; else restart both Macs"
            found.append(fail("rdma_device", f"{device} has no link ({state})", fix))
        else:
            found.append(ok("rdma_device", f"{device} active" if state else f"{device} listed"))
    return found


def check_bridge(
    host: Host, interfaces: Sequence[Interface], ports: Sequence[Port], *, wants_rdma: bool
) -> Finding | None:
    """Say whether the Thunderbolt bridge is in the way: RDMA cannot use its members, and a ring of them loops."""
    bridge = next((interface for interface in interfaces if interface.name == "bridge0"), None)
    if bridge is None or not bridge.is_up or not bridge.members:
        return None if bridge is None else ok("bridge", "bridge0 off")
    cabled = [port for port in ports if port.peer_domain and port.interface in bridge.members]
    fix = f"{at_host(host, 'sudo ifconfig bridge0 down')} (until it restarts), or System Settings, Network, "
    fix += "Thunderbolt Bridge: Make Inactive"
    members = ", ".join(bridge.members)
    if wants_rdma:
        return fail("bridge", f"bridge0 holds {members}: RDMA fails with errno 22 or 96 on them", fix)
    if len(cabled) > 1:
        return warn("bridge", f"bridge0 joins {len(cabled)} cables: packets go round where cables form a loop", fix)
    return ok("bridge", f"bridge0 on ({members})")


def check_port_addresses(host: Host, interfaces: Sequence[Interface], ports: Sequence[Port]) -> list[Finding]:
    """Say which cabled ports lack an IPv4 address; those that ifconfig gave are gone after a restart."""
    by_name = {interface.name: interface for interface in interfaces}
    bridge = by_name.get("bridge0")
    bridged = set(bridge.members) if bridge is not None and bridge.is_up else set()
    wanted = {device for entry in host.rdma for device in split_devices(entry)}
    found = []
    for port in ports:
        own = by_name.get(port.interface or "")
        if own is None or port.peer_domain is None:
            continue
        name = f"{own.name} (port {port.receptacle})"
        if own.ipv4:
            found.append(ok("port_address", f"{name} {own.ipv4[0].ip}", address=str(own.ipv4[0])))
        elif f"rdma_{own.name}" in wanted:
            text = f"{name} has no IPv4 address: RDMA fails with errno 22 without one"
            found.append(fail("port_address", text, _address_fix(host, own.name)))
        elif own.name not in bridged:
            found.append(warn("port_address", f"{name} has no IPv4 address", _address_fix(host, own.name)))
    return found


def _address_fix(host: Host, interface: str) -> str:
    command = f"sudo ifconfig {interface} inet 192.168.0.1 netmask 255.255.255.252"
    return f"{_SETUP}; by hand: {at_host(host, command)}"


def _speed(bit_s: int | None) -> str:
    return f"{bit_s / 1e9:.0f} Gb/s" if bit_s else "of unknown speed"
