"""moectl beside `mlx_lm`'s own distribution, in one run: `python -m tests.benchmarks.bench_mlx_lm`.

Two ranks on this machine have both: the model as `mlx_lm.sharded_load` divides it, by its own `shard()`, with mlx-lm's
greedy `generate_step`; and moectl's engine on sets cut with `hidden` and `tensor`. They take turns, on the same ring,
each with a prompt never seen before, while the shim delays every exchange. Printed are medians of tokens per second, of
the ratios of neighbours and their range, and how much of the model lies on each host's disk. Ratios matter; absolutes
are this machine's, which should have nothing else to do: with more processes than cores an exchange waits for a core.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

from moectl.engine.engine import Engine
from moectl.engine.network.exchange import seam
from moectl.engine.network.load import load_rank
from moectl.engine.protocol import Done, Generate
from moectl.engine.random_prompts import check_uncached
from moectl.engine.request import Request
from moectl.model.manifest import read_manifest
from moectl.shards.chat.tokenizer import open_tokenizer
from moectl.shards.look.skeleton import make_skeleton
from tests.support.alphabet import VOCAB_SIZE, write_tokenizer
from tests.support.cutting import cut
from tests.support.ring import process_env

RANKS = 2
THEIRS = "mlx_lm"
_SHARED: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 384, "norm_topk_prob": True}
FAMILIES: dict[str, dict[str, Any]] = {  # 0.1 to 0.3 GB in float32
    "llama": {**_SHARED, "model_type": "llama", "intermediate_size": 2304, "num_hidden_layers": 8},
    "qwen3_moe": {
        **_SHARED,
        **_EXPERTS,
        "model_type": "qwen3_moe",
        "intermediate_size": 1536,
        "head_dim": 64,
        "num_experts": 8,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "deepseek_v3": {
        **_SHARED,
        **_EXPERTS,
        "model_type": "deepseek_v3",
        "intermediate_size": 1536,
        "num_key_value_heads": 12,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "kv_lora_rank": 128,
        "q_lora_rank": 256,
        "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 64,
        "v_head_dim": 64,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.5,
        "rope_scaling": None,
        "attention_bias": False,
    },
    "glm4_moe": {
        **_SHARED,
        **_EXPERTS,
        "model_type": "glm4_moe",
        "intermediate_size": 1536,
        "head_dim": 64,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "rope_scaling": None,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "use_qk_norm": True,
        "attention_bias": False,
        "partial_rotary_factor": 0.5,
    },
}


def write_model(directory: Path, config: dict[str, Any]) -> int:
    """Write a checkpoint with random float32 weights, as mlx-lm stores them; return its bytes."""
    directory.mkdir(parents=True)
    mx.random.seed(3)
    parameters = make_skeleton(config).parameters
    arrays = {
        name: 1 + 0.1 * mx.random.normal(a.shape) if a.ndim == 1 else mx.random.normal(a.shape) * a.shape[-1] ** -0.5
        for name, a in parameters.items()
    }
    mx.save_safetensors(str(directory / "model.safetensors"), arrays, metadata={"format": "mlx"})
    (directory / "config.json").write_text(json.dumps(config))
    write_tokenizer(directory)
    return sum(a.nbytes for a in arrays.values())


class Theirs:
    """mlx-lm's own half of a model, as `mlx_lm.utils.sharded_load` makes it."""

    def __init__(self, directory: Path, group: mx.distributed.Group) -> None:
        self._model, _ = load_model(directory, lazy=True)
        self._model.shard(group)
        mx.eval(self._model.parameters())

    def time(self, prompt: Sequence[int], tokens: int) -> tuple[float, float]:
        """Return the tokens per second of the prompt, and of the answer after its first token."""
        begin, times = time.perf_counter(), []
        for _ in generate_step(mx.array(list(prompt)), self._model, max_tokens=tokens):
            times.append(time.perf_counter())
        return len(prompt) / (times[0] - begin), (len(times) - 1) / (times[-1] - times[0])


class Ours:
    """moectl's engine on one rank of a set."""

    def __init__(self, directory: Path, rank: int, group: mx.distributed.Group) -> None:
        manifest = read_manifest(directory)
        with seam():
            model = load_rank(directory, manifest, rank, group)
            self._engine = Engine(
                model,
                open_tokenizer(directory),
                rank=rank,
                head_rank=manifest.placement.head_rank,
                group=group,
                vocab_size=manifest.structure.vocab_size,
                max_seq_len=manifest.structure.context,
            )
        self._asked = 0

    def time(self, prompt: Sequence[int], tokens: int) -> tuple[float, float]:
        """Return the same; nothing on a rank that does not lead."""
        self._asked += 1
        inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        request = Request(self._asked, "", tokens, prompt_tokens=tuple(prompt), ignore_eos=True, cache_prompt=False)
        inbox.put(Generate(request))
        inbox.put(None)
        with seam():
            done = [event for event in self._engine.serve(inbox) if isinstance(event, Done)]
        self._engine._closing = False  # so that it can be asked again
        if not done:
            return 0.0, 0.0
        check_uncached(done[0].stats)
        return len(prompt) / done[0].stats.prompt_s, (tokens - 1) / done[0].stats.decode_s


