"""The arithmetic of a measurement and the random weights it runs on; measuring itself is tested in test_probe."""

from __future__ import annotations

import statistics

import mlx.core as mx
import pytest
from hypothesis import given, strategies as st
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from moectl.engine.measure import fit_pass, weigh_layers
from moectl.engine.network.exchange import seam
from moectl.engine.random_model import RandomWeights, choose_depths, shorten, with_depth
from moectl.errors import PlanError
from moectl.model.placement import make_placement
from moectl.model.structure import Quantization
from moectl.planner.measured import Pass, RankSpeed
from tests.support.families import config_of
from tests.support.structures import structure_of
from tests.support.tiny import make_config

CONFIG = make_config(n_layers=6)
TINY = structure_of(CONFIG)
MODES = [None, Quantization(4, 64), Quantization(8, 32), Quantization(4, 32, "mxfp4"), Quantization(4, 16, "nvfp4")]
times = st.floats(0, 100, allow_nan=False)


@given(st.lists(times, min_size=1, max_size=5), st.lists(times, min_size=1, max_size=5), st.integers(2, 6))
def test_a_line_through_noise_has_no_negative_part(low: list[float], high: list[float], deep: int) -> None:
    found = fit_pass(1, {1: low, deep: high}, (0,) * deep)
    assert min(found.layer_s, found.outer_s) >= 0
    assert found.total_s(deep) == pytest.approx(statistics.median(high))


def test_a_line() -> None:
    found = fit_pass(5, {2: [0.5, 9.0, 0.4], 6: [1.3, 1.3]}, (0,) * 40)
    assert found.tokens == 5
    assert (found.layer_s, found.outer_s) == pytest.approx((0.2, 0.1))
    assert found.total_s(40) == pytest.approx(8.1)


def test_layers_of_two_kinds_are_told_apart() -> None:
    order = (0, 0, 0, *[1] * 57)  # 1 s and 3 s each, and 0.5 s for the rest
    seconds = {depth: [0.5 + sum(1 + 2 * kind for kind in order[:depth])] for depth in choose_depths(order, 1)}
    assert fit_pass(1, seconds, order).total_s(60) == pytest.approx(0.5 + 3 * 1 + 57 * 3)


def test_a_model_of_one_layer_is_all_layer() -> None:
    assert fit_pass(1, {1: [0.25]}, (0,)) == Pass(1, 0.25, 0.0)


@pytest.mark.parametrize(
    ("order", "ranks", "depths"),
    [
        ((0,) * 40, 1, [2, 6]),
        ((0,) * 3, 1, [2, 3]),
        ((0,) * 40, 4, [8, 12]),
        ((0, 1) * 10, 1, [2, 3, 4]),
        ((0,), 1, [1]),
    ],
)
def test_depths(order: tuple[int, ...], ranks: int, depths: list[int]) -> None:
    assert choose_depths(order, ranks) == depths


def test_a_shortened_model_has_as_many_layers_as_told() -> None:
    for family in ("deepseek_v3", "llama", "kimi_k25"):
        assert structure_of(shorten(config_of(family), 2)).n_layers == 2
    with pytest.raises(PlanError, match="cannot shorten"):
        shorten({"model_type": "x"}, 2)


@pytest.mark.parametrize("quantization", MODES, ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_weights_are_counted_before_they_are_made(quantization: Quantization | None, shared: bool) -> None:
    placement = with_depth(make_placement(TINY, "hidden", 2), 3)
    weights = RandomWeights(CONFIG, quantization, mx.float32, shared)
    counted = weights.count_bytes(placement, 0)
    model = weights.make_model(placement, 0, None)
    arrays = dict(tree_flatten(model.parameters()))
    per_layer = [{n.split(".", 3)[3]: a for n, a in arrays.items() if f"blocks.{i}." in n} for i in range(3)]
    own = [
        a for n, a in arrays.items() if not shared or not n.startswith(("transformer.blocks.1", "transformer.blocks.2"))
    ]
    assert counted == sum(a.nbytes for a in own)
    assert all(mx.array_equal(per_layer[0][n], per_layer[2][n]) for n in per_layer[0] if shared)
    with seam():
        logits = model(mx.array([[1, 2, 3]]), cache=make_prompt_cache(model))
    assert mx.isfinite(logits).all()
    assert mx.abs(logits).max() > 0


def test_models_of_other_depth_have_the_same_weights() -> None:
    placement = make_placement(TINY, "experts", 2)
    weights = RandomWeights(CONFIG, None, mx.float32)
    long = weights.make_model(with_depth(placement, 3), 1, None)
    short = weights.make_model(with_depth(placement, 1), 1, None)
    theirs = dict(tree_flatten(long.parameters()))
    assert len(short.layers) == 1
    assert all(mx.array_equal(array, theirs[name]) for name, array in tree_flatten(short.parameters()))


def test_a_shortened_pipeline_has_its_layers_evenly() -> None:
    short = with_depth(make_placement(TINY, "layers", 2, shares=(1, 2)), 4)
    assert [short.layers(rank) for rank in range(2)] == [(0, 2), (2, 4)]


def test_a_layer_of_a_pipeline_takes_longer_where_the_slow_rank_has_more() -> None:
    slow, fast = (RankSpeed(s, 1.0, 1.0) for s in (3.0, 1.0))
    assert weigh_layers((3, 1), (slow, fast)) == pytest.approx((3 * 3 + 1 * 1) / 4 / 2)
    assert weigh_layers((2, 2), (slow, fast)) == pytest.approx(1.0)
