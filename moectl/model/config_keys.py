"""What moectl does with every key of config.json and generation_config.json: one table and its checks.

A key is used (READ), changes neither tokens nor numbers (HARMLESS), is set by each request (`PerRequest`), or is
refused unless it has one of a few values (`Only`). In config.json an unknown key is refused too, because it could
change numbers. Some keys of generation_config.json are defaults of requests: `parameters` reads them. null means "not
set" everywhere, as transformers writes it. `geometry`, `rope` and `shards.tensors` read the values.

Sources: transformers' PreTrainedConfig, DbrxConfig and GenerationConfig (4.39 to 5), databricks' configuration_dbrx.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from moectl.errors import CheckpointError
from moectl.model.parameters import DEFAULTS, read_defaults

CONFIG, GENERATION = "config.json", "generation_config.json"


@dataclass(frozen=True)
class Only:
    """The values, besides null, with which a key changes nothing; every other value is refused."""

    values: tuple[Any, ...] = ()


@dataclass(frozen=True)
class PerRequest:
    """A key that each request sets for itself; the `usual` values are not reported."""

    usual: tuple[Any, ...] = ()
    flag: str | None = None  # of `moectl run`


READ, HARMLESS = "read", "harmless"
Rule = Only | PerRequest | str


def _all(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


# Keys of every configuration class of transformers, and of programs that write configs: none of them changes numbers.
_LIBRARY: dict[str, Rule] = _all(
    HARMLESS,
    "_name_or_path name_or_path _commit_hash _attn_implementation _attn_implementation_internal attn_implementation"
    " _attn_implementation_autoset _experts_implementation _experts_implementation_internal experts_implementation"
    " output_hidden_states output_attentions _output_attentions return_dict use_return_dict torchscript use_bfloat16"
    " tf_legacy_loss chunk_size_feed_forward is_decoder finetuning_task id2label label2id num_labels tokenizer_class"
    " problem_type transformers_version gradient_checkpointing bos_token_id pad_token_id sep_token_id"
    " decoder_start_token_id custom_pipelines torch_dtype dtype initializer_range use_cache unsloth_version"
    " unsloth_fixed",
)

# Greedy answers of transformers depend on the `Only` keys. moectl does not use them.
_GENERATION: dict[str, Rule] = {
    **_all(READ, "eos_token_id"),
    **_all(
        HARMLESS,
        "bos_token_id pad_token_id decoder_start_token_id transformers_version _from_model_config _commit_hash"
        " _original_object_hash use_cache cache_config max_cache_len length_penalty renormalize_logits"
        " remove_invalid_values output_attentions output_hidden_states output_scores output_logits"
        " return_dict_in_generate is_assistant num_assistant_tokens num_assistant_tokens_schedule"
        " assistant_confidence_threshold prompt_lookup_num_tokens max_matching_ngram_size assistant_early_exit"
        " assistant_lookbehind target_lookbehind assistant_ensemble_weight speculation_type use_mtp compile_config"
        " disable_compile continuous_batching_config low_memory prefill_chunk_size",
    ),
    "do_sample": PerRequest((False,)),
    "temperature": PerRequest((1,), "--temp"),
    "top_p": PerRequest((1,), "--top-p"),
    "top_k": PerRequest((0, 50), "--top-k"),
    "min_p": PerRequest((0,), "--min-p"),
    "repetition_penalty": PerRequest((1,), "--repetition-penalty"),
    "typical_p": PerRequest((1,)),
    **_all(PerRequest((0,)), "epsilon_cutoff eta_cutoff top_h"),
    "max_length": PerRequest((20,), "--max-tokens"),
    "max_new_tokens": PerRequest((), "--max-tokens"),
    "max_time": PerRequest(),
    "num_return_sequences": PerRequest((1,)),
    "task_specific_params": PerRequest(({},)),
    **_all(Only((1,)), "encoder_repetition_penalty guidance_scale num_beams"),
    "num_beam_groups": Only((1, 0)),
    **_all(Only((0,)), "no_repeat_ngram_size encoder_no_repeat_ngram_size min_length min_new_tokens"),
    **_all(Only((0, [])), "diversity_penalty penalty_alpha"),
    **_all(Only(([], {})), "bad_words_ids suppress_tokens begin_suppress_tokens sequence_bias stop_strings"),
    **_all(Only(([],)), "force_words_ids constraints forced_decoder_ids exponential_decay_length_penalty"),
    **_all(Only((False,)), "early_stopping token_healing"),
    **_all(Only(), "forced_bos_token_id forced_eos_token_id watermarking_config dola_layers"),
    "generation_kwargs": Only(({},)),
    "cache_implementation": Only(
        ("static", "dynamic", "dynamic_full", "offloaded", "offloaded_static", "hybrid", "paged")
    ),
}

_TOP: dict[str, Rule] = {
    **_GENERATION,
    **_LIBRARY,
    "repetition_penalty": Only((1,)),  # defaults of requests are those of generation_config.json
    **_all(
        READ,
        "model_type architectures auto_map attn_config ffn_config vocab_size quantization quantization_config"
        # DbrxConfig's own names of sizes and those that its attribute_map has for them.
        " n_layers num_hidden_layers d_model hidden_size n_heads num_attention_heads max_seq_len"
        " max_position_embeddings"
        # Second names of other keys: they must agree with these.
        " num_key_value_heads head_dim num_experts num_local_experts num_experts_per_tok intermediate_size"
        " moe_intermediate_size"
        " rope_theta rope_parameters rope_scaling partial_rotary_factor",
    ),
    # For training only, or for other outputs than the logits.
    **_all(HARMLESS, "resid_pdrop emb_pdrop output_router_logits router_aux_loss_coef"),
    **_all(Only((False,)), "tie_word_embeddings tie_encoder_decoder is_encoder_decoder add_cross_attention"),
    **_all(Only((False,)), "attention_bias mlp_bias qkv_bias use_bias bias use_sliding_window use_qk_norm"),
    **_all(Only(("silu",)), "hidden_act activation_function hidden_activation"),
    **_all(Only((1e-5,)), "layer_norm_eps layer_norm_epsilon norm_eps"),
    **_all(Only((1,)), "logit_scale logits_scaling embedding_multiplier residual_multiplier pretraining_tp"),
    **_all(Only(), "sliding_window layer_types final_logit_softcapping attn_logit_softcapping per_layer_config"),
    **_all(Only(), "original_max_position_embeddings cross_attention_hidden_size"),
    "no_bias": Only((True,)),
    "pruned_heads": Only(({},)),
    "prefix": Only(("",)),
    "model_file": Only(),  # mlx-lm runs this Python file instead of its own network
}

# Older releases of transformers wrote all of PretrainedConfig into the nested objects, where it is never read.
_NESTED: dict[str, Rule] = {
    **dict.fromkeys([*_GENERATION, *_LIBRARY], HARMLESS),
    **_all(
        HARMLESS,
        "model_type architectures auto_map tie_word_embeddings tie_encoder_decoder is_encoder_decoder"
        " add_cross_attention cross_attention_hidden_size pruned_heads prefix",
    ),
}
_ATTENTION: dict[str, Rule] = {
    **_NESTED,
    **_all(READ, "kv_n_heads clip_qkv rope_theta rope_parameters rope_scaling partial_rotary_factor"),
    "attn_pdrop": HARMLESS,  # training only
}
_FFN: dict[str, Rule] = {
    **_NESTED,
    **_all(READ, "ffn_hidden_size hidden_size moe_num_experts moe_top_k moe_normalize_expert_weights ffn_act_fn"),
    **_all(HARMLESS, "moe_jitter_eps moe_loss_weight"),  # training only
    "uniform_expert_assignment": Only((False,)),
}

_COPY = "in a copy of the checkpoint's directory"
CORRECT = f"correct it {_COPY}: the model's original repository has the right value"
_REMOVE = f"if the model works without it, remove the key {_COPY}"
_CLASSES = ("DbrxConfig", "DbrxModel", "DbrxForCausalLM")  # of databricks' own code, whose results moectl computes


def check_config(config: Mapping[str, Any]) -> None:
    """Raise CheckpointError for a key of a DBRX config.json that changes tokens or numbers and that moectl ignores."""
    _check(config, _TOP, f"{CONFIG}: ")
    for part, table in (("attn_config", _ATTENTION), ("ffn_config", _FFN)):
        nested = config.get(part)
        if isinstance(nested, Mapping):
            _check(nested, table, f"{CONFIG}: {part}.")
    _check_classes(config)


def check_generation(generation: Mapping[str, Any]) -> None:
    """Raise CheckpointError for a key of generation_config.json that changes answers and that moectl ignores."""
    read_defaults(generation)
    _check({key: value for key, value in generation.items() if key in _GENERATION}, _GENERATION, f"{GENERATION}: ")


def list_ignored(config: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a sentence for each file with keys that requests set here, or that moectl does not know."""
    notes = []
    for file, given in ((CONFIG, config), (GENERATION, generation)):
        asked, unknown = [], []
        for key, value in given.items():
            rule = _GENERATION.get(key)
            if file == GENERATION and key in (*DEFAULTS, "do_sample"):
                continue
            if isinstance(rule, PerRequest) and not _is_one_of(value, rule.usual):
                asked.append(f"{key} {show(value)}" + f" ({rule.flag})" * bool(rule.flag))
            elif rule is None and file == GENERATION and value is not None:
                unknown.append(f"{key} {show(value)}")
        if asked:
            notes.append(f"{file}: not used, each request sets its own: {', '.join(asked)}")
        if unknown:
            notes.append(f"{file}: not used, moectl does not know: {', '.join(unknown)}")
    return tuple(notes)


