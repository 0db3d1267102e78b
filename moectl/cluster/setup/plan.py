"""What `setup` proposes: how to join the hosts, which commands make it so on each, and the hosts file that follows.

Pure: machines in, a plan out; nothing is run. The addresses, the commands and the hosts file are those that
`mlx.distributed_config` gives for the same cables, so that both tools may be used on one cluster; a test compares them.
Differences, all on purpose: addresses that a host's other networks use already are left out, RDMA is proposed only on
links that are Thunderbolt 5, and what is in effect already is not done again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from moectl.cluster.setup.commands import (
    AS_IT_COMES,
    BRIDGE,
    Link,
    Step,
    Wish,
    network_steps,
    number_cables,
    setting_steps,
)
from moectl.cluster.setup.machine import Machine
from moectl.cluster.setup.shape import Advice, choose_shape, pairs_text, unusable_ports
from moectl.cluster.setup.topology import Topology, find_topology, ring_pairs
from moectl.errors import PlanError
from moectl.hosts.hostfile import Host, HostList


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


def plan_setup(machines: Sequence[Machine], given: HostList, wish: Wish = AS_IT_COMES) -> SetupPlan:
    """Return what to do on each machine, and the hosts file that follows.

    Raises PlanError where the cables make neither a mesh nor a ring, or not what was asked for.
    """
    topology = find_topology([machine.ports for machine in machines])
    if wish.over == "ethernet" or len(machines) < 2 or not all(machine.is_mac for machine in machines):
        return _plan_ethernet(topology, machines, given, wish)
    backend, order, reasons = choose_shape(topology, machines, wish.backend)
    links = number_cables(topology, machines)
    steps = tuple(
        (*network_steps(machines, links, place), *setting_steps(machine, wish, order.index(place)))
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


def _plan_ethernet(topology: Topology, machines: Sequence[Machine], given: HostList, wish: Wish) -> SetupPlan:
    """Return a plan that changes no network: the addresses that hosts have already."""
    others = [machine.host.name for machine in machines if not machine.is_mac]
    if wish.backend.startswith("jaccl"):
        why = f"{', '.join(others)}: no Mac" if others else "only Thunderbolt carries RDMA"
        raise PlanError(f"--backend {wish.backend} cannot work: {why}", hint="moectl setup --backend ring")
    hosts = tuple(replace(machine.host, ips=_outside(machine, (), 0), rdma=()) for machine in machines)
    steps = tuple(tuple(setting_steps(machine, wish, rank)) for rank, machine in enumerate(machines))
    text = "not a Mac: there is nothing to set up, its addresses are used as they are"
    advice = (*(Advice(name, text) for name in others), *_host_advice(machines, steps, wish))
    return SetupPlan(topology, "ethernet", replace(given, hosts=hosts, backend=""), tuple(machines), steps, advice)


# The hosts file.


def _mesh_hosts(topology: Topology, machines: Sequence[Machine], links: Sequence[Link]) -> tuple[Host, ...]:
    """Return the hosts with RDMA devices towards every other one, and addresses outside the cables to meet at."""
    width = topology.width(sorted(topology.pairs))
    return tuple(
        replace(
            machine.host,
            ips=_outside(machine, links, place),
            rdma=tuple(_devices(links, place, other, width) for other in range(len(machines))),
        )
        for place, machine in enumerate(machines)
    )


def _ring_hosts(
    topology: Topology, machines: Sequence[Machine], links: Sequence[Link], order: Sequence[int], backend: str
) -> tuple[Host, ...]:
    """Return the hosts in the ring's order.

    Over TCP each one listens where the host before it in the ring is cabled to; with RDMA it names the devices towards
    both neighbours.
    """
    width, found = topology.width(ring_pairs(order)), []
    for rank, place in enumerate(order):
        host, before = machines[place].host, order[rank - 1]
        if backend == "ring":
            ips = tuple(link.end(place)[1] for link in _between(links, place, before)[:width])
            found.append(replace(host, ips=ips, rdma=()))
            continue
        near = {before, order[(rank + 1) % len(order)]}
        rdma = tuple(_devices(links, place, other, width) if other in near else None for other in order)
        found.append(replace(host, ips=_outside(machines[place], links, place), rdma=rdma))
    return tuple(found)


def _between(links: Sequence[Link], one: int, other: int) -> list[Link]:
    return [link for link in links if one != other and link.joins(one, other)]


def _devices(links: Sequence[Link], place: int, other: int, width: int) -> str | None:
    ports = [link.end(place)[0] for link in _between(links, place, other)[:width]]
    return "+".join(f"rdma_{port.interface}" for port in ports) or None


def _outside(machine: Machine, links: Sequence[Link], place: int) -> tuple[str, ...]:
    """Return the host's addresses that are not a cable's: those of the hosts file, else the one that is found."""
    mine = [link.end(place) for link in links if link.joins(place)]
    names = frozenset({BRIDGE, *(port.interface or "" for port, _, _ in mine)})
    inside = {ip for _, ip, _ in mine}
    inside |= {str(ip.ip) for interface in machine.interfaces if interface.name in names for ip in interface.ipv4}
    kept = tuple(ip for ip in machine.host.ips if ip not in inside)
    found = machine.find_address(names)
    return kept or ((found,) if found else ())


# What a person should know.


def _cable_advice(topology: Topology, machines: Sequence[Machine], backend: str) -> Iterator[Advice]:
    yield from unusable_ports(topology, machines)
    missing = topology.missing_of_mesh
    if missing and len(machines) > 2:
        lacks = pairs_text(missing, machines)
        yield Advice(None, f"a ring, and no mesh: no cable between {lacks}; RDMA is faster over a mesh")
    if topology.ring not in (None, tuple(range(len(machines)))) and backend != "jaccl":
        order = ", ".join(machines[place].host.name for place in topology.ring or ())
        yield Advice(None, f"ranks follow the ring: {order}")


def _host_advice(machines: Sequence[Machine], steps: Sequence[Sequence[Step]], wish: Wish) -> Iterator[Advice]:
    for machine in machines:
        if machine.sleep_minutes and not wish.no_sleep:
            text = f"sleeps after {machine.sleep_minutes} min without a user: --no-sleep sets it to never; "
            yield Advice(machine.host.name, f"{text}for one run: caffeinate -is")
    if any(step.address for some in steps for step in some):
        yield Advice(
            None,
            "addresses are gone when a Mac restarts: run moectl setup --again then; moectl service does it by itself",
        )


def _find_blockers(machines: Sequence[Machine], steps: Sequence[Sequence[Step]]) -> Iterator[Advice]:
    """Yield the hosts whose SSH connection comes in by an interface that a step would change."""
    for machine, some in zip(machines, steps, strict=True):
        changed = {step.interface for step in some if step.interface and not step.already}
        by = next(
            (i.name for i in machine.interfaces if machine.reached_at in {str(address.ip) for address in i.ipv4}), None
        )
        if by in changed:
            text = f"SSH reaches it by {by} ({machine.reached_at}), which would be changed under it"
            yield Advice(machine.host.name, f"{text}: use its Ethernet or Wi-Fi address")
