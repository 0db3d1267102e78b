"""A checkpoint that follows a script, without training: its layers add nothing, its head maps each token to the next.

It has DBRX's shape. Asked to think, as it does by itself, it answers <think>x</think>yz, else yz.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import numpy as np

from tests.support.thinkers import make_thinker
from tests.support.tiny import make_config

_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{{ '<think></think><|plain|>' if enable_thinking is false else '<|deep|>' }}{% endif %}"
)
_SCRIPTS = (("<|deep|>", "<think>", "x", "</think>", "y", "z", "<|im_end|>"), ("<|plain|>", "y"))
_WIDTH, _LAYERS, _HEADS, _KV_HEADS, _EXPERTS, _HIDDEN = 128, 2, 4, 2, 4, 128


def write_scripted(directory: Path) -> Path:
    """Write the checkpoint and its small files; its defaults are a temperature that top_k 1 makes greedy."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = make_thinker(directory, _TEMPLATE, ("<think>", "</think>", "<|deep|>", "<|plain|>"))
    number = {text: tokenizer.encode(text)[0] for script in _SCRIPTS for text in script}
    generation = {"eos_token_id": number["<|im_end|>"], "do_sample": True, "temperature": 0.7, "top_k": 1}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    size = max(number.values()) + 1
    config = make_config(
        n_layers=_LAYERS,
        d_model=_WIDTH,
        n_heads=_HEADS,
        kv_n_heads=_KV_HEADS,
        ffn_hidden=_HIDDEN,
        n_experts=_EXPERTS,
        top_k=2,
        vocab_size=size,
    )
    (directory / "config.json").write_text(json.dumps(config))
    steps = {number[before]: number[after] for script in _SCRIPTS for before, after in pairwise(script)}
    mx.save_safetensors(str(directory / "model.safetensors"), _make_weights(size, steps), metadata={"format": "pt"})
    return directory


def _make_weights(size: int, steps: dict[int, int]) -> dict[str, mx.array]:
    noise = np.random.default_rng(0)
    embedding = np.sign(noise.standard_normal((size, _WIDTH)))
    head = np.zeros((size, _WIDTH))
    for before, after in steps.items():
        head[after] += embedding[before] / 4
    weights = {"wte": embedding, "norm_f": np.ones(_WIDTH)}
    for layer in range(_LAYERS):
        attention, experts = f"blocks.{layer}.norm_attn_norm", f"blocks.{layer}.ffn.experts.mlp"
        rows = _WIDTH + 2 * _KV_HEADS * (_WIDTH // _HEADS)
        weights |= {
            f"{attention}.attn.Wqkv": noise.standard_normal((rows, _WIDTH)) / 50,
            f"{attention}.attn.out_proj": np.zeros((_WIDTH, _WIDTH)),
            f"{attention}.norm_1": np.ones(_WIDTH),
            f"{attention}.norm_2": np.ones(_WIDTH),
            f"blocks.{layer}.ffn.router.layer": noise.standard_normal((_EXPERTS, _WIDTH)) / 50,
            **{f"{experts}.{name}": np.zeros((_EXPERTS * _HIDDEN, _WIDTH)) for name in ("w1", "v1", "w2")},
        }
    named = {f"transformer.{name}" + ".weight" * (".mlp." not in name): value for name, value in weights.items()}
    return {name: mx.array(value).astype(mx.bfloat16) for name, value in (named | {"lm_head.weight": head}).items()}
