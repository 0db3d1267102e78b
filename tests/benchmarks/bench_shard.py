"""Measure `shard` on a synthetic checkpoint of DBRX's real width: memory above the baseline, and speed beside mx.quantize.

Makes (streamed) and deletes a fused checkpoint of random bf16 weights. The cut and the bare `mx.quantize` run in the
same minutes with the same number of streams; the source is in the page cache when memory allows. Not a test.

    python tests/benchmarks/bench_shard.py --gb 6.3 --jobs 1 2
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import mlx.core as mx

D_MODEL, FFN_HIDDEN, GROUP, BITS = 6144, 10752, 64, 4
EXPERT_BYTES = 3 * D_MODEL * FFN_HIDDEN * 2
_PEAK_UNIT = 1 if sys.platform == "darwin" else 1024


def write_checkpoint(directory: Path, n_experts: int, n_layers: int) -> int:
    """Write a fused checkpoint, one file per layer; return its bytes."""
    config = {
        "model_type": "dbrx",
        "d_model": D_MODEL,
        "n_heads": 48,
        "n_layers": n_layers,
        "vocab_size": 1024,
        "max_seq_len": 32768,
        "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "rope_theta": 500_000},
        "ffn_config": {
            "ffn_hidden_size": FFN_HIDDEN,
            "moe_num_experts": n_experts,
            "moe_top_k": min(4, n_experts),
            "moe_normalize_expert_weights": 1,
        },
    }
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    block = bytes(memoryview(mx.random.normal((32 << 20,)).astype(mx.bfloat16).view(mx.uint16)).cast("B"))
    outer = {
        "transformer.wte.weight": (1024, D_MODEL),
        "transformer.norm_f.weight": (D_MODEL,),
        "lm_head.weight": (1024, D_MODEL),
    }
    weight_map: dict[str, str] = {}
    for layer in range(n_layers):
        b = f"transformer.blocks.{layer}"
        shapes: dict[str, tuple[int, ...]] = {
            f"{b}.norm_attn_norm.norm_1.weight": (D_MODEL,),
            f"{b}.norm_attn_norm.attn.Wqkv.weight": (8192, D_MODEL),
            f"{b}.norm_attn_norm.attn.out_proj.weight": (D_MODEL, D_MODEL),
            f"{b}.norm_attn_norm.norm_2.weight": (D_MODEL,),
            f"{b}.ffn.router.layer.weight": (n_experts, D_MODEL),
            **{f"{b}.ffn.experts.mlp.{p}": (n_experts * FFN_HIDDEN, D_MODEL) for p in ("w1", "v1", "w2")},
            **(outer if layer == 0 else {}),
        }
        file = f"model-{layer + 1:05d}-of-{n_layers:05d}.safetensors"
        weight_map |= dict.fromkeys(shapes, file)
        _write_file(directory / file, shapes, block)
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return sum(p.stat().st_size for p in directory.iterdir())


def _write_file(path: Path, shapes: dict[str, tuple[int, ...]], block: bytes) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * shape[0] * (shape[1] if len(shape) == 2 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        left = end
        while left:
            left -= f.write(memoryview(block)[: min(left, len(block))])


def measure_quantize(streams: int, seconds: float) -> float:
    """Return the MB/s (of bf16 input) of `mx.quantize` alone on blocks in memory, the better of two block sizes."""
    return max(_measure_blocks(streams, rows, seconds / 2) for rows in (170, 1364))


def _measure_blocks(streams: int, rows: int, seconds: float) -> float:
    done = [0.0] * streams
    start = threading.Barrier(streams)

    def work(i: int) -> None:
        stream = mx.new_stream(mx.gpu if mx.metal.is_available() else mx.cpu)
        w = mx.random.normal((rows, D_MODEL), stream=stream).astype(mx.bfloat16, stream=stream)
        mx.eval(w)
        start.wait()
        began = time.perf_counter()
        count = 0
        while time.perf_counter() - began < seconds:
            mx.eval(*mx.quantize(w, group_size=GROUP, bits=BITS, stream=stream))
            count += 1
        done[i] = count * w.nbytes / (time.perf_counter() - began) / 1e6
        mx.clear_streams()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done)


def cut_here(source: Path, target: Path, nodes: int, jobs: int) -> None:
    """Cut in this process and print the figures as JSON (run as a subprocess: peak memory is a process's own)."""
    from moectl import quantize, shards
    from moectl.checkpoint import open_checkpoint
    from moectl.manifest import Quantization
    from moectl.plan import make_placement

    baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _PEAK_UNIT
    began, cpu = time.perf_counter(), time.process_time()
    with open_checkpoint(str(source)) as checkpoint:
        placement = make_placement(checkpoint.geometry, "hidden", nodes, group_size=GROUP)
        quantization = Quantization(BITS, GROUP)
        shards.cut(
            checkpoint, placement, quantization, target, name="bench", quantise=quantize.quantizer, jobs=jobs
        )
    figures = {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
        "baseline": baseline,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _PEAK_UNIT,
    }
    print(json.dumps(figures))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gb", type=float, default=6.4, help="least size of the checkpoint (10⁹ bytes)")
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument(
        "--dir", type=Path, help="where to make it (default: the system's temporary directory)"
    )
    parser.add_argument("--seconds", type=float, default=6.0, help="of each mx.quantize measurement")
    parser.add_argument("--cut", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cut:
        cut_here(*args.cut, args.nodes, args.jobs[0])
        return
    with tempfile.TemporaryDirectory(dir=args.dir, prefix="moectl-bench-") as root:
        run(Path(root), args)


def run(root: Path, args: argparse.Namespace) -> None:
    n_experts = min(16, -(-int(args.gb * 1e9) // EXPERT_BYTES))
    n_layers = -(-int(args.gb * 1e9) // (n_experts * EXPERT_BYTES + 180_000_000))
    size = write_checkpoint(root / "source", n_experts, n_layers)
    print(f"source {size / 1e9:.2f} GB · {n_layers} layers of {n_experts} experts · mlx {mx.__version__}")
    print("JOBS  SHARD MB/s  mx.quantize MB/s  RATIO  PEAK RSS over baseline  CPU s / wall s")
    for jobs in args.jobs:
        before = measure_quantize(jobs, args.seconds)
        command = [sys.executable, __file__, "--cut", str(root / "source"), str(root / "out")]
        command += ["--jobs", str(jobs), "--nodes", str(args.nodes)]
        got = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        after = measure_quantize(jobs, args.seconds)
        shutil.rmtree(root / "out")
        speed, bare = size / got["seconds"] / 1e6, (before + after) / 2
        over = (got["peak"] - got["baseline"]) / 2**20
        print(
            f"{jobs:4}  {speed:10.0f}  {bare:6.0f} ({before:.0f}, {after:.0f})  {speed / bare:5.2f}"
            f"  {over:15.0f} MiB  {got['cpu_seconds']:13.1f} / {got['seconds']:.1f}"
        )


if __name__ == "__main__":
    main()
