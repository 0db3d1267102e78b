"""DBRX computed by somebody else: transformers' DbrxForCausalLM in float32, and weights that both sides can make.

Run `python -m tests.support.oracle` (needs torch and transformers) to write tests/golden/logits.npz, which tests
compare with
where torch is absent; with a file's name, to write there what other weights and tokens give.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
GOLDEN = Path(__file__).parent.parent / "golden" / "logits.npz"
TOKENS = [[3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26, 43, 38, 32, 79, 50, 28, 84, 19, 71, 69, 39, 93]]
GOLDEN_SEED = 7
LIVE_TOKENS = [np.random.RandomState(1).randint(0, 96, 48).tolist()]
LIVE_SEED = 11

_BASE: dict[str, Any] = {"clip_qkv": 8.0, "kv_n_heads": 2, "top_k": 4, "normalize": 1.0}
CASES: dict[str, dict[str, Any]] = {
    "base": {},
    "clip-0.5": {"clip_qkv": 0.5},
    "clip-1e4": {"clip_qkv": 1e4},
    "clip-none": {"clip_qkv": None},
    "kv-1": {"kv_n_heads": 1},
    "kv-4": {"kv_n_heads": 4},
    "top-1": {"top_k": 1},
    "top-2": {"top_k": 2},
    "normalize-2": {"normalize": 2.0},
    "normalize-none": {"normalize": None},
    "rope-linear": {"rope": {"rope_type": "linear", "factor": 4.0}},
    "rope-llama3": {
        "rope": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "rope-yarn": {"rope": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
    "rope-yarn-betas": {"rope": {"type": "yarn", "factor": 16, "beta_fast": 4, "beta_slow": 2, "truncate": True}},
}


def make_config(case: str) -> dict[str, Any]:
    """Return the config.json of a case: 2 layers, 8 experts, width 64."""
    knobs = {**_BASE, **CASES[case]}
    rope = {"rope_scaling": knobs["rope"]} if "rope" in knobs else {}
    return {
        **rope,
        "model_type": "dbrx",
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 128,
        "vocab_size": 96,
        "attn_config": {"clip_qkv": knobs["clip_qkv"], "kv_n_heads": knobs["kv_n_heads"], "rope_theta": 500_000.0},
        "ffn_config": {
            "ffn_hidden_size": 128,
            "moe_num_experts": 8,
            "moe_top_k": knobs["top_k"],
            "moe_normalize_expert_weights": knobs["normalize"],
        },
    }


def make_weights(config: dict[str, Any], seed: int = GOLDEN_SEED) -> dict[str, Array]:
    """Return random weights under the original checkpoint's names; equal for equal seeds on every platform."""
    random = np.random.RandomState(seed)
    d, heads, kv = config["d_model"], config["n_heads"], config["attn_config"]["kv_n_heads"]
    experts, hidden = config["ffn_config"]["moe_num_experts"], config["ffn_config"]["ffn_hidden_size"]

    def normal(*shape: int, scale: float) -> Array:
        return (random.standard_normal(shape) * scale).astype(np.float32)

    weights = {"transformer.wte.weight": normal(config["vocab_size"], d, scale=1.0)}
    for i in range(config["n_layers"]):
        b = f"transformer.blocks.{i}"
        weights |= {
            f"{b}.norm_attn_norm.norm_1.weight": 1 + normal(d, scale=0.1),
            f"{b}.norm_attn_norm.norm_2.weight": 1 + normal(d, scale=0.1),
            f"{b}.norm_attn_norm.attn.Wqkv.weight": normal((heads + 2 * kv) * d // heads, d, scale=0.15),
            f"{b}.norm_attn_norm.attn.out_proj.weight": normal(d, d, scale=0.1),
            f"{b}.ffn.router.layer.weight": normal(experts, d, scale=0.3),
            f"{b}.ffn.experts.mlp.w1": normal(experts * hidden, d, scale=0.1),
            f"{b}.ffn.experts.mlp.v1": normal(experts * hidden, d, scale=0.1),
            f"{b}.ffn.experts.mlp.w2": normal(experts * hidden, d, scale=0.1),
        }
    weights["transformer.norm_f.weight"] = 1 + normal(d, scale=0.1)
    weights["lm_head.weight"] = normal(config["vocab_size"], d, scale=0.1)
    return weights


def oracle_logits(config: dict[str, Any], weights: dict[str, Array], tokens: list[list[int]]) -> Array:
    """Return DbrxForCausalLM's float32 logits (B, L, V)."""
    import torch
    from transformers import DbrxConfig, DbrxForCausalLM

    attn = dict(config["attn_config"])
    # Known traps: clip None crashes it, and RoPE is read from the top level only.
    attn["clip_qkv"] = 1e9 if attn["clip_qkv"] is None else attn["clip_qkv"]
    rope = {"rope_type": "default", **config.get("rope_scaling", {}), "rope_theta": attn["rope_theta"]}
    rope["rope_type"] = rope.pop("type", rope["rope_type"])
    theirs = DbrxConfig(
        **{k: v for k, v in config.items() if k not in ("model_type", "attn_config", "rope_scaling")},
        attn_config=attn,
        rope_parameters=rope,
    )
    model = DbrxForCausalLM(theirs).to(torch.float32).eval()
    missing, unexpected = model.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()}, strict=False)
    assert not unexpected, unexpected
    assert all("inv_freq" in name for name in missing), missing
    with torch.no_grad():
        logits: Array = model(torch.tensor(tokens)).logits.numpy()
    return logits


def write_logits(path: Path, tokens: list[list[int]], seed: int) -> None:
    """Write the logits of all cases to an .npz file."""
    path.parent.mkdir(exist_ok=True)
    cases: dict[str, Any] = {
        c: oracle_logits(make_config(c), make_weights(make_config(c), seed), tokens) for c in CASES
    }
    np.savez_compressed(path, **cases)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        write_logits(Path(sys.argv[1]), LIVE_TOKENS, LIVE_SEED)
    else:
        write_logits(GOLDEN, TOKENS, GOLDEN_SEED)
