"""DBRX as a model file: transformers' logits, the same parameters from every layout, and plain copies stay plain."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from moectl.errors import CheckpointError
from moectl.model.geometry import read_geometry
from moectl.shards.look.dbrx import Model, rename_table
from moectl.shards.look.skeleton import make_skeleton
from moectl.shards.trace.formats import read_format
from moectl.shards.trace.parts import full
from moectl.shards.trace.places import find_rectangles
from moectl.shards.trace.precision import settle
from moectl.shards.trace.traced import Expression, Stored, check_parameters, form_of, trace
from tests.support import oracle, tiny
from tests.support.ring import process_env


def build(case: str, seed: int = oracle.GOLDEN_SEED) -> Model:
    config = oracle.make_config(case)
    model: Model = make_skeleton(config).model
    weights = {name: mx.array(value) for name, value in oracle.make_weights(config, seed).items()}
    model.load_weights(list(model.sanitize(weights).items()))
    return model


@pytest.mark.parametrize("case", oracle.CASES)
def test_logits_equal_the_golden_ones(case: str) -> None:
    model = build(case)
    with np.load(oracle.GOLDEN) as golden:
        expected = golden[case]
    prefill = np.array(model(mx.array(oracle.TOKENS)))
    np.testing.assert_allclose(prefill, expected, atol=1e-4, rtol=0)
    cache = make_prompt_cache(model)
    steps = mx.concatenate([model(mx.array([[token]]), cache) for token in oracle.TOKENS[0]], axis=1)
    np.testing.assert_allclose(np.array(steps), expected, atol=1e-4, rtol=0)


def test_golden_cases_differ_from_each_other() -> None:
    with np.load(oracle.GOLDEN) as golden:
        distinct = {golden[case].tobytes() for case in oracle.CASES if case not in ("clip-1e4", "clip-none")}
    assert len(distinct) == len(oracle.CASES) - 2


@pytest.fixture(scope="module")
def live_logits(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The live oracle's logits by case, computed in a process of its own, which may find torch where this one does not.

    MOECTL_TEST_TORCH names the directory: beside moectl, every process that imports transformers would load torch.
    """
    path = os.pathsep.join(filter(None, (os.environ.get("MOECTL_TEST_TORCH"), process_env().get("PYTHONPATH"))))
    env = {**process_env(), "PYTHONPATH": path}
    found = subprocess.run([sys.executable, "-c", "import torch"], env=env, capture_output=True, check=False)
    if b"ModuleNotFoundError" in found.stderr:
        pytest.skip("torch is not installed; golden logits serve")
    out = tmp_path_factory.mktemp("oracle") / "logits.npz"
    subprocess.run([sys.executable, "-m", "tests.support.oracle", str(out)], env=env, check=True)
    with np.load(out) as logits:
        return dict(logits)


@pytest.mark.oracle
@pytest.mark.parametrize("case", oracle.CASES)
def test_logits_equal_the_live_oracle(case: str, live_logits: Any) -> None:
    actual = np.array(build(case, oracle.LIVE_SEED)(mx.array(oracle.LIVE_TOKENS)))
    np.testing.assert_allclose(actual, live_logits[case], atol=1e-4, rtol=0)


CONFIG = tiny.make_config(d_model=64, ffn_hidden=128, n_experts=4, top_k=2)
GEOMETRY = read_geometry(CONFIG)


def lay_out(layout: str) -> dict[str, mx.array]:
    if layout == "turned":
        weights = tiny.to_layout(tiny.make_weights(GEOMETRY), GEOMETRY, "mlx")
        return {name: value.T if ".w2." in name else value for name, value in weights.items()}
    return tiny.to_layout(tiny.make_weights(GEOMETRY), GEOMETRY, layout)


def as_stored(weights: dict[str, mx.array]) -> dict[str, Expression]:
    return {name: Stored(name, form_of(tuple(value.shape), value.dtype)) for name, value in weights.items()}


@pytest.mark.parametrize("layout", ["fused", "v2", "mlx", "turned"])
def test_every_layout_gives_the_same_parameters(layout: str) -> None:
    model = make_skeleton(CONFIG).model
    expected = model.sanitize(lay_out("v2"))
    found = model.sanitize(lay_out(layout))
    assert found.keys() == expected.keys() == dict(tree_flatten(model.parameters())).keys()
    assert all(mx.array_equal(found[name], expected[name]).item() for name in expected)


