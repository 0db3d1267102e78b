"""Deploy a set with much in common to four namespaced hosts over a slow uplink, with and without passing files on.

    python -m tests.benchmarks.bench_relay [MEGABYTES_COMMON] [MEGABYTES_PER_RANK] [RATE]

Needs root, iproute2 and tc. The rate is for what this machine sends to all hosts; they reach each other freely.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

from moectl.cluster.deploy.deploy import deploy
from moectl.hosts.onhost.files import hash_file
from moectl.model.manifest import NAME, FileEntry, Manifest, write_manifest
from tests.support.netns import Cluster, run_cluster
from tests.support.structures import structure_of
from tests.support.tiny import make_config

RANKS = 4
FILE_BYTES = 2_000_000


def make_shards(directory: Path, common_mb: int, rank_mb: int) -> Manifest:
    """Write a shard set of random bytes in files of FILE_BYTES."""
    names = [f"common/layer-{i:03}.safetensors" for i in range(common_mb * 1_000_000 // FILE_BYTES)]
    own = rank_mb * 1_000_000 // FILE_BYTES
    names += [f"rank-{rank}/layer-{i:03}.safetensors" for rank in range(RANKS) for i in range(own)]
    files = {}
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(FILE_BYTES))
        files[name] = FileEntry(FILE_BYTES, hash_file(str(path)))
    manifest = Manifest(
        directory.name,
        "bench",
        None,
        "",
        make_config(),
        structure_of(make_config()),
        None,
        None,
        "experts",
        (1,) * RANKS,
        files,
    )
    write_manifest(directory, manifest)
    return manifest


def measure(cluster: Cluster, shards: Path, manifest: Manifest, *, relay: bool) -> tuple[float, int]:
    """Return the seconds of one deployment and the bytes that this machine sent for it; check what arrived."""
    where = f"/node/relay-{relay}"
    sent, started = cluster.sent_bytes, time.perf_counter()
    deploy(cluster.hosts(dir=where), shards, manifest, relay=relay).raise_failures()
    spent_s, sent = time.perf_counter() - started, cluster.sent_bytes - sent
    for rank, node in enumerate(cluster.nodes):
        there = node.directory / Path(where).name / "shards" / manifest.name
        assert (there / NAME).read_bytes() == (shards / NAME).read_bytes()
        assert all(hash_file(str(there / n)) == f.sha256 for n, f in manifest.files_of(rank).items())
    return spent_s, sent


def main(common: str = "60", rank: str = "8", rate: str = "80mbit") -> None:
    """Print seconds and bytes sent of both, and the ratios."""
    common_mb, rank_mb = int(common), int(rank)
    with tempfile.TemporaryDirectory(prefix="moectl-bench-") as scratch, run_cluster(Path(scratch), RANKS) as cluster:
        os.environ |= {"MOECTL_SSH_CONFIG": str(cluster.config), "XDG_STATE_HOME": f"{scratch}/state"}
        shards = Path(scratch) / "bench-experts-4"
        manifest = make_shards(shards, common_mb, rank_mb)
        cluster.limit_uplink(rate)
        needed = common_mb + RANKS * rank_mb
        print(
            f"{common_mb} MB common, {rank_mb} MB for each of {RANKS} ranks, uplink {rate}; each byte once: {needed} MB"
        )
        results = {}
        for relay in (False, True):
            results[relay] = spent_s, sent = measure(cluster, shards, manifest, relay=relay)
            print(f"{'relay' if relay else 'no relay':9} {spent_s:6.1f} s  {sent / 1e6:7.1f} MB sent", flush=True)
        (plain_s, plain), (relay_s, relayed) = results[False], results[True]
        print(f"ratio     {plain_s / relay_s:6.2f}    {plain / relayed:7.2f}")
        cluster.mend()


if __name__ == "__main__":
    main(*sys.argv[1:4])
