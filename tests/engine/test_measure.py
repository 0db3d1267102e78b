"""The arithmetic of a measurement and the random weights it runs on; measuring itself is tested in test_probe."""

from __future__ import annotations

import statistics

import mlx.core as mx
import pytest
from hypothesis import given, strategies as st
from mlx.utils import tree_flatten

from moectl.engine.measure import count_first_layers, fit_pass, scale_of, weigh_layers
from moectl.engine.random_model import Weights, fewer_experts, shorten
from moectl.model.catalog import MODELS
from moectl.model.placement import make_placement
from moectl.model.structure import Quantization
from moectl.planner.measured import Pass, RankSpeed
from tests.support.families import config_of
from tests.support.structures import structure_of
from tests.support.tiny import make_config

CONFIG = make_config(n_layers=3)
TINY = structure_of(CONFIG)
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


def test_a_config_with_fewer_layers() -> None:
    config = {"num_hidden_layers": 4, "layer_types": list("abab"), "hybrid_override_pattern": "MEM*", "vocab_size": 4}
    short = {"num_hidden_layers": 2, "layer_types": ["a", "b"], "hybrid_override_pattern": "ME", "vocab_size": 4}
    assert shorten(config, 4, 2) == short
    assert shorten({"text_config": config}, 4, 2) == {"text_config": short}
    assert structure_of(shorten(CONFIG, 3, 2)).n_layers == 2


def test_a_config_with_fewer_experts() -> None:
    assert structure_of(fewer_experts(CONFIG, 16, 8)).n_experts == 8
    assert structure_of(fewer_experts(config_of("gpt_oss"), 8, 4)).n_experts == 4


def test_first_layers_of_another_kind_do_not_stand_for_all() -> None:
    """DeepSeek's first three layers are dense, and read less than one with experts."""
    deepseek = MODELS["deepseek-ai/DeepSeek-V3.1"].structure
    assert count_first_layers(deepseek) == 4
    assert scale_of(deepseek, deepseek, 4) == pytest.approx(1, abs=0.05)
    assert count_first_layers(MODELS["Qwen/Qwen3-Next-80B-A3B-Instruct"].structure) == 4
    assert count_first_layers(TINY) == 1
    assert scale_of(TINY, TINY, 1) == 1


@pytest.mark.parametrize("quantization", MODES, ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_weights_are_counted_before_they_are_made(quantization: Quantization | None, shared: bool) -> None:
    placement = make_placement(TINY, "hidden", 2)
    weights = Weights(CONFIG, quantization, shared=shared)
    short = weights.make_model(placement, 3, 0, None)
    counted = weights.count_bytes(short, mx.float32)
    model = weights.fill(short, mx.float32).model
    arrays = dict(tree_flatten(model.parameters()))
    later = ("transformer.blocks.1", "transformer.blocks.2")
    assert counted == sum(a.nbytes for n, a in arrays.items() if not shared or not n.startswith(later))
    first = {n: a for n, a in arrays.items() if "blocks.0." in n}
    assert all(mx.array_equal(a, arrays[n.replace("blocks.0.", "blocks.2.")]) for n, a in first.items() if shared)
    logits = model(mx.array([[1, 2, 3]]))
    assert mx.isfinite(logits).all()
    assert mx.abs(logits).max() > 0


def test_models_of_other_depth_have_the_same_weights() -> None:
    placement = make_placement(TINY, "experts", 2)
    weights = Weights(CONFIG, None, shared=False)
    long, short = (weights.fill(weights.make_model(placement, depth, 0, None), mx.float32).model for depth in (3, 1))
    theirs = dict(tree_flatten(long.parameters()))
    assert len(short.layers) == 1
    assert all(mx.array_equal(array, theirs[name]) for name, array in tree_flatten(short.parameters()))


def test_a_layer_of_a_pipeline_takes_longer_where_the_slow_rank_has_more() -> None:
    slow, fast = (RankSpeed(s, 1.0, 1.0) for s in (3.0, 1.0))
    assert weigh_layers((3, 1), (slow, fast)) == pytest.approx((3 * 3 + 1 * 1) / 4 / 2)
    assert weigh_layers((2, 2), (slow, fast)) == pytest.approx(1.0)