def run_rank(job: dict[str, Any], rank: int) -> None:
    """Time both sides turn by turn; rank 0 prints one JSON line."""
    group = mx.distributed.init(strict=True, backend="ring")
    sides: dict[str, Any] = {THEIRS: Theirs(Path(job["model"]), group)}
    sides |= {split: Ours(Path(directory), rank, group) for split, directory in job["sets"].items()}
    draw = random.Random(job["delay"])
    found: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    for trial in range(job["trials"] + 1):
        for side in list(sides) if trial % 2 else list(sides)[::-1]:
            prompt = [draw.randrange(VOCAB_SIZE - 8) for _ in range(job["prompt"])]
            speeds = sides[side].time(prompt, job["generate"] if trial else 8)
            mx.eval(mx.distributed.all_sum(mx.ones((1,)), group=group))  # both begin together
            if trial:  # the first one warms up
                found[side].append(speeds)
    if rank == 0:
        print(json.dumps(found), flush=True)
    os._exit(0)  # no destructor of the ring may wait for the other rank


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def run(job: dict[str, Any], scratch: Path) -> dict[str, list[tuple[float, float]]]:
    """Start both ranks; return what rank 0 measured."""
    hostfile, order = scratch / "ring.json", scratch / "job.json"
    hostfile.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(RANKS)]))
    order.write_text(json.dumps(job))
    ranks = []
    for rank in range(RANKS):
        env = process_env(RING_DELAY_US=str(job["delay"]), MLX_RANK=str(rank), MLX_HOSTFILE=str(hostfile))
        command = [sys.executable, "-m", "tests.benchmarks.bench_mlx_lm", "--rank", str(rank), "--job", str(order)]
        ranks.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    said = [process.communicate()[0] for process in ranks]
    result: dict[str, list[tuple[float, float]]] = json.loads(said[0].splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--splits", default="hidden,tensor")
    parser.add_argument("--latencies", default="0,100,300,1000", help="microseconds per exchange")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--generate", type=int, default=48)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        run_rank(json.loads(Path(args.job).read_text()), args.rank)
    for family in args.families.split(","):
        with tempfile.TemporaryDirectory() as name:
            measure(family, args, Path(name))


def measure(family: str, args: argparse.Namespace, scratch: Path) -> None:
    """Print one family's table."""
    model, sets = scratch / "model", {split: scratch / split for split in args.splits.split(",")}
    size = write_model(model, FAMILIES[family])
    print(f"{family}: {size / 1e9:.2f} GB in float32, {RANKS} ranks, {args.prompt} + {args.generate} tokens")
    for split, directory in sets.items():
        manifest = cut(model, directory, split=split, nodes=RANKS)
        held = [
            sum(entry.bytes for path, entry in manifest.files_of(rank).items() if path.endswith(".safetensors"))
            for rank in range(RANKS)
        ]
        print(
            f"on each disk with {split}: {', '.join(f'{part / size:.2f}' for part in held)} of the model; mlx_lm: 1.00"
        )
    print(f"{'delay':>8} {'':>8} {'split':>7} {THEIRS:>8} {'moectl':>8} {'ratio':>6} {'least':>6} {'most':>6}")
    for delay in map(int, args.latencies.split(",")):
        job: dict[str, Any] = {"model": str(model), "sets": {split: str(place) for split, place in sets.items()}}
        job |= {"delay": delay, "trials": args.trials, "prompt": args.prompt, "generate": args.generate}
        found = run(job, scratch)
        for column, what in enumerate(("prefill", "decode")):
            for split in sets:
                theirs, mine = ([trial[column] for trial in found[side]] for side in (THEIRS, split))
                ratios = [b / a for a, b in zip(theirs, mine, strict=True)]
                medians = f"{statistics.median(theirs):8.1f} {statistics.median(mine):8.1f}"
                spread = f"{statistics.median(ratios):6.2f} {min(ratios):6.2f} {max(ratios):6.2f}"
                print(f"{delay:>5} µs {what:>8} {split:>7} {medians} {spread}", flush=True)


if __name__ == "__main__":
    main()
