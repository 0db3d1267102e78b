"""Write tiny random DBRX checkpoints, real safetensors directories in every layout that moectl reads.

The same seed gives the same logical weights in every layout and for any number of files. Not a trained model:
text from it is noise, numbers from it are exact.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from hypothesis import strategies as st

from moectl.model.geometry import Geometry, block, expert_name, read_geometry
from moectl.shards.source.tensors import ITEM_BYTES

PROJECTIONS = ("w1", "v1", "w2")  # gate, up, down

LAYOUTS = ("fused", "v2", "mlx", "mlx-quantized")
_DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}
_SIDECARS = {
    "LICENSE": "Databricks Open Model License (a placeholder of the tests)\n",
    "tokenizer_config.json": '{"tokenizer_class": "PreTrainedTokenizerFast"}\n',
    "generation_config.json": '{"eos_token_id": [100257, 100279]}\n',
}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def make_config(
    *,
    n_layers: int = 2,
    d_model: int = 64,
    n_heads: int = 4,
    kv_n_heads: int = 2,
    ffn_hidden: int = 384,
    n_experts: int = 16,
    top_k: int = 4,
    vocab_size: int = 128,
    max_seq_len: int = 512,
    rope_theta: float = 500_000.0,
    clip_qkv: float | None = 8.0,
    moe_normalize: float | None = 1.0,
    dtype: str = "bfloat16",
) -> dict[str, Any]:
    """Return a config.json in the shape of databricks/dbrx-instruct's."""
    return {
        "architectures": ["DbrxForCausalLM"],
        "attn_config": {"clip_qkv": clip_qkv, "kv_n_heads": kv_n_heads, "rope_theta": rope_theta},
        "d_model": d_model,
        "ffn_config": {
            "ffn_hidden_size": ffn_hidden,
            "moe_jitter_eps": 0,
            "moe_loss_weight": 0.05,
            "moe_normalize_expert_weights": moe_normalize,
            "moe_num_experts": n_experts,
            "moe_top_k": top_k,
        },
        "max_seq_len": max_seq_len,
        "model_type": "dbrx",
        "n_heads": n_heads,
        "n_layers": n_layers,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "vocab_size": vocab_size,
    }


def make_weights(geometry: Geometry, *, dtype: str = "bfloat16", seed: int = 0) -> dict[str, mx.array]:
    """Return every canonical tensor, experts as (out, in), rounded to `dtype`."""
    weights = {}
    for name, shape in geometry.checkpoint_shapes():
        noise = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape, np.float32)
        values = 1 + 0.1 * noise if len(shape) == 1 else noise / np.float32(shape[-1]) ** 0.5
        weights[name] = mx.array(values.astype(np.float32)).astype(_DTYPES[dtype])
    return weights


def to_layout(
    weights: Mapping[str, mx.array],
    geometry: Geometry,
    layout: str,
    *,
    q_bits: int = 4,
    q_group_size: int = 64,
    q_mode: str = "affine",
    quantize_router: bool = False,
) -> dict[str, mx.array]:
    """Return canonical weights under the names and in the shapes of a layout."""
    if layout == "fused":
        return _fuse(weights, geometry)
    if layout == "v2":
        return {_v2_name(name): value for name, value in weights.items()}
    if layout == "mlx":
        return dict(weights)
    if layout != "mlx-quantized":
        raise ValueError(f"layout {layout!r} is not one of {LAYOUTS}")
    out: dict[str, mx.array] = {}
    for name, value in weights.items():
        if value.ndim == 1 or (".router." in name and not quantize_router):
            out[name] = value
            continue
        parts = mx.quantize(value, group_size=q_group_size, bits=q_bits, mode=q_mode)
        for suffix, part in zip(("weight", "scales", "biases"), parts, strict=False):
            out[name.removesuffix("weight") + suffix] = part
    return out


def to_parameters(weights: Mapping[str, mx.array], geometry: Geometry) -> dict[str, mx.array]:
    """Return canonical weights as the model's parameters: stacked experts; queries, keys and values apart."""
    made = {name: value for name, value in weights.items() if ".ffn.experts." not in name and ".Wqkv." not in name}
    rows = geometry.n_heads * geometry.head_dim, (geometry.n_heads + geometry.kv_n_heads) * geometry.head_dim
    for i in range(geometry.n_layers):
        attention = f"{block(i)}.norm_attn_norm.attn"
        for name, part in zip("qkv", mx.split(weights[f"{attention}.Wqkv.weight"], list(rows)), strict=True):
            made[f"{attention}.{name}_proj.weight"] = part
        for projection, name in zip(PROJECTIONS, ("gate_proj", "up_proj", "down_proj"), strict=True):
            experts = [weights[expert_name(i, e, projection)] for e in range(geometry.n_experts)]
            made[f"{block(i)}.ffn.experts.{name}.weight"] = mx.stack(experts)
    return made


