"""What 8,000 tokens of history cost a second turn: `python -m tests.benchmarks.bench_second_turn`.

It compares the time of an answer of one token: to a history that is known with new tokens behind it, and to as many new
tokens alone. Two agents with different histories take turns, on one and on two ranks of this machine, through the HTTP
API; the models are random, one in the shape of DBRX and a dense one. The new tokens attend to all of the history: that
work is part of the second turn, and no cache can save it. So `far` is the same with a history of an eighth.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

import openai

from tests.support.alphabet import write_tokenizer
from tests.support.scripted_caller import write_caller
from tests.support.serving import serve
from tests.support.tiny import write_checkpoint

_TOKENS = 27  # of the vocabularies: those that both models have


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


def measure(model: Path, ranks: int, history: int, new: int, trials: int) -> str:
    """Return what one model's turns took on so many ranks."""
    with serve(model, "--local", str(ranks)) as url:
        turns = Turns(url, new)
        agents = {"one": turns.know(history), "two": turns.know(history), "far": turns.know(history // 8)}
        turns.take("warm", [])
        for _ in range(trials):  # in turns, so that all see the same weather
            turns.take("alone", [])
            for name in agents:
                agents[name] = turns.take(name, agents[name])
    took = {kind: statistics.median(times) for kind, times in turns.times.items()}
    told = ", ".join(f"{name} {took[name] / took['alone']:.2f}" for name in agents)
    return f"{model.name}, {ranks} ranks: {new} tokens alone {1000 * took['alone']:.0f} ms; times as much: {told}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--history", type=int, default=8192)
    parser.add_argument("--new", type=int, default=512)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--width", type=int, default=512, help="of the model in DBRX's shape")
    parser.add_argument("--hidden", type=int, default=896, help="of one of its experts")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        dbrx = Path(scratch) / "dbrx"
        sizes = {"d_model": args.width, "ffn_hidden": args.hidden, "n_heads": 8, "kv_n_heads": 2}
        write_checkpoint(dbrx, n_layers=2, vocab_size=264, max_seq_len=4 * args.history, **sizes)
        write_tokenizer(dbrx)
        for model in (dbrx, write_caller(Path(scratch) / "dense")):
            for ranks in (1, 2):
                print(measure(model, ranks, args.history, args.new, args.trials), flush=True)


if __name__ == "__main__":
    main()
