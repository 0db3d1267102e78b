"""Eight concurrent requests' tokens per second beside one's, in one run: `python -m tests.benchmarks.bench_batch`.

On the bundled demo, or on a random model with DBRX's proportions, on one rank in this process. The engine alone is
measured, without the API: orders go in together, and the clock runs from the first token to the last. Ratios matter;
absolutes are this machine's.
"""

from __future__ import annotations

import argparse
import queue
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx

from moectl.demo import demo_dir
from moectl.engine.engine import Engine
from moectl.engine.network.load import load_rank
from moectl.engine.protocol import Done, Generate, Token
from moectl.engine.random_prompts import RandomPrompts, check_uncached
from moectl.engine.request import Request
from moectl.model.manifest import read_manifest
from moectl.shards.chat.tokenizer import open_tokenizer
from tests.support.alphabet import VOCAB_SIZE, write_tokenizer
from tests.support.cutting import cut
from tests.support.tiny import write_checkpoint

PROMPT = 17


def time_batch(model: Any, tokenizer: Any, prompts: RandomPrompts, rows: int, tokens: int) -> float:
    """Return the tokens per second of all rows together, from the first token told to the last."""
    engine = Engine(model, tokenizer, vocab_size=model.args.vocab_size, max_seq_len=2048)
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for number in range(1, rows + 1):
        inbox.put(Generate(Request(number, "", tokens, prompt_tokens=prompts.draw(PROMPT), ignore_eos=True)))
    inbox.put(None)
    times = []
    for event in engine.serve(inbox):
        if isinstance(event, Token):
            times.append(time.perf_counter())
        if isinstance(event, Done):
            check_uncached(event.stats)
    return (len(times) - 1) / (times[-1] - times[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--generate", type=int, default=200, help="tokens of each answer")
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--random", action="store_true", help="a random model instead of the demo: 4 layers of 512")
    parser.add_argument("--bits", type=int, default=16)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        source = demo_dir()
        if args.random:
            source = Path(scratch) / "model"
            sizes: dict[str, Any] = {"n_layers": 4, "d_model": 512, "n_heads": 8, "kv_n_heads": 2, "ffn_hidden": 896}
            write_checkpoint(source, vocab_size=VOCAB_SIZE, max_seq_len=2048, **sizes)
            write_tokenizer(source)
        out = Path(scratch) / "shards"
        cut(
            source, out, nodes=1, bits=None if args.bits == 16 else args.bits, group_size=64 if args.bits < 16 else None
        )
        model, tokenizer = load_rank(out, read_manifest(out), 0), open_tokenizer(out)
        prompts = RandomPrompts(model.args.vocab_size)
        time_batch(model, tokenizer, prompts, 8, 20)
        # Turn by turn, so that both see the same weather.
        speeds = {rows: list[float]() for rows in (1, 8)}
        for _ in range(args.trials):
            for rows, measured in speeds.items():
                measured.append(time_batch(model, tokenizer, prompts, rows, args.generate))
    one, eight = (statistics.median(speeds[rows]) for rows in (1, 8))
    print(f"{mx.default_device()}, {source.name}, {args.bits} bits, median of {args.trials}")
    print(f"1 request {one:.0f} tok/s, 8 requests {eight:.0f} tok/s in all: {eight / one:.2f} times")


if __name__ == "__main__":
    main()
