"""The geometry of a DBRX model, read from its config.json: sizes and names of tensors, no files and no arrays.

Names are those of a checkpoint (mlx-lm's spelling), with one matrix per expert.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moectl.errors import CheckpointError
from moectl.model.config_keys import CONFIG, CORRECT, check_config, show
from moectl.model.rope import Scaling, read_rope


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes of one DBRX model; all are element counts."""

    n_layers: int
    d_model: int
    n_heads: int
    kv_n_heads: int
    ffn_hidden: int
    n_experts: int
    top_k: int
    vocab_size: int
    max_seq_len: int
    rope_theta: float
    clip_qkv: float | None
    moe_normalize: float | None
    rope_scaling: Scaling = ()  # empty: none

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @property
    def qkv_dim(self) -> int:
        return (self.n_heads + 2 * self.kv_n_heads) * self.head_dim

    @property
    def expert_shapes(self) -> dict[str, tuple[int, int]]:
        """Shape of one expert's matrices as (out, in)."""
        return {
            "w1": (self.ffn_hidden, self.d_model),
            "v1": (self.ffn_hidden, self.d_model),
            "w2": (self.d_model, self.ffn_hidden),
        }

    def layer_shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Shapes of a layer's replicated tensors by name."""
        b = block(layer)
        return {
            f"{b}.norm_attn_norm.norm_1.weight": (self.d_model,),
            f"{b}.norm_attn_norm.attn.Wqkv.weight": (self.qkv_dim, self.d_model),
            f"{b}.norm_attn_norm.attn.out_proj.weight": (self.d_model, self.d_model),
            f"{b}.norm_attn_norm.norm_2.weight": (self.d_model,),
            f"{b}.ffn.router.layer.weight": (self.n_experts, self.d_model),
        }

    def outer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors outside the layers by name."""
        return {
            "transformer.wte.weight": (self.vocab_size, self.d_model),
            "transformer.norm_f.weight": (self.d_model,),
            "lm_head.weight": (self.vocab_size, self.d_model),
        }

    @property
    def parameters(self) -> int:
        """All parameters of the model."""
        return self._outer + self.n_layers * (self._layer + self.n_experts * self._expert)

    @property
    def active_parameters(self) -> int:
        """The parameters that take part in one token."""
        return self._outer + self.n_layers * (self._layer + self.top_k * self._expert)

    @property
    def _outer(self) -> int:
        return sum(math.prod(shape) for shape in self.outer_shapes().values())

    @property
    def _layer(self) -> int:
        return sum(math.prod(shape) for shape in self.layer_shapes(0).values())

    @property
    def _expert(self) -> int:
        return sum(math.prod(shape) for shape in self.expert_shapes.values())

    def checkpoint_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield (canonical name, shape) of every unquantised tensor, one matrix per expert."""
        yield from self.outer_shapes().items()
        for i in range(self.n_layers):
            yield from self.layer_shapes(i).items()
            for e in range(self.n_experts):
                for projection, shape in self.expert_shapes.items():
                    yield expert_name(i, e, projection), shape


def block(layer: int) -> str:
    """Return the name prefix of a layer."""
    return f"transformer.blocks.{layer}"


def expert_name(layer: int, expert: int, projection: str) -> str:
    """Return the canonical name of one expert's matrix in a checkpoint."""
    return f"{block(layer)}.ffn.experts.{expert}.{projection}.weight"


def read_geometry(config: Mapping[str, Any]) -> Geometry:
    """Read the geometry from a parsed config.json.

    Raises CheckpointError when the activation is not silu, a field is missing, not possible or contradicts another, or
    a key would change numbers and moectl does not support it (`config_keys`).
    Defaults are those of transformers' DbrxConfig; `attn_config.rope_theta` and
    `ffn_config.moe_normalize_expert_weights` count, as in the original modeling_dbrx.py.
    """
    attn, ffn = config.get("attn_config"), config.get("ffn_config")
    if not isinstance(attn, Mapping) or not isinstance(ffn, Mapping):
        raise CheckpointError(
            "config.json has no attn_config or no ffn_config; it is not a complete DBRX config", hint=CORRECT
        )
    check_config(config)
    _check_activation(ffn.get("ffn_act_fn"))
    config = {**config, **{key: config[other] for key, other in _SYNONYMS.items() if _stands_for(config, key, other)}}
    max_seq_len = _count(config, "max_seq_len", default=2048)
    theta, scaling = read_rope(config, max_seq_len)
    geometry = Geometry(
        n_layers=_count(config, "n_layers"),
        d_model=_count(config, "d_model"),
        n_heads=_count(config, "n_heads"),
        kv_n_heads=_count(attn, "kv_n_heads", default=1),
        ffn_hidden=_count(ffn, "ffn_hidden_size"),
        n_experts=_count(ffn, "moe_num_experts"),
        top_k=_count(ffn, "moe_top_k"),
        vocab_size=_count(config, "vocab_size"),
        max_seq_len=max_seq_len,
        rope_theta=theta,
        clip_qkv=_positive(attn, "clip_qkv", default=None),
        moe_normalize=_positive(ffn, "moe_normalize_expert_weights", default=1.0),
        rope_scaling=scaling,
    )
    if geometry.d_model % geometry.n_heads:
        raise CheckpointError(
            f"config.json: d_model {geometry.d_model} is not divisible by n_heads {geometry.n_heads}", hint=CORRECT
        )
    if geometry.n_heads % geometry.kv_n_heads:
        raise CheckpointError(
            f"config.json: n_heads {geometry.n_heads} is not divisible by kv_n_heads {geometry.kv_n_heads}",
            hint=CORRECT,
        )
    if geometry.top_k > geometry.n_experts:
        raise CheckpointError(
            f"config.json: moe_top_k {geometry.top_k} is more than moe_num_experts {geometry.n_experts}", hint=CORRECT
        )
    _check_agreement(config, geometry)
    return geometry


