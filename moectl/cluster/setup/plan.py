"""What `setup` proposes: how to join the hosts, which commands make it so on each, and what undoes each command.

Pure: machines in, a plan out; nothing is run. The addresses, the commands and the hosts file are those that
`mlx.distributed_config` gives for the same cables, so that both tools may be used on one cluster; a test compares them.
Differences, all on purpose: addresses that a host's other networks use already are left out, RDMA is proposed only on
links that are Thunderbolt 5, and what is in effect already is not done again.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from moectl.cluster.setup.machine import Machine
from moectl.cluster.setup.topology import Pair, Topology, find_topology, ring_pairs
from moectl.errors import PlanError
from moectl.hosts.hostfile import Host, HostList
from moectl.hosts.thunderbolt import THUNDERBOLT_5_BIT_S, Cable, Interface, Port
from moectl.planner.chips import default_working_set_bytes
from moectl.planner.memory import COMFORTABLE, SYSTEM_BYTES

BRIDGE = "bridge0"
RDMA_MACOS = (26, 2)
NETWORKS = ("192.168.0.0/16", "172.16.0.0/12", "10.0.0.0/8")  # the first one is MLX's
_MASK = "255.255.255.252"
_GIB = 1 << 30
_RECOVERY = (
    "RDMA is off. Only a person at the Mac can switch it on: shut it down, hold the power button until the start-up "
    "options appear, Options, Utilities, Terminal: rdma_ctl enable. Restart, then run moectl setup again"
)


@dataclass(frozen=True, slots=True)
class Wish:
    """What the person asked for."""

    over: str = "thunderbolt"  # or "ethernet": the addresses that hosts have already
    backend: str = "auto"  # or "ring", "jaccl", "jaccl-ring"
    no_sleep: bool = False
    wired_limit_bytes: int | None = None  # for the GPU of every Mac
    needs_bytes: tuple[int, ...] = ()  # instead: what each rank has to hold, so that a Mac gets a limit if it needs one


@dataclass(frozen=True, slots=True)
class Step:
    """One command that root runs on one host."""

    argv: tuple[str, ...]
    undo: tuple[str, ...]
    why: str
    interface: str | None = None  # that it changes
    address: str | None = None  # that the interface has afterwards
    needed: bool = True  # False: what it does is good to have, and its failure stops nothing
    already: bool = False  # it is in effect


@dataclass(frozen=True, slots=True)
class Advice:
    """What a person should know or do; of one host, or of all of them (None)."""

    host: str | None
    text: str


@dataclass(frozen=True, slots=True)
class SetupPlan:
    """The proposal for a list of hosts."""

    topology: Topology
    shape: str  # "mesh", "ring" or "ethernet"
    hosts: HostList  # in rank order, with ip= and rdma=; a ring has its own order
    machines: tuple[Machine, ...]  # in the order of the list that was given
    steps: tuple[tuple[Step, ...], ...]  # of each machine
    advice: tuple[Advice, ...] = ()
    blockers: tuple[Advice, ...] = ()  # reasons not to run it from here

    @property
    def to_do(self) -> tuple[tuple[Step, ...], ...]:
        """Return the steps of each machine that are not in effect yet."""
        return tuple(tuple(step for step in some if not step.already) for some in self.steps)


@dataclass(frozen=True, slots=True)
class _Link:
    """A cable with the address of each end."""

    cable: Cable
    a_ip: str
    b_ip: str

    def end(self, place: int) -> tuple[Port, str, str]:
        """Return (port, its address, the peer's address) at one of the two hosts."""
        if place == self.cable.a:
            return self.cable.a_port, self.a_ip, self.b_ip
        return self.cable.b_port, self.b_ip, self.a_ip


def plan_setup(machines: Sequence[Machine], given: HostList, wish: Wish = Wish()) -> SetupPlan:
    """Return what to do on each machine, and the hosts file that follows.

    Raises PlanError where the cables make neither a mesh nor a ring, or not what was asked for.
    """
    topology = find_topology([machine.ports for machine in machines])
    if wish.over == "ethernet" or len(machines) < 2 or not all(machine.is_mac for machine in machines):
        return _plan_ethernet(topology, machines, given, wish)
    backend, order, reasons = _choose(topology, machines, wish.backend)
    links = _number(topology, machines)
    steps = tuple(
        (
            *_bridge_steps(machine, links, place),
            *_address_steps(machines, links, place),
            *_extra_steps(machine, wish, order.index(place)),
        )
        for place, machine in enumerate(machines)
    )
    is_mesh = backend == "jaccl"
    hosts = (
        _mesh_hosts(topology, machines, links) if is_mesh else _ring_hosts(topology, machines, links, order, backend)
    )
    return SetupPlan(
        topology,
        "mesh" if is_mesh else "ring",
        replace(given, hosts=hosts, backend=backend),
        tuple(machines),
        steps,
        (*_cable_advice(topology, machines, backend), *reasons, *_host_advice(machines, steps, wish)),
        tuple(_find_blockers(machines, steps)),
    )


# Which way to join them.


def _choose(
    topology: Topology, machines: Sequence[Machine], wanted: str
) -> tuple[str, tuple[int, ...], tuple[Advice, ...]]:
    """Return (backend, the hosts in rank order, why it is not a faster one)."""
    ring = topology.ring
    if (wanted == "jaccl" and not topology.is_mesh) or ring is None:
        raise _no_shape(topology, machines, wanted)
    whys: tuple[Advice, ...] = ()
    for backend, order, pairs in _rdma_ways(topology, ring):
        if wanted not in ("auto", backend):
            continue
        cannot, better_not = _why_no_rdma(topology, machines, pairs)
        if wanted == backend and cannot:
            raise PlanError(cannot[0].text.split(". ")[0], host=cannot[0].host, hint=_hint(cannot[0].text))
        if wanted == backend or not (cannot or better_not):
            return backend, order, whys + better_not
        whys = whys or cannot + better_not
    return "ring", ring, whys


def _rdma_ways(topology: Topology, ring: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...], tuple[Pair, ...]]]:
    """Return (backend, the hosts in rank order, the pairs that it joins), the fastest first."""
    if topology.is_mesh:
        yield "jaccl", tuple(range(topology.count)), tuple(sorted(topology.pairs))
    yield "jaccl-ring", ring, tuple(sorted(set(ring_pairs(ring))))


