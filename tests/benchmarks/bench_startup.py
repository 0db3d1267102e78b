"""How long moectl takes to begin: `--help`, a Tab press and `--version`, beside a bare click program, in turns.

    python -m tests.benchmarks.bench_startup [ROUNDS]

The ratio of `--help` is what the house rules bound (2); the times are this machine's.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
BARE = """\
import click

@click.group()
def cli():
    "A bare program."

@cli.command()
def verb():
    "Do something."

cli()
"""
TAB = {"_MOECTL_COMPLETE": "bash_complete", "COMP_POINT": "99", "COMP_WORD": ""}


def time_run(words: list[str], environment: dict[str, str], directory: str) -> float:
    """Return the seconds of one run."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    started = time.perf_counter()
    subprocess.run(words, env=environment, cwd=directory, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started


def main() -> None:
    """Measure and print."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    moectl = [sys.executable, "-m", "moectl"]
    with tempfile.TemporaryDirectory() as directory:
        bare = Path(directory, "bare.py")
        bare.write_text(BARE)
        Path(directory, "hosts.txt").write_text("".join(f"mac{n} ip=10.0.0.{n}\n" for n in range(1, 5)))
        runs: dict[str, tuple[list[str], dict[str, str]]] = {
            "bare click --help": ([sys.executable, str(bare), "--help"], {}),
            "moectl --help": ([*moectl, "--help"], {}),
            "moectl run --help": ([*moectl, "run", "--help"], {}),
            "Tab: a verb": (moectl, {**TAB, "COMP_LINE": "moectl "}),
            "Tab: a host": (moectl, {**TAB, "COMP_LINE": "moectl deploy --only "}),
            "moectl --version": ([*moectl, "--version"], {}),
        }
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds + 1):  # the first writes .pyc files
            for name, (words, environment) in runs.items():
                seconds[name].append(time_run(words, environment, directory))
    best = {name: min(found[1:]) for name, found in seconds.items()}
    middle = {name: sorted(found[1:])[rounds // 2] for name, found in seconds.items()}
    base = "bare click --help"
    print(f"{'':18}    BEST  MEDIAN  RATIO OF BESTS, OF MEDIANS   ({rounds} rounds)")
    for name in runs:
        ratios = f"{best[name] / best[base]:5.2f} {middle[name] / middle[base]:5.2f}"
        print(f"{name:18} {1000 * best[name]:4.0f} ms {1000 * middle[name]:4.0f} ms  {ratios}")


if __name__ == "__main__":
    main()
