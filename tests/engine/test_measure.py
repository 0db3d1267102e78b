"""The arithmetic of a measurement and the random weights it runs on; measuring itself is tested in test_probe."""

from __future__ import annotations

import statistics

import mlx.core as mx
import pytest
from hypothesis import given, strategies as st
from mlx.utils import tree_flatten

from moectl.engine.measure import fit_pass, scale_up, weigh_layers
from moectl.engine.random_model import Weights, shrink, with_depth
from moectl.model.geometry import read_geometry
from moectl.model.placement import make_placement
from moectl.model.structure import Quantization
from moectl.planner.measured import Pass, RankSpeed
from tests.support.tiny import make_config

TINY = read_geometry(make_config(n_layers=3))
MODES = [None, Quantization(4, 64), Quantization(8, 32), Quantization(4, 32, "mxfp4"), Quantization(4, 16, "nvfp4")]
times = st.floats(0, 100, allow_nan=False)


@given(st.lists(times, min_size=1, max_size=5), st.lists(times, min_size=1, max_size=5), st.integers(2, 6))
def test_a_line_through_noise_has_no_negative_part(low: list[float], high: list[float], deep: int) -> None:
    found = fit_pass(1, {1: low, deep: high})
    assert min(found.layer_s, found.outer_s) >= 0
    assert found.total_s(deep) == pytest.approx(statistics.median(high))


def test_a_line() -> None:
    found = fit_pass(5, {2: [0.5, 9.0, 0.4], 6: [1.3, 1.3]})
    assert found.tokens == 5
    assert (found.layer_s, found.outer_s) == pytest.approx((0.2, 0.1))
    assert found.total_s(40) == pytest.approx(8.1)


def test_a_model_of_one_layer_is_all_layer() -> None:
    assert fit_pass(1, {1: [0.25]}) == Pass(1, 0.25, 0.0)


def test_only_the_experts_time_is_scaled() -> None:
    assert scale_up(Pass(1, 1.0, 0.5), 0.5, 0.5) == Pass(1, 1.5, 0.5)
    assert scale_up(Pass(1, 1.0, 0.5), 2.0, 0.5) == Pass(1, 1.0, 0.5)
    assert scale_up(Pass(1, 1.0, 0.5), 0.4, 1.0) == Pass(1, 1.0, 0.5)


def test_fewer_experts_come_before_narrower_ones_where_they_cost_no_time() -> None:
    hidden = make_placement(TINY, "hidden", 2)
    fewer = shrink(hidden, None)
    assert (fewer.geometry.n_experts, fewer.geometry.ffn_hidden) == (TINY.top_k, TINY.ffn_hidden)
    narrower = shrink(fewer, None)
    assert narrower.shares == (1, 1)
    assert narrower.geometry.ffn_hidden == 2 * hidden.unit
    assert shrink(narrower, None) == narrower


def test_whole_experts_get_narrower_in_whole_groups() -> None:
    experts = make_placement(TINY, "experts", 2)
    sizes = []
    while (shorter := shrink(experts, Quantization(4, 64))) != experts:
        experts = shorter
        sizes.append(experts.geometry.ffn_hidden)
    assert sizes == [192, 64]
    assert experts.shares == (8, 8)


@pytest.mark.parametrize("quantization", MODES, ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_weights_are_counted_before_they_are_made(quantization: Quantization | None, shared: bool) -> None:
    placement = make_placement(TINY, "hidden", 2, group_size=64)
    weights = Weights(quantization, shared=shared)
    model = weights.make_model(placement, 0, None)
    counted = weights.count_bytes(model, mx.float32)
    weights.fill(model, mx.float32)
    arrays = dict(tree_flatten(model.parameters()))
    per_layer = [{n.split(".", 3)[3]: a for n, a in arrays.items() if f"blocks.{i}." in n} for i in range(3)]
    distinct = [
        a for n, a in arrays.items() if not shared or not n.startswith(("transformer.blocks.1", "transformer.blocks.2"))
    ]
    assert counted == sum(a.nbytes for a in distinct)
    assert all(mx.array_equal(per_layer[0][n], per_layer[2][n]) for n in per_layer[0] if shared)
    logits = model(mx.array([[1, 2, 3]]))
    assert mx.isfinite(logits).all()
    assert mx.abs(logits).max() > 0


def test_models_of_other_depth_have_the_same_weights() -> None:
    placement = make_placement(TINY, "experts", 2)
    weights = Weights(None, shared=False)
    long = weights.fill(weights.make_model(placement, 1, None), mx.float32)
    short = weights.fill(weights.make_model(with_depth(placement, 1), 1, None), mx.float32)
    theirs = dict(tree_flatten(long.parameters()))
    assert len(short.layers) == 1
    assert all(mx.array_equal(array, theirs[name]) for name, array in tree_flatten(short.parameters()))


def test_a_shortened_pipeline_has_its_layers_evenly() -> None:
    short = with_depth(make_placement(TINY, "layers", 2, shares=(1, 2)), 4)
    assert short.shares == (2, 2)
    assert short.geometry.n_layers == 4


def test_a_layer_of_a_pipeline_takes_longer_where_the_slow_rank_has_more() -> None:
    slow, fast = (RankSpeed(s / 2, {4: s / 2}, None, 1.0, 1.0) for s in (3.0, 1.0))
    assert weigh_layers((3, 1), (slow, fast)) == pytest.approx((3 * 3 + 1 * 1) / 4 / 2)
    assert weigh_layers((2, 2), (slow, fast)) == pytest.approx(1.0)
