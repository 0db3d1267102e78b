"""What it costs to hold an answer to a schema: the mask of each token at vocabularies of three sizes, beside a step.

    python -m tests.benchmarks.bench_schema [STEP_MS]

Vocabularies are byte-level BPE in cl100k's shape with made-up words, since no real one is in the tree. STEP_MS is a
step of the model to compare with: 40 by default, some 25 tokens/s. CPU time of this thread: the device works meanwhile.
The last figures are the whole cost in the engine: the demo's answers, held and not, in one run.
"""

from __future__ import annotations

import json
import queue
import random
import sys
import time
from pathlib import Path
from statistics import mean, quantiles
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
from tokenizers import Tokenizer as Tokens, pre_tokenizers

from moectl.demo import demo_dir
from moectl.engine.grammar import Grammars, Matcher
from moectl.engine.network.load import load_rank
from moectl.errors import MoectlError
from moectl.model.manifest import read_manifest
from moectl.shards.chat.answer_grammar import HeldForm
from moectl.shards.chat.tokenizer import Tokenizer, open_tokenizer
from tests.support import vocabularies
from tests.support.cutting import cut
from tests.support.driven import Driven

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 400},
        "mail": {"type": "string", "format": "email"},
        "kind": {"enum": ["red", "green", "blue"]},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 5},
        "size": {"type": "object", "properties": {"w": {"type": "number"}, "h": {"type": "integer"}}},
    },
    "required": ["name", "mail", "kind", "tags", "size"],
    "additionalProperties": False,
}
ANSWER = json.dumps(
    {
        "name": "a text of some words, as models write them in such fields " * 4,
        "mail": "somebody@example.com",
        "kind": "green",
        "tags": ["short", "a longer tag", "third"],
        "size": {"w": 12.5, "h": 7},
    }
)


def make_vocabulary(size: int) -> Tokenizer:
    """Return a tokenizer of this many tokens; the words begin with a blank or not, as real ones do."""
    told = json.loads(vocabularies.make_cl100k(numbered={"<|endoftext|>": 0}).to_str())
    rng, letters = random.Random(0), pre_tokenizers.ByteLevel.alphabet()
    usual = "etaoinshrdlucmfwypvbgkjqxz"
    vocabulary: dict[str, int] = told["model"]["vocab"]
    known = {number: text for text, number in vocabulary.items()}
    words = set(known.values())
    for number in range(size):
        while number not in known:
            word = "".join(rng.choices(usual if rng.random() < 0.9 else letters, k=rng.randint(2, 9)))
            word = rng.choice(("Ġ", "")) + word
            if word not in words:
                known[number] = word
                words.add(word)
    told["model"]["vocab"] = {text: number for number, text in known.items()}
    return Tokenizer(Tokens.from_str(json.dumps(told)), eos_token_ids={0})


def bench_masks(tokenizer: Tokenizer, size: int, step_ms: float) -> None:
    done: queue.SimpleQueue[Matcher | MoectlError] = queue.SimpleQueue()
    grammars = Grammars(tokenizer, size)
    grammar = tokenizer.write_grammar(HeldForm(SCHEMA), None)
    began = time.perf_counter()
    grammars.make(grammar, (), done.put)
    done.get()
    built = time.perf_counter() - began
    costs = []
    for _ in range(3):
        grammars.make(grammar, (), done.put)
        matcher = done.get()
        assert isinstance(matcher, Matcher)
        for token in tokenizer.encode(ANSWER):
            at = time.thread_time()
            matcher.find_allowed(size)
            matcher.take(token)
            costs.append(1e3 * (time.thread_time() - at))
    p99 = quantiles(costs, n=100)[98]
    share = 100 * mean(costs) / step_ms
    print(
        f"{size:8,} tokens: read and compiled in {built:.2f} s; a token {mean(costs):.3f} ms, p99 {p99:.2f} ms,"
        f" at most {max(costs):.2f} ms: {share:.2f} % of a step of {step_ms:g} ms"
    )


def bench_engine() -> None:
    with TemporaryDirectory() as directory:
        out = Path(directory) / "shards"
        cut(demo_dir(), out, split="hidden", nodes=1)
        parts = load_rank(out, read_manifest(out), 0), open_tokenizer(out)
        costs = {}
        for held in (False, True, False, True):
            driven = Driven(parts)
            more: Any = {"schema": SCHEMA} if held else {"ignore_eos": True}
            for seed in range(4):
                driven.ask("Tell me.", 300, temperature=0.8, seed=seed, **more)
            at = time.thread_time()
            driven.run()
            costs[held] = 1e3 * (time.thread_time() - at) / sum(len(driven.tokens(n)) for n in range(1, 5))
        mx.synchronize()
        print(f"the demo, 4 rows: {costs[True]:.2f} ms of CPU per token, {costs[False]:.2f} without a form")


def main(step_ms: float) -> None:
    for size in (1_536, 100_000, 200_000):
        bench_masks(make_vocabulary(size), size, step_ms)
    bench_engine()


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 40)
