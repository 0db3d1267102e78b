"""A checkpoint that follows a script, without training: its layers add nothing, its head maps each token to the next.

It is a small Qwen3. Asked to think, as it does by itself, it answers <think>x</think>yz, else yz.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import numpy as np

from tests.support.thinkers import make_thinker

_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{{ '<think></think><|plain|>' if enable_thinking is false else '<|deep|>' }}{% endif %}"
)
_SCRIPTS = (("<|deep|>", "<think>", "x", "</think>", "y", "z", "<|im_end|>"), ("<|plain|>", "y"))
_WIDTH, _LAYERS, _HEADS, _KV_HEADS = 128, 2, 4, 2


def write_scripted(directory: Path) -> Path:
    """Write the checkpoint and its small files; its defaults are a temperature that top_k 1 makes greedy."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = make_thinker(directory, _TEMPLATE, ("<think>", "</think>", "<|deep|>", "<|plain|>"))
    number = {text: tokenizer.encode(text)[0] for script in _SCRIPTS for text in script}
    generation = {"eos_token_id": number["<|im_end|>"], "do_sample": True, "temperature": 0.7, "top_k": 1}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    write_model(directory, [[number[text] for text in script] for script in _SCRIPTS], context=512)
    return directory


def write_model(directory: Path, scripts: Sequence[Sequence[int]], *, context: int) -> None:
    """Write the config and the weights of a model in which each token of a script leads to the next."""
    size = max(token for script in scripts for token in script) + 1
    steps: dict[int, int] = {}
    for before, after in (pair for script in scripts for pair in pairwise(script)):
        assert steps.setdefault(before, after) == after, f"token {before} has two that follow it"
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": _WIDTH,
        "intermediate_size": _WIDTH,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV_HEADS,
        "head_dim": _WIDTH // _HEADS,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "max_position_embeddings": context,
        "tie_word_embeddings": False,
        "vocab_size": size,
        "torch_dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(directory / "model.safetensors"), _make_weights(size, steps), metadata={"format": "pt"})


def _make_weights(size: int, steps: dict[int, int]) -> dict[str, mx.array]:
    noise = np.random.default_rng(0)
    embedding = np.sign(noise.standard_normal((size, _WIDTH)))
    head = np.zeros((size, _WIDTH))
    for before, after in steps.items():
        head[after] += embedding[before] / 4
    weights = {"model.embed_tokens": embedding, "model.norm": np.ones(_WIDTH), "lm_head": head}
    head_dim = _WIDTH // _HEADS
    rows = {"q": _WIDTH, "k": _KV_HEADS * head_dim, "v": _KV_HEADS * head_dim}
    for prefix in (f"model.layers.{layer}." for layer in range(_LAYERS)):
        for name, count in rows.items():
            weights[f"{prefix}self_attn.{name}_proj"] = noise.standard_normal((count, _WIDTH)) / 50
        for name in ("gate", "up"):
            weights[f"{prefix}mlp.{name}_proj"] = noise.standard_normal((_WIDTH, _WIDTH)) / 50
        for name in ("self_attn.o_proj", "mlp.down_proj"):  # so that the layer adds nothing
            weights[prefix + name] = np.zeros((_WIDTH, _WIDTH))
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[prefix + name] = np.ones(_WIDTH)
        for name in ("q", "k"):
            weights[f"{prefix}self_attn.{name}_norm"] = np.ones(head_dim)
    return {f"{name}.weight": mx.array(value).astype(mx.bfloat16) for name, value in weights.items()}
