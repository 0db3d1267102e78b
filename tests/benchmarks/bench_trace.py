"""Measure the trace of full-size checkpoints from made-up headers, and parts of a large one: time and memory.

Each is measured in a process of its own. `cut` writes and deletes about 0.6 GB in DeepSeek-V3's layout, and computes
every parameter of it, quantised to 4 bits, chunk by chunk. Not a test.

    python -m tests.benchmarks.bench_trace deepseek-v3 kimi-k2 kimi-k2-int4 cut
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx

from moectl.model.structure import Quantization
from moectl.shards.source.stored import name_stored
from moectl.shards.source.tensors import StoredTensor
from moectl.shards.trace.formats import quantise, read_format, unpack
from moectl.shards.trace.parts import chunks, full, part
from moectl.shards.trace.precision import settle, source_of
from moectl.shards.trace.traced import list_dropped, trace
from tests.support.traced import make_model, open_traced

DEEPSEEK_V3: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "torch_dtype": "bfloat16",
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}
KIMI_K2 = DEEPSEEK_V3 | {
    "model_type": "kimi_k2",
    "vocab_size": 163840,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "n_routed_experts": 384,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.827,
}
MODELS = {
    "deepseek-v3": DEEPSEEK_V3,
    "kimi-k2": KIMI_K2,
    "kimi-k2-int4": KIMI_K2
    | {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}},
}
Header = Iterator[tuple[str, str, tuple[int, ...]]]  # name, type, shape


def fp8(name: str, rows: int, columns: int) -> Header:
    yield f"{name}.weight", "F8_E4M3", (rows, columns)
    yield f"{name}.weight_scale_inv", "F32", (-(-rows // 128), -(-columns // 128))


def int4(name: str, rows: int, columns: int) -> Header:
    yield f"{name}.weight_packed", "I32", (rows, columns // 8)
    yield f"{name}.weight_scale", "BF16", (rows, columns // 32)
    yield f"{name}.weight_shape", "I64", (2,)


def plain(name: str, *shape: int) -> Header:
    yield f"{name}.weight", "BF16", shape


def headers(config: dict[str, Any]) -> Header:
    """Yield what the headers of a published DeepSeek-V3 or Kimi K2 say."""
    packed = config["quantization_config"]["quant_method"] == "compressed-tensors"
    size, heads, latent, queries = 7168, config["num_attention_heads"], config["kv_lora_rank"], config["q_lora_rank"]
    store, experts_as = (plain, int4) if packed else (fp8, fp8)
    yield from plain("model.embed_tokens", config["vocab_size"], size)
    yield from plain("lm_head", config["vocab_size"], size)
    yield from plain("model.norm", size)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        attention = f"{layer}.self_attn"
        yield from store(f"{attention}.q_a_proj", queries, size)
        yield from store(f"{attention}.q_b_proj", heads * 192, queries)
        yield from store(f"{attention}.kv_a_proj_with_mqa", latent + 64, size)
        yield from store(f"{attention}.kv_b_proj", heads * 256, latent)
        yield from store(f"{attention}.o_proj", size, heads * 128)
        yield from plain(f"{attention}.q_a_layernorm", queries)
        yield from plain(f"{attention}.kv_a_layernorm", latent)
        yield from plain(f"{layer}.input_layernorm", size)
        yield from plain(f"{layer}.post_attention_layernorm", size)
        dense = i < config["first_k_dense_replace"]
        path = f"{layer}.mlp" if dense else f"{layer}.mlp.shared_experts"
        mlps = [(path, config["intermediate_size" if dense else "moe_intermediate_size"], store)]
        if not dense:
            mlps += [(f"{layer}.mlp.experts.{e}", 2048, experts_as) for e in range(config["n_routed_experts"])]
            yield from plain(f"{layer}.mlp.gate", config["n_routed_experts"], size)
            yield f"{layer}.mlp.gate.e_score_correction_bias", "F32", (config["n_routed_experts"],)
        for path, hidden, how in mlps:
            yield from how(f"{path}.gate_proj", hidden, size)
            yield from how(f"{path}.up_proj", hidden, size)
            yield from how(f"{path}.down_proj", size, hidden)


def make_headers(config: dict[str, Any]) -> dict[str, StoredTensor]:
    """Return what reading the headers gives; offsets are made up."""
    return {
        name: StoredTensor("model-00001.safetensors", dtype, shape, 8 * i)
        for i, (name, dtype, shape) in enumerate(headers(config))
    }


def rss_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_trace(name: str) -> None:
    """Trace a model and print time and memory as JSON."""
    config = MODELS[name]
    loaded_mb, begin, busy = rss_mb(), time.perf_counter(), time.process_time()
    stored = make_headers(config)
    times = {"headers": time.perf_counter()}
    model = make_model(config)
    times["skeleton"] = time.perf_counter()
    form = read_format(config)
    tensors = unpack(name_stored(stored), form)
    times["unpack"] = time.perf_counter()
    traced = trace(model, tensors)
    times["trace"] = time.perf_counter()
    settled = settle(model, config, traced, form, Quantization(4, 64, "affine"))
    times["settle"] = time.perf_counter()
    dropped = list_dropped(tensors, settled.parameters)
    times["dropped"] = time.perf_counter()
    busy = time.process_time() - busy
    lapses = {}
    for step, at in times.items():
        lapses[step], begin = round(at - begin, 2), at
    values = sum(node.size for node in traced.values())
    result = {
        "model": name,
        "names": len(stored),
        "values_g": round(values / 1e9, 1),
        "4-bit_gb": round(sum(node.nbytes for node in settled.parameters.values()) / 1e9, 1),
        "dropped": len(dropped),
        "seconds": {**lapses, "all": round(sum(lapses.values()), 2), "cpu": round(busy, 2)},
        "rss_mb": {"imports": round(loaded_mb), "all": round(rss_mb())},
        "mlx_peak_mb": round(mx.get_peak_memory() / 1e6, 1),
    }
    print(json.dumps(result))


def measure_parts() -> None:
    """Compute all parameters of a checkpoint in chunks, and print speed and memory as JSON."""
    with tempfile.TemporaryDirectory(prefix="bench-") as work:
        sizes = {"hidden_size": 2048, "moe_intermediate_size": 2048, "n_routed_experts": 48, "n_group": 1}
        command = "import sys, json; from pathlib import Path; from tests.support.layouts import write_layout; "
        command += "write_layout(Path(sys.argv[1]), 'deepseek-v3-fp8', **json.loads(sys.argv[2]))"
        subprocess.run([sys.executable, "-c", command, work, json.dumps(sizes)], check=True)
        loaded_mb = rss_mb()
        traced = open_traced(Path(work), Quantization(4, 64, "affine"))
        mx.reset_peak_memory()
        begin, busy, made = time.perf_counter(), time.process_time(), 0
        for node in traced.parameters.values():
            source, quantization = source_of(node)
            if quantization is not None and node.operation.result:
                continue  # scales and biases come with the weight
            for region in chunks(full(source.shape), source.dtype.size):
                block = part(source, region, traced.read)
                parts = [block] if quantization is None else quantise(block, *quantization_of(quantization))
                mx.eval(*parts)
                made += sum(p.nbytes for p in parts)
                mx.clear_cache()
        lapse, busy = time.perf_counter() - begin, time.process_time() - busy
    result = {
        "read_mb": round(traced.read.bytes_read / 1e6),
        "made_mb": round(made / 1e6),
        "seconds": {"all": round(lapse, 2), "cpu": round(busy, 2)},
        "rss_mb": {"imports": round(loaded_mb), "all": round(rss_mb())},
        "mlx_peak_mb": round(mx.get_peak_memory() / 1e6, 1),
    }
    print(json.dumps({"model": "cut", **result}))


def quantization_of(q: Quantization) -> tuple[int, int, str]:
    return q.group_size, q.bits, q.mode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=[*MODELS, "cut"], metavar="NAME", help=", ".join([*MODELS, "cut"]))
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    for name in options.names:
        if not options.here:
            subprocess.run([sys.executable, "-m", "tests.benchmarks.bench_trace", "--here", name], check=True)
        elif name == "cut":
            measure_parts()
        else:
            measure_trace(name)


if __name__ == "__main__":
    main()
