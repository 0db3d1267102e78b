"""The commands that root runs on each host, what undoes each of them, and the addresses that they give to the cables.

Pure: nothing is run.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from moectl.cluster.setup.machine import Machine
from moectl.cluster.setup.topology import Topology
from moectl.errors import PlanError
from moectl.hosts.thunderbolt import Cable, Interface, Port
from moectl.planner.chips import default_working_set_bytes
from moectl.planner.memory import COMFORTABLE, Memory

BRIDGE = "bridge0"
NETWORKS = ("192.168.0.0/16", "172.16.0.0/12", "10.0.0.0/8")  # MLX uses the first one
_MASK = "255.255.255.252"
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Wish:
    """What the person asked for."""

    over: str = "thunderbolt"  # or "ethernet": the addresses that hosts have already
    backend: str = "auto"  # or "ring", "jaccl", "jaccl-ring"
    no_sleep: bool = False
    wired_limit_bytes: int | None = None  # for the GPU of every Mac
    needs_bytes: tuple[int, ...] = ()  # instead: what each rank has to hold, so that a Mac gets a limit if it needs one


AS_IT_COMES = Wish()


@dataclass(frozen=True, slots=True)
class Step:
    """One command that root runs on one host."""

    argv: tuple[str, ...]
    undo: tuple[str, ...]
    why: str
    interface: str | None = None  # that it changes
    address: str | None = None  # that the interface has afterwards
    needed: bool = True  # False: when it fails, the others go on
    already: bool = False  # it is in effect


@dataclass(frozen=True, slots=True)
class Link:
    """A cable with the address of each end."""

    cable: Cable
    a_ip: str
    b_ip: str

    def joins(self, *places: int) -> bool:
        """Whether all of these hosts, by their places, are at its ends."""
        return {*places} <= {self.cable.a, self.cable.b}

    def peer(self, place: int) -> int:
        """Return the host at the other end."""
        return self.cable.b if place == self.cable.a else self.cable.a

    def end(self, place: int) -> tuple[Port, str, str]:
        """Return (port, its address, the peer's address) at one of the two hosts."""
        if place == self.cable.a:
            return self.cable.a_port, self.a_ip, self.b_ip
        return self.cable.b_port, self.b_ip, self.a_ip


def number_cables(topology: Topology, machines: Sequence[Machine]) -> tuple[Link, ...]:
    """Give every cable a network of its own with two addresses, out of those that no host uses elsewhere."""
    used = {(place, port.interface) for cable in topology.cables for place, port in cable.ends}
    taken = [
        address.network
        for place, machine in enumerate(machines)
        for interface in machine.interfaces
        for address in interface.ipv4
        if (place, interface.name) not in used
    ]
    free = chain.from_iterable(ipaddress.IPv4Network(network).subnets(new_prefix=30) for network in NETWORKS)
    links = []
    for cable in topology.cables:
        network = next((one for one in free if not any(one.overlaps(other) for other in taken)), None)
        if network is None:
            raise PlanError("no private network is left for the cables", hint="look at ifconfig of each host")
        links.append(Link(cable, str(network[1]), str(network[2])))
    return tuple(links)


def network_steps(machines: Sequence[Machine], links: Sequence[Link], place: int) -> Iterator[Step]:
    """Yield what gives one host's cables their addresses; the bridge that would join the cables goes down first."""
    mine = sorted((link for link in links if link.joins(place)), key=lambda link: link.peer(place))
    bridge = machines[place].interface(BRIDGE)
    used = {link.end(place)[0].interface for link in mine}
    if bridge is not None and (used & set(bridge.members) or not bridge.is_up):
        yield Step(
            ("ifconfig", BRIDGE, "down"),
            ("ifconfig", BRIDGE, "up"),
            "each cable is a network of its own: a bridge over a ring of them loops, and RDMA fails on its members",
            interface=BRIDGE,
            already=not bridge.is_up,
        )
    for link in mine:
        port, ip, peer_ip = link.end(place)
        assert port.interface is not None  # the topology leaves others out
        interface = machines[place].interface(port.interface) or Interface(port.interface)
        peer = machines[link.peer(place)].host.name
        there = ipaddress.IPv4Interface(f"{ip}/30") in interface.ipv4
        yield Step(
            ("ifconfig", interface.name, "inet", ip, "netmask", _MASK),
            _restore(interface, ip),
            f"an address for port {port.receptacle}, the cable to {peer}",
            interface=interface.name,
            address=ip,
            already=there,
        )
        yield Step(
            ("route", "change", peer_ip, "-interface", interface.name),
            ("route", "delete", peer_ip),
            f"{peer} is at the other end of {interface.name}",
            interface=interface.name,
            needed=False,  # the address brings a route of its own
            already=there,
        )


def _restore(interface: Interface, ip: str) -> tuple[str, ...]:
    before = next((address for address in interface.ipv4 if str(address.ip) != ip), None)
    if before is None:
        return ("ifconfig", interface.name, "inet", ip, "delete")
    return ("ifconfig", interface.name, "inet", str(before.ip), "netmask", str(before.netmask))


def setting_steps(machine: Machine, wish: Wish, rank: int) -> Iterator[Step]:
    """Yield what changes a Mac's settings, as far as the person asked for it. Raises PlanError."""
    if not machine.is_mac:
        return
    if wish.no_sleep and machine.sleep_minutes is not None:
        yield Step(
            ("pmset", "-c", "sleep", "0"),
            ("pmset", "-c", "sleep", str(machine.sleep_minutes)),
            "a Mac that sleeps drops out, and Thunderbolt cannot wake it; this stays after a restart",
            already=machine.sleep_minutes == 0,
        )
    limit = wish.wired_limit_bytes if not wish.needs_bytes else _needed_limit(machine, wish.needs_bytes[rank])
    if limit is not None:
        yield _limit_step(machine, limit)


def _needed_limit(machine: Machine, need_bytes: int) -> int | None:
    """Return the limit under which a rank fits well; None where the one in force will do. Raises PlanError."""
    memory = machine.memory_bytes or 0
    most = Memory(memory).budget
    if need_bytes > most:
        need, can = need_bytes / _GIB, most / _GIB
        raise PlanError(
            f"its rank needs {need:.1f} GiB, and no limit above {can:.1f} GiB is safe",
            host=machine.host.name,
            hint="moectl plan shows what would fit; or give a size with --wired-limit",
        )
    wanted = min(most, int(need_bytes / COMFORTABLE) + (1 << 20))
    usual = default_working_set_bytes(memory, machine.version[0] if machine.version else None)
    return None if wanted <= (machine.wired_limit_bytes or usual) else wanted


def _limit_step(machine: Machine, limit_bytes: int) -> Step:
    """Return what gives the GPU so much memory until the next restart. Raises PlanError for too much."""
    memory, before = machine.memory_bytes or 0, machine.wired_limit_bytes or 0
    most = Memory(memory).budget
    if limit_bytes > most:
        raise PlanError(
            f"a wired limit of {limit_bytes / _GIB:.1f} GiB leaves macOS too little of {memory / _GIB:.0f} GiB",
            host=machine.host.name,
            hint=f"at most {most // _GIB}GiB: overflow is a kernel panic",
        )
    wanted = limit_bytes >> 20
    return Step(
        ("sysctl", f"iogpu.wired_limit_mb={wanted}"),
        ("sysctl", f"iogpu.wired_limit_mb={before >> 20}"),
        f"the GPU may hold {limit_bytes / _GIB:.1f} GiB until the next restart",
        already=before >> 20 == wanted,
    )
