"""Who holds what: every part of a model exactly once, whatever the split, and refusals that say what works."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, strategies as st

from moectl.errors import PlanError
from moectl.model.geometry import DBRX, Geometry, read_geometry
from moectl.model.placement import SPLITS, Placement, make_placement
from tests.support.tiny import make_config


def geometry(**sizes: Any) -> Geometry:
    return read_geometry(make_config(**sizes))


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    """Draw any placement that can be had of a small model."""
    kv_heads = draw(st.integers(1, 12))
    heads = kv_heads * draw(st.integers(1, 3))
    model = geometry(
        n_layers=draw(st.integers(1, 12)),
        n_heads=heads,
        kv_n_heads=kv_heads,
        d_model=4 * heads,
        ffn_hidden=32 * draw(st.integers(1, 12)),
        n_experts=draw(st.integers(4, 16)),
    )
    split = draw(st.sampled_from(SPLITS))
    total = {"experts": model.n_experts, "layers": model.n_layers}.get(split, model.ffn_hidden // 32)
    counts = range(1, total + 1)
    nodes = draw(st.sampled_from([n for n in counts if split != "tensor" or kv_heads % n == 0]))
    cuts = draw(st.sets(st.integers(1, total - 1), min_size=nodes - 1, max_size=nodes - 1)) if nodes > 1 else set()
    edges = [0, *sorted(cuts), total]
    shares = draw(st.none() | st.just([b - a for a, b in pairwise(edges)]))
    return make_placement(model, split, nodes, shares=shares, group_size=32)


@given(placements())
def test_every_part_is_held_exactly_once(placement: Placement) -> None:
    model, ranks = placement.geometry, range(placement.world_size)
    cells = sorted(cell for rank in ranks for cell in _cells(placement, rank))
    assert cells == sorted(
        ((i, e), u)
        for i in range(model.n_layers)
        for e in range(model.n_experts)
        for u in range(model.ffn_hidden // 32)
    )
    heads = [(i, h) for r in ranks for i in range(*placement.layers(r)) for h in _heads(placement, r)]
    expected = [(i, h) for i in range(model.n_layers) for h in range(model.n_heads + model.kv_n_heads)]
    divided = placement.split in ("tensor", "layers")
    assert sorted(heads) == sorted(expected * (1 if divided else placement.world_size))
    assert sum(placement.holds_head(r) for r in ranks) == 1
    assert sum(placement.holds_embedding(r) for r in ranks) == (1 if placement.split == "layers" else len(ranks))
    assert placement.layers(placement.head_rank)[1] == model.n_layers


def _cells(placement: Placement, rank: int) -> list[tuple[tuple[int, int], int]]:
    """Return ((layer, expert), unit of its hidden dimension) of everything that a rank holds."""
    start, stop = placement.hidden(rank)
    assert start % 32 == stop % 32 == 0
    units = range(start // 32, stop // 32)
    layers, experts = range(*placement.layers(rank)), placement.experts_of(rank)
    return [((layer, e), u) for layer in layers for e in experts for u in units]


def _heads(placement: Placement, rank: int) -> list[int]:
    """Return a rank's query heads, then its KV heads."""
    n, keys = placement.geometry.n_heads, placement.kv_heads(rank)
    queries = range(*placement.heads(rank))
    group = n // placement.geometry.kv_n_heads
    assert {q // group for q in queries} == set(range(*keys))
    return [*queries, *range(n + keys[0], n + keys[1])]


@pytest.mark.parametrize(
    ("split", "nodes", "shares", "words"),
    [
        ("tensor", 3, None, "8 KV heads cannot be divided by 3 nodes; a tensor split works on 1, 2, 4 or 8"),
        ("tensor", 9, None, "8 KV heads cannot be divided by 9 nodes; a tensor split works on 1, 2, 4 or 8"),
        ("layers", 41, None, "41 nodes are too many: the model has 40 layers, so at most 40 nodes"),
        ("layers", 2, (39, 2), "shares 39,2 add up to 41; each must be 1 or more and together 40 .layers."),
        ("layers", 2, (40, 0), "each must be 1 or more"),
        ("experts", 17, None, "at most 16 nodes"),
        ("hidden", 2, (100, 100), "together 168 .units of 64 hidden elements."),
        ("hidden", 0, None, "0 nodes"),
        ("rows", 2, None, "experts, hidden, tensor, layers"),
    ],
)
def test_what_cannot_work_is_refused_with_what_can(
    split: str, nodes: int, shares: tuple[int, ...] | None, words: str
) -> None:
    with pytest.raises(PlanError, match=words):
        make_placement(DBRX, split, nodes, shares=shares)


@pytest.mark.parametrize(
    ("split", "nodes", "more", "words"),
    [
        ("hidden", 4, {"replicas": 2}, "only whole experts can have copies, and --split hidden has none"),
        ("experts", 2, {"replicas": 3}, "3 copies of an expert need 3 nodes; there are 2"),
        ("experts", 2, {"replicas": 0}, "0 copies"),
        ("experts", 2, {"replicas": 2, "shares": (17, 8)}, "each must be 1 to 16 and together 16 to 32 .experts."),
        ("experts", 2, {"replicas": 2, "shares": (8, 7)}, "add up to 15"),
        ("experts", 2, {"frequencies": [1.0] * 15}, "should be 16 numbers"),
        ("experts", 2, {"frequencies": [float("nan")] * 16}, "should be 16 numbers"),
    ],
)
def test_copies_that_cannot_be(split: str, nodes: int, more: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        make_placement(DBRX, split, nodes, **more)


def test_the_split_that_a_hint_names_works() -> None:
    small = geometry(n_heads=4, kv_n_heads=4, n_experts=4, ffn_hidden=192)
    many: dict[str, Any] = {"replicas": 2}
    often: dict[str, Any] = {"frequencies": [1.0, 2.0, 3.0, 4.0]}
    odd: dict[str, Any] = {"group_size": 100}
    cases: list[tuple[str, int, dict[str, Any], str]] = [
        ("tensor", 3, {}, "--split hidden works on any number of nodes"),
        ("hidden", 2, many, "--split experts"),
        ("layers", 2, often, "--split experts"),
        ("hidden", 2, odd, "choose another --q-group-size, or --split experts"),
    ]
    for split, nodes, options, hint in cases:
        with pytest.raises(PlanError) as refused:
            make_placement(small, split, nodes, **options)
        assert refused.value.hint == hint
        named = "hidden" if "hidden" in hint else "experts"
        make_placement(small, named, nodes, **options)
    make_placement(small, "hidden", 2, group_size=64)
