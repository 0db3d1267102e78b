"""Decode and prefill speed of moectl's DBRX beside mlx-lm's own, in one run: `python -m tests.benchmarks.bench_model`.

A random model with DBRX's proportions on this machine's device. moectl runs as real workers on the ring, mlx-lm through
its own generator. No prompt is measured twice: a cache would know it. Ratios matter; absolutes are this machine's.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import stream_generate
from mlx_lm.models.dbrx import Model, ModelArgs

from moectl.engine.protocol import Done, RunOptions
from moectl.engine.random_prompts import RandomPrompts, check_uncached
from moectl.engine.request import Request
from moectl.hosts.hostfile import Host
from moectl.hosts.remote import LocalRemote
from moectl.session.session import RankSpec, Session
from moectl.shards.chat.tokenizer import open_tokenizer
from tests.support.alphabet import VOCAB_SIZE, write_tokenizer
from tests.support.cutting import cut
from tests.support.ring import rank_env
from tests.support.tiny import write_checkpoint


def time_mlx_lm(source: Path, bits: int, length: int, count: int) -> tuple[float, float]:
    """Return mlx-lm's (prefill, decode) in tokens per second, float32 activations as in moectl on a CPU."""
    model = Model(ModelArgs.from_dict(json.loads((source / "config.json").read_text())))
    weights: dict[str, Any] = {}
    for file in sorted(source.glob("*.safetensors")):
        weights.update(mx.load(str(file)))  # type: ignore[arg-type]
    float32 = {k: v.astype(mx.float32) for k, v in model.sanitize(weights).items()}
    model.load_weights(list(float32.items()))
    if bits < 16:
        nn.quantize(model, 64, bits, class_predicate=lambda p, m: hasattr(m, "to_quantized") and "router" not in p)
    model.eval()
    mx.eval(model.parameters())
    tokenizer = open_tokenizer(source)
    tokenizer.eos_token_ids = set()  # all tokens, as moectl is asked for them
    prompts = RandomPrompts(VOCAB_SIZE)
    for _ in range(2):  # the first warms up
        tokens = list(prompts.draw(length))
        begin = time.perf_counter()
        times = [time.perf_counter() for _ in stream_generate(model, tokenizer, tokens, max_tokens=count)]
    return len(tokens) / (times[0] - begin), (len(times) - 1) / (times[-1] - times[0])


def time_moectl(shards: Path, ranks: int, length: int, count: int) -> tuple[float, float]:
    """Return moectl's (prefill, decode) in tokens per second on this many local ranks."""
    worker = (sys.executable, "-m", "moectl", "worker")
    spec = RankSpec(Host("localhost"), LocalRemote(), worker, str(shards), ("127.0.0.1",), rank_env())
    prompts = RandomPrompts(VOCAB_SIZE)
    with Session([spec] * ranks, RunOptions(start_timeout_s=120)) as session:
        for number in (1, 2):
            request = Request(number, "", count, prompt_tokens=prompts.draw(length), ignore_eos=True)
            done = list(session.generate(request))[-1]
            assert isinstance(done, Done)
            stats = done.stats
            check_uncached(stats)
    return stats.prompt_tokens / stats.prompt_s, (stats.completion_tokens - 1) / stats.decode_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt", type=int, default=256, help="prompt tokens")
    parser.add_argument("--generate", type=int, default=48, help="generated tokens")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "model"
        sizes: dict[str, Any] = {"n_layers": 4, "d_model": 512, "n_heads": 8, "kv_n_heads": 2, "ffn_hidden": 896}
        write_checkpoint(source, vocab_size=VOCAB_SIZE, max_seq_len=2048, **sizes)
        write_tokenizer(source)
        print("tokens per second, and the ratio to mlx-lm's")
        print(f"{'bits':>4} {'what':<22} {'prefill':>9} {'ratio':>6} {'decode':>9} {'ratio':>6}")
        for bits in (16, 8, 4):
            reference = time_mlx_lm(source, bits, args.prompt, args.generate)
            show(bits, "mlx-lm, 1 process", reference, reference)
            for split, ranks in (("hidden", 1), ("hidden", 2), ("experts", 2)):
                shards = Path(scratch) / f"{bits}-{split}-{ranks}"
                cut(source, shards, split=split, nodes=ranks, bits=bits)
                measured = time_moectl(shards, ranks, args.prompt, args.generate)
                show(bits, f"moectl {split}, {ranks} rank{'s' * (ranks > 1)}", measured, reference)


def show(bits: int, what: str, measured: tuple[float, float], reference: tuple[float, float]) -> None:
    cells = [f"{m:9.1f} {m / r:6.2f}" for m, r in zip(measured, reference, strict=True)]
    print(f"{bits:>4} {what:<22} {' '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
