"""config.json and generation_config.json as published DBRX checkpoints have them: sizes are the real ones.

`SMALL` makes any of them fit the weights of `tests.support.tiny`.
"""

from __future__ import annotations

import copy
from typing import Any

# databricks/dbrx-instruct, dbrx-base and their mirrors.
ORIGINAL: dict[str, Any] = {
    "architectures": ["DbrxForCausalLM"],
    "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "model_type": "", "rope_theta": 500000},
    "auto_map": {
        "AutoConfig": "configuration_dbrx.DbrxConfig",
        "AutoModelForCausalLM": "modeling_dbrx.DbrxForCausalLM",
    },
    "d_model": 6144,
    "emb_pdrop": 0.0,
    "ffn_config": {
        "ffn_hidden_size": 10752,
        "model_type": "",
        "moe_jitter_eps": 0,
        "moe_loss_weight": 0.05,
        "moe_num_experts": 16,
        "moe_top_k": 4,
    },
    "initializer_range": 0.02,
    "max_seq_len": 32768,
    "model_type": "dbrx",
    "n_heads": 48,
    "n_layers": 40,
    "output_router_logits": False,
    "resid_pdrop": 0.0,
    "router_aux_loss_coef": 0.05,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.38.2",
    "use_cache": True,
    "vocab_size": 100352,
}

# What transformers 4.39 wrote into both nested objects, and a conversion to MLX keeps.
_NESTED: dict[str, Any] = {
    "return_dict": True,
    "output_hidden_states": False,
    "output_attentions": False,
    "torchscript": False,
    "torch_dtype": None,
    "use_bfloat16": False,
    "tf_legacy_loss": False,
    "pruned_heads": {},
    "tie_word_embeddings": True,
    "chunk_size_feed_forward": 0,
    "is_encoder_decoder": False,
    "is_decoder": False,
    "cross_attention_hidden_size": None,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "max_length": 20,
    "min_length": 0,
    "do_sample": False,
    "early_stopping": False,
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "num_return_sequences": 1,
    "output_scores": False,
    "return_dict_in_generate": False,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "remove_invalid_values": False,
    "exponential_decay_length_penalty": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "architectures": None,
    "finetuning_task": None,
    "tokenizer_class": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "prefix": None,
    "bos_token_id": None,
    "pad_token_id": None,
    "eos_token_id": None,
    "sep_token_id": None,
    "decoder_start_token_id": None,
    "task_specific_params": None,
    "problem_type": None,
    "_name_or_path": "",
    "model_type": "",
}
MLX: dict[str, Any] = {
    **ORIGINAL,
    "attn_config": {**_NESTED, "attn_pdrop": 0, "clip_qkv": 8, "kv_n_heads": 8, "rope_theta": 500000},
    "ffn_config": {
        **_NESTED,
        **ORIGINAL["ffn_config"],
        "ffn_act_fn": {"name": "silu"},
        "moe_normalize_expert_weights": 1,
        "uniform_expert_assignment": False,
    },
    "quantization": {"group_size": 64, "bits": 4},
    "transformers_version": "4.39.2",
}

# As transformers 5 saves a model that it made itself.
TRANSFORMERS_5: dict[str, Any] = {
    **{key: value for key, value in ORIGINAL.items() if key not in ("auto_map", "torch_dtype")},
    "attn_config": {
        "attn_pdrop": 0.0,
        "clip_qkv": 8,
        "kv_n_heads": 8,
        "model_type": "",
        "output_hidden_states": False,
        "architectures": None,
        "chunk_size_feed_forward": 0,
        "dtype": None,
        "id2label": {"0": "LABEL_0"},
        "is_encoder_decoder": False,
        "label2id": {"LABEL_0": 0},
        "problem_type": None,
        "return_dict": True,
        "_name_or_path": "",
    },
    "ffn_config": {
        **ORIGINAL["ffn_config"],
        "ffn_act_fn": {"name": "silu"},
        "hidden_size": 6144,
        "moe_normalize_expert_weights": 1.0,
    },
    "dtype": "bfloat16",
    "bos_token_id": None,
    "eos_token_id": [100257, 100279],
    "pad_token_id": 100277,
    "num_key_value_heads": 8,
    "rope_parameters": {"rope_theta": 500000, "rope_type": "default"},
    "transformers_version": "5.2.0",
}
CONFIGS = {"original": ORIGINAL, "mlx": MLX, "transformers-5": TRANSFORMERS_5}

GENERATION: dict[str, Any] = {
    "_from_model_config": True,
    "eos_token_id": [100257, 100279],
    "transformers_version": "4.39.0",
}

SMALL: dict[str, dict[str, int]] = {
    "": {"d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 128, "max_seq_len": 512},
    "attn_config": {"kv_n_heads": 2},
    "ffn_config": {"ffn_hidden_size": 384},
}


def shrink(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config with the sizes of `tests.support.tiny`, under whatever names it has them."""
    small = copy.deepcopy(config)
    for part, sizes in SMALL.items():
        (small[part] if part else small).update(sizes)
    if "hidden_size" in small["ffn_config"]:
        small["ffn_config"]["hidden_size"] = 64
    if "num_key_value_heads" in small:
        small["num_key_value_heads"] = 2
    return small
