"""Stored formats and precisions: what is read, and what is refused by name before anything is written."""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from mlx_lm import utils
from mlx_lm.convert import MODEL_CONVERSION_DTYPES, QUANT_RECIPES, convert, mixed_quant_predicate_builder

from moectl.errors import CheckpointError, MoectlError, PlanError
from moectl.model.structure import Quantization
from moectl.shards.source.stored import name_stored
from moectl.shards.source.tensors import StoredTensor
from moectl.shards.trace.formats import read_format, unpack
from moectl.shards.trace.parts import part
from moectl.shards.trace.precision import settle
from moectl.shards.trace.traced import Stored, form_of
from tests.support.layouts import fp8, noise, write_layout, write_tensors
from tests.support.tiny import json_values
from tests.support.traced import make_model, open_traced

KEYS = (
    *("quantization", "quantization_config", "text_config", "quant_method", "format", "config_groups", "weights"),
    *("bits", "group_size", "mode", "weight_block_size", "scale_fmt", "quant_algo", "quantize_activations"),
)


def compressed(**changes: Any) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    group = {"weights": {**weights, **changes.pop("weights", {})}, "input_activations": None, **changes}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}


def hint_of(call: Callable[[], Any], kind: type[MoectlError], match: str) -> str:
    with pytest.raises(kind, match=match) as caught:
        call()
    return caught.value.hint or ""


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "'awq'"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "'gptq'"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes'"),
        ({"quant_method": "bitnet"}, "'bitnet'"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "modelopt as 'FP8'"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "'float-quantized'"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "'nvfp4-pack-quantized'"),
        (compressed(weights={"num_bits": 8}), "group_0.weights.num_bits = 8"),
        (compressed(weights={"symmetric": False}), "group_0.weights.symmetric = False"),
        (compressed(weights={"strategy": "channel"}), "group_0.weights.strategy = 'channel'"),
        (compressed(weights={"actorder": "group"}), "group_0.weights.actorder = 'group'"),
        (compressed(weights={"group_size": 48}), "groups of 48"),
        (compressed(input_activations={"num_bits": 8}), "group_0.input_activations"),
    ],
    ids=str,
)
def test_formats_that_are_not_read_are_refused_by_name(raw: dict[str, Any], named: str) -> None:
    for config in ({"quantization_config": raw}, {"text_config": {"quantization_config": raw}}):
        with pytest.raises(CheckpointError, match=r"is quantised .* which moectl does not read") as caught:
            read_format(config)
        assert named in caught.value.message


def test_a_copy_that_mlx_has_quantised_is_taken_as_the_hint_says() -> None:
    hint = hint_of(lambda: read_format({"quantization_config": {"quant_method": "awq"}}), CheckpointError, "awq")
    assert "or from one that MLX has quantised" in hint
    assert read_format({"quantization": {"bits": 4, "group_size": 64}}).kind == "mlx"
    assert read_format({}).kind == "plain"


WORDS = st.sampled_from(["fp8", "compressed-tensors", "modelopt", "mxfp4", "pack-quantized", "NVFP4", "ue8m0"])
TABLES = st.dictionaries(st.sampled_from(KEYS), WORDS | json_values, max_size=4)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(raw=TABLES, outer=TABLES)
def test_any_configuration_is_read_or_refused(raw: dict[str, Any], outer: dict[str, Any]) -> None:
    for config in (outer, raw, {**outer, "quantization_config": raw}, {**outer, "quantization": raw}):
        with contextlib.suppress(CheckpointError):
            assert read_format(config).kind in ("plain", "mlx", "fp8", "packed")


@pytest.mark.parametrize("name", ["a.weight_zero_point", "a.weight_g_idx"])
def test_packed_weights_with_zero_points_or_an_order_are_refused(name: str) -> None:
    form = read_format({"quantization_config": compressed()})
    with pytest.raises(CheckpointError, match=name.removeprefix("a.")):
        unpack({name: Stored(name, form_of((2, 2), mx.int32))}, form)


def test_a_scale_for_a_whole_weight_is_read(tmp_path: Path) -> None:
    def tensors() -> Any:
        for name, array, kind in fp8("a.weight", noise(64, 96), block=96):
            yield name, array.reshape(()) if name.endswith("_inv") else array, kind

    write_tensors(tmp_path, {}, tensors())
    loaded = mx.load(str(tmp_path / "model-00001-of-00001.safetensors"))
    assert isinstance(loaded, dict)
    expected = (mx.from_fp8(loaded["a.weight"], dtype=mx.bfloat16) * loaded["a.weight_scale_inv"]).astype(mx.bfloat16)
    form = read_format({"quantization_config": {"quant_method": "fp8"}})
    stored = {name: Stored(name, form_of(tuple(a.shape), a.dtype)) for name, a in loaded.items()}
    made = unpack(stored, form)
    assert made.keys() == {"a.weight"}
    got = part(
        made["a.weight"], ((3, 9), (5, 7)), lambda name, _, region: loaded[name][tuple(slice(*s) for s in region)]
    )
    assert mx.array_equal(got, expected[3:9, 5:7])


def test_a_type_that_mlx_does_not_read_is_refused() -> None:
    with pytest.raises(CheckpointError, match="a is stored as F8_E5M2"):
        name_stored({"a": StoredTensor("f", "F8_E5M2", (1,), 0)})


