"""A Mac's Thunderbolt ports, what is connected to each, and its interface and RDMA device; the cables between Macs.

Pure parsers of the output of macOS's own tools. It runs no tool and changes nothing. Text that is cut off or strange
gives None or nothing, never an error.

A port belongs to the interface with the number of its receptacle, as in `mlx.distributed_config`: receptacle 2 is
networksetup's "Thunderbolt 2". Its RDMA device is `rdma_` and the interface's name (Apple's TN3205). A cable joins two
Macs where one lists the other's domain UUID; a Mac behind a dock does not count, because RDMA needs a direct cable.

Sources of the formats: system_profiler(8), networksetup(8), ifconfig(8), Apple's TN3205 (ibv_devices, ibv_devinfo,
bridge0), and the public capture named in tests/recordings/thunderbolt/README.md.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

THUNDERBOLT_5_BIT_S = 80_000_000_000  # Thunderbolt 3, 4 and USB4 links do 40 Gb/s
_GBIT = 1_000_000_000
_SPEED = re.compile(r"(up to )?(\d{1,4}) ?gb/s", re.IGNORECASE)
_INTERFACE = re.compile(r"([A-Za-z][\w.-]{0,30}): flags=[0-9a-fA-F]{1,8}<([^>]*)>(?:.*\bmtu (\d{1,9}))?")


@dataclass(frozen=True, slots=True)
class Port:
    """One receptacle of a Mac."""

    receptacle: str | None = None  # "2", as the case and networksetup count them
    domain: str | None = None  # its own domain UUID, upper case
    peer_domain: str | None = None  # the port of the Mac that is cabled to it directly
    peer_name: str | None = None  # "MacBook Pro"
    devices: tuple[str, ...] = ()  # docks, disks and displays on it
    link_bit_s: int | None = None  # of its link now; None where nothing is connected
    most_bit_s: int | None = None  # its maximum, which only idle ports report
    interface: str | None = None  # "en3", of IP over Thunderbolt
    rdma: str | None = None  # "rdma_en3", where ibv_devices lists it

    @property
    def is_connected(self) -> bool:
        return self.link_bit_s is not None or self.peer_domain is not None or bool(self.devices)

    @property
    def is_thunderbolt_5(self) -> bool:
        """Whether its link, or the maximum of an idle port, is as fast as Thunderbolt 5; a cable can make it slower."""
        return max(self.link_bit_s or 0, self.most_bit_s or 0) >= THUNDERBOLT_5_BIT_S


@dataclass(frozen=True, slots=True)
class Interface:
    """One network interface as ifconfig shows it."""

    name: str
    is_up: bool = False
    is_active: bool | None = None  # "status: active"; None where it has no status
    ipv4: tuple[ipaddress.IPv4Interface, ...] = ()
    members: tuple[str, ...] = ()  # of a bridge
    mtu: int | None = None


@dataclass(frozen=True, slots=True)
class Cable:
    """A direct cable between two Macs, by their places in the list (a < b) and the port at each end."""

    a: int
    b: int
    a_port: Port
    b_port: Port

    @property
    def ends(self) -> tuple[tuple[int, Port], tuple[int, Port]]:
        return (self.a, self.a_port), (self.b, self.b_port)

    @property
    def link_bit_s(self) -> int | None:
        speeds = [port.link_bit_s for port in (self.a_port, self.b_port) if port.link_bit_s]
        return min(speeds, default=None)


def parse_ports(system_profiler: str, hardware_ports: str = "", ibv_devices: str = "") -> tuple[Port, ...]:
    """Return a Mac's ports in the order of their receptacles.

    The texts are those of `system_profiler -json SPThunderboltDataType`, `networksetup -listallhardwareports` and
    `ibv_devices`; without the last two, ports have no interface or no RDMA device.
    """
    buses = read_items(system_profiler, "SPThunderboltDataType")
    return read_ports(buses, parse_hardware_ports(hardware_ports), parse_ibv_devices(ibv_devices))


def read_items(system_profiler: str, kind: str) -> list[dict[str, Any]]:
    """Return the objects of one data type in the JSON of system_profiler."""
    try:
        profile = json.loads(system_profiler)
    except (ValueError, RecursionError):
        return []
    listed = profile.get(kind) if isinstance(profile, dict) else None
    return [item for item in listed if isinstance(item, dict)] if isinstance(listed, list) else []


def read_ports(
    buses: Sequence[Any], interfaces: Mapping[str, str] | None = None, rdma: Sequence[str] = ()
) -> tuple[Port, ...]:
    """Return the ports of system_profiler's list of buses; see `parse_ports`."""
    found = [
        _read_port(bus, key, value, interfaces or {}, rdma)
        for bus in buses
        if isinstance(bus, dict)
        for key, value in sorted(bus.items(), key=lambda item: str(item[0]))
        if re.fullmatch(r"receptacle_\d{1,3}_tag", str(key)) and isinstance(value, dict)
    ]
    return tuple(sorted(found, key=_by_receptacle))


def find_generation(ports: Sequence[Port]) -> int | None:
    """Return 5 when any port is of Thunderbolt 5, 4 for all older ones, None where no port reports a speed."""
    if any(port.is_thunderbolt_5 for port in ports):
        return 5
    return 4 if any(port.link_bit_s or port.most_bit_s for port in ports) else None


def parse_hardware_ports(text: str) -> dict[str, str]:
    """Return the device of each hardware port of `networksetup -listallhardwareports`: {"Thunderbolt 1": "en2"}."""
    found = re.findall(r"^[ \t]*Hardware Port:(.+)\n[ \t]*Device:(.+)$", text, re.MULTILINE)
    return {name.strip(): device.strip() for name, device in found if name.strip() and device.strip()}


