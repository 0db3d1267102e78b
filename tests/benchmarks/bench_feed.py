"""Cut a model, push it, and do both at once, to four namespaced hosts over a link on which both take about as long.

    python -m tests.benchmarks.bench_feed [LAYERS] [RATE]

Needs root, iproute2 and tc. Makes (and deletes) a checkpoint of random bf16 weights with as many layers as DBRX, 43 MB
each. RATE limits what this machine sends, such as 200mbit; by default it is chosen so that pushing takes as long as
cutting did. All three are commands as a person types them, their start included.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx

from moectl.hosts.onhost.files import hash_file
from moectl.model.manifest import read_manifest
from tests.benchmarks.bench_shard import write_file
from tests.support.netns import Cluster, run_cluster
from tests.support.tiny import make_config

RANKS = 4
D_MODEL, FFN_HIDDEN, EXPERTS, VOCAB = 1024, 768, 8, 1024
CUT = ("--split", "hidden", "--q-bits", "4")


def write_checkpoint(directory: Path, layers: int) -> int:
    """Write a fused checkpoint, one file per layer; return its bytes."""
    config = make_config(
        n_layers=layers,
        d_model=D_MODEL,
        n_heads=8,
        kv_n_heads=2,
        ffn_hidden=FFN_HIDDEN,
        n_experts=EXPERTS,
        vocab_size=VOCAB,
    )
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    noise = mx.random.normal((8 << 20,)).astype(mx.bfloat16).view(mx.uint16)
    block = bytes(memoryview(noise).cast("B"))  # type: ignore[arg-type]  # a buffer, whatever the stubs say
    weight_map: dict[str, str] = {}
    for layer in range(layers):
        b = f"transformer.blocks.{layer}"
        shapes: dict[str, tuple[int, ...]] = {
            f"{b}.norm_attn_norm.norm_1.weight": (D_MODEL,),
            f"{b}.norm_attn_norm.attn.Wqkv.weight": (D_MODEL * 3 // 2, D_MODEL),
            f"{b}.norm_attn_norm.attn.out_proj.weight": (D_MODEL, D_MODEL),
            f"{b}.norm_attn_norm.norm_2.weight": (D_MODEL,),
            f"{b}.ffn.router.layer.weight": (EXPERTS, D_MODEL),
            **{f"{b}.ffn.experts.mlp.{p}": (EXPERTS * FFN_HIDDEN, D_MODEL) for p in ("w1", "v1", "w2")},
        }
        if layer == 0:
            shapes["transformer.wte.weight"] = shapes["lm_head.weight"] = (VOCAB, D_MODEL)
            shapes["transformer.norm_f.weight"] = (D_MODEL,)
        file = f"model-{layer + 1:05d}-of-{layers:05d}.safetensors"
        weight_map |= dict.fromkeys(shapes, file)
        write_file(directory / file, shapes, block)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(p.stat().st_size for p in directory.iterdir())


def time_moectl(*words: str) -> float:
    """Return the seconds of one command."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "moectl", *words, "-q"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def write_hosts(cluster: Cluster, path: Path, where: str) -> str:
    lines = [f"{h.name} ip={h.ips[0]} python={h.python} dir=/node/{where}\n" for h in cluster.hosts()]
    path.write_text("".join(lines))
    return str(path)


def check(cluster: Cluster, shards: Path, where: str) -> None:
    """Check that every host holds what its rank needs."""
    manifest = read_manifest(shards)
    for rank, node in enumerate(cluster.nodes):
        directory = node.directory / where / "shards" / manifest.name
        assert all(hash_file(str(directory / n)) == f.sha256 for n, f in manifest.files_of(rank).items())


def main(layers: str = "40", rate: str = "") -> None:
    """Print the three times and the ratio of the third to the longer of the others."""
    with tempfile.TemporaryDirectory(prefix="moectl-bench-") as text, run_cluster(Path(text), RANKS) as cluster:
        scratch = Path(text)
        os.environ |= {f"XDG_{name}_HOME": f"{scratch}/xdg/{name}" for name in ("STATE", "DATA", "CACHE", "CONFIG")}
        os.environ["MOECTL_SSH_CONFIG"] = str(cluster.config)
        model, alone, fed = str(scratch / "model"), scratch / "alone", scratch / "fed"
        source = write_checkpoint(Path(model), int(layers))
        os.sync()
        cut_s = time_moectl("shard", model, "--nodes", str(RANKS), *CUT, "-o", str(alone))
        output = sum(f.bytes for f in read_manifest(alone).files.values())
        rate = rate or f"{8 * output / cut_s / 1e6:.0f}mbit"
        print(f"source {source / 1e6:.0f} MB, shards {output / 1e6:.0f} MB for {RANKS} hosts, link {rate}")
        print(f"shard alone           {cut_s:6.1f} s", flush=True)
        cluster.limit_uplink(rate)
        hosts = write_hosts(cluster, scratch / "one.txt", "alone")
        push_s = time_moectl("deploy", hosts, "--shards", str(alone))
        print(f"deploy alone          {push_s:6.1f} s", flush=True)
        check(cluster, alone, "alone")
        shutil.rmtree(alone)
        hosts = write_hosts(cluster, scratch / "two.txt", "fed")
        both_s = time_moectl("deploy", hosts, "--shard", model, *CUT, "-o", str(fed))
        check(cluster, fed, "fed")
        print(f"deploy --shard        {both_s:6.1f} s")
        print(f"ratio to the slower   {both_s / max(cut_s, push_s):6.2f}")
        cluster.mend()


if __name__ == "__main__":
    main(*sys.argv[1:3])
