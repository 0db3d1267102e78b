"""Estimated memory beside MLX's own peak, for models of different kinds: one rank of each, with random weights.

Keys and values (llama, mixtral), rotating ones (gpt_oss), MLA (deepseek_v3), linear attention (qwen3_next), state space
(nemotron_h): 200 to 450 MB, whole and in two splits. `--long` measures all of them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

SIZES: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 8192,
    },
    "mixtral": {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 5,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_local_experts": 8,
        "vocab_size": 4096,
    },
    "gpt_oss": {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_attention_heads": 8,
        "head_dim": 64,
        "num_local_experts": 8,
        "vocab_size": 4096,
    },
    "deepseek_v3": {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "moe_intermediate_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "n_routed_experts": 8,
        "kv_lora_rank": 128,
        "q_lora_rank": 256,
        "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 64,
        "v_head_dim": 64,
        "first_k_dense_replace": 1,
        "vocab_size": 4096,
    },
    "qwen3_next": {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "num_experts": 16,
        "num_hidden_layers": 4,
        "mlp_only_layers": [],
        "vocab_size": 4096,
        "linear_num_value_heads": 8,
        "linear_num_key_heads": 4,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
    },
    "nemotron_h": {
        "hidden_size": 768,
        "intermediate_size": 1024,
        "moe_intermediate_size": 768,
        "moe_shared_expert_intermediate_size": 1024,
        "moe_latent_size": None,
        "n_routed_experts": 48,
        "vocab_size": 8192,
    },
}


def measure(family: str, split: str, ranks: int, tokens: int) -> float:
    """Return the estimate divided by the peak."""
    words = [family, split, str(ranks), "0", json.dumps(SIZES[family]), str(tokens)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.peak", *words], capture_output=True, check=True, timeout=300
    )
    found = json.loads(done.stdout.splitlines()[-1])
    return float(found["estimate"] / found["peak"])


def cases() -> list[Any]:
    usual = {("llama", ""), ("gpt_oss", ""), ("deepseek_v3", ""), ("qwen3_next", ""), ("nemotron_h", "")}
    return [
        pytest.param(family, split, id=f"{family}-{split or 'whole'}", marks=[] if (family, split) in usual else marks)
        for family in SIZES
        for split in ("", "hidden", "tensor" if family != "nemotron_h" else "layers")
        for marks in [pytest.mark.long]
    ]


@pytest.mark.no_cover  # it is another process
@pytest.mark.parametrize(("family", "split"), cases())
def test_kinds_of_models_little_too_high(family: str, split: str) -> None:
    """At most 3 % too low and 6 too high: how much of what is queued is there at once is a matter of timing.

    6 and 9 % where one rank of two holds half of the weights, but not half of what a pass keeps; and Nemotron-H's.
    """
    ratio = measure(family, split or "hidden", 2 if split else 1, 512)
    low, high = (0.94, 1.09) if split or family == "nemotron_h" else (0.97, 1.06)
    assert low <= ratio <= high


@pytest.mark.long
@pytest.mark.no_cover
@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_longer_contexts_at_most_3_percent_too_low_and_6_too_high(family: str) -> None:
    assert 0.97 <= measure(family, "hidden", 1, 1536) <= 1.06
