"""What truth checks cost: --paranoia and --agree-routing beside a plain session, round by round.

    python -m tests.benchmarks.bench_checks [ROUNDS]

Three sessions of two local ranks are loaded at once and asked in turn, so that what else the machine does meets all of
them. Prints the ratio of each one's decode time to the plain one's, by the clock and by the workers' processor time
(all that says something on a busy machine): the median over rounds, and the quartiles.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from moectl.cli.target import PARANOIA
from moectl.demo import demo_dir
from moectl.engine.protocol import Done, RunOptions
from moectl.engine.random_prompts import RandomPrompts, check_uncached
from moectl.engine.request import Request
from moectl.session.session import Session
from tests.engine.test_lockstep import cut_case
from tests.session.test_session import specs
from tests.support.alphabet import VOCAB_SIZE, write_tokenizer
from tests.support.tiny import write_checkpoint

PROMPT, TOKENS = 6, 256
WAYS = {
    "plain": RunOptions(),
    "--paranoia": RunOptions(paranoia=PARANOIA),
    "--agree-routing": RunOptions(agree_routing=True),
}


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "source"
        write_checkpoint(source, vocab_size=VOCAB_SIZE, n_layers=8, d_model=512, n_heads=8, kv_n_heads=4)
        write_tokenizer(source)
        models = {
            "demo, 4 layers of 128": cut_case(demo_dir(), Path(scratch) / "demo", "hidden", (2, 2), 16),
            "random, 8 layers of 512": cut_case(source, Path(scratch) / "random", "hidden", (3, 3), 16),
        }
        for name, directory in models.items():
            measure(name, directory, rounds)


def measure(name: str, directory: Path, rounds: int) -> None:
    with ExitStack() as held:
        sessions = {way: held.enter_context(Session(specs(directory), options)) for way, options in WAYS.items()}
        wall: dict[str, list[float]] = {way: [] for way in WAYS}
        cpu: dict[str, list[float]] = {way: [] for way in WAYS}
        prompts = RandomPrompts(VOCAB_SIZE)
        for number in range(1, rounds + 2):
            prompt = prompts.draw(PROMPT)
            for way, session in sessions.items():
                request = Request(number, "", TOKENS, prompt_tokens=prompt, ignore_eos=True, cache_prompt=False)
                begin_s = cpu_s(session)
                done = list(session.generate(request))[-1]
                assert isinstance(done, Done)
                check_uncached(done.stats)
                if number > 1:  # the first one warms up
                    wall[way].append(done.stats.decode_s / (TOKENS - 1))
                    cpu[way].append((cpu_s(session) - begin_s) / TOKENS)
    plain = {"clock": wall["plain"], "processor": cpu["plain"]}
    said = ", ".join(f"{1000 * statistics.median(times):.2f} ms of {what}" for what, times in plain.items())
    print(f"{name}: {said} per token, {rounds} rounds")
    for way in list(WAYS)[1:]:
        for what, times in (("clock", wall[way]), ("processor", cpu[way])):
            ratios = [time / base for time, base in zip(times, plain[what], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            print(f"  {way:<16} {what:<9} {middle:.3f} (quartiles {low:.3f} to {high:.3f})")


def cpu_s(session: Session) -> float:
    """Return the processor time that a session's workers have taken."""
    ticks = 0
    for link in session._links:
        fields = Path(f"/proc/{link.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
