"""DBRX as a model file of mlx-lm: stacked experts and divisible heads, from every layout in which it is published.

mlx-lm's own file loops over tokens in Python and has a list of experts, which cannot be shared out. Norms are taken
from it. Sources: databricks modeling_dbrx.py, mlx_lm/models/dbrx.py.

Layouts: *fused* (experts.mlp.w1 of (experts·hidden, d_model), w2 not transposed), *v2* (experts.mlp.0.w1.weight) and
*mlx* (experts.0.w1.weight, quantised or not). Wqkv is three matrices, one after the other.

Sizes in comments: B batch, L tokens, D model width, V vocabulary, K experts per token.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import dbrx
from mlx_lm.models.base import create_attention_mask, scaled_dot_product_attention
from mlx_lm.models.rope_utils import initialize_rope
from mlx_lm.models.switch_layers import SwitchGLU

from moectl.errors import CheckpointError
from moectl.model.geometry import Geometry, read_geometry

Weights = dict[str, Any]  # arrays, or what stands for them in a trace

_EXPERTS = {"w1": "gate_proj", "v1": "up_proj", "w2": "down_proj"}
_ONE = re.compile(r"(transformer\.blocks\.\d+\.ffn\.experts\.)((?:mlp\.)?)(\d+)\.(w1|v1|w2)((?:\..+)?)")
_FUSED = re.compile(r"(transformer\.blocks\.\d+\.ffn\.experts\.)mlp\.(w1|v1|w2)")
_QKV = re.compile(r"(.*\.attn\.)Wqkv((?:\..+)?)")


class ModelArgs:
    """What config.json says of the model, checked."""

    @staticmethod
    def from_dict(config: Mapping[str, Any]) -> Geometry:
        """Return the sizes. Raises CheckpointError."""
        return read_geometry(config)


class Attention(nn.Module):
    def __init__(self, args: Geometry) -> None:
        super().__init__()
        self.num_heads, self.num_key_value_heads = args.n_heads, args.kv_n_heads
        self.scale = args.head_dim**-0.5
        self._clip = args.clip_qkv
        for name, width in zip(("q_proj", "k_proj", "v_proj"), _qkv_widths(args), strict=True):
            self[name] = nn.Linear(args.d_model, width, bias=False)
        self.out_proj = nn.Linear(args.d_model, args.d_model, bias=False)
        self.rope = initialize_rope(
            args.head_dim, args.rope_theta, False, dict(args.rope_scaling) or None, args.max_seq_len
        )

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:  # (B, L, D) → (B, L, D)
        queries = self._project(self.q_proj, x, self.num_heads)
        keys = self._project(self.k_proj, x, self.num_key_value_heads)
        values = self._project(self.v_proj, x, self.num_key_value_heads)
        offset = 0 if cache is None else cache.offset
        queries, keys = self.rope(queries, offset=offset), self.rope(keys, offset=offset)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        found = scaled_dot_product_attention(queries, keys, values, cache=cache, scale=self.scale, mask=mask)
        return self.out_proj(found.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1))

    def _project(self, projection: nn.Module, x: mx.array, heads: int) -> mx.array:
        """Return (B, heads, L, head_dim)."""
        y = projection(x)
        if self._clip is not None:
            y = mx.clip(y, -self._clip, self._clip)
        return y.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)


class Router(dbrx.Router):
    """Choose top-k experts per token: softmax over all in float32, top-k, then divide by the p-norm."""

    def __init__(self, args: Geometry) -> None:
        super().__init__(args.d_model, args.n_experts)
        self._top_k, self._p = args.top_k, args.moe_normalize

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Return (indices, weights), both (B, L, K)."""
        scores = mx.softmax(super().__call__(x).astype(mx.float32), axis=-1)
        indices = mx.argpartition(-scores, kth=self._top_k - 1, axis=-1)[..., : self._top_k]
        weights = mx.take_along_axis(scores, indices, axis=-1)
        if self._p is not None:
            weights = weights / mx.linalg.norm(weights, ord=self._p, axis=-1, keepdims=True)
        return indices, weights.astype(x.dtype)


class SparseMoe(nn.Module):
    def __init__(self, args: Geometry) -> None:
        super().__init__()
        self.router = Router(args)
        self.experts = SwitchGLU(args.d_model, args.ffn_hidden, args.n_experts)

    def __call__(self, x: mx.array) -> mx.array:  # (B, L, D) → (B, L, D)
        indices, weights = self.router(x)
        return (self.experts(x, indices) * weights[..., None]).sum(axis=-2)


class DecoderLayer(nn.Module):
    def __init__(self, args: Geometry) -> None:
        super().__init__()
        self.norm_attn_norm = dbrx.NormAttnNorm(_mlx_args(args))
        self.norm_attn_norm.attn = Attention(args)
        self.ffn = SparseMoe(args)

    def __call__(self, x: mx.array, mask: Any, cache: Any) -> mx.array:
        residual, h = self.norm_attn_norm(x, mask, cache)
        return residual + self.ffn(h)


