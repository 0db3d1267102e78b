"""Tokens per second with and without prompt lookup, in one run: `python -m tests.benchmarks.bench_speculation`.

On the bundled demo (or a random model with DBRX's proportions), one request on one rank in this process, the engine
alone. Three kinds of prompt: one whose answer stands in it already, as when a text is corrected or quoted; a question
whose answer is new; and sampled, where speculation never takes part. Ratios matter; absolutes are this machine's. On a
busy machine the ratio of processor times says more than that of the clock.
"""

from __future__ import annotations

import argparse
import queue
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from moectl.demo import demo_dir
from moectl.engine.engine import Engine
from moectl.engine.network.load import load_rank
from moectl.engine.protocol import Done, Generate, Token
from moectl.engine.random_prompts import check_uncached
from moectl.engine.request import Request, Stats
from moectl.model.manifest import read_manifest
from moectl.shards.chat.tokenizer import open_tokenizer
from tests.support.alphabet import VOCAB_SIZE, write_tokenizer
from tests.support.cutting import cut
from tests.support.tiny import write_checkpoint

QUESTION = "Tell me a long story about experts."


@dataclass(frozen=True, slots=True)
class Answered:
    tokens: tuple[int, ...]
    wall_s: float  # from the first token told to the last
    cpu_s: float  # of this process, all threads, meanwhile
    stats: Stats


def answer(parts: tuple[Any, Any], prompt: tuple[int, ...], count: int, speculate: int, temperature: float) -> Answered:
    """Generate `count` tokens."""
    model, tokenizer = parts
    engine = Engine(model, tokenizer, vocab_size=model.args.vocab_size, max_seq_len=2048, speculate=speculate)
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    request = Request(1, "", count, prompt_tokens=prompt, ignore_eos=True, temperature=temperature, seed=1)
    for order in (Generate(request), None):
        inbox.put(order)
    tokens: list[int] = []
    wall, cpu = [], []
    for event in engine.serve(inbox):
        if isinstance(event, Token):
            tokens.append(event.token)
            wall.append(time.perf_counter())
            cpu.append(time.process_time())
        if isinstance(event, Done):
            stats = event.stats
            check_uncached(stats)  # each answer has an engine, and so a cache, of its own
    return Answered(tuple(tokens), wall[-1] - wall[0], cpu[-1] - cpu[0], stats)


def compare(parts: tuple[Any, Any], prompt: tuple[int, ...], args: argparse.Namespace, temperature: float) -> None:
    """Print speeds, ratios and acceptance for each number of proposed tokens, measured turn by turn."""
    measured: dict[int, list[Answered]] = {most: [] for most in (0, *args.speculate)}
    for _ in range(args.trials):
        for most, answers in measured.items():
            answers.append(answer(parts, prompt, args.generate, most, temperature))
    plain = measured[0]
    for most, answers in measured.items():
        wall = statistics.median(a.wall_s / b.wall_s for a, b in zip(plain, answers, strict=True))
        cpu = statistics.median(a.cpu_s / b.cpu_s for a, b in zip(plain, answers, strict=True))
        speed = statistics.median((len(a.tokens) - 1) / a.wall_s for a in answers)
        stats = answers[0].stats
        same = "same tokens" if answers[0].tokens == plain[0].tokens else "OTHER TOKENS"
        print(
            f"  speculate {most}: {speed:.0f} tok/s, {wall:.2f} times (processor: {cpu:.2f} times), "
            f"accepted {stats.accepted_tokens} of {stats.drafted_tokens} proposed, {same}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--generate", type=int, default=200, help="tokens of each answer")
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--speculate", type=int, nargs="+", default=[4, 8])
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
        parts = load_rank(out, read_manifest(out), 0), open_tokenizer(out)
        question = tuple(parts[1].encode_chat([{"role": "user", "content": QUESTION}]))
        said = answer(parts, question, args.generate, 0, 0.0).tokens
        print(f"{mx.default_device()}, {source.name}, {args.bits} bits, {args.generate} tokens, {args.trials} trials")
        for kind, prompt, temperature in (
            ("the answer stands in the prompt", question + said + question, 0.0),
            ("the answer is new", question, 0.0),
            ("sampled", question, 1.0),
        ):
            print(f"{kind}:")
            compare(parts, prompt, args, temperature)


if __name__ == "__main__":
    main()
