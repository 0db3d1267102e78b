"""Grouped by expert on a CPU or gathered by MLX: the same results in every family that has stacks of experts."""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP

from moectl.engine.network import experts
from moectl.engine.network.own_pairs import OwnPairs
from moectl.model.placement import place_copies
from moectl.shards.look.hooks import hook_call
from tests.support.families import families, make_whole, quantise, run_greedily

UNITS = (SwitchGLU, SwitchMLP)
# gpt-oss has biases and a clipped activation, nemotron_h relu² in a SwitchMLP, gemma4 gelu.
FEW = ("dbrx", "mixtral", "gpt_oss", "nemotron_h", "gemma4_text", "deepseek_v3", "qwen3_next")
CANNOT_RUN = ("bitnet", "muse_spark", "olmo", "phi3small")
OTHERS = [family for family in families() if family not in (*FEW, *CANNOT_RUN)]


pytestmark = pytest.mark.usefixtures("uncompiled")


def first_unit(model: nn.Module) -> Any:
    return next(module for module in model.modules() if isinstance(module, UNITS))


def pairs(unit: Any, tokens: int, top_k: int = 2) -> tuple[mx.array, mx.array]:
    up = unit["up_proj"] if "up_proj" in unit else unit["fc1"]
    x = mx.random.normal((1, tokens, up.input_dims), key=mx.random.key(tokens))
    scores = mx.random.uniform(shape=(1, tokens, up.num_experts), key=mx.random.key(5))
    return x, mx.argpartition(-scores, kth=top_k - 1, axis=-1)[..., :top_k]


def grouped(unit: Any) -> Any:
    other = copy.deepcopy(unit)
    experts.install(other)
    return other


@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize("tokens", [4, 40])
def test_grouped_pairs_are_as_gathered_ones(family: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "GROUP_FROM_PAIRS", 1)
    unit = first_unit(make_whole(family))
    x, indices = pairs(unit, tokens)
    expected, found = unit(x, indices), grouped(unit)(x, indices)
    assert found.shape == expected.shape
    np.testing.assert_allclose(np.array(found), np.array(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("family", OTHERS)
def test_all_families_answer_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "GROUP_FROM_PAIRS", 1)
    model = make_whole(family)
    expected = run_greedily(model)
    experts.install(model)
    for one, other in zip(run_greedily(model), expected, strict=True):
        np.testing.assert_allclose(np.array(one), np.array(other), atol=1e-4, rtol=1e-4)


MODES = [("affine", 64, 4), ("affine", 32, 8), ("mxfp4", 32, 4), ("mxfp8", 32, 8), ("nvfp4", 16, 4)]


@pytest.mark.parametrize(("mode", "group_size", "bits"), MODES)
def test_quantised_stacks_are_as_gathered(mode: str, group_size: int, bits: int) -> None:
    unit = SwitchGLU(64, 128, 4, bias=True)
    nn.quantize(unit, group_size, bits, mode=mode)
    x, indices = pairs(unit, 40)
    np.testing.assert_allclose(np.array(grouped(unit)(x, indices)), np.array(unit(x, indices)), atol=1e-5, rtol=1e-5)


def test_one_scale_for_each_expert_is_used() -> None:
    unit = SwitchGLU(64, 128, 4)
    wide = grouped(unit)
    how = {"group_size": 16, "bits": 4, "mode": "nvfp4", "global_scale": True}
    nn.quantize(unit, class_predicate=lambda _, module: how if hasattr(module, "to_quantized") else False)
    quantised, (x, indices) = grouped(unit), pairs(unit, 2)  # MLX cannot gather them on a CPU, not even few
    assert unit.up_proj.global_scale is not None
    found, expected = np.array(quantised(x, indices)), np.array(wide(x, indices))
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.98


def test_few_pairs_are_gathered_and_many_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    unit = SwitchGLU(64, 128, 4)
    assert not experts.waits_for_host(unit, pairs(unit, 3)[1])
    assert experts.waits_for_host(unit, pairs(unit, 32)[1])
    monkeypatch.setattr(experts, "LARGE_ELEMENTS", 1)
    assert experts.waits_for_host(unit, pairs(unit, 2)[1])
    assert not experts.waits_for_host(unit, pairs(unit, 1)[1])
    quantise(unit, 64)
    assert not experts.waits_for_host(unit, pairs(unit, 2)[1])


def test_types_that_mlx_cannot_gather_are_grouped() -> None:
    unit = SwitchGLU(64, 128, 4)
    x, indices = pairs(unit, 1)
    expected = unit(x, indices)
    unit.set_dtype(mx.bfloat16)
    found = grouped(unit)(x.astype(mx.bfloat16), indices)
    assert found.dtype == mx.bfloat16
    np.testing.assert_allclose(np.array(found.astype(mx.float32)), np.array(expected), atol=0.02, rtol=0.1)


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_owners_of_copies_add_up_to_all_experts(replicas: int, tokens: int, groups: bool) -> None:
    count = 8
    slots = [count * replicas // 3 + (rank < count * replicas % 3) for rank in range(3)]
    held = place_copies(slots, replicas, [8, 1, 1, 5, 1, 1, 1, 2])
    whole = SwitchGLU(64, 128, count, bias=True)
    x, indices = pairs(whole, tokens)
    total, owners = mx.zeros((1, tokens, 2, 64)), np.zeros((tokens, 2), dtype=int)
    for rank, numbers in enumerate(held):
        part = SwitchGLU(64, 128, len(numbers), bias=True)
        part.update({n: {k: a[mx.array(numbers)] for k, a in m.items()} for n, m in whole.items() if "weight" in m})
        hook = OwnPairs(count, numbers, rank, held)
        if groups:
            experts.install(part)
        hook_call(part, hook)
        total += part(x, indices)
        owners += hook.choose(indices) >= 0
    assert (owners == 1).all()
    np.testing.assert_allclose(np.array(total), np.array(whole(x, indices)), atol=1e-5, rtol=0)
