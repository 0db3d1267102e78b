"""Each selected pair is computed exactly once, by an owner, and no sharing out would load the busiest rank less."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given, strategies as st

from moectl.model.balance import share_out
from moectl.model.placement import make_placement
from tests.support.structures import structure_of
from tests.support.tiny import make_config

STRUCTURE = structure_of(make_config())  # 16 experts, as DBRX


@st.composite
def selections(draw: st.DrawFn) -> tuple[dict[int, int], list[list[int]]]:
    """Draw the ranks that own each expert, and how many pairs of some experts were selected."""
    ranks = draw(st.integers(1, 5))
    owners = draw(st.lists(st.sets(st.integers(0, ranks - 1), min_size=1), min_size=1, max_size=16))
    counts = draw(st.dictionaries(st.integers(0, len(owners) - 1), st.integers(1, 40)))
    return counts, [sorted(o) for o in owners]


def loads_of(shares: dict[int, dict[int, int]]) -> Counter[int]:
    loads: Counter[int] = Counter()
    for share in shares.values():
        loads.update(share)
    return loads


@given(selections())
def test_every_pair_is_computed_once_and_the_busiest_rank_has_least(
    selection: tuple[dict[int, int], list[list[int]]],
) -> None:
    counts, owners = selection
    shares = share_out(counts, owners)
    assert {expert: sum(share.values()) for expert, share in shares.items()} == counts
    for expert, share in shares.items():
        assert set(share) <= set(owners[expert])
        assert min(share.values()) >= 0
    busiest = max(loads_of(shares).values(), default=0)
    # Hall: what nobody outside a set of ranks can compute has to be done within it; the tightest set is the optimum.
    ranks = sorted({r for o in owners for r in o})
    groups = [set(group) for size in range(1, len(ranks) + 1) for group in combinations(ranks, size)]
    trapped = [(sum(n for e, n in counts.items() if set(owners[e]) <= group), len(group)) for group in groups]
    assert busiest == max(-(-pairs // size) for pairs, size in trapped)
    without_copies: Counter[int] = Counter()
    for expert, count in counts.items():
        without_copies[owners[expert][-1]] += count
    assert busiest <= max(without_copies.values(), default=0)


@given(selections())
def test_the_order_of_the_counts_does_not_matter(selection: tuple[dict[int, int], list[list[int]]]) -> None:
    counts, owners = selection
    backwards = dict(reversed(counts.items()))
    assert share_out(counts, owners) == share_out(backwards, owners)


@pytest.mark.parametrize(
    ("nodes", "replicas", "expected"), [(4, 1, 1.97), (4, 2, 1.16), (4, 4, 1.0), (2, 2, 2.0), (3, 2, 2.0), (8, 2, 1.0)]
)
def test_expected_experts_of_the_busiest_node(nodes: int, replicas: int, expected: float) -> None:
    """All 1820 choices of 4 experts of 16, as likely as each other, one token."""
    owners = make_placement(STRUCTURE, "experts", nodes, replicas=replicas).owners
    chosen = list(combinations(range(16), 4))
    busiest = [max(loads_of(share_out(dict.fromkeys(four, 1), owners)).values()) for four in chosen]
    assert sum(busiest) / len(busiest) == pytest.approx(expected, abs=0.005)
