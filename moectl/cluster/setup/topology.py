"""What shape the cables between some Macs make: a mesh, a ring, or neither, and which cables are missing then.

Pure: cables in, places and pairs of places out. It knows nothing of addresses, of RDMA or of how to reach a host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, permutations

from moectl.hosts.thunderbolt import Cable, Port, find_cables

_MOST_TRIED = 8  # hosts for which every order is tried when a ring is short of cables

Pair = tuple[int, int]  # places in the list, the smaller one first


@dataclass(frozen=True)
class Topology:
    """This many hosts, and the usable cables between them in the order in which they are numbered."""

    count: int
    cables: tuple[Cable, ...]
    unusable: tuple[Cable, ...] = ()  # an end has no network interface

    @cached_property
    def pairs(self) -> frozenset[Pair]:
        """Hosts that are cabled to each other."""
        return frozenset((cable.a, cable.b) for cable in self.cables)

    def between(self, one: int, other: int) -> tuple[Cable, ...]:
        pair = _pair(one, other)
        return tuple(cable for cable in self.cables if (cable.a, cable.b) == pair)

    @property
    def is_mesh(self) -> bool:
        return self.count > 1 and not self.missing_of_mesh

    @property
    def missing_of_mesh(self) -> tuple[Pair, ...]:
        """Pairs that a mesh needs and that are not cabled."""
        return tuple(pair for pair in combinations(range(self.count), 2) if pair not in self.pairs)

    @cached_property
    def ring(self) -> tuple[int, ...] | None:
        """All hosts in the order of a ring; of several the first one, which begins with host 0."""
        if self.count == 2:
            return (0, 1) if self.pairs else None
        neighbours = [
            [other for other in range(self.count) if _pair(place, other) in self.pairs] for place in range(self.count)
        ]
        if self.count < 2 or any(len(some) < 2 for some in neighbours):
            return None
        return _close(neighbours, [0])

    @property
    def missing_of_ring(self) -> tuple[Pair, ...]:
        """The fewest cables that would make a ring, in pairs; none where there is one."""
        if self.ring is not None or self.count < 2:
            return ()
        orders = permutations(range(1, self.count)) if self.count <= _MOST_TRIED else [range(1, self.count)]
        lacks = (self._lacks((0, *order)) for order in orders)
        return min(lacks, key=lambda pairs: (len(pairs), pairs))

    def width(self, pairs: Sequence[Pair]) -> int:
        """Return how many cables there are between every one of these pairs."""
        return min(len(self.between(*pair)) for pair in pairs)

    def _lacks(self, order: Sequence[int]) -> tuple[Pair, ...]:
        return tuple(sorted({pair for pair in ring_pairs(order) if pair not in self.pairs}))


def find_topology(hosts: Sequence[Sequence[Port]]) -> Topology:
    """Return the shape of the cables between hosts, given the ports of each.

    Cables are numbered host by host and there by the interface's name as text, as `mlx.distributed_config` does, so
    that both give a cable the same addresses.
    """
    cables = sorted(find_cables(hosts), key=lambda cable: (cable.a, cable.a_port.interface or "", cable.b))
    usable = tuple(cable for cable in cables if cable.a_port.interface and cable.b_port.interface)
    return Topology(len(hosts), usable, tuple(cable for cable in cables if cable not in usable))


def ring_pairs(order: Sequence[int]) -> tuple[Pair, ...]:
    """Return the pairs of neighbours in a ring of hosts in this order."""
    return tuple(_pair(place, order[(index + 1) % len(order)]) for index, place in enumerate(order))


def _pair(one: int, other: int) -> Pair:
    return (one, other) if one < other else (other, one)


def _close(neighbours: Sequence[Sequence[int]], path: list[int]) -> tuple[int, ...] | None:
    """Return the first way to go on from a path through all hosts and back to its beginning."""
    if len(path) == len(neighbours):
        return tuple(path) if path[0] in neighbours[path[-1]] else None
    for place in neighbours[path[-1]]:
        if place not in path:
            found = _close(neighbours, [*path, place])
            if found is not None:
                return found
    return None