def _hint(text: str) -> str:
    return text.partition(". ")[2] or "moectl setup --backend ring needs no RDMA"


def _why_no_rdma(
    topology: Topology, machines: Sequence[Machine], pairs: Sequence[Pair]
) -> tuple[tuple[Advice, ...], tuple[Advice, ...]]:
    """Return (why RDMA cannot be used now, why it had better not be) over these pairs."""
    width = topology.width(pairs)
    cables = [cable for pair in pairs for cable in topology.between(*pair)[:width]]
    lacking = {place for cable in cables for place, port in _ends(cable) if port.rdma is None}
    cannot, better_not = [], []
    for place, machine in enumerate(machines):
        name = machine.host.name
        text = _why_not_there(machine)
        if place in lacking:
            cannot.append(Advice(name, text or _RECOVERY))
        elif text:
            better_not.append(Advice(name, text))
    for cable in cables:
        if all((machines[place].generation or 0) >= 5 for place, _ in _ends(cable)):
            better_not.extend(_slow(cable, machines))
    return tuple(cannot), tuple(better_not)


def _why_not_there(machine: Machine) -> str | None:
    if (machine.generation or 0) < 5:
        return "its Thunderbolt is of generation 4 or older: RDMA needs 5 (M4 Pro, M4 Max, M3 Ultra or later)"
    if machine.version is not None and machine.version < RDMA_MACOS:
        have, least = (".".join(map(str, version)) for version in (machine.version, RDMA_MACOS))
        return f"macOS {have}: RDMA over Thunderbolt needs {least} or newer: sudo softwareupdate -ia -R"
    return None


def _slow(cable: Cable, machines: Sequence[Machine]) -> Iterator[Advice]:
    speed = cable.link_bit_s
    if speed is None or speed < THUNDERBOLT_5_BIT_S:
        said = "does not tell its speed" if speed is None else f"runs at {speed / 1e9:.0f} Gb/s"
        text = f"the cable {_cable_name(cable, machines)} {said}: RDMA needs a Thunderbolt 5 cable (80 Gb/s)"
        yield Advice(None, text)


def _no_shape(topology: Topology, machines: Sequence[Machine], wanted: str) -> PlanError:
    names = [machine.host.name for machine in machines]
    missing = topology.missing_of_mesh if wanted == "jaccl" else topology.missing_of_ring
    shape = {"auto": "neither a mesh nor a ring", "jaccl": "no mesh"}.get(wanted, "no ring")
    lacks = ", ".join(f"{names[a]} and {names[b]}" for a, b in missing)
    error = PlanError(f"the Thunderbolt cables make {shape}: no cable between {lacks}", hint="")
    if topology.unusable:
        found = next(_unusable(topology, machines))
        error.hint = f"{found.host}: {found.text}"
    else:
        first = [f"{names[place]} (free: {_free_ports(machines[place])})" for place in missing[0]]
        error.hint = f"plug a cable from {' to '.join(first)}, or use --over ethernet"
    return error


