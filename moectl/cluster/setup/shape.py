"""Which way joins the hosts: RDMA over a mesh, RDMA over a ring, or TCP over a ring; and why it is not a faster one.

Pure: cables and machines in, a backend and the order of the ranks out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moectl.cluster.setup.machine import Machine
from moectl.cluster.setup.topology import Pair, Topology, ring_pairs
from moectl.errors import PlanError
from moectl.hosts.macos import RDMA_MACOS, refuse_rdma, version_text
from moectl.hosts.thunderbolt import THUNDERBOLT_5_BIT_S, Cable

_RECOVERY = (
    "RDMA is off. Only a person at the Mac can switch it on: shut it down, hold the power button until the start-up "
    "options appear, Options, Utilities, Terminal: rdma_ctl enable. Restart, then run moectl setup again"
)


@dataclass(frozen=True, slots=True)
class Advice:
    """What a person should know or do; of one host, or of all of them (None)."""

    host: str | None
    text: str


def choose_shape(
    topology: Topology, machines: Sequence[Machine], wanted: str
) -> tuple[str, tuple[int, ...], tuple[Advice, ...]]:
    """Return (backend, the hosts in rank order, why it is not a faster one).

    Raises PlanError where the cables make neither a mesh nor a ring, or not what was asked for.
    """
    ring = topology.ring
    if (wanted == "jaccl" and not topology.is_mesh) or ring is None:
        raise _no_shape(topology, machines, wanted)
    whys: tuple[Advice, ...] = ()
    for backend, order, pairs in _rdma_ways(topology, ring):
        if wanted not in ("auto", backend):
            continue
        cannot, better_not = _why_no_rdma(topology, machines, pairs)
        if wanted == backend and cannot:
            text, _, hint = cannot[0].text.partition(". ")
            raise PlanError(text, host=cannot[0].host, hint=hint or "moectl setup --backend ring needs no RDMA")
        if wanted == backend or not (cannot or better_not):
            return backend, order, whys + better_not
        whys = whys or cannot + better_not
    return "ring", ring, whys


def _rdma_ways(topology: Topology, ring: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...], tuple[Pair, ...]]]:
    """Yield (backend, the hosts in rank order, the pairs that it joins), the fastest first."""
    if topology.is_mesh:
        yield "jaccl", tuple(range(topology.count)), tuple(sorted(topology.pairs))
    yield "jaccl-ring", ring, tuple(sorted(set(ring_pairs(ring))))


def _why_no_rdma(
    topology: Topology, machines: Sequence[Machine], pairs: Sequence[Pair]
) -> tuple[tuple[Advice, ...], tuple[Advice, ...]]:
    """Return (why RDMA cannot be used now, why it had better not be) over these pairs."""
    width = topology.width(pairs)
    cables = [cable for pair in pairs for cable in topology.between(*pair)[:width]]
    lacking = {place for cable in cables for place, port in cable.ends if port.rdma is None}
    cannot, better_not = [], []
    for place, machine in enumerate(machines):
        name = machine.host.name
        text = _why_not_there(machine)
        if place in lacking:
            cannot.append(Advice(name, text or _RECOVERY))
        elif text:
            better_not.append(Advice(name, text))
    for cable in cables:
        if all((machines[place].generation or 0) >= 5 for place, _ in cable.ends):
            better_not.extend(_slow(cable, machines))
    able = {m.host.name: m.version for m in machines if m.version and m.version >= RDMA_MACOS}
    if refused := refuse_rdma(able):
        cannot.append(Advice(None, f"{refused.message}. {refused.hint}"))
    return tuple(cannot), tuple(better_not)


def _why_not_there(machine: Machine) -> str | None:
    if (machine.generation or 0) < 5:
        return "its Thunderbolt is of generation 4 or older: RDMA needs 5 (M4 Pro, M4 Max, M3 Ultra or later)"
    if machine.version is not None and machine.version < RDMA_MACOS:
        have, least = version_text(machine.version), version_text(RDMA_MACOS)
        return f"macOS {have}: RDMA over Thunderbolt needs {least} or newer: sudo softwareupdate -ia -R"
    return None


def _slow(cable: Cable, machines: Sequence[Machine]) -> Iterator[Advice]:
    speed = cable.link_bit_s
    if speed is None or speed < THUNDERBOLT_5_BIT_S:
        said = "does not tell its speed" if speed is None else f"runs at {speed / 1e9:.0f} Gb/s"
        name = " to ".join(f"{machines[place].host.name} port {port.receptacle}" for place, port in cable.ends)
        yield Advice(None, f"the cable {name} {said}: RDMA needs a Thunderbolt 5 cable (80 Gb/s)")


def _no_shape(topology: Topology, machines: Sequence[Machine], wanted: str) -> PlanError:
    missing = topology.missing_of_mesh if wanted == "jaccl" else topology.missing_of_ring
    shape = {"auto": "neither a mesh nor a ring", "jaccl": "no mesh"}.get(wanted, "no ring")
    if topology.unusable:
        found = next(unusable_ports(topology, machines))
        hint = f"{found.host}: {found.text}"
    else:
        first = [f"{machines[place].host.name} (free: {_free_ports(machines[place])})" for place in missing[0]]
        hint = f"plug a cable from {' to '.join(first)}, or use --over ethernet"
    lacks = pairs_text(missing, machines)
    return PlanError(f"the Thunderbolt cables make {shape}: no cable between {lacks}", hint=hint)


def _free_ports(machine: Machine) -> str:
    free = [port.receptacle or "?" for port in machine.ports if not port.is_connected]
    return f"port{'s' * (len(free) != 1)} {', '.join(free)}" if free else "no port"


def pairs_text(pairs: Sequence[Pair], machines: Sequence[Machine]) -> str:
    """Return "mac1 and mac2, mac1 and mac4"."""
    return ", ".join(f"{machines[a].host.name} and {machines[b].host.name}" for a, b in pairs)


def unusable_ports(topology: Topology, machines: Sequence[Machine]) -> Iterator[Advice]:
    """Yield what gives a cabled port its network interface."""
    for cable in topology.unusable:
        for place, port in cable.ends:
            if port.interface is None:
                text = f"port {port.receptacle} has no network interface: sudo networksetup -detectnewhardware"
                yield Advice(machines[place].host.name, f"{text}; networksetup -listallhardwareports has to list it")
