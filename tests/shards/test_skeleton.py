"""A skeleton has all names and shapes of a model and takes no memory; what mlx-lm cannot build is refused."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from moectl.errors import CheckpointError
from moectl.shards.look.skeleton import make_skeleton
from tests.support.families import config_of, make_whole

QWEN3_235B = {
    "model_type": "qwen3_moe",
    "hidden_size": 4096,
    "num_hidden_layers": 94,
    "intermediate_size": 12288,
    "num_attention_heads": 64,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 1536,
    "rms_norm_eps": 1e-6,
    "vocab_size": 151936,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 40960,
    "norm_topk_prob": True,
}


def test_a_skeleton_has_the_names_and_shapes_of_the_model() -> None:
    skeleton = make_skeleton(config_of("mixtral"))
    whole = dict(tree_flatten(make_whole("mixtral").parameters()))
    assert {n: a.shape for n, a in skeleton.parameters.items()} == {n: a.shape for n, a in whole.items()}


def test_a_large_skeleton_takes_no_memory() -> None:
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    parameters = make_skeleton(QWEN3_235B).parameters
    mx.eval([array for array in parameters.values() if array.ndim == 1])
    assert sum(array.size for array in parameters.values()) == 235_093_634_560
    assert mx.get_peak_memory() - before < 1 << 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_file": "model.py"}, "config.json names a program of its own, model_file = 'model.py'"),
        ({"model_type": "gpt5"}, "config.json has model_type = 'gpt5', and mlx-lm has no model file of that name"),
        ({"model_type": "cache"}, "model_type = 'cache', and mlx-lm has no model file"),
        ({"model_type": "../cache"}, "model_type = '../cache', and mlx-lm has no model file"),
        ({"model_type": None}, "model_type = None, and mlx-lm has no model file"),
        ({"model_type": "olmo"}, "mlx-lm's model file for olmo cannot be loaded: it wants a library"),
        ({"hidden_size": None}, "config.json does not describe a model that mlx-lm can build: mixtral"),
    ],
)
def test_what_cannot_be_built_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as error:
        make_skeleton({**config_of("mixtral"), **change})
    assert message in error.value.message
    assert error.value.hint


def test_missing_keys_are_named() -> None:
    config = config_of("ministral3")
    del config["rope_parameters"]["rope_theta"]
    with pytest.raises(CheckpointError, match="ministral3: missing key 'rope_theta'"):
        make_skeleton(config)


def test_the_callers_config_is_not_changed() -> None:
    config = config_of("gemma3")
    make_skeleton(config)
    assert config == config_of("gemma3")


def test_only_numbers_of_modules_are_limited() -> None:
    """Gemma 4 has a vocabulary for each layer's input."""
    config = config_of("gemma4_text")
    large = {**config, "vocab_size_per_layer_input": 262144}
    assert make_skeleton(large).model_type == config["model_type"]
    for key in ("num_hidden_layers", "n_layers"):
        with pytest.raises(CheckpointError, match=f"{key} is 5000, more than any model has"):
            make_skeleton({**config, key: 5000})