def _free_ports(machine: Machine) -> str:
    free = [port.receptacle or "?" for port in machine.ports if not port.is_connected]
    return f"port{'s' * (len(free) != 1)} {', '.join(free)}" if free else "no port"


# Addresses and commands.


def _number(topology: Topology, machines: Sequence[Machine]) -> tuple[_Link, ...]:
    """Give every cable a network of its own with two addresses, out of those that no host uses elsewhere."""
    used = {(place, port.interface) for cable in topology.cables for place, port in _ends(cable)}
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
        links.append(_Link(cable, str(network[1]), str(network[2])))
    return tuple(links)


def _bridge_steps(machine: Machine, links: Sequence[_Link], place: int) -> Iterator[Step]:
    bridge = machine.interface(BRIDGE)
    used = {link.end(place)[0].interface for link in links if place in (link.cable.a, link.cable.b)}
    if bridge is not None and (used & set(bridge.members) or not bridge.is_up):
        yield Step(
            ("ifconfig", BRIDGE, "down"),
            ("ifconfig", BRIDGE, "up"),
            "each cable is a network of its own: a bridge over a ring of them loops, and RDMA fails on its members",
            interface=BRIDGE,
            already=not bridge.is_up,
        )


def _address_steps(machines: Sequence[Machine], links: Sequence[_Link], place: int) -> Iterator[Step]:
    mine = (link for link in links if place in (link.cable.a, link.cable.b))
    for link in sorted(mine, key=lambda link: _peer(link, place)):
        port, ip, peer_ip = link.end(place)
        assert port.interface is not None  # the topology leaves others out
        interface = machines[place].interface(port.interface) or Interface(port.interface)
        peer = machines[_peer(link, place)].host.name
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


