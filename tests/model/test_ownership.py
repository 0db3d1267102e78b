"""Shares become spans: rounded to grains, complete, and never without a head."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, strategies as st

from moectl.errors import PlanError
from moectl.model.ownership import Holding, find_holding, find_runs, first_owner, hold, own, own_layers, share_out
from moectl.model.regions import Division, Pieces, Role


@pytest.mark.parametrize(
    ("count", "grain", "shares", "spans"),
    [
        (256, 64, [1, 1], [(0, 128), (128, 256)]),
        (256, 64, [3, 1], [(0, 192), (192, 256)]),
        (2112, 64, [1, 1], [(0, 1088), (1088, 2112)]),  # Gemma-4: 33 groups
        (64, 64, [1, 1, 1], [(0, 0), (0, 64), (64, 64)]),  # two ranks hold nothing
        (8, 1, [0.1, 0.9], [(0, 1), (1, 8)]),
    ],
)
def test_shares_are_rounded_to_grains(
    count: int, grain: int, shares: list[float], spans: list[tuple[int, int]]
) -> None:
    assert share_out(count, grain, shares) == tuple(spans)


@pytest.mark.parametrize(
    ("shares", "fast"),
    [
        ([1] * 2, False),
        ([88, 80], True),
        ([1] * 4, False),
        ([48, 40, 40, 40], True),
        ([1] * 6, False),
        ([1] * 8, False),
    ],
)
def test_shares_that_keep_mlx_in_its_faster_kernel(shares: list[float], fast: bool) -> None:
    """DBRX's 10752 in groups of 64: rows of 4 bits in multiples of 512 (qmv_fast in MLX's metal/quantized.cpp)."""
    assert all((stop - start) % 512 == 0 for start, stop in share_out(10752, 64, shares)) == fast


@given(st.integers(1, 60), st.integers(1, 64), st.lists(st.floats(0.01, 100), min_size=1, max_size=9))
def test_spans_cover_everything_once(grains: int, grain: int, shares: list[float]) -> None:
    spans = share_out(grains * grain, grain, shares)
    assert [n for start, stop in spans for n in range(start, stop)] == list(range(grains * grain))
    assert all(start % grain == stop % grain == 0 for start, stop in spans)


def heads(role: Role, count: int, kv_count: int, grain: int = 1) -> Pieces:
    return Pieces(role, count if role is Role.HEAD else kv_count, grain, count, kv_count)


@pytest.mark.parametrize(
    ("count", "kv_count", "shares", "expected", "kv_expected"),
    [
        (8, 4, [1, 1], [(0, 4), (4, 8)], [(0, 2), (2, 4)]),
        (8, 4, [1, 1, 1], [(0, 2), (2, 6), (6, 8)], [(0, 1), (1, 3), (3, 4)]),
        (8, 2, [9, 1], [(0, 4), (4, 8)], [(0, 1), (1, 2)]),  # no rank is without a head
        (8, 2, [1] * 4, [(0, 2), (2, 4), (4, 6), (6, 8)], [(0, 1), (0, 1), (1, 2), (1, 2)]),  # KV heads on two ranks
        (8, 1, [1, 3], [(0, 2), (2, 8)], [(0, 1), (0, 1)]),
    ],
)
def test_heads_go_with_their_keys(
    count: int,
    kv_count: int,
    shares: list[float],
    expected: list[tuple[int, int]],
    kv_expected: list[tuple[int, int]],
) -> None:
    assert own(heads(Role.HEAD, count, kv_count), shares) == tuple(expected)
    assert own(heads(Role.KV_HEAD, count, kv_count), shares) == tuple(kv_expected)


@pytest.mark.parametrize(
    "pieces",
    [
        heads(Role.HEAD, 8, 2),  # three ranks, two KV heads
        heads(Role.HEAD, 4, 1, grain=2),  # two groups of two, three ranks
    ],
)
def test_heads_that_do_not_fit_stay_whole(pieces: Pieces) -> None:
    assert own(pieces, [1, 1, 1]) is None


def test_each_rank_of_a_pipeline_has_a_layer() -> None:
    assert own_layers(4, [100, 1, 1]) == ((0, 2), (2, 3), (3, 4))
    with pytest.raises(PlanError, match="2 layers cannot be given to 3 nodes: each needs one") as error:
        own_layers(2, [1, 1, 1])
    assert error.value.hint == "use 2 nodes or fewer, or another split"
    assert own_layers(2, [1, 1]) == ((0, 1), (1, 2))


def test_attention_is_divided_in_all_layers_or_in_none() -> None:
    wide, narrow = heads(Role.HEAD, 6, 6), heads(Role.HEAD, 6, 2)
    mlp = Division(-2, Pieces(Role.HIDDEN, 6))
    divisions = {"a.o_proj": Division(-1, wide), "b.o_proj": Division(-1, narrow), "a.mlp": mlp}
    assert set(hold(divisions, [1, 1], 0)) == {"a.o_proj", "b.o_proj", "a.mlp"}
    assert set(hold(divisions, [1] * 5, 0)) == {"a.mlp"}  # five ranks cannot share two KV heads


def test_the_first_rank_that_holds_something_adds_the_bias() -> None:
    divisions = {"mlp.down_proj": Division(-1, Pieces(Role.HIDDEN, 64, 64))}
    shares = [1, 1, 1]
    spans = share_out(64, 64, shares)
    assert first_owner(spans) == 1
    held = [hold(divisions, shares, rank)["mlp.down_proj"] for rank in range(3)]
    assert [holding.adds for holding in held] == [False, True, False]
    assert [holding.is_empty for holding in held] == [True, False, True]


def test_a_holding_is_of_a_module_or_of_one_array() -> None:
    division = Division(0, heads(Role.HEAD, 4, 2))
    holdings = hold({"attn.sinks": division, "attn.q_proj": division}, [1, 1], 1)
    assert find_holding(holdings, "attn.sinks") == holdings["attn.sinks"]
    assert find_holding(holdings, "attn.q_proj.bias") == holdings["attn.q_proj"]
    assert find_holding(holdings, "attn.norm.weight") is None


def test_experts_that_do_not_follow_one_another_are_several_spans() -> None:
    experts, hidden = Division(0, Pieces(Role.EXPERT, 8)), Division(-2, Pieces(Role.HIDDEN, 64))
    held = ((0, 1, 4), (2, 3, 4, 5, 6, 7))
    first, second = (hold({"stack": experts, "mlp": hidden}, [1, 1], rank, held) for rank in range(2))
    assert first["stack"] == Holding(experts, ((0, 2), (4, 5)), adds=True)
    assert second["stack"] == Holding(experts, ((2, 8),), adds=False)
    assert first["stack"].numbers == [0, 1, 4]
    assert second["stack"].span == (2, 8)
    assert (first["mlp"].span, second["mlp"].span) == ((0, 32), (32, 64))


@given(st.sets(st.integers(0, 40), min_size=1))
def test_runs_are_the_numbers_and_as_few_as_can_be(numbers: set[int]) -> None:
    runs = find_runs(sorted(numbers))
    assert [n for start, stop in runs for n in range(start, stop)] == sorted(numbers)
    assert all(stop < start for (_, stop), (start, _) in pairwise(runs))