# DbrxConfig's names of sizes, and the other names that its attribute_map allows.
_SYNONYMS = {
    "n_layers": "num_hidden_layers",
    "d_model": "hidden_size",
    "n_heads": "num_attention_heads",
    "max_seq_len": "max_position_embeddings",
}


def _stands_for(config: Mapping[str, Any], key: str, other: str) -> bool:
    return config.get(key) is None and config.get(other) is not None


def _check_activation(activation: object) -> None:
    """Raise CheckpointError unless the experts' activation is silu, without arguments."""
    if activation is None or activation == "silu" or activation == {"name": "silu"}:
        return
    name = activation.get("name") if isinstance(activation, Mapping) and len(activation) == 1 else activation
    raise CheckpointError(
        f"config.json: ffn_config.ffn_act_fn, the experts' activation is {name!r}; moectl runs 'silu' only",
        hint="moectl cannot run a model that was trained with it",
    )


def _check_agreement(config: Mapping[str, Any], geometry: Geometry) -> None:
    """Raise CheckpointError where a size has a second name with another value."""
    ffn = config["ffn_config"]
    seconds: dict[str, tuple[object, str, int]] = {
        **{other: (config.get(other), key, getattr(geometry, key)) for key, other in _SYNONYMS.items()},
        "head_dim": (config.get("head_dim"), "d_model / n_heads", geometry.head_dim),
        "num_key_value_heads": (config.get("num_key_value_heads"), "attn_config.kv_n_heads", geometry.kv_n_heads),
        "num_experts": (config.get("num_experts"), "ffn_config.moe_num_experts", geometry.n_experts),
        "num_local_experts": (config.get("num_local_experts"), "ffn_config.moe_num_experts", geometry.n_experts),
        "num_experts_per_tok": (config.get("num_experts_per_tok"), "ffn_config.moe_top_k", geometry.top_k),
        "intermediate_size": (config.get("intermediate_size"), "ffn_config.ffn_hidden_size", geometry.ffn_hidden),
        "moe_intermediate_size": (
            config.get("moe_intermediate_size"),
            "ffn_config.ffn_hidden_size",
            geometry.ffn_hidden,
        ),
        "ffn_config.hidden_size": (ffn.get("hidden_size"), "d_model", geometry.d_model),
    }
    for other, (value, key, right) in seconds.items():
        if value is not None and (isinstance(value, bool) or value != right):
            raise CheckpointError(
                f"{CONFIG}: {other} is {show(value)} and {key} is {right}; a model has one of them",
                hint=CORRECT,
            )


def _count(config: Mapping[str, Any], key: str, *, default: int | None = None) -> int:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"config.json: {key} should be a positive whole number, it is {value!r}", hint=CORRECT)
    return value


def _positive(config: Mapping[str, Any], key: str, *, default: float | None) -> float | None:
    value = config.get(key, default)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
        raise CheckpointError(f"config.json: {key} should be a positive number, it is {value!r}", hint=CORRECT)
    return float(value)


# databricks/dbrx-instruct and dbrx-base, so that a plan needs no network (config.json of the original repository).
DBRX = Geometry(
    n_layers=40,
    d_model=6144,
    n_heads=48,
    kv_n_heads=8,
    ffn_hidden=10752,
    n_experts=16,
    top_k=4,
    vocab_size=100352,
    max_seq_len=32768,
    rope_theta=500_000.0,
    clip_qkv=8.0,
    moe_normalize=1.0,
)