def _extra_steps(machine: Machine, wish: Wish, rank: int) -> Iterator[Step]:
    """Return the steps that a person has to ask for."""
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
    most = memory - min(SYSTEM_BYTES, memory // 4)
    if need_bytes > most:
        need, can = need_bytes / _GIB, most / _GIB
        raise PlanError(
            f"its rank needs {need:.1f} GiB, and no limit above {can:.1f} GiB is safe",
            host=machine.host.name,
            hint="moectl plan shows what would fit; or give a size with --wired-limit",
        )
    wanted = min(most, int(need_bytes / COMFORTABLE) + (1 << 20))
    return None if wanted <= (machine.wired_limit_bytes or default_working_set_bytes(memory)) else wanted


def _limit_step(machine: Machine, limit_bytes: int) -> Step:
    """Return what gives the GPU so much memory until the next restart. Raises PlanError for too much."""
    memory, before = machine.memory_bytes or 0, machine.wired_limit_bytes or 0
    most = memory - min(SYSTEM_BYTES, memory // 4)
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


def _peer(link: _Link, place: int) -> int:
    return link.cable.b if place == link.cable.a else link.cable.a


def _ends(cable: Cable) -> tuple[tuple[int, Port], tuple[int, Port]]:
    return (cable.a, cable.a_port), (cable.b, cable.b_port)


# The hosts file.


def _mesh_hosts(topology: Topology, machines: Sequence[Machine], links: Sequence[_Link]) -> tuple[Host, ...]:
    """Return the hosts with RDMA devices towards every other one, and addresses outside the cables to meet at."""
    everyone = range(len(machines))
    width = topology.width(sorted(topology.pairs))
    rdma = {(i, j): _devices(links, i, j, width) for i in everyone for j in everyone}
    return tuple(
        replace(machine.host, ips=_outside(machine, links, place), rdma=tuple(rdma[place, other] for other in everyone))
        for place, machine in enumerate(machines)
    )


def _ring_hosts(
    topology: Topology, machines: Sequence[Machine], links: Sequence[_Link], order: Sequence[int], backend: str
) -> tuple[Host, ...]:
    """Return the hosts in the ring's order.

    Over TCP each one listens where the host before it in the ring is cabled to; with RDMA it names the devices towards
    both neighbours.
    """
    width, found = topology.width(ring_pairs(order)), []
    for rank, place in enumerate(order):
        host, before = machines[place].host, order[rank - 1]
        if backend == "ring":
            ips = tuple(link.end(place)[1] for link in _links_between(links, place, before)[:width])
            found.append(replace(host, ips=ips, rdma=()))
            continue
        near = {before, order[(rank + 1) % len(order)]}
        rdma = tuple(_devices(links, place, other, width) if other in near else None for other in order)
        found.append(replace(host, ips=_outside(machines[place], links, place), rdma=rdma))
    return tuple(found)


def _links_between(links: Sequence[_Link], one: int, other: int) -> list[_Link]:
    return [link for link in links if {one, other} == {link.cable.a, link.cable.b}]


def _devices(links: Sequence[_Link], place: int, other: int, width: int) -> str | None:
    ports = [link.end(place)[0] for link in _links_between(links, place, other)[:width]]
    return "+".join(f"rdma_{port.interface}" for port in ports) or None


def _outside(machine: Machine, links: Sequence[_Link], place: int) -> tuple[str, ...]:
    """Return the host's addresses that are not a cable's: those of the hosts file, else the one that is found."""
    mine = [link.end(place) for link in links if place in (link.cable.a, link.cable.b)]
    names = frozenset({BRIDGE, *(port.interface or "" for port, _, _ in mine)})
    inside = {ip for _, ip, _ in mine}
    inside |= {str(ip.ip) for interface in machine.interfaces if interface.name in names for ip in interface.ipv4}
    kept = tuple(ip for ip in machine.host.ips if ip not in inside)
    found = machine.find_address(names)
    return kept or ((found,) if found else ())


def _plan_ethernet(topology: Topology, machines: Sequence[Machine], given: HostList, wish: Wish) -> SetupPlan:
    """Return a plan that changes no network: the addresses that hosts have already."""
    if wish.backend.startswith("jaccl"):
        names = [machine.host.name for machine in machines if not machine.is_mac]
        why = f"{', '.join(names)}: no Mac" if names else "only Thunderbolt carries RDMA"
        raise PlanError(f"--backend {wish.backend} cannot work: {why}", hint="moectl setup --backend ring")
    hosts = tuple(replace(machine.host, ips=_outside(machine, (), 0), rdma=()) for machine in machines)
    steps = tuple(tuple(_extra_steps(machine, wish, rank)) for rank, machine in enumerate(machines))
    others = tuple(
        Advice(machine.host.name, "not a Mac: there is nothing to set up, its addresses are used as they are")
        for machine in machines
        if not machine.is_mac
    )
    advice = (*others, *_host_advice(machines, steps, wish))
    return SetupPlan(topology, "ethernet", replace(given, hosts=hosts, backend=""), tuple(machines), steps, advice)


# What a person should know.


def _cable_advice(topology: Topology, machines: Sequence[Machine], backend: str) -> Iterator[Advice]:
    names = [machine.host.name for machine in machines]
    yield from _unusable(topology, machines)
    missing = topology.missing_of_mesh
    if missing and len(names) > 2:
        lacks = ", ".join(f"{names[a]} and {names[b]}" for a, b in missing)
        yield Advice(None, f"a ring, and no mesh: no cable between {lacks}; RDMA is faster over a mesh")
    if topology.ring not in (None, tuple(range(len(names)))) and backend != "jaccl":
        order = ", ".join(names[place] for place in topology.ring or ())
        yield Advice(None, f"ranks follow the ring: {order}")


def _unusable(topology: Topology, machines: Sequence[Machine]) -> Iterator[Advice]:
    for cable in topology.unusable:
        for place, port in _ends(cable):
            if port.interface is None:
                text = f"port {port.receptacle} has no network interface: sudo networksetup -detectnewhardware"
                yield Advice(machines[place].host.name, f"{text}; networksetup -listallhardwareports has to list it")


def _host_advice(machines: Sequence[Machine], steps: Sequence[Sequence[Step]], wish: Wish) -> Iterator[Advice]:
    for machine in machines:
        if machine.sleep_minutes and not wish.no_sleep:
            text = f"sleeps after {machine.sleep_minutes} min without a user: --no-sleep sets it to never; "
            yield Advice(machine.host.name, f"{text}for one run: caffeinate -is")
    if any(step.address for some in steps for step in some):
        yield Advice(None, "addresses are gone when a Mac restarts: run moectl setup --apply again then")


def _find_blockers(machines: Sequence[Machine], steps: Sequence[Sequence[Step]]) -> Iterator[Advice]:
    """Tell of hosts whose SSH connection comes in by an interface that a step would change under it."""
    for machine, some in zip(machines, steps, strict=True):
        changed = {step.interface for step in some if step.interface and not step.already}
        by = next(
            (i.name for i in machine.interfaces if machine.reached_at in {str(address.ip) for address in i.ipv4}), None
        )
        if by in changed:
            text = f"SSH reaches it by {by} ({machine.reached_at}), which would be changed under it"
            yield Advice(machine.host.name, f"{text}: use its Ethernet or Wi-Fi address")


def _cable_name(cable: Cable, machines: Sequence[Machine]) -> str:
    ends = (f"{machines[place].host.name} port {port.receptacle}" for place, port in _ends(cable))
    return " to ".join(ends)