class Transformer(nn.Module):
    def __init__(self, args: Geometry) -> None:
        super().__init__()
        self.wte = nn.Embedding(args.vocab_size, args.d_model)
        self.blocks = [DecoderLayer(args) for _ in range(args.n_layers)]
        self.norm_f = nn.LayerNorm(args.d_model, bias=False)

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:  # (B, L) → (B, L, D)
        h = self.wte(inputs)
        cache = cache or [None] * len(self.blocks)
        mask = create_attention_mask(h, cache[0])
        for layer, layer_cache in zip(self.blocks, cache, strict=True):
            h = layer(h, mask, layer_cache)
        return self.norm_f(h)


class Model(nn.Module):
    def __init__(self, args: Geometry) -> None:
        super().__init__()
        self.args = args
        self.model_type = "dbrx"
        self.transformer = Transformer(args)
        self.lm_head = nn.Linear(args.d_model, args.vocab_size, bias=False)

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        """Return logits (B, L, V) for token ids (B, L)."""
        return self.lm_head(self.transformer(inputs, cache))

    @property
    def layers(self) -> list[DecoderLayer]:
        return self.transformer.blocks

    @property
    def quant_predicate(self) -> Callable[[str, nn.Module], bool]:
        """Whether a module is quantised: the router is not."""
        return lambda path, _: ".router" not in path

    def sanitize(self, weights: Weights) -> Weights:
        """Return the model's parameters for the tensors of any layout; what the model has not keeps its name."""
        made: Weights = {}
        rest = {name for name in weights if name.startswith(("transformer.", "lm_head."))}
        for name in sorted(rest):
            value = weights[name]
            if found := _FUSED.fullmatch(name):
                made |= self._split_fused(found[1], found[2], value)
            elif found := _QKV.fullmatch(name):
                made |= self._split_qkv(found[1], found[2], value)
            elif found := _ONE.fullmatch(name):
                prefix, mlp, expert, projection, part = found.groups()
                if expert == "0":
                    names = [f"{prefix}{mlp}{e}.{projection}{part}" for e in range(self.args.n_experts)]
                    stack = mx.stack([self._turn(projection, part, weights[one]) for one in names])
                    made[f"{prefix}{_EXPERTS[projection]}{part}"] = stack
                elif int(expert) >= self.args.n_experts or f"{prefix}{mlp}0.{projection}{part}" not in weights:
                    made[name] = value
            elif not name.endswith(".inv_freq"):  # tables of old rotary embeddings are computed, not read
                made[name] = value
        return made

    def _split_fused(self, prefix: str, projection: str, value: Any) -> Weights:
        stack = value.reshape(self.args.n_experts, -1, value.shape[-1])
        if projection == "w2":  # it is used as x @ w2[e]: each expert is stored (hidden, d_model)
            stack = stack.swapaxes(1, 2)
        return {f"{prefix}{_EXPERTS[projection]}.weight": stack}

    def _split_qkv(self, prefix: str, part: str, value: Any) -> Weights:
        *ends, _ = accumulate(_qkv_widths(self.args))
        parts = mx.split(value, ends, axis=0)
        return {f"{prefix}{name}_proj{part}": one for name, one in zip("qkv", parts, strict=True)}

    def _turn(self, projection: str, part: str, value: Any) -> Any:
        """Return one expert's array as (out, in); a square w2 counts as that."""
        stored_turned = (self.args.ffn_hidden, self.args.d_model)
        if projection == "w2" and part == ".weight" and value.shape == stored_turned and len(set(stored_turned)) == 2:
            return value.T
        return value


def rename_table(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json's `quantization` with the names of this model's modules.

    Raises CheckpointError where experts of a layer differ: they are one stack here.
    """
    renamed: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for path, value in table.items():
        for new in _rename_module(path):
            if new in renamed and renamed[new] != value:
                raise CheckpointError(
                    f"config.json: quantization: {origin[new]} and {path} differ, and moectl needs experts of a layer"
                    " that are quantised alike",
                    hint="start from the 16-bit checkpoint: moectl shard --q-bits 4",
                )
            renamed[new], origin[new] = value, path
    return renamed


def _rename_module(path: str) -> list[str]:
    if found := _ONE.fullmatch(path):
        return [f"{found[1]}{_EXPERTS[found[4]]}"]
    if found := _QKV.fullmatch(path):
        return [f"{found[1]}{name}_proj" for name in "qkv"]
    return [path]


def _qkv_widths(args: Geometry) -> tuple[int, int, int]:
    return args.d_model, args.kv_n_heads * args.head_dim, args.kv_n_heads * args.head_dim


def _mlx_args(args: Geometry) -> dbrx.ModelArgs:
    # For the norms; the attention that is made of it is replaced.
    attention = {"kv_n_heads": args.kv_n_heads, "clip_qkv": math.inf, "rope_theta": args.rope_theta}
    return dbrx.ModelArgs("dbrx", args.vocab_size, args.d_model, {}, attention, args.n_layers, args.n_heads)