def write_checkpoint(
    directory: Path,
    *,
    layout: str = "fused",
    dtype: str = "bfloat16",
    seed: int = 0,
    files: int = 2,
    q_bits: int = 4,
    q_group_size: int = 64,
    q_mode: str = "affine",
    quantize_router: bool = False,
    **config_overrides: Any,
) -> Path:
    """Write a checkpoint directory and return it; `config_overrides` are the keywords of `make_config`."""
    config = make_config(dtype=dtype, **config_overrides)
    geometry = read_geometry(config)
    weights = to_layout(
        make_weights(geometry, dtype=dtype, seed=seed),
        geometry,
        layout,
        q_bits=q_bits,
        q_group_size=q_group_size,
        q_mode=q_mode,
        quantize_router=quantize_router,
    )
    if layout == "mlx-quantized":
        config["quantization"] = {"bits": q_bits, "group_size": q_group_size}
        if q_mode != "affine":
            config["quantization"]["mode"] = q_mode
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name, text in _SIDECARS.items():
        (directory / name).write_text(text)
    write_weights(directory, weights, files=files)
    return directory


def write_words(directory: Path, vocabulary: Mapping[str, int] | None = None) -> Path:
    """Write a tokenizer of a few whole words, beside a checkpoint's weights or alone; return the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    words = {"<|endoftext|>": 0, "a": 1, "b": 2, **(vocabulary or {})}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "<|endoftext|>"}
    (directory / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def write_weights(directory: Path, weights: Mapping[str, mx.array], *, files: int = 1) -> None:
    """Write tensors in order to `files` safetensors files, with an index when there is more than one."""
    names = list(weights)
    per_file = -(-len(names) // files)
    weight_map = {}
    for i in range(files):
        file = "model.safetensors" if files == 1 else f"model-{i + 1:05}-of-{files:05}.safetensors"
        chosen = names[i * per_file : (i + 1) * per_file]
        mx.save_safetensors(str(directory / file), {n: weights[n] for n in chosen}, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(chosen, file))
    if files > 1:
        total = sum(value.nbytes for value in weights.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def order_names(names: Iterable[str]) -> list[str]:
    """Return tensor names in the order of the published files: embedding, layers, head."""

    def key(name: str) -> tuple[int, ...]:
        if not name.startswith("transformer.blocks."):
            return (-1 if ".wte." in name else 1 << 30,)
        order = ("norm_1", "Wqkv", "out_proj", "norm_2", "router", "w1", "v1", "w2")
        return (int(name.split(".")[2]), next(i for i, part in enumerate(order) if part in name))

    return sorted(names, key=key)


def write_hollow_dbrx(directory: Path) -> Path:
    """Write databricks/dbrx-instruct as holes: 263 GB in 61 files, cut as transformers cuts them, at 5 GB."""
    config = make_config(
        n_layers=40,
        d_model=6144,
        n_heads=48,
        kv_n_heads=8,
        ffn_hidden=10752,
        vocab_size=100352,
        max_seq_len=32768,
    )
    shapes = fused_shapes(config)
    files: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name in order_names(shapes):
        nbytes = 2 * math.prod(shapes[name])
        if size + nbytes > 5_000_000_000:
            files.append({})
            size = 0
        files[-1][name] = shapes[name]
        size += nbytes
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    for i, held in enumerate(files, 1):
        path = directory / f"model-{i:05}-of-{len(files):05}.safetensors"
        write_hollow(path, {name: ("BF16", shape) for name, shape in held.items()})
    return directory


def fused_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors of a published DBRX."""
    geometry = read_geometry(config)
    shapes: dict[str, tuple[int, ...]] = geometry.outer_shapes()
    rows = geometry.n_experts * geometry.ffn_hidden
    for i in range(geometry.n_layers):
        shapes |= geometry.layer_shapes(i)
        shapes |= {f"{block(i)}.ffn.experts.mlp.{p}": (rows, geometry.d_model) for p in PROJECTIONS}
    return shapes


def write_hollow(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Write a safetensors file of holes: a type and a shape for each name."""
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + ITEM_BYTES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + end)


def _fuse(weights: Mapping[str, mx.array], geometry: Geometry) -> dict[str, mx.array]:
    out = {name: value for name, value in weights.items() if ".ffn.experts." not in name}
    for i in range(geometry.n_layers):
        for projection in PROJECTIONS:
            experts = [weights[expert_name(i, e, projection)] for e in range(geometry.n_experts)]
            # The fused w2 is used as x @ w2[e]: each expert is stored (hidden, d_model).
            rows = [e.T for e in experts] if projection == "w2" else experts
            out[f"{block(i)}.ffn.experts.mlp.{projection}"] = mx.concatenate(rows)
    return out


def _v2_name(name: str) -> str:
    return name.replace(".ffn.experts.", ".ffn.experts.mlp.")
