"""What `plan --probe` predicts beside what `bench` measures: `python -m tests.benchmarks.bench_predict`.

Two ranks on this machine, or four namespaced hosts over SSH (`--netns`, as root), with the shim that injects latency
into every exchange. Prints predicted and measured tokens per second and their ratio.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from moectl.cluster.probe import Site, measure_speed
from moectl.demo import demo_dir
from moectl.hosts.hostfile import Host
from moectl.hosts.remote import LocalRemote, Remote
from moectl.hosts.ssh.remote import SSHRemote
from moectl.model.placement import Placement, make_placement
from moectl.planner.measured import Job
from moectl.planner.speed import Work, predict_measured
from moectl.session.bench import bench
from moectl.session.session import RankSpec, Session
from tests.support.cutting import cut
from tests.support.netns import run_cluster
from tests.support.ring import rank_env
from tests.support.structures import structure_of

_Place = tuple[Host, Remote, tuple[str, ...]]
DTYPE_BYTES = 4  # float32, on a CPU
PROMPT, GENERATED = 128, 96


def predict(sites: list[Site], config: dict[str, Any], placements: list[Placement]) -> list[float]:
    """Return predicted decode tokens per second of each placement."""
    job = Job(tuple(placements), config, None, 1 << 30, prompt_tokens=PROMPT, budget_s=3.0 / len(placements))
    speeds = measure_speed(sites, job)
    works = [Work(p, PROMPT + GENERATED // 2, PROMPT, DTYPE_BYTES) for p in placements]
    return [predict_measured(work, speed).decode_tok_s for work, speed in zip(works, speeds, strict=True)]


def measure(sites: list[Site], shards: Path, trials: int) -> float:
    """Return decode tokens per second of a shard set, as `moectl bench` finds them."""
    worker = ("-m", "moectl", "worker")
    ranks = [RankSpec(s.host, s.remote, (s.python, *worker), str(shards), s.addresses, s.env) for s in sites]
    with Session(ranks) as session:
        found = bench(session, shards.name, prompt_tokens=PROMPT, generation_tokens=GENERATED, trials=trials)
    return found.decode_tok_s.mean


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(demo_dir()), help="directory of a checkpoint (default: the demo)")
    parser.add_argument("--netns", action="store_true", help="four namespaced hosts instead of two local ranks")
    parser.add_argument("--splits", default="hidden,experts")
    parser.add_argument("--latencies", default="0,100,300,1000", help="microseconds per exchange")
    parser.add_argument("--trials", type=int, default=3)
    options = parser.parse_args()
    config = json.loads((Path(options.model) / "config.json").read_text())
    count = 4 if options.netns else 2
    placements = [make_placement(structure_of(config), split, count) for split in options.splits.split(",")]
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for placement in placements:
            cut(Path(options.model), directory / placement.split, split=placement.split, nodes=count)
        if options.netns:
            (directory / "net").mkdir()
            with run_cluster(directory / "net", count) as cluster:
                remotes: list[_Place] = [(h, SSHRemote(h, config=str(cluster.config)), h.ips) for h in cluster.hosts()]
                table(remotes, config, placements, directory, options)
        else:
            table([(Host("localhost"), LocalRemote(), ("127.0.0.1",))] * count, config, placements, directory, options)


def table(
    hosts: list[_Place],
    config: dict[str, Any],
    placements: list[Placement],
    directory: Path,
    options: argparse.Namespace,
) -> None:
    """Print one row per latency and split."""
    print(f"{len(hosts)} ranks, {options.model}, {PROMPT} prompt + {GENERATED} generated tokens")
    print(f"{'delay':>8} {'split':>8} {'predicted':>10} {'measured':>9} {'ratio':>6}")
    for delay in options.latencies.split(","):
        env = rank_env(RING_DELAY_US=delay)
        sites = [Site(host, remote, sys.executable, ips, env) for host, remote, ips in hosts]
        for placement, predicted in zip(placements, predict(sites, config, placements), strict=True):
            found = measure(sites, directory / placement.split, options.trials)
            ratio = predicted / found
            print(f"{delay:>5} µs {placement.split:>8} {predicted:10.1f} {found:9.1f} {ratio:6.2f}", flush=True)


if __name__ == "__main__":
    main()