def change_weights(directory: Path, change: Callable[[dict[str, mx.array]], None]) -> None:
    """Rewrite the only file of a checkpoint."""
    [path] = directory.glob("*.safetensors")
    weights = mx.load(str(path))
    assert isinstance(weights, dict)
    mx.eval(weights)
    change(weights)
    mx.save_safetensors(str(path), weights)


def rename(old: str, new: str) -> Callable[[dict[str, mx.array]], None]:
    def change(weights: dict[str, mx.array]) -> None:
        weights[new] = weights.pop(old)

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda weights: weights.pop("model.layers.1.block_sparse_moe.experts.2.w3.weight"),
            "the checkpoint has no tensor model.layers.1.block_sparse_moe.experts.2.w3.weight",
        ),
        (
            lambda weights: weights.pop("model.layers.1.self_attn.q_proj.weight"),
            "does not give the parameter model.layers.1.self_attn.q_proj.weight",
        ),
        (
            rename("model.norm.weight", "model.norm.qweight"),
            "does not give the parameter model.norm.weight",
        ),
        (
            lambda weights: weights.update({"model.layers.0.odd.qzeros": mx.zeros((2, 2))}),
            "gives model.layers.0.odd.qzeros, and the model has no such parameter",
        ),
        (
            lambda weights: weights.update({"lm_head.weight": mx.zeros((160, 64))}),
            r"lm_head.weight has shape \(160, 64\) in the checkpoint, and \(160, 192\) by config.json",
        ),
    ],
    ids=["expert", "missing", "renamed", "unknown", "shape"],
)
def test_what_the_model_does_not_take_is_refused_by_name(change: Any, said: str, tmp_path: Path) -> None:
    directory = write_layout(tmp_path, "mixtral", files=1)
    change_weights(directory, change)
    with pytest.raises(CheckpointError, match=said):
        open_traced(directory)


def test_what_is_quantised_is_not_quantised_again(tmp_path: Path) -> None:
    directory = write_layout(tmp_path, "mlx-mixed")
    hint = hint_of(lambda: open_traced(directory, Quantization(4, 64, "affine")), PlanError, "quantised already")
    assert hint.startswith("leave --q-bits, --q-group-size and --q-mode out")
    assert open_traced(directory).settled.table is not None


def test_recipes_are_mlx_lms_and_affine_as_the_hint_says(tmp_path: Path) -> None:
    directory = write_layout(tmp_path, "qwen3")

    def cut(mode: str, recipe: str) -> Any:
        return open_traced(directory, Quantization(4, 32, mode), recipe).settled.table

    assert hint_of(lambda: cut("mxfp4", "mixed_4_6"), PlanError, "mixed_4_6 mixes affine") == "--q-mode affine"
    table = cut("affine", "mixed_4_6")
    assert table["lm_head"]["bits"] == 6
    assert table.get("model.layers.0.mlp.up_proj", table)["bits"] == 4  # a table names what differs
    with pytest.raises(PlanError, match="unknown recipe 'mixed_5_5'; it is one of mixed_2_6, mixed_3_4"):
        cut("affine", "mixed_5_5")


def test_groups_that_mlx_lm_cannot_make_are_changed_as_the_hint_says(tmp_path: Path) -> None:
    directory = write_layout(tmp_path, "qwen3-moe", hidden_size=96)  # its routers want groups of 64
    hint = hint_of(lambda: open_traced(directory, Quantization(4, 32, "affine")), PlanError, "mlx-lm cannot quantise")
    assert hint == "choose another --q-bits, --q-group-size or --q-mode"
    assert open_traced(directory, Quantization(4, 64, "affine")).settled.table is not None


def test_overrides_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    directory = write_layout(tmp_path, "mlx-mixed")
    config = json.loads((directory / "config.json").read_text())
    config["quantization"]["model.norm"] = {"bits": 4, "group_size": 64}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="quantization does not fit the model"):
        open_traced(directory)


def test_mlx_lm_has_the_internals_that_are_relied_on() -> None:
    """mlx-lm is pinned to a minor version; these are no part of its promises."""

    def names(function: Callable[..., Any]) -> list[str]:
        return list(inspect.signature(function).parameters)

    assert names(utils._get_classes) == ["config"]
    assert names(utils.infer_quant_config) == ["path", "module", "weights"]
    assert names(utils._takes_global_scale) == ["module"]
    assert names(utils.quantize_model)[:5] == ["model", "config", "group_size", "bits", "mode"]
    assert names(mixed_quant_predicate_builder) == ["recipe", "model", "group_size"]
    assert MODEL_CONVERSION_DTYPES == ["float16", "bfloat16", "float32"]
    assert QUANT_RECIPES[0] == "mixed_2_6"
    # `settle` decides as the closure in there does; `cast` as `convert.convert`.
    assert 'if f"{p}.scales" not in weights:' in inspect.getsource(utils.load_model)
    assert 'cast_predicate = getattr(model, "cast_predicate"' in inspect.getsource(convert)


def test_nothing_is_evaluated_to_settle(tmp_path: Path) -> None:
    directory = write_layout(tmp_path, "qwen3-next")
    config = json.loads((directory / "config.json").read_text())
    mx.synchronize()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    model = make_model(config | {"hidden_size": 8192, "vocab_size": 100_000})
    with pytest.raises(CheckpointError):
        settle(model, config, {}, read_format(config), Quantization(4, 64, "affine"))
    assert mx.get_peak_memory() - before < 1_000_000
