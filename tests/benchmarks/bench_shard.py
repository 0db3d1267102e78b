"""Measure `shard` on a synthetic checkpoint of DBRX's real width: memory, and speed beside mx.quantize.

Makes (streamed) and deletes a fused checkpoint of random bf16 weights. The cut and the bare `mx.quantize` run
in the same minutes with as many streams; the source is in the page cache if memory allows. Not a test.

    python -m tests.benchmarks.bench_shard --gb 6.3 --jobs 1 2
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

from tests.support.memory import peak_bytes

D_MODEL, FFN_HIDDEN, GROUP, BITS = 6144, 10752, 64, 4
EXPERT_BYTES = 3 * D_MODEL * FFN_HIDDEN * 2


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
    noise = mx.random.normal((32 << 20,)).astype(mx.bfloat16).view(mx.uint16)
    block = bytes(memoryview(noise).cast("B"))  # type: ignore[arg-type]  # a buffer, whatever the stubs say
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
        write_file(directory / file, shapes, block)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(p.stat().st_size for p in directory.iterdir())


def write_file(path: Path, shapes: dict[str, tuple[int, ...]], block: bytes) -> None:
    """Write a safetensors file of bf16 tensors whose data is `block`, over and over."""
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


def measure_quantize(streams: int, seconds: float) -> tuple[float, float]:
    """Return (MB/s, CPU seconds per GB) of `mx.quantize` alone on bf16 blocks in memory, best of two sizes."""
    return max(_measure_blocks(streams, rows, seconds / 2) for rows in (170, 1364))


def _measure_blocks(streams: int, rows: int, seconds: float) -> tuple[float, float]:
    speeds, amounts = [0.0] * streams, [0.0] * streams
    start = threading.Barrier(streams + 1)

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
        amounts[i] = count * w.nbytes / 1e9
        speeds[i] = 1000 * amounts[i] / (time.perf_counter() - began)
        mx.clear_streams()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(streams)]
    for thread in threads:
        thread.start()
    start.wait()
    cpu = time.process_time()
    for thread in threads:
        thread.join()
    return sum(speeds), (time.process_time() - cpu) / sum(amounts)


class Ballast:
    """A file in the page cache that is dropped as fast as output is written.

    For virtual machines that hand free memory back to their host (free page reporting): there every new page of
    output costs 3–14 µs, more than its quantisation. The pages that this gives back are taken again at once, as
    they would be on a machine of its own.
    """

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY)
        self._dropped = 0

    def drop(self, count: int) -> None:
        self._dropped += count
        if self._dropped >= 16 << 20:
            offset = os.lseek(self._fd, 0, os.SEEK_CUR)
            os.posix_fadvise(self._fd, offset, self._dropped, os.POSIX_FADV_DONTNEED)
            os.lseek(self._fd, offset + self._dropped, os.SEEK_SET)
            self._dropped = 0


def cut_here(source: Path, target: Path, nodes: int, jobs: int, ballast: Path | None = None) -> None:
    """Cut in this process and print the figures as JSON; a subprocess, since peak memory is a process's own."""
    from moectl.model.placement import make_placement
    from moectl.shards import build
    from moectl.shards.prepare import Wanted, draw_wanted
    from moectl.shards.source.checkpoint import open_checkpoint

    baseline = peak_bytes()
    began, cpu = time.perf_counter(), time.process_time()
    with open_checkpoint(str(source)) as checkpoint:
        blueprint = draw_wanted(checkpoint, Wanted(bits=BITS, group_size=GROUP))
        placement = make_placement(blueprint.structure, "hidden", nodes)
        build.cut(
            checkpoint,
            blueprint,
            placement,
            target,
            name="bench",
            jobs=jobs,
            on_bytes=Ballast(ballast).drop if ballast else lambda _: None,
        )
    figures = {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
        "baseline": baseline,
        "peak": peak_bytes(),
    }
    print(json.dumps(figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=6.4, help="least size of the checkpoint (10⁹ bytes)")
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--dir", type=Path, help="where to make it (default: the temporary directory)")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each mx.quantize measurement")
    parser.add_argument("--recycle", action="store_true", help="give pages back as fast as output takes them")
    parser.add_argument("--cut", nargs="+", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cut:
        cut_here(args.cut[0], args.cut[1], args.nodes, args.jobs[0], *args.cut[2:])
        return
    with tempfile.TemporaryDirectory(dir=args.dir, prefix="moectl-bench-") as root:
        run(Path(root), args)


def run(root: Path, args: argparse.Namespace) -> None:
    n_experts = min(16, -(-int(args.gb * 1e9) // EXPERT_BYTES))
    n_layers = -(-int(args.gb * 1e9) // (n_experts * EXPERT_BYTES + 180_000_000))
    size = write_checkpoint(root / "source", n_experts, n_layers)
    print(f"source {size / 1e9:.2f} GB · {n_layers} layers of {n_experts} experts · mlx {version('mlx')}")
    print("JOBS  SHARD MB/s  mx.quantize MB/s  RATIO  PEAK RSS OVER BASELINE  CPU s/GB: shard, mx.quantize")
    for jobs in args.jobs:
        paths = [root / "source", root / "out"]
        if args.recycle:
            paths.append(root / "ballast")
            write_file(paths[-1], {"ballast": (int(size * 0.3) // 2,)}, bytes(1 << 24))
            os.sync()  # only clean pages can be dropped
        before = measure_quantize(jobs, args.seconds)
        command = [
            sys.executable,
            "-m",
            "tests.benchmarks.bench_shard",
            "--jobs",
            str(jobs),
            "--nodes",
            str(args.nodes),
        ]
        command += ["--cut", *map(str, paths)]
        got = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        after = measure_quantize(jobs, args.seconds)
        shutil.rmtree(root / "out")
        speed, bare = size / got["seconds"] / 1e6, (before[0] + after[0]) / 2
        over = (got["peak"] - got["baseline"]) / 2**20
        print(
            f"{jobs:4}  {speed:10.0f}  {bare:6.0f} ({before[0]:.0f}, {after[0]:.0f})  {speed / bare:5.2f}"
            f"  {over:18.0f} MiB  {got['cpu_seconds'] / size * 1e9:12.2f}, {(before[1] + after[1]) / 2:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
