"""Who holds what: every part of a model exactly once, whatever the split, and refusals that say what works."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, strategies as st

from moectl.errors import PlanError
from moectl.model.placement import SPLITS, Placement, make_placement
from moectl.model.regions import Division, Pieces, Role
from moectl.model.structure import Layer, Outer, Part, Structure

FIRST, LAST, ALL = Outer(Part(64), first=True), Outer(Part(64), last=True), Outer(Part(floats=8))


def structure(
    *, layers: int = 40, heads: int = 48, kv_heads: int = 8, experts: int = 16, hidden: int = 10752, grain: int = 64
) -> Structure:
    """Return a model in numbers; those of DBRX, where none are given."""
    parts = (
        Part(heads * 64, heads=Pieces(Role.HEAD, heads, 1, heads, kv_heads)),
        Part(kv_heads * 64, heads=Pieces(Role.KV_HEAD, kv_heads, 1, heads, kv_heads)),
        Part(
            experts * hidden * 32,
            hidden=Pieces(Role.HIDDEN, hidden, grain),
            experts=experts,
            top_k=min(4, experts),
            is_shared_out=True,
        ),
        Part(floats=32),
    )
    return Structure("dbrx", (Layer(parts),), (0,) * layers, (FIRST, LAST, ALL), 64, 128, 512)


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    """Draw any placement that can be had of a small model."""
    kv_heads = draw(st.integers(1, 12))
    model = structure(
        layers=draw(st.integers(1, 12)),
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        hidden=32 * draw(st.integers(1, 12)),
        grain=32,
        experts=draw(st.integers(1, 16)),
    )
    split = draw(st.sampled_from(SPLITS))
    shares = draw(st.lists(st.integers(1, 100) | st.floats(0.01, 100), min_size=1, max_size=9))
    try:
        return make_placement(model, split, len(shares), shares=shares)
    except PlanError:
        return make_placement(model, split, 1)


@given(placements())
def test_every_part_is_held_exactly_once(placement: Placement) -> None:
    model, ranks = placement.structure, range(placement.world_size)
    queries, keys, stack, norms = model.kinds[0].parts
    layers = [layer for rank in ranks for layer in range(*placement.layers(rank))]
    assert sorted(layers) == sorted([*range(model.n_layers)] * (1 if placement.split == "layers" else len(ranks)))
    divided = {"experts": [stack], "hidden": [stack], "tensor": [stack, queries, keys], "layers": []}[placement.split]
    for part in (queries, keys, stack, norms):
        total = math.fsum(placement.fraction(part, rank) for rank in ranks)
        if part not in divided:
            assert total == len(ranks)  # each rank has it, in the layers that it holds
        elif part is keys:
            assert total >= 1 - 1e-9  # KV heads go with the heads that use them
        else:
            assert total == pytest.approx(1)
    if placement.split in ("experts", "hidden"):
        pieces = stack.pieces(placement.split)
        assert pieces is not None
        spans = [placement.hold({"up": Division(0, pieces)}, rank)["up"].numbers for rank in ranks]
        assert [n for numbers in spans for n in numbers] == [*range(pieces.count)]
        assert [len(numbers) / pieces.count for numbers in spans] == [placement.fraction(stack, r) for r in ranks]
    assert sum(placement.holds_outer(LAST, r) for r in ranks) == 1
    assert placement.holds_outer(LAST, placement.head_rank)
    assert sum(placement.holds_outer(FIRST, r) for r in ranks) == (1 if placement.split == "layers" else len(ranks))
    assert all(placement.holds_outer(ALL, r) for r in ranks)
    assert placement.layers(placement.head_rank)[1] == model.n_layers


@given(
    shares=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    replicas=st.integers(1, 6),
    frequencies=st.lists(st.floats(0, 100), min_size=16, max_size=16),
)
def test_copies_of_experts_fit_any_shares(shares: list[int], replicas: int, frequencies: list[float]) -> None:
    nodes, replicas = len(shares), min(replicas, len(shares))
    placement = make_placement(structure(), "experts", nodes, shares=shares, replicas=replicas, frequencies=frequencies)
    assert all(1 <= len(owners) <= replicas for owners in placement.owners)
    held = [placement.experts_of(rank) for rank in range(nodes)]
    assert all(1 <= len(numbers) == len(set(numbers)) for numbers in held)
    stack = structure().kinds[0].parts[2]
    assert [placement.fraction(stack, rank) for rank in range(nodes)] == [len(numbers) / 16 for numbers in held]
    assert placement.replicas <= replicas


def test_attention_is_whole_where_the_heads_of_one_layer_cannot_be_divided() -> None:
    model = structure()
    queries, *others = model.kinds[0].parts
    narrow = Part(64, heads=Pieces(Role.HEAD, 2, 1, 2, 2))
    mixed = replace(model, kinds=(Layer((queries, *others)), Layer((narrow, *others))), order=(0, 1))
    alone = Placement("tensor", (1, 1, 1, 1), mixed)
    assert not alone.divides_heads
    assert alone.fraction(queries, 0) == alone.fraction(narrow, 0) == 1
    assert alone.fraction(others[1], 0) == 0.25


def test_every_rank_has_the_ends_of_a_model_without_a_line() -> None:
    placement = make_placement(replace(structure(), has_line=False), "hidden", 3)
    assert all(placement.holds_outer(outer, rank) for outer in (FIRST, LAST, ALL) for rank in range(3))


@pytest.mark.parametrize(
    ("split", "nodes", "shares", "words"),
    [
        ("tensor", 9, None, "heads cannot be divided by 9 nodes; a tensor split works on 1, 2, 3, 4, 5, 6, 7, 8 or 16"),
        ("layers", 41, None, "40 layers cannot be given to 41 nodes: each needs one"),
        ("experts", 17, None, "17 nodes are too many: the model has 16 experts, so at most 16 nodes"),
        ("hidden", 169, None, "169 nodes are too many: the model has 168 parts that can be divided"),
        ("hidden", 2, (1, 0), "shares 1,0 should be numbers above 0"),
        ("hidden", 2, (1, -1), "should be numbers above 0"),
        ("layers", 2, (1, math.inf), "should be numbers above 0"),
        ("layers", 2, (1, math.nan), "should be numbers above 0"),
        ("hidden", 2, (1, 1, 1), "3 shares were given for 2 nodes; give one per node"),
        ("hidden", 0, None, "0 nodes"),
        ("rows", 2, None, "experts, hidden, tensor, layers"),
    ],
)
def test_what_cannot_work_is_refused_with_what_can(
    split: str, nodes: int, shares: tuple[float, ...] | None, words: str
) -> None:
    with pytest.raises(PlanError, match=words):
        make_placement(structure(), split, nodes, shares=shares)


@pytest.mark.parametrize(
    ("split", "nodes", "more", "words"),
    [
        ("hidden", 4, {"replicas": 2}, "only whole experts can have copies, and --split hidden has none"),
        ("hidden", 4, {"frequencies": [1.0] * 16}, "only whole experts have places, and --split hidden has none"),
        ("experts", 2, {"replicas": 3}, "3 copies of an expert need 3 nodes; there are 2"),
        ("experts", 2, {"replicas": 0}, "0 copies"),
        ("experts", 2, {"frequencies": [1.0] * 15}, "should be 16 numbers"),
        ("experts", 2, {"frequencies": [float("nan")] * 16}, "should be 16 numbers"),
    ],
)
def test_copies_that_cannot_be(split: str, nodes: int, more: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        make_placement(structure(), split, nodes, **more)


def test_layers_with_other_numbers_of_experts_have_no_copies() -> None:
    model = structure()
    *others, stack, norms = model.kinds[0].parts
    fewer = Layer((*others, replace(stack, experts=8), norms))
    mixed = replace(model, kinds=(*model.kinds, fewer), order=(0, 1))
    with pytest.raises(PlanError, match="different numbers of experts"):
        make_placement(mixed, "experts", 2, replicas=2)
    assert make_placement(mixed, "experts", 2).owners[0] == (0,)


def test_the_split_that_a_hint_names_works() -> None:
    small = structure(heads=4, kv_heads=4, experts=4, hidden=192)
    many: dict[str, Any] = {"replicas": 2}
    often: dict[str, Any] = {"frequencies": [1.0, 2.0, 3.0, 4.0]}
    cases: list[tuple[str, int, dict[str, Any], str]] = [
        ("tensor", 3, {}, "--split hidden works on any number of nodes"),
        ("hidden", 2, many, "--split experts"),
        ("layers", 2, often, "--split experts"),
    ]
    for split, nodes, options, hint in cases:
        model = structure(heads=4, kv_heads=2, experts=4, hidden=192) if split == "tensor" else small
        with pytest.raises(PlanError) as refused:
            make_placement(model, split, nodes, **options)
        assert refused.value.hint == hint
        make_placement(model, "hidden" if "hidden" in hint else "experts", nodes, **options)


def test_a_split_that_the_model_cannot_have_names_those_that_it_can() -> None:
    dense = replace(structure(), refused={"experts": "it has no stacked experts", "tensor": "no heads"})
    with pytest.raises(PlanError, match="a dbrx model cannot be split by experts: it has no stacked experts") as caught:
        make_placement(dense, "experts", 2)
    assert caught.value.hint == "use --split hidden or --split layers"
    make_placement(dense, "hidden", 2)
    make_placement(dense, "experts", 1)  # on one host nothing is divided
    none = replace(dense, refused=dict.fromkeys(SPLITS, "why"))
    with pytest.raises(PlanError) as caught:
        make_placement(none, "hidden", 2)
    assert caught.value.hint == "it runs on one host only"