def parse_ibv_devices(text: str) -> tuple[str, ...]:
    """Return the RDMA devices that `ibv_devices` lists; none where RDMA is off: then it prints only its heading."""
    words = (line.split() for line in text.split("\n"))
    return tuple(row[0] for row in words if len(row) == 2 and re.fullmatch(r"rdma_\w{1,30}", row[0]))


def parse_ibv_devinfo(text: str) -> dict[str, str]:
    """Return the port state of each device of `ibv_devinfo`: {"rdma_en2": "PORT_ACTIVE"}; of the first port's."""
    devices = re.split(r"^[ \t]*hca_id:[ \t]*", text, flags=re.MULTILINE)[1:]
    states = ((device, re.search(r"^\s*state:[ \t]*(\S+)", device, re.MULTILINE)) for device in devices)
    return {device.split()[0]: state[1] for device, state in states if state}


def parse_ifconfig(text: str) -> tuple[Interface, ...]:
    """Return the interfaces of macOS's `ifconfig`, in its order."""
    blocks: list[tuple[re.Match[str], list[str]]] = []
    for line in text.split("\n"):
        head = _INTERFACE.match(line)
        if head:
            blocks.append((head, []))
        elif blocks and line[:1].isspace():
            blocks[-1][1].append(line.strip())
    return tuple(_read_interface(head, body) for head, body in blocks)


def find_cables(hosts: Sequence[Sequence[Port]]) -> tuple[Cable, ...]:
    """Return the cables between these Macs, in the order of (a, b) and of a's ports.

    It is enough that one end lists the other. A domain of two ports, and a cable from a Mac to itself, do not count.
    """
    ends = [(place, port) for place, ports in enumerate(hosts) for port in ports]
    owners: dict[str, list[tuple[int, Port]]] = {}
    for place, port in ends:
        if port.domain:
            owners.setdefault(port.domain, []).append((place, port))
    found: dict[tuple[int, int, str, str], Cable] = {}
    for place, port in ends:
        there = owners.get(port.peer_domain or "", [])
        if len(there) != 1 or len(owners.get(port.domain or "", [])) != 1 or there[0][0] == place:
            continue
        (a, a_port), (b, b_port) = sorted(((place, port), there[0]), key=lambda end: end[0])
        found[a, b, a_port.domain or "", b_port.domain or ""] = Cable(a, b, a_port, b_port)
    return tuple(sorted(found.values(), key=lambda cable: (cable.a, cable.b, _by_receptacle(cable.a_port))))


def _by_receptacle(port: Port) -> tuple[int, str]:
    text = port.receptacle or ""
    return (int(text) if re.fullmatch(r"[0-9]{1,4}", text) else 1 << 20, text)


def _read_port(
    bus: Mapping[str, Any], key: str, tag: Mapping[str, Any], interfaces: Mapping[str, str], rdma: Sequence[str]
) -> Port:
    listed = bus.get("_items")
    items = [item for item in listed if isinstance(item, dict)] if isinstance(listed, list) else []
    peer = next((item for item in items if _uuid(item.get("domain_uuid_key"))), {})
    link, most = _speeds(tag)
    receptacle = _text(tag.get("receptacle_id_key")) or key.split("_")[1]
    interface = interfaces.get(f"Thunderbolt {receptacle}")
    device = f"rdma_{interface}"
    return Port(
        receptacle=receptacle,
        domain=_uuid(bus.get("domain_uuid_key")),
        peer_domain=_uuid(peer.get("domain_uuid_key")),
        peer_name=_text(peer.get("_name")),
        devices=tuple(name for item in items if item is not peer and (name := _text(item.get("_name")))),
        link_bit_s=link,
        most_bit_s=most,
        interface=interface,
        rdma=device if interface and device in rdma else None,
    )


def _speeds(tag: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Return (bit/s of the link, bit/s that an idle port could do) of a receptacle."""
    speed = _SPEED.search(str(tag.get("current_speed_key")))
    if speed is None:
        return None, None
    bit_s = int(speed[2]) * _GBIT
    # "Up to" is a maximum. Some docks' ports show it while something is connected, so it never counts as a link.
    return (None, bit_s) if speed[1] or tag.get("receptacle_status_key") != "receptacle_connected" else (bit_s, None)


def _uuid(value: object) -> str | None:
    text = _text(value)
    return text.upper() if text else None


def _text(value: object) -> str | None:
    return value.strip() or None if isinstance(value, str) else None


def _read_interface(head: re.Match[str], body: Sequence[str]) -> Interface:
    status = next((line.partition(":")[2].strip() for line in body if line.startswith("status:")), None)
    members = (line.split()[1] for line in body if line.startswith("member:") and len(line.split()) > 1)
    return Interface(
        name=head[1],
        is_up="UP" in head[2].split(","),
        is_active=None if status is None else status == "active",
        ipv4=tuple(address for line in body if (address := _read_inet(line.split()))),
        members=tuple(members),
        mtu=int(head[3]) if head[3] else None,
    )


def _read_inet(words: Sequence[str]) -> ipaddress.IPv4Interface | None:
    """Return the address of a line "inet 192.168.0.1 netmask 0xfffffffc broadcast …"; None for any other line."""
    if len(words) < 2 or words[0] != "inet":
        return None
    mask = next((value for key, value in pairwise(words) if key == "netmask"), "0xffffffff")
    try:
        bits = ipaddress.IPv4Address(int(mask, 16) if mask.startswith("0x") else mask)
        return ipaddress.IPv4Interface(f"{words[1]}/{bits}")
    except ValueError:
        return None
