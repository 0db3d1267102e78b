"""Every model file's `sanitize`, traced, against the same `sanitize` on real arrays: names, values, random regions.

A layout as publishers have it is made from the model's own parameters by undoing, one after another, what `sanitize`
does; an undoing counts where mlx-lm's real `sanitize` leads back from it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from moectl.errors import CheckpointError
from moectl.model.regions import Region
from moectl.shards.trace.parts import full, part
from moectl.shards.trace.traced import Stored, form_of, trace
from tests.shards.test_trace import compare_all, equal
from tests.support.layouts import write_tensors
from tests.support.traced import load_whole, make_model, open_traced

Weights = dict[str, mx.array]
FAMILIES: dict[str, Any] = json.loads((Path(__file__).parent.parent / "golden/families.json").read_text("utf-8"))
SAME = {name: name for name in ("gate_proj", "up_proj", "down_proj", "fc1", "fc2")}
NUMBERED = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def rename(old: str, new: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name.replace(old, new): value for name, value in weights.items()}


def one_by_one(stack: str, names: dict[str, str]) -> Callable[[Weights], Weights]:
    """Give each expert tensors of its own."""

    def undo(weights: Weights) -> Weights:
        made: Weights = {}
        for name, value in weights.items():
            base, _, array = name.rpartition(".")
            parent, _, projection = base.rpartition(".")
            if not parent.endswith(f".{stack}") or projection not in names:
                made[name] = value
                continue
            for e in range(value.shape[0]):
                made[f"{parent.removesuffix(stack)}experts.{e}.{names[projection]}.{array}"] = value[e]
        return made

    return undo


def fused(stack: str, *, turned: bool) -> Callable[[Weights], Weights]:
    """Put the gate and up projections of all experts into one tensor."""

    def turn(value: mx.array) -> mx.array:
        return value.swapaxes(1, 2) if turned else value

    def undo(weights: Weights) -> Weights:
        made = dict(weights)
        for name in weights:
            if name.endswith(f"{stack}.gate_proj.weight"):
                base = name.removesuffix("gate_proj.weight")
                parts = [made.pop(f"{base}{p}_proj.weight") for p in ("gate", "up", "down")]
                target = f"{base.removesuffix(f'{stack}.')}experts"
                made[f"{target}.gate_up_proj"] = turn(mx.concatenate(parts[:2], 1))
                made[f"{target}.down_proj"] = turn(parts[2])
        return made

    return undo


def turned_convolutions(weights: Weights) -> Weights:
    return {
        name: value.swapaxes(1, 2) if "conv" in name and value.ndim == 3 and value.shape[-1] == 1 else value
        for name, value in weights.items()
    }


def joined_latent(weights: Weights) -> Weights:
    """Put what MLA makes of a latent into one projection, as DeepSeek stores it."""
    made = dict(weights)
    for name in weights:
        if name.endswith(".embed_q.weight"):
            base = name.removesuffix("embed_q.weight")
            keys, values = made.pop(name), made.pop(f"{base}unembed_out.weight")
            made[f"{base}kv_b_proj.weight"] = mx.concatenate([keys.swapaxes(1, 2), values], 1).reshape(
                -1, keys.shape[1]
            )
    return made


UNDO: dict[str, Callable[[Weights], Weights]] = {
    "convolutions": turned_convolutions,
    "latent": joined_latent,
    "experts": one_by_one("switch_mlp", SAME),
    "experts-w": one_by_one("switch_mlp", NUMBERED),
    "experts-same": one_by_one("experts", SAME),
    "experts-block": lambda weights: one_by_one("switch_mlp", NUMBERED)(
        rename(".mlp.switch_mlp.", ".block_sparse_moe.switch_mlp.")(weights)
    ),
    "fused": fused("switch_mlp", turned=False),
    "fused-turned": fused("switch_mlp", turned=True),
    "fused-experts": fused("experts", turned=True),
    "fused-glu": fused("experts.switch_glu", turned=False),
    "vision": rename("language_model.model.", "model.language_model."),
    "prefix": rename("language_model.", ""),
}


def copied(weights: Weights) -> Weights:
    return {name: mx.array(value) for name, value in weights.items()}  # `sanitize` may change arrays in place


def sanitize(config: dict[str, Any], weights: Weights) -> Weights:
    model = make_model(config)
    made: Weights = model.sanitize(copied(weights)) if hasattr(model, "sanitize") else weights
    return made


def random_weights(config: dict[str, Any]) -> Weights:
    mx.random.seed(5)
    parameters = dict(tree_flatten(make_model(config).parameters()))
    return {
        name: mx.random.normal(a.shape).astype(mx.bfloat16) if a.ndim > 1 and a.dtype == mx.float32 else a
        for name, a in parameters.items()
    }


def undo_all(config: dict[str, Any]) -> tuple[Weights, list[str]]:
    """Return the most original layout from which `sanitize` leads to the model's parameters, and its steps."""
    weights = random_weights(config)
    wanted = {name: value.shape for name, value in weights.items()}
    steps = []
    for step, undo in UNDO.items():
        try:
            before = undo(weights)
            if {n: a.shape for n, a in before.items()} == {n: a.shape for n, a in weights.items()}:
                continue
            made = sanitize(config, before)
        except (KeyError, ValueError, IndexError):
            continue
        if {name: value.shape for name, value in made.items()} == wanted:
            weights = before
            steps.append(step)
    return weights, steps


