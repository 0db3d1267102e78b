"""What 8,000 tokens of history cost a second turn: `python -m tests.benchmarks.bench_second_turn`.

It compares the time of an answer of one token: to a history that is known with new tokens behind it, and to as many new
tokens alone. Two agents with different histories take turns, on one and on two ranks of this machine, through the HTTP
API. The new tokens attend to all of the history: that work is part of the second turn, and no cache can save it. How
much it is depends on the model's shape: a layer computes 24·d·h for the experts of a token and 4·d·L for a history of L
tokens (d: width, h: hidden width of an expert, four experts per token). So the model has DBRX's h. `floor` is the ratio
that is left if nothing but attention to the history is added, measured by itself in the same run.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import openai

from moectl.engine.network.attention import attend
from tests.support.alphabet import write_tokenizer
from tests.support.serving import serve
from tests.support.tiny import write_checkpoint

_TOKENS = 27  # of the vocabularies: those that the model has
_LAYERS = 2


class Turns:
    """One server's turns, and the times that they took by what they were."""

    def __init__(self, url: str, new: int) -> None:
        self._api = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=900)
        self._source = random.Random(1)
        self._new = new
        self.times: dict[str, list[float]] = {}

    def draw(self, count: int) -> list[int]:
        return [self._source.randrange(1, _TOKENS) for _ in range(count)]

    def take(self, kind: str, history: list[int]) -> list[int]:
        """Time the answer to a history with new tokens behind it; return the whole prompt."""
        prompt = [*history, *self.draw(self._new)]
        begin = time.perf_counter()
        usage = self._api.completions.create(model="", prompt=prompt, max_tokens=1).usage
        self.times.setdefault(kind, []).append(time.perf_counter() - begin)
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        known = usage.prompt_tokens_details.cached_tokens or 0
        assert known >= len(history) - 1, f"{known} of {len(history)} tokens were known"
        return prompt

    def know(self, count: int) -> list[int]:
        """Let a history be read; return it."""
        history = self.draw(count)
        self._api.completions.create(model="", prompt=history, max_tokens=1)
        return history


def time_attention(history: int, new: int, width: int, layers: int) -> float:
    """Return the seconds that attention alone takes for new tokens behind a history, in one process."""
    mx.set_default_device(mx.cpu)
    queries = mx.random.normal((1, 1, new, width))
    keys, values = (mx.random.normal((1, 1, history + new, width)) for _ in range(2))
    mx.eval(queries, keys, values)
    begin = time.perf_counter()
    mx.eval(attend(queries, keys, values, scale=0.1, mask="causal"))
    return layers * (time.perf_counter() - begin)


def measure(model: Path, ranks: int, history: int, new: int, width: int, trials: int) -> str:
    """Return what one model's turns took on so many ranks, as times the new tokens alone."""
    with serve(model, "--local", str(ranks)) as url:
        turns = Turns(url, new)
        agents = {"one": turns.know(history), "two": turns.know(history)}
        turns.take("warm", [])
        for _ in range(trials):  # in turns, so that all see the same weather
            turns.take("alone", [])
            for name in agents:
                agents[name] = turns.take(name, agents[name])
            for kind, length in (("near", 0), ("attending", history)):
                turns.times.setdefault(kind, []).append(time_attention(length, new, width, _LAYERS))
    took = {kind: statistics.median(times) for kind, times in turns.times.items()}
    ratios = {name: took[name] / took["alone"] for name in agents}
    ratios["floor"] = 1 + (took["attending"] - took["near"]) / took["alone"]
    told = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
    return f"{ranks} ranks: {new} tokens alone {1000 * took['alone']:.0f} ms; times as much: {told}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--history", type=int, default=8192)
    parser.add_argument("--new", type=int, default=512)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=10_752, help="of one expert")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "dbrx"
        sizes = {"d_model": args.width, "ffn_hidden": args.hidden, "n_heads": 1, "kv_n_heads": 1}
        write_checkpoint(model, n_layers=_LAYERS, vocab_size=264, max_seq_len=4 * args.history, **sizes)
        write_tokenizer(model)
        for ranks in (1, 2):
            print(measure(model, ranks, args.history, args.new, args.width, args.trials), flush=True)


if __name__ == "__main__":
    main()
