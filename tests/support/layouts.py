"""Write tiny random checkpoints as their publishers lay them out: names, types, scales and further heads of originals.

Each has the traps of its family: experts one by one, FP8 in blocks that do not divide the weights, MXFP4, packed int4,
the layer of multi-token prediction, modules that MLX has quantised with other bits than the rest.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.convert import mixed_quant_predicate_builder
from mlx_lm.utils import load_model, quantize_model, save_config, save_model

Config = dict[str, Any]
Tensors = Iterator[tuple[str, mx.array, str]]  # name, values, type in safetensors' spelling

_TYPES = {mx.bfloat16: "BF16", mx.float32: "F32", mx.uint8: "U8", mx.int32: "I32", mx.int64: "I64"}
_VOCABULARY = 160


def write_layout(directory: Path, name: str, *, files: int | None = 2, **changes: Any) -> Path:
    """Write the checkpoint of this name (one of LAYOUTS) and return its directory; `changes` go into its config.

    With None for `files` each layer has a file of its own, after one with all the rest.
    """
    if name in _CONVERTED:
        source = write_layout(directory / "source", _CONVERTED[name].source, **changes)
        return _convert(source, directory / "converted", _CONVERTED[name])
    layout = _ORIGINALS[name]
    config = {**layout.config, **changes}
    mx.random.seed(3)
    return write_tensors(directory, config, layout.make(config), files=files)


def write_tensors(directory: Path, config: Config, tensors: Tensors, *, files: int | None = 1) -> Path:
    """Write tensors of any type of safetensors, in order, to some files, or (None) to one for each layer."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    held = list(tensors)
    if files is None:
        layers: dict[str, list[tuple[str, mx.array, str]]] = {}
        for tensor in held:
            layers.setdefault(tensor[0].partition(".layers.")[2].partition(".")[0], []).append(tensor)
        groups = list(layers.values())
    else:
        per_file = -(-len(held) // files)
        groups = [held[number * per_file : (number + 1) * per_file] for number in range(files)]
    index = {}
    for number, chosen in enumerate(groups, start=1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        _write_file(directory / file, chosen)
        index.update({name: file for name, _, _ in chosen})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return directory


def _write_file(path: Path, tensors: list[tuple[str, mx.array, str]]) -> None:
    header: dict[str, Any] = {}
    end = 0
    for name, array, kind in tensors:
        start, end = end, end + array.nbytes
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for _, array, _ in tensors:
            flat = mx.contiguous(array).reshape(-1).view(mx.uint8)
            mx.eval(flat)
            f.write(memoryview(flat))  # type: ignore[arg-type]  # a buffer, whatever the stubs say


def noise(*shape: int, scale: float | None = None, around: float = 0.0) -> mx.array:
    values = around + mx.random.normal(shape) * (scale or shape[-1] ** -0.5)
    return values.astype(mx.bfloat16)


def plain(name: str, array: mx.array) -> Tensors:
    yield name, array, _TYPES[array.dtype]


def fp8(name: str, array: mx.array, block: int = 128) -> Tensors:
    """Store a weight as DeepSeek does: e4m3, and a float32 scale for each block."""
    rows, columns = array.shape
    down, across = -(-rows // block), -(-columns // block)
    padding = [(0, down * block - rows), (0, across * block - columns)]
    blocks = mx.pad(array.astype(mx.float32), padding).reshape(down, block, across, block)
    scale = mx.abs(blocks).max(axis=(1, 3)) / 448.0 + 1e-12
    values = mx.to_fp8((blocks / scale[:, None, :, None]).reshape(down * block, across * block)[:rows, :columns])
    yield name, values, "F8_E4M3"
    yield f"{name}_scale_inv", scale, "F32"


def mxfp4(name: str, array: mx.array) -> Tensors:
    """Store a weight as OpenAI does: blocks of 16 bytes, and exponents."""
    packed, scales, *_ = mx.quantize(array.astype(mx.float32), group_size=32, bits=4, mode="mxfp4")
    yield f"{name}_blocks", packed.view(mx.uint8).reshape(*scales.shape, 16), "U8"
    yield f"{name}_scales", scales, "U8"


def int4(name: str, array: mx.array) -> Tensors:
    """Store a weight as compressed-tensors does (random values of the same shape)."""
    base, (rows, columns) = name.removesuffix(".weight"), array.shape
    scale = mx.random.uniform(shape=(rows, columns // 32)) * 0.05 * columns**-0.5
    yield f"{base}.weight_packed", mx.random.randint(-(2**31), 2**31 - 1, (rows, columns // 8)).astype(mx.int32), "I32"
    yield f"{base}.weight_scale", scale.astype(mx.bfloat16), "BF16"
    yield f"{base}.weight_shape", mx.array([rows, columns], mx.int64), "I64"


Store = Callable[[str, mx.array], Tensors]


def _ends(config: Config, norm: float = 1.0) -> Tensors:
    size = config["hidden_size"]
    yield from plain("model.embed_tokens.weight", noise(config["vocab_size"], size, scale=1.0))
    yield from plain("model.norm.weight", noise(size, scale=0.1, around=norm))
    yield from plain("lm_head.weight", noise(config["vocab_size"], size))


def _norms(layer: str, size: int, around: float = 1.0) -> Tensors:
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield from plain(f"{layer}.{name}.weight", noise(size, scale=0.1, around=around))


def _mlp(
    path: str, size: int, hidden: int, store: Store = plain, names: str = "gate_proj up_proj down_proj"
) -> Tensors:
    gate, up, down = names.split()
    yield from store(f"{path}.{gate}.weight", noise(hidden, size))
    yield from store(f"{path}.{up}.weight", noise(hidden, size))
    yield from store(f"{path}.{down}.weight", noise(size, hidden))


def _attention(path: str, config: Config, store: Store = plain, *, bias: bool = False, gated: bool = False) -> Tensors:
    size, heads, kv_heads = (config[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    dims = config.get("head_dim", size // heads)
    rows = {"q": heads * dims * (2 if gated else 1), "k": kv_heads * dims, "v": kv_heads * dims}
    for name, count in rows.items():
        yield from store(f"{path}.{name}_proj.weight", noise(count, size))
    yield from store(f"{path}.o_proj.weight", noise(size, heads * dims))
    for name, count in ({**rows, "o": size} if bias else {}).items():
        yield from plain(f"{path}.{name}_proj.bias", noise(count, scale=0.1))


def _head_norms(path: str, config: Config, around: float = 1.0) -> Tensors:
    for name in ("q_norm", "k_norm"):
        yield from plain(f"{path}.{name}.weight", noise(config["head_dim"], scale=0.1, around=around))


def _mixtral(config: Config) -> Tensors:
    size, experts = config["hidden_size"], config["num_local_experts"]
    yield from _ends(config)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        yield from _attention(f"{layer}.self_attn", config)
        yield from plain(f"{layer}.block_sparse_moe.gate.weight", noise(experts, size, scale=0.3))
        for e in range(experts):
            path = f"{layer}.block_sparse_moe.experts.{e}"
            yield from _mlp(path, size, config["intermediate_size"], names="w1 w3 w2")
        yield from _norms(layer, size)


def _deepseek(config: Config, store: Store = fp8, experts_as: Store = fp8, mtp: int | None = 61) -> Tensors:
    """DeepSeek-V3 and Kimi K2. `mtp` is the number of the layer that predicts further tokens."""
    size, heads, experts = config["hidden_size"], config["num_attention_heads"], config["n_routed_experts"]
    nope, rope, values = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    queries, latent = config["q_lora_rank"], config["kv_lora_rank"]
    yield from _ends(config)
    for i in [*range(config["num_hidden_layers"]), *([mtp] if mtp else [])]:
        layer = f"model.layers.{i}"
        attention = f"{layer}.self_attn"
        yield from store(f"{attention}.q_a_proj.weight", noise(queries, size))
        yield from plain(f"{attention}.q_a_layernorm.weight", noise(queries, scale=0.1, around=1))
        yield from store(f"{attention}.q_b_proj.weight", noise(heads * (nope + rope), queries))
        yield from store(f"{attention}.kv_a_proj_with_mqa.weight", noise(latent + rope, size))
        yield from plain(f"{attention}.kv_a_layernorm.weight", noise(latent, scale=0.1, around=1))
        yield from store(f"{attention}.kv_b_proj.weight", noise(heads * (nope + values), latent))
        yield from store(f"{attention}.o_proj.weight", noise(size, heads * values))
        if i < config["first_k_dense_replace"]:
            yield from _mlp(f"{layer}.mlp", size, config["intermediate_size"], store)
        else:
            for e in range(experts):
                yield from _mlp(f"{layer}.mlp.experts.{e}", size, config["moe_intermediate_size"], experts_as)
            yield from _mlp(f"{layer}.mlp.shared_experts", size, config["moe_intermediate_size"], store)
            yield from plain(f"{layer}.mlp.gate.weight", noise(experts, size, scale=0.3))
            correction = mx.random.normal((experts,)) * 0.1
            yield f"{layer}.mlp.gate.e_score_correction_bias", correction, "F32"
        yield from _norms(layer, size)


def _kimi(config: Config) -> Tensors:
    return _deepseek(config, plain, int4, None)


def _kimi_k25(config: Config) -> Tensors:
    for name, array, kind in _kimi(config["text_config"]):
        yield f"language_model.{name}", array, kind
    yield from plain("vision_tower.patch.weight", noise(8, 8))
    yield from plain("mm_projector.proj.weight", noise(8, 8))


def _gpt_oss(config: Config) -> Tensors:
    size, hidden, experts = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    yield from _ends(config)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        yield from _attention(f"{layer}.self_attn", config, bias=True)
        yield from plain(f"{layer}.self_attn.sinks", noise(config["num_attention_heads"], scale=1.0))
        yield from plain(f"{layer}.mlp.router.weight", noise(experts, size, scale=0.3))
        yield from plain(f"{layer}.mlp.router.bias", noise(experts, scale=0.1))
        yield from mxfp4(f"{layer}.mlp.experts.gate_up_proj", noise(experts, 2 * hidden, size))
        yield from plain(f"{layer}.mlp.experts.gate_up_proj_bias", noise(experts, 2 * hidden, scale=0.1))
        yield from mxfp4(f"{layer}.mlp.experts.down_proj", noise(experts, size, hidden))
        yield from plain(f"{layer}.mlp.experts.down_proj_bias", noise(experts, size, scale=0.1))
        yield from _norms(layer, size)


def _qwen3_next(config: Config) -> Tensors:
    size, hidden, experts = config["hidden_size"], config["moe_intermediate_size"], config["num_experts"]
    keys = config["linear_num_key_heads"] * config["linear_key_head_dim"]
    heads, value_dims = config["linear_num_value_heads"], config["linear_value_head_dim"]
    values = heads * value_dims
    yield from _ends(config, norm=0.0)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        if (i + 1) % config["full_attention_interval"]:
            path = f"{layer}.linear_attn"
            yield from plain(f"{path}.in_proj_qkvz.weight", noise(2 * keys + 2 * values, size))
            yield from plain(f"{path}.in_proj_ba.weight", noise(2 * heads, size))
            width = config["linear_conv_kernel_dim"]
            yield from plain(f"{path}.conv1d.weight", noise(2 * keys + values, 1, width, scale=0.5))
            yield f"{path}.A_log", mx.log(mx.random.uniform(1, 16, (heads,))), "F32"
            yield from plain(f"{path}.dt_bias", noise(heads, scale=0.1, around=1))
            yield from plain(f"{path}.norm.weight", noise(value_dims, scale=0.1, around=1))
            yield from plain(f"{path}.out_proj.weight", noise(size, values))
        else:
            yield from _attention(f"{layer}.self_attn", config, gated=True)
            yield from _head_norms(f"{layer}.self_attn", config, around=0)
        for e in range(experts):
            yield from _mlp(f"{layer}.mlp.experts.{e}", size, hidden)
        yield from _mlp(f"{layer}.mlp.shared_expert", size, config["shared_expert_intermediate_size"])
        yield from plain(f"{layer}.mlp.gate.weight", noise(experts, size, scale=0.3))
        yield from plain(f"{layer}.mlp.shared_expert_gate.weight", noise(1, size))
        yield from _norms(layer, size, around=0)
    yield from plain("mtp.fc.weight", noise(size, 2 * size))


def _qwen3(config: Config, store: Store = plain) -> Tensors:
    size, experts = config["hidden_size"], config.get("num_experts", 0)
    yield from _ends(config)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        yield from _attention(f"{layer}.self_attn", config, store)
        yield from _head_norms(f"{layer}.self_attn", config)
        if not experts:
            yield from _mlp(f"{layer}.mlp", size, config["intermediate_size"], store)
        else:
            yield from plain(f"{layer}.mlp.gate.weight", noise(experts, size, scale=0.3))
        for e in range(experts):
            yield from _mlp(f"{layer}.mlp.experts.{e}", size, config["moe_intermediate_size"], store)
        yield from _norms(layer, size)


def _qwen3_fp8(config: Config) -> Tensors:
    return _qwen3(config, fp8)


@dataclass(frozen=True)
class _Original:
    make: Callable[[Config], Tensors]
    config: Config


@dataclass(frozen=True)
class _Conversion:
    """What mlx-lm makes of an original, as mlx-community publishes it."""

    source: str
    bits: int
    recipe: str | None = None


_COMMON: Config = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 192,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}
_DEEPSEEK: Config = _COMMON | {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 2,
    "num_key_value_heads": 6,
    "intermediate_size": 320,
    "moe_intermediate_size": 96,
    "n_shared_experts": 1,
    "n_routed_experts": 4,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 64,
    "q_lora_rank": 96,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "qk_nope_head_dim": 64,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}
_FP8: Config = {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}}
_INT4: Config = {
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {
                "input_activations": None,
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32},
            }
        },
    }
}
_QWEN3: Config = _COMMON | {
    "model_type": "qwen3",
    "head_dim": 32,
    "intermediate_size": 448,
    "num_hidden_layers": 2,
    "rope_theta": 1e6,
}
_QWEN3_MOE: Config = _QWEN3 | {
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 160,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}
_QWEN3_NEXT: Config = _COMMON | {
    "model_type": "qwen3_next",
    "num_hidden_layers": 2,
    "intermediate_size": 320,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "shared_expert_intermediate_size": 128,
    "mlp_only_layers": [],
    "moe_intermediate_size": 128,
    "partial_rotary_factor": 0.25,
    "head_dim": 32,
    "norm_topk_prob": True,
    "full_attention_interval": 2,
}
_MIXTRAL: Config = _COMMON | {
    "model_type": "mixtral",
    "num_hidden_layers": 2,
    "intermediate_size": 256,
    "num_experts_per_tok": 2,
    "num_local_experts": 4,
}
_GPT_OSS: Config = _COMMON | {
    "model_type": "gpt_oss",
    "num_hidden_layers": 2,
    "intermediate_size": 224,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "head_dim": 32,
    "sliding_window": 16,
    "quantization_config": {"quant_method": "mxfp4"},
}
_ORIGINALS = {
    "mixtral": _Original(_mixtral, _MIXTRAL),
    "deepseek-v3-fp8": _Original(_deepseek, _DEEPSEEK | _FP8),
    "gpt-oss-mxfp4": _Original(_gpt_oss, _GPT_OSS),
    "qwen3-next": _Original(_qwen3_next, _QWEN3_NEXT),
    "qwen3": _Original(_qwen3, _QWEN3),
    "qwen3-moe-fp8": _Original(_qwen3_fp8, _QWEN3_MOE | _FP8),
    "qwen3-moe": _Original(_qwen3, _QWEN3_MOE),
    "kimi-k2-int4": _Original(_kimi, _DEEPSEEK | _INT4 | {"model_type": "kimi_k2"}),
    "kimi-k25-int4": _Original(_kimi_k25, {"model_type": "kimi_k25", "text_config": _DEEPSEEK | _INT4} | _INT4),
}
_CONVERTED = {
    "mlx-overrides": _Conversion("qwen3-next", 4),  # its routers have 8 bits
    "mlx-mixed": _Conversion("qwen3", 3, "mixed_3_6"),
    "mlx-mla": _Conversion("deepseek-v3-fp8", 4),
}
LAYOUTS = (*_ORIGINALS, *_CONVERTED)


def _convert(source: Path, directory: Path, conversion: _Conversion) -> Path:
    with redirect_stdout(io.StringIO()):
        model, config = load_model(source)
        recipe = conversion.recipe and mixed_quant_predicate_builder(conversion.recipe, model, 64)
        model, config = quantize_model(model, config, 64, conversion.bits, quant_predicate=recipe)
        directory.mkdir(parents=True)
        save_model(directory, model, donate_model=False)
    config.pop("quantization_config")
    save_config(config, directory / "config.json")
    return directory