def compare(config: dict[str, Any], weights: Weights) -> None:
    def read(name: str, dtype: mx.Dtype, region: Region) -> mx.array:
        whole = weights[name].view(dtype)
        return whole[tuple(slice(*span) for span in region)] if region else whole

    real = sanitize(config, weights)
    stored = {name: Stored(name, form_of(tuple(a.shape), a.dtype)) for name, a in weights.items()}
    traced = trace(make_model(config), stored)
    assert list(traced) == list(real)
    random = Random(1)
    for name, expected in real.items():
        node = traced[name]
        assert equal(part(node, full(node.shape), read), expected), name
        starts = [random.randrange(n) for n in node.shape]
        region = tuple((a, random.randrange(a + 1, n + 1)) for a, n in zip(starts, node.shape, strict=True))
        assert equal(part(node, region, read), expected[tuple(slice(*span) for span in region)]), (name, region)


ALWAYS = (
    *("deepseek_v3", "deepseek_v41", "falcon_h1", "gemma4", "glm4_moe", "gpt_oss", "hunyuan", "kimi_k25", "kimi_k3"),
    *("llama4", "minimax", "minimax_m3_vl", "mistral4", "mixtral", "muse_spark", "nemotron_h", "qwen3_5_moe"),
    *("qwen3_moe", "qwen3_next"),
)
OTHERS = sorted(FAMILIES.keys() - {*ALWAYS, "olmo"})  # olmo's file ends Python where hf_olmo is not installed


@pytest.mark.parametrize("family", [*ALWAYS, *[pytest.param(name, marks=pytest.mark.long) for name in OTHERS]])
def test_every_sanitize_can_be_traced(family: str) -> None:
    config = FAMILIES[family]
    weights, _ = undo_all(config)
    compare(config, weights)


def test_layouts_of_publishers_are_undone() -> None:
    def steps(family: str) -> list[str]:
        return undo_all(FAMILIES[family])[1]

    assert steps("mixtral") == ["experts-w"]
    assert steps("deepseek_v3") == ["latent", "experts"]
    assert steps("Klear") == ["experts-same"]
    assert steps("qwen3_vl_moe") == ["fused-turned"]


def test_a_sanitize_that_looks_at_values_is_refused() -> None:
    class Model:
        model_type = "curious"

        def sanitize(self, weights: dict[str, Any]) -> dict[str, Any]:
            return weights if (weights["a"] > 0).any() else {}

    with pytest.raises(CheckpointError, match=r"mlx-lm's loading of curious .* looks at the values"):
        trace(Model(), {"a": Stored("a", form_of((2,), mx.float32))})


def packed(
    weights: Weights, mode: str, bits: int, names: tuple[str, str], only: str
) -> list[tuple[str, mx.array, str]]:
    """Store the matrices under names with `only` packed, in bytes: with exponents of groups of 32."""
    made = []
    for name, value in weights.items():
        base = name.removesuffix(".weight")
        if value.ndim < 2 or only not in name or base == name or value.shape[-1] % 32:
            made.append((name, value, {mx.bfloat16: "BF16", mx.float32: "F32"}[value.dtype]))
            continue
        values, scales, *_ = mx.quantize(value.astype(mx.float32), group_size=32, bits=bits, mode=mode)
        made += [(f"{base}.{names[0]}", values.view(mx.uint8), "U8"), (f"{base}.{names[1]}", scales, "U8")]
    return made


@pytest.mark.parametrize(
    ("family", "quantised", "mode", "names", "only"),
    [
        (
            "minimax_m3_vl",
            {"quant_method": "mxfp8"},
            ("mxfp8", 8),
            ("weight", "weight_scale_inv"),
            "block_sparse_moe.experts.",
        ),
        (
            "kimi_k3",
            {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"},
            ("mxfp4", 4),
            ("weight_packed", "weight_scale"),
            "block_sparse_moe.experts.",
        ),
    ],
    ids=["minimax_m3_vl", "kimi_k3"],
)
def test_formats_that_stay_packed_come_out_as_mlx_lm_loads_them(
    family: str,
    quantised: dict[str, Any],
    mode: tuple[str, int],
    names: tuple[str, str],
    only: str,
    tmp_path: Path,
) -> None:
    config = FAMILIES[family] | {"quantization_config": quantised}
    weights, steps = undo_all(FAMILIES[family])
    assert {"experts-w", "experts-block"} & {*steps}
    write_tensors(tmp_path, config, iter(packed(weights, *mode, names, only)))
    compare_all(open_traced(tmp_path), load_whole(tmp_path))
