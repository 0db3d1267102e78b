"""Shapes of cabling: mesh, ring, what is missing of each, and that a ring found is a ring."""

from __future__ import annotations

from itertools import combinations, permutations

import pytest
from hypothesis import given, strategies as st

from moectl.cluster.setup.topology import Topology, find_topology, ring_pairs
from moectl.hosts.thunderbolt import Cable, Port, parse_ports
from tests.support import cabling


def topology(count: int, pairs: list[tuple[int, int]]) -> Topology:
    return Topology(count, tuple(Cable(a, b, Port(), Port()) for a, b in pairs))


def test_a_mesh_is_also_a_ring() -> None:
    for count in (2, 3, 4, 6):
        whole = topology(count, list(combinations(range(count), 2)))
        assert whole.is_mesh
        assert whole.ring == tuple(range(count))
        assert (whole.missing_of_mesh, whole.missing_of_ring) == ((), ())


@pytest.mark.parametrize(
    ("count", "pairs", "ring", "missing_of_ring"),
    [
        (1, [], None, ()),
        (2, [], None, ((0, 1),)),
        (3, [(0, 1), (1, 2)], None, ((0, 2),)),
        (3, [(0, 1)], None, ((0, 2), (1, 2))),
        (4, [(0, 1), (1, 2), (2, 3), (0, 3)], (0, 1, 2, 3), ()),
        (4, [(0, 2), (1, 2), (1, 3), (0, 3)], (0, 2, 1, 3), ()),  # in another order than the list's
        (4, [(0, 1), (1, 2), (0, 2), (2, 3)], None, ((0, 3),)),  # 3 hangs on one cable
        (4, [(0, 1), (2, 3)], None, ((0, 2), (1, 3))),
        (5, [(0, 4), (1, 4), (2, 4), (3, 4)], None, ((0, 1), (0, 2), (1, 3))),  # a star
    ],
)
def test_rings_and_what_they_lack(
    count: int, pairs: list[tuple[int, int]], ring: tuple[int, ...] | None, missing_of_ring: tuple[tuple[int, int], ...]
) -> None:
    found = topology(count, pairs)
    assert (found.ring, found.missing_of_ring) == (ring, missing_of_ring)
    assert not found.is_mesh or count == 2


def test_a_long_list_short_of_cables_is_told_in_its_own_order() -> None:
    found = topology(9, [(place, place + 1) for place in range(7)])
    assert found.missing_of_ring == ((0, 8), (7, 8))


def test_cables_are_numbered_by_the_interfaces_name_as_text() -> None:
    cables = [((0, 1), (1, 1)), ((0, 2), (1, 2))]
    texts = [(cabling.profiler_json(mac, cables), cabling.hardware_ports_text({1: "en9", 2: "en10"})) for mac in (0, 1)]
    found = find_topology([parse_ports(*text) for text in texts])
    assert [cable.a_port.interface for cable in found.cables] == ["en10", "en9"]
    assert found.width([(0, 1)]) == 2


def test_a_port_without_an_interface_cannot_be_used() -> None:
    cables = [((0, 1), (1, 1))]
    texts = [cabling.profiler_json(mac, cables) for mac in (0, 1)]
    found = find_topology([parse_ports(texts[0], cabling.hardware_ports_text({1: "en2"})), parse_ports(texts[1])])
    assert (found.cables, len(found.unusable), found.ring) == ((), 1, None)


@given(st.integers(3, 6), st.data())
def test_a_ring_is_found_where_there_is_one(count: int, data: st.DataObject) -> None:
    every = list(combinations(range(count), 2))
    found = topology(count, data.draw(st.lists(st.sampled_from(every), unique=True)))
    rings = [
        order
        for order in ((0, *rest) for rest in permutations(range(1, count)))
        if all(pair in found.pairs for pair in ring_pairs(order))
    ]
    assert found.ring == (rings[0] if rings else None)
    whole = topology(count, [*sorted(found.pairs), *found.missing_of_ring])
    assert whole.ring is not None