@pytest.mark.parametrize("layout", ["fused", "v2", "mlx", "turned", "mlx-quantized"])
def test_copies_stay_plain(layout: str) -> None:
    weights = lay_out(layout)
    config: dict[str, Any] = dict(CONFIG)
    if layout == "mlx-quantized":
        config["quantization"] = {"bits": 4, "group_size": 64}
    model, form = make_skeleton(config).model, read_format(config)
    settled = settle(model, config, trace(model, as_stored(weights)), form)
    for name, node in settled.parameters.items():
        assert find_rectangles(node, full(node.shape)) is not None, name
    half = settled.parameters["transformer.blocks.0.ffn.experts.down_proj.weight"]
    experts, rows, columns = half.shape
    found = find_rectangles(half, ((0, experts), (0, rows), (0, columns // 2)))
    assert found is not None
    assert len(found) == experts
    assert all(rectangle.transposed == (layout in ("fused", "turned")) for rectangle in found)


def test_the_router_is_not_quantised_but_where_it_is_stored_so() -> None:
    model = make_skeleton(CONFIG).model
    assert not model.quant_predicate("transformer.blocks.0.ffn.router.layer", None)
    assert model.quant_predicate("transformer.blocks.0.ffn.experts.up_proj", None)
    weights = tiny.to_layout(tiny.make_weights(GEOMETRY), GEOMETRY, "mlx-quantized", quantize_router=True)
    config = {**CONFIG, "quantization": {"bits": 4, "group_size": 64}}
    settle(model, config, trace(model, as_stored(weights)), read_format(config))
    assert "scales" in model.layers[0].ffn.router.layer


def test_overrides_of_single_modules_are_renamed() -> None:
    eight = {"bits": 8, "group_size": 64}
    block = "transformer.blocks.0"
    table = {"bits": 4, "group_size": 64, f"{block}.norm_attn_norm.attn.Wqkv": eight, "lm_head": False}
    table |= {f"{block}.ffn.experts.{expert}.w1": eight for expert in range(4)}
    found = rename_table(table)
    assert found == {
        "bits": 4,
        "group_size": 64,
        "lm_head": False,
        **{f"{block}.norm_attn_norm.attn.{name}_proj": eight for name in "qkv"},
        f"{block}.ffn.experts.gate_proj": eight,
    }


def test_experts_that_are_quantised_in_two_ways_are_refused() -> None:
    one, other = (f"transformer.blocks.1.ffn.experts.{expert}.v1" for expert in (0, 3))
    table = {"bits": 4, "group_size": 64, one: {"bits": 8, "group_size": 64}, other: {"bits": 6, "group_size": 64}}
    with pytest.raises(CheckpointError, match=f"{one} and {other} differ"):
        read_format({**CONFIG, "quantization": table})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("transformer.blocks.0.ffn.experts.mlp.1.w1.weight", None, "no tensor transformer.blocks.0.ffn.experts.mlp.1"),
        ("transformer.blocks.0.ffn.experts.mlp.4.w1.weight", mx.zeros((128, 64)), "experts.mlp.4.w1.weight, and the"),
        ("transformer.blocks.0.norm_attn_norm.attn.out_proj.bias", mx.zeros((64,)), "out_proj.bias, and the model has"),
        ("transformer.blocks.2.norm_attn_norm.norm_1.weight", mx.zeros((64,)), "norm_1.weight, and the model has no"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(name: str, value: mx.array | None, message: str) -> None:
    model, weights = make_skeleton(CONFIG).model, lay_out("v2")
    weights.pop(name, None)
    if value is not None:
        weights[name] = value
    with pytest.raises(CheckpointError, match=message):
        check_parameters(
            {n: tuple(a.shape) for n, a in tree_flatten(model.parameters())}, trace(model, as_stored(weights))
        )


def test_old_tables_of_the_rotary_embedding_are_passed_over() -> None:
    model = make_skeleton(CONFIG).model
    old = {"transformer.blocks.0.norm_attn_norm.attn.rotary_emb.inv_freq": mx.zeros((8,))}
    assert model.sanitize({**lay_out("v2"), **old}).keys() == model.sanitize(lay_out("v2")).keys()


def test_config_json_is_checked() -> None:
    with pytest.raises(CheckpointError, match="activation is 'gelu'"):
        make_skeleton({**CONFIG, "ffn_config": {**CONFIG["ffn_config"], "ffn_act_fn": {"name": "gelu"}}})
