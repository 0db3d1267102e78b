"""Nothing in config.json or generation_config.json is passed over in silence: honoured, or refused by its name.

The independent reader is transformers: its DbrxConfig, its lists of keys, and (tests.support.oracle) its network.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from mlx_lm.models.cache import make_prompt_cache

from moectl import __main__
from moectl.demo import demo_dir
from moectl.engine.network.canary_run import compute_canary
from moectl.engine.network.load import load_rank
from moectl.errors import CheckpointError
from moectl.hosts.onhost.files import RECORD
from moectl.model.config_keys import check_generation, list_ignored
from moectl.model.geometry import DBRX, Geometry, read_geometry
from moectl.model.manifest import read_manifest
from moectl.shards import prepare
from moectl.shards.blueprint import draw, find_quantization
from moectl.shards.prepare import Wanted
from moectl.shards.source.checkpoint import open_checkpoint
from tests.support import published
from tests.support.tiny import make_weights, to_layout, write_checkpoint, write_weights, write_words

Edit = Callable[[dict[str, Any]], object]


def edited(edit: Edit, config: dict[str, Any] | None = None) -> dict[str, Any]:
    config = copy.deepcopy(config or published.shrink(published.ORIGINAL))
    edit(config)
    return config


def put(path: str, value: Any) -> Edit:
    """Return what sets a key; `path` is its name, after `attn_config.` or `ffn_config.` where it stands there."""
    *parts, key = path.split(".")

    def edit(config: dict[str, Any]) -> None:
        for part in parts:
            config = config.setdefault(part, {})
        config[key] = value

    return edit


def refusal(config: dict[str, Any]) -> CheckpointError | None:
    try:
        read_geometry(config)
        find_quantization(config)
    except CheckpointError as error:
        return error
    return None


# Published checkpoints.


@pytest.mark.parametrize("name", published.CONFIGS)
def test_published_configs_are_read(name: str) -> None:
    config = published.CONFIGS[name]
    assert read_geometry(config) == DBRX
    assert list_ignored(config, published.GENERATION) == ()
    check_generation(published.GENERATION)
    if name == "mlx":
        quantization = find_quantization(config)
        assert quantization is not None
        assert (quantization.bits, quantization.group_size, quantization.mode) == (4, 64, "affine")


def test_the_table_knows_every_key_of_transformers() -> None:
    from transformers import DbrxConfig, GenerationConfig, PreTrainedConfig

    config = published.shrink(published.ORIGINAL)
    theirs = DbrxConfig(d_model=64, n_heads=4, n_layers=2, vocab_size=128, max_seq_len=512).to_dict()
    for place, keys in (
        ("", [*PreTrainedConfig().to_dict(), *theirs, *GenerationConfig().to_dict()]),
        ("attn_config.", theirs["attn_config"]),
        ("ffn_config.", theirs["ffn_config"]),
    ):
        for key in set(keys) - {"attn_config", "ffn_config", "model_type"}:
            refused = refusal(edited(put(place + key, ["odd"]), config))
            assert refused is None or (key in refused.message and "does not know" not in refused.message), key
    generation = {key: ["odd"] for key in GenerationConfig().to_dict()}
    assert not any("does not know" in note for note in list_ignored({}, generation))


# Refused by name.

REFUSED: list[tuple[str, Any]] = [
    *[("rope_parameters.rope_type", kind) for kind in ("dynamic", "longrope", "proportional", "mrope", "su", 7)],
    ("rope_scaling", {"type": "dynamic", "factor": 2.0}),
    ("rope_scaling", {"rope_type": "linear", "type": "yarn", "factor": 2.0}),
    ("rope_scaling", {"type": "linear"}),
    ("rope_scaling", {"factor": 2.0}),
    ("rope_scaling", {"type": "linear", "factor": -1}),
    ("rope_scaling", {"type": "yarn", "factor": 2.0, "attention_factor": 1.5}),
    ("rope_scaling", {"type": "yarn", "factor": 2.0, "truncate": False}),
    ("rope_scaling", {"type": "yarn", "factor": 2.0, "mscale": 0.7}),
    ("rope_scaling", {"type": "llama3", "factor": 2.0}),
    ("rope_scaling", {"type": "llama3", "factor": 2.0, "low_freq_factor": 4, "high_freq_factor": 4}),
    ("rope_scaling", "yarn"),
    ("rope_parameters", {"full_attention": {"rope_type": "default", "rope_theta": 500000}}),
    ("rope_parameters.rope_theta", 10000),
    ("rope_theta", 10000.0),
    ("rope_theta", True),
    ("attn_config.rope_theta", "500000"),
    ("attn_config.rope_scaling", {"type": "dynamic", "factor": 2.0}),
    ("partial_rotary_factor", 0.5),
    ("attn_config.partial_rotary_factor", 0.25),
    ("rope_parameters.partial_rotary_factor", 0.5),
    ("original_max_position_embeddings", 128),
    ("tie_word_embeddings", True),
    ("ffn_config.ffn_act_fn", {"name": "gelu"}),
    ("ffn_config.ffn_act_fn", {"name": "silu", "inplace": True}),
    ("ffn_config.ffn_act_fn", {}),
    ("ffn_config.uniform_expert_assignment", True),
    ("ffn_config.moe_normalize_expert_weights", True),
    ("ffn_config.moe_shared_experts", 1),
    ("ffn_config.hidden_size", 128),
    ("ffn_config.bias", False),
    ("attn_config.attn_type", "multihead_attention"),
    ("attn_config.qk_ln", True),
    ("attn_config.sliding_window_size", -1),
    ("attn_config.clip_qkv", "8"),
    ("hidden_size", 128),
    ("num_hidden_layers", 4),
    ("num_attention_heads", 8),
    ("max_position_embeddings", 4096),
    ("num_key_value_heads", 4),
    ("head_dim", 32),
    ("num_local_experts", 8),
    ("num_experts_per_tok", 2),
    ("sliding_window", 4096),
    ("attention_bias", True),
    ("no_bias", False),
    ("logit_scale", 0.5),
    ("final_logit_softcapping", 30.0),
    ("hidden_act", "gelu"),
    ("norm_eps", 1e-6),
    ("layer_types", ["sliding_attention", "full_attention"]),
    ("per_layer_config", {"0": {}}),
    ("is_encoder_decoder", True),
    ("pruned_heads", {"0": [1]}),
    ("model_file", "my_dbrx.py"),
    ("auto_map", {"AutoModelForCausalLM": "modeling_mine.MyForCausalLM"}),
    ("architectures", ["DbrxForSequenceClassification"]),
    ("prefix", "Answer: "),
    ("an_unknown_switch", False),
    ("another_number", 3),
    ("repetition_penalty", 1.1),
    ("suppress_tokens", [1]),
]


@pytest.mark.parametrize(("path", "value"), REFUSED)
def test_what_changes_numbers_is_refused_by_name(path: str, value: Any) -> None:
    refused = refusal(edited(put(path, value)))
    assert refused is not None
    assert refused.exit_code == 4
    assert refused.message.startswith("config.json: ")
    assert path.rpartition(".")[2] in refused.message
    assert refused.hint


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("rope_scaling", None),
        ("rope_scaling", {}),
        ("rope_parameters", {"rope_type": "default", "type": "default", "rope_theta": 500000.0}),
        ("rope_parameters", {"type": None, "rope_theta": 500000, "partial_rotary_factor": 1.0, "factor": 1.0}),
        ("rope_theta", 500_000),
        ("hidden_size", 64),
        ("num_hidden_layers", 2),
        ("head_dim", 16),
        ("sliding_window", None),
        ("an_unknown_switch", None),
        ("attention_bias", False),
        ("norm_eps", 1e-5),
        ("ffn_config.ffn_act_fn", {"name": "silu"}),
        ("ffn_config.moe_jitter_eps", 0.01),
        ("attn_config.attn_pdrop", 0.1),
        ("_name_or_path", "databricks/dbrx-instruct"),
        ("auto_map", {"AutoModelForCausalLM": "databricks/dbrx-instruct--modeling_dbrx.DbrxForCausalLM"}),
        ("quantization", None),
        ("repetition_penalty", 1.0),
    ],
)
def test_what_changes_nothing_is_no_obstacle(path: str, value: Any) -> None:
    plain = published.shrink(published.ORIGINAL)
    config = edited(put(path, value))
    assert read_geometry(config) == read_geometry(plain)
    assert find_quantization(config) is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("encoder_repetition_penalty", 1.2),
        ("no_repeat_ngram_size", 3),
        ("bad_words_ids", [[5]]),
        ("suppress_tokens", [5]),
        ("begin_suppress_tokens", [5]),
        ("sequence_bias", [[[5], -10.0]]),
        ("forced_bos_token_id", 5),
        ("forced_eos_token_id", 5),
        ("forced_decoder_ids", [[1, 5]]),
        ("force_words_ids", [[5]]),
        ("exponential_decay_length_penalty", [10, 1.5]),
        ("min_length", 10),
        ("min_new_tokens", 10),
        ("stop_strings", ["User:"]),
        ("num_beams", 4),
        ("penalty_alpha", 0.6),
        ("guidance_scale", 1.5),
        ("dola_layers", "high"),
        ("token_healing", True),
        ("watermarking_config", {"bias": 2.0}),
        ("cache_implementation", "quantized"),
    ],
)
def test_generation_settings_that_change_greedy_answers_are_refused(key: str, value: Any, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "m")
    (directory / "generation_config.json").write_text(json.dumps({**published.GENERATION, key: value}))
    with pytest.raises(CheckpointError, match=rf"^generation_config\.json: {key} is ") as caught:
        open_checkpoint(str(directory))
    assert "remove the key" in (caught.value.hint or "")


@pytest.fixture
def moectl(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    def call(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["moectl", *words])
        monkeypatch.setattr(sys, "stdin", None)
        code = __main__.run()
        return code, capsys.readouterr().err

    return call


@pytest.mark.parametrize("verb", ["plan", "shard"])
@pytest.mark.parametrize(
    ("file", "path", "value"),
    [
        ("config.json", "rope_scaling", {"type": "dynamic", "factor": 4}),
        ("config.json", "sliding_window", 128),
        ("config.json", "ffn_config.moe_shared_experts", 1),
        ("generation_config.json", "suppress_tokens", [3]),
    ],
)
def test_nothing_is_written_of_what_is_refused(
    verb: str, file: str, path: str, value: Any, tmp_path: Path, moectl: Any
) -> None:
    directory, output = write_checkpoint(tmp_path / "m"), tmp_path / "shards"
    content = json.loads((directory / file).read_text())
    put(path, value)(content)
    (directory / file).write_text(json.dumps(content))
    words = ["--nodes", "1", "-o", str(output)] if verb == "shard" else ["--hosts", "localhost"]
    code, err = moectl(verb, str(directory), *words)
    assert code == 4, err
    assert f"{file}: {path}" in err
    assert "Hint: " in err
    assert not output.exists()


def test_a_set_that_was_cut_from_such_a_config_names_the_key_too(tmp_path: Path, moectl: Any) -> None:
    prepare.shard(str(write_checkpoint(tmp_path / "m")), Wanted(nodes=1), directory=tmp_path / "s")
    manifest = json.loads((tmp_path / "s" / "moectl.json").read_text())
    manifest["config"]["sliding_window"] = 128
    (tmp_path / "s" / "moectl.json").write_text(json.dumps(manifest))
    (tmp_path / "s" / RECORD).unlink()  # it would tell that the manifest has changed
    code, err = moectl("run", "--shards", str(tmp_path / "s"), "Hello")
    assert code == 4
    assert "config.json: sliding_window is 128: moectl does not support it" in err


def test_settings_that_are_left_to_requests_are_told_first(tmp_path: Path, moectl: Any) -> None:
    directory = write_words(write_checkpoint(tmp_path / "m"))
    sampling = {"do_sample": True, "temperature": 0.6, "typical_p": 0.9, "max_new_tokens": 512, "mood": "dry"}
    (directory / "generation_config.json").write_text(json.dumps({**published.GENERATION, **sampling}))
    code, err = moectl("shard", str(directory), "--nodes", "1", "--dry-run", "-o", str(tmp_path / "s"))
    assert code == 0, err
    told = "generation_config.json: not used, each request sets its own: typical_p 0.9, max_new_tokens 512"
    assert f"Warning: {told} (--max-tokens)\n" in err
    assert 'Warning: generation_config.json: not used, moectl does not know: mood "dry"\n' in err


# Rope: the same numbers, wherever they stand.

MOVED: dict[str, Edit] = {
    "as it is": lambda c: None,
    "rope_parameters": lambda c: c["attn_config"].pop("rope_theta"),
    "top level": lambda c: (c["attn_config"].pop("rope_theta"), c.pop("rope_parameters"), c.update(rope_theta=500000)),
    "rope_scaling": lambda c: (
        c["attn_config"].pop("rope_theta"),
        c.pop("rope_parameters"),
        c.update(rope_scaling={"type": "default", "rope_theta": 5e5}),
    ),
    "attn_config.rope_parameters": lambda c: c["attn_config"].update(
        rope_parameters={"rope_theta": c["attn_config"].pop("rope_theta")}
    ),
}


def test_the_demo_answers_alike_wherever_its_rope_theta_stands(tmp_path: Path) -> None:
    answers, canaries = {}, {}
    for number, (where, edit) in enumerate(MOVED.items()):
        source, output = tmp_path / f"m{number}", tmp_path / f"s{number}"
        source.mkdir()
        for file in demo_dir().iterdir():
            if file.is_file():
                (source / file.name).symlink_to(file)
        (source / "config.json").unlink()
        config = edited(edit, json.loads((demo_dir() / "config.json").read_text()))
        (source / "config.json").write_text(json.dumps(config))
        prepare.shard(str(source), Wanted(nodes=1), directory=output)
        manifest = read_manifest(output)
        answers[where] = generate(load_rank(output, manifest, 0, dtype=mx.float32), [2, 31, 512, 77, 100, 9], 40)
        canaries[where] = compute_canary(output, manifest)
    assert {tuple(tokens) for tokens in answers.values()} == {tuple(answers["as it is"])}
    assert len(set(canaries.values())) == 1
    # It matters: with another theta the same weights give another answer.
    changed = edited(put("attn_config.rope_theta", 10_000), json.loads((demo_dir() / "config.json").read_text()))
    changed.pop("rope_parameters")
    assert read_geometry(changed).rope_theta == 10_000


def generate(model: Any, prompt: list[int], count: int) -> list[int]:
    cache, tokens = make_prompt_cache(model), list(prompt)
    logits = model(mx.array([prompt]), cache)
    for _ in range(count):
        tokens.append(mx.argmax(logits[0, -1]).tolist())  # type: ignore[arg-type]
        logits = model(mx.array([tokens[-1:]]), cache)
    return tokens[len(prompt) :]


# Against the independent reader.

_SIZES = st.sampled_from([1, 2, 3, 4, 8, 16, 64, 384, 512])
_ROPES = st.fixed_dictionaries(
    {},
    optional={
        "rope_type": st.sampled_from(["default", "linear", "llama3", "yarn", "dynamic", "longrope", None]),
        "type": st.sampled_from(["default", "linear", "yarn"]),
        "rope_theta": st.sampled_from([10_000, 500_000, 500_000.0]),
        "factor": st.sampled_from([1.0, 2.0, 8]),
        "low_freq_factor": st.just(1.0),
        "high_freq_factor": st.just(4.0),
        "original_max_position_embeddings": st.sampled_from([128, 256]),
        "beta_fast": st.sampled_from([16, 32]),
        "beta_slow": st.sampled_from([1, 2]),
        "partial_rotary_factor": st.sampled_from([0.5, 1.0]),
        "attention_factor": st.sampled_from([None, 1.2]),
    },
)
_VALUES: dict[str, st.SearchStrategy[Any]] = {
    **dict.fromkeys(("n_layers", "d_model", "n_heads", "vocab_size", "max_seq_len"), _SIZES),
    **dict.fromkeys(
        ("num_hidden_layers", "hidden_size", "num_attention_heads", "max_position_embeddings", "head_dim"), _SIZES
    ),
    **dict.fromkeys(("ffn_config.ffn_hidden_size", "ffn_config.moe_num_experts", "ffn_config.moe_top_k"), _SIZES),
    "num_key_value_heads": _SIZES,
    "ffn_config.hidden_size": _SIZES,
    "attn_config.kv_n_heads": _SIZES,
    "attn_config.clip_qkv": st.sampled_from([None, 0.5, 8, 1e4]),
    "attn_config.rope_theta": st.sampled_from([10_000.0, 500_000.0, None]),
    "ffn_config.moe_normalize_expert_weights": st.sampled_from([None, 1.0, 2.0]),
    "ffn_config.ffn_act_fn": st.sampled_from([None, {"name": "silu"}, {"name": "gelu"}, {"name": "silu", "a": 1}]),
    "ffn_config.uniform_expert_assignment": st.booleans(),
    "rope_theta": st.sampled_from([10_000.0, 500_000.0, 1_000_000]),
    "rope_parameters": _ROPES,
    "rope_scaling": _ROPES | st.none(),
    "partial_rotary_factor": st.sampled_from([0.5, 1.0]),
    "tie_word_embeddings": st.booleans(),
    "sliding_window": st.sampled_from([None, 128]),
    "attention_bias": st.booleans(),
}
GONE = object()


@st.composite
def mutations(draw: st.DrawFn) -> tuple[dict[str, Any], list[str]]:
    """Draw a published config with up to three keys changed or gone, and their paths."""
    config = published.shrink(published.CONFIGS[draw(st.sampled_from(sorted(published.CONFIGS)))])
    config.pop("quantization", None)
    paths = draw(st.lists(st.sampled_from(sorted(_VALUES)), min_size=1, max_size=3, unique=True))
    for path in paths:
        value = draw(_VALUES[path] | st.just(GONE))
        if value is not GONE:
            put(path, copy.deepcopy(value))(config)
            continue
        *parts, key = path.split(".")
        (config[parts[0]] if parts else config).pop(key, None)
    return config, paths


def read_independently(config: dict[str, Any]) -> Geometry | None:
    """Return what transformers' DbrxConfig reads; None where it refuses the config.

    Its known trap: it reads neither theta nor anything else of rope in attn_config; databricks' code does.
    """
    from transformers import DbrxConfig

    given = copy.deepcopy(config)
    normalize = given["ffn_config"].get("moe_normalize_expert_weights")
    if isinstance(normalize, int):  # and it takes no whole number here
        given["ffn_config"]["moe_normalize_expert_weights"] = float(normalize)
    try:
        theirs = DbrxConfig.from_dict(given)
    except Exception:
        return None
    rope = dict(theirs.rope_parameters)
    attn, ffn = theirs.attn_config, theirs.ffn_config
    names = {"default": (), "linear": ("factor",)}.get(rope["rope_type"])
    if names is None:
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if rope["rope_type"] == "yarn":
        rope = {"beta_fast": 32, "beta_slow": 1} | {key: value for key, value in rope.items() if value is not None}
        names = ("factor", "beta_fast", "beta_slow", "original_max_position_embeddings")
    scaling = tuple((name, rope.get(name)) for name in names)
    theta = config["attn_config"].get("rope_theta")
    return Geometry(
        n_layers=theirs.num_hidden_layers,
        d_model=theirs.hidden_size,
        n_heads=theirs.num_attention_heads,
        kv_n_heads=attn.kv_n_heads,
        ffn_hidden=ffn.ffn_hidden_size,
        n_experts=ffn.moe_num_experts,
        top_k=ffn.moe_top_k,
        vocab_size=theirs.vocab_size,
        max_seq_len=theirs.max_position_embeddings,
        rope_theta=rope["rope_theta"] if theta is None else theta,
        clip_qkv=attn.clip_qkv,
        moe_normalize=ffn.moe_normalize_expert_weights,
        rope_scaling=(("rope_type", rope["rope_type"]), *scaling) if scaling else (),  # type: ignore[arg-type]
    )


@settings(max_examples=400, deadline=None)
@given(mutations())
def test_a_config_is_read_as_transformers_reads_it_or_refused_by_name(drawn: tuple[dict[str, Any], list[str]]) -> None:
    config, paths = drawn
    refused = refusal(config)
    if refused is not None:
        assert refused.exit_code == 4
        assert any(path.rpartition(".")[2] in refused.message for path in paths), (refused.message, paths)
        return
    theirs = read_independently(config)
    assert theirs is None or read_geometry(config) == theirs
    # What transformers' network would do otherwise, moectl's does not.
    assert not config.get("tie_word_embeddings")
    assert config.get("sliding_window") is None
    assert not config.get("attention_bias")


# Quantised checkpoints.


def write_mixed(directory: Path, key: str = "quantization", **own: dict[str, Any]) -> Path:
    """Write a 4-bit checkpoint in which modules named in `own` are quantised their own way."""
    write_checkpoint(directory, layout="mlx-quantized", files=1)
    config = json.loads((directory / "config.json").read_text())
    geometry = read_geometry(config)
    weights = make_weights(geometry)
    stored = to_layout(weights, geometry, "mlx-quantized")
    for module, how in own.items():
        parts = mx.quantize(weights[f"{module}.weight"], **how)
        for name in ("weight", "scales", "biases"):
            stored.pop(f"{module}.{name}", None)
        stored.update(
            {f"{module}.{name}": part for name, part in zip(("weight", "scales", "biases"), parts, strict=False)}
        )
    write_weights(directory, stored)
    config[key] = {**config.pop("quantization"), **own}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("key", ["quantization", "quantization_config"])
@pytest.mark.parametrize("how", [{"bits": 8, "group_size": 32}, {"bits": 4, "group_size": 32, "mode": "mxfp4"}])
def test_overrides_of_modules_and_of_a_layers_experts_are_honoured(
    key: str, how: dict[str, Any], tmp_path: Path
) -> None:
    experts = [f"transformer.blocks.1.ffn.experts.{e}.{p}" for e in range(16) for p in ("w1", "v1", "w2")]
    own = dict.fromkeys([*experts, "lm_head"], how)
    source = write_mixed(tmp_path / "m", key, **own)
    prepare.shard(str(source), Wanted(nodes=1), directory=tmp_path / "s")
    model = load_rank(tmp_path / "s", read_manifest(tmp_path / "s"), 0, dtype=mx.float32)
    layers = [model.layers[i].ffn.experts.gate_proj for i in (0, 1)]
    assert [layer.bits for layer in layers] == [4, how["bits"]]
    assert [layer.group_size for layer in layers] == [64, how["group_size"]]
    assert model.lm_head.mode == layers[1].mode == how.get("mode", "affine")
    weights = make_weights(read_geometry(json.loads((source / "config.json").read_text())))
    expert = layers[1]
    back = mx.dequantize(
        expert.weight[3], expert.scales[3], expert.biases[3] if "biases" in expert else None,
        group_size=expert.group_size, bits=expert.bits, mode=expert.mode,
    )  # fmt: skip
    should = np.array(weights["transformer.blocks.1.ffn.experts.3.w1.weight"].astype(mx.float32))
    assert np.abs(np.array(back.astype(mx.float32)) - should).max() < 0.2


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"mode": "int4"}, '"mode": "int4"}, and MLX has no such mode'),
        ({"mode": 7}, '"mode": 7}, and MLX has no such mode'),
        ({"mode": "mxfp4"}, '"group_size": 64, "mode": "mxfp4"}, and MLX has no such mode'),
        ({"bits": 7}, '"bits": 7'),
        ({"group_size": 16}, '"group_size": 16'),
        ({"group_size": -64}, '"group_size": -64'),
        ({"bits": True}, '"bits": true'),
        ({"bits": "4"}, "no bits or no group_size"),
        ({"lm_head": {"bits": 8}}, "lm_head.weight has shape (128, 8) in the checkpoint, and (128, 16) by config.json"),
        ({"lm_head": {"bits": 4, "group_size": 64, "quantize_input": True}}, "activations"),
        ({"lm_head": False}, "gives lm_head."),
        ({"lm_head": 3}, "quantization does not fit the model"),
    ],
)
def test_other_quantisations_are_refused_by_name(change: dict[str, Any], name: str, tmp_path: Path) -> None:
    source = write_mixed(tmp_path / "m")
    config = json.loads((source / "config.json").read_text())
    config["quantization"].update(change)
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        draw(open_checkpoint(str(source)))
    assert name in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("layout", ["fused", "v2", "mlx", "mlx-quantized"])
def test_weights_that_the_config_does_not_describe_are_refused(layout: str, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "m", layout=layout, files=1)
    config = json.loads((directory / "config.json").read_text())
    stored = to_layout(make_weights(read_geometry(config)), read_geometry(config), layout)
    bias = "transformer.blocks.1.norm_attn_norm.attn.Wqkv.bias"
    write_weights(directory, {**stored, bias: mx.zeros((128,))})
    with pytest.raises(
        CheckpointError, match=r"gives transformer\.blocks\.1\..*\.q_proj\.bias .*, and the model has no"
    ):
        draw(open_checkpoint(str(directory)))
    write_weights(directory, stored)
    (directory / "config.json").write_text(json.dumps({**config, "n_layers": 1}))
    with pytest.raises(CheckpointError, match=r"gives transformer\.blocks\.1\..*, and the model has no"):
        draw(open_checkpoint(str(directory)))
