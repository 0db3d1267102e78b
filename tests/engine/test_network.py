"""The network against transformers' DbrxForCausalLM: golden logits always, the live oracle where torch is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from moectl.engine.network.dbrx import Experts, Model
from moectl.engine.network.experts import GROUP_FROM_PAIRS
from moectl.model.geometry import read_geometry
from moectl.model.placement import make_placement
from tests.support import oracle
from tests.support.ring import process_env


def build(case: str, split: str = "hidden", seed: int = oracle.GOLDEN_SEED) -> Model:
    """Build a one-rank model of an oracle case in float32."""
    config = oracle.make_config(case)
    geometry = read_geometry(config)
    model = Model(make_placement(geometry, split, 1))
    stacked = []
    for name, value in oracle.make_weights(config, seed).items():
        if ".mlp." not in name:
            stacked.append((name, mx.array(value)))
            continue
        prefix, projection = name.rsplit(".", 1)
        role = {"w1": "gate_proj", "v1": "up_proj", "w2": "down_proj"}[projection]
        w = mx.array(value).reshape(geometry.n_experts, geometry.ffn_hidden, geometry.d_model)
        stacked.append((f"{prefix}.{role}.weight", w.swapaxes(1, 2) if projection == "w2" else w))
    model.load_weights(stacked)
    model.eval()
    return model


def stepwise(model: Model, tokens: list[int]) -> mx.array:
    """Return logits (1, L, V) computed one token at a time through mlx-lm's cache."""
    cache = make_prompt_cache(model)
    return mx.concatenate([model(mx.array([[t]]), cache) for t in tokens], axis=1)


@pytest.mark.parametrize("split", ["hidden", "experts"])
@pytest.mark.parametrize("case", oracle.CASES)
def test_logits_equal_the_golden_ones(case: str, split: str) -> None:
    model = build(case, split)
    tokens = oracle.TOKENS[0]
    # With top-4 the whole prompt is grouped by expert, and a single step gathers.
    assert 4 < GROUP_FROM_PAIRS <= 4 * len(tokens)
    with np.load(oracle.GOLDEN) as golden:
        expected = golden[case]
    prefill = np.array(model(mx.array(oracle.TOKENS)))
    np.testing.assert_allclose(prefill, expected, atol=1e-4, rtol=0)
    np.testing.assert_allclose(np.array(stepwise(model, tokens)), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("length", [1, 5, 40])
def test_grouped_and_gathered_prefill_agree(length: int) -> None:
    model = build("base")
    tokens = [int(t) for t in np.random.RandomState(length).randint(0, 96, length)]
    whole = np.array(model(mx.array([tokens])))
    np.testing.assert_allclose(whole, np.array(stepwise(model, tokens)), atol=1e-4, rtol=0)


def test_a_batch_of_large_experts_is_grouped_and_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = build("base").layers[0].ffn.experts
    geometry = read_geometry(oracle.make_config("base"))
    x = mx.random.normal((3, geometry.d_model), key=mx.random.key(1))
    indices = mx.array([[0, 1, 2, 3], [3, 2, 1, 0], [1, 5, 6, 7]])[:, : geometry.top_k]
    weights = mx.random.uniform(shape=indices.shape, key=mx.random.key(2))
    gathered = np.array(experts(x, indices, weights))
    assert not experts.waits_for_host(indices)
    monkeypatch.setattr("moectl.engine.network.experts.LARGE_ELEMENTS", 1)
    assert experts.waits_for_host(indices)
    assert not experts.waits_for_host(indices[:1])
    np.testing.assert_allclose(np.array(experts(x, indices, weights)), gathered, atol=1e-5, rtol=0)


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_owners_of_copies_add_up_to_all_experts(replicas: int, tokens: int) -> None:
    geometry = read_geometry(oracle.make_config("base"))
    alone = Experts(make_placement(geometry, "experts", 1), 0)
    placement = make_placement(geometry, "experts", 3, replicas=replicas, frequencies=[8, 1, 1, 5, 1, 1, 1, 2])
    x = mx.random.normal((tokens, geometry.d_model), key=mx.random.key(1))
    scores = mx.random.uniform(shape=(tokens, geometry.n_experts), key=mx.random.key(2))
    indices = mx.argpartition(-scores, kth=geometry.top_k - 1, axis=-1)[:, : geometry.top_k]
    weights = mx.take_along_axis(scores, indices, axis=-1)
    total, owners = mx.zeros_like(x), np.zeros(indices.shape, dtype=int)
    for rank in range(3):
        part = Experts(placement, rank)
        numbers = mx.array(placement.experts_of(rank))
        for name in ("gate_proj", "up_proj", "down_proj"):
            part.mlp[name].weight = alone.mlp[name].weight[numbers]
        total += part(x, indices, weights)
        owners += part._own(indices) >= 0
    assert (owners == 1).all()
    np.testing.assert_allclose(np.array(total), np.array(alone(x, indices, weights)), atol=1e-5, rtol=0)


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
    actual = np.array(build(case, seed=oracle.LIVE_SEED)(mx.array(oracle.LIVE_TOKENS)))
    np.testing.assert_allclose(actual, live_logits[case], atol=1e-4, rtol=0)