def show(value: object) -> str:
    """Return a value as JSON spells it, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:79] + "…"


def _check(given: Mapping[str, Any], table: Mapping[str, Rule], where: str) -> None:
    for key, value in given.items():
        rule = table.get(key)
        if value is None or rule in (READ, HARMLESS) or isinstance(rule, PerRequest):
            continue
        if rule is None:
            raise CheckpointError(f"{where}{key} is {show(value)}: moectl does not know this key", hint=_REMOVE)
        assert isinstance(rule, Only)
        if not _is_one_of(value, rule.values):
            raise CheckpointError(f"{where}{key} is {show(value)}: {_can(rule)}", hint=_remedy(key))


def _can(rule: Only) -> str:
    return f"moectl runs {' or '.join(map(show, rule.values))} only" if rule.values else "moectl does not support it"


def _remedy(key: str) -> str:
    if key == "repetition_penalty":
        return f"remove the key {_COPY}; requests to the API may carry repetition_penalty"
    if key == "stop_strings":
        return f"remove the key {_COPY}; requests to the API may carry stop"
    return _REMOVE


def _is_one_of(value: object, allowed: Iterable[object]) -> bool:
    """Whether a value is null or among these; true and 1 are two values."""
    return value is None or any(
        value == other and isinstance(value, bool) == isinstance(other, bool) for other in allowed
    )


def _check_classes(config: Mapping[str, Any]) -> None:
    named = config.get("architectures") or []
    for name in named if isinstance(named, list) else [named]:
        if name not in _CLASSES:
            raise CheckpointError(
                f"{CONFIG}: architectures is {show(named)}: moectl runs DbrxForCausalLM only", hint=_REMOVE
            )
    mapped = config.get("auto_map") or {}
    for key, value in mapped.items() if isinstance(mapped, Mapping) else [("", mapped)]:
        if key == "AutoTokenizer":
            continue
        if not isinstance(value, str) or value.rpartition(".")[2] not in _CLASSES:
            raise CheckpointError(
                f"{CONFIG}: auto_map names {show(value)}, code of the repository: moectl runs no such code",
                hint=_REMOVE,
            )
