"""One rank of the equality tests, a process of its own: `python -m tests.support.lockstep_rank JOB.json RANK`.

It joins one ring and then runs every case of the job on it, because starting an interpreter per case would take most of
the time. A case is a shard set; its results are the greedy tokens, the last hidden states of a prompt and, on the rank
that has the head, the logits.
"""

from __future__ import annotations

import json
import os
import queue
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from moectl.engine.engine import Engine
from moectl.engine.network.canary_run import check
from moectl.engine.network.load import load_rank
from moectl.engine.protocol import Done, Generate, Token
from moectl.engine.request import Request
from moectl.model.manifest import read_manifest
from moectl.shards.tokenizer import open_tokenizer
from tests.support.words import ask_chat


def run_case(case: dict[str, Any], rank: int, group: Any) -> dict[str, Any]:
    """Load a shard set, generate from each prompt, and look at one prefill's arrays."""
    directory = Path(case["shards"])
    manifest = read_manifest(directory)
    dtype = getattr(mx, case["dtype"]) if case.get("dtype") else None
    model = load_rank(directory, manifest, rank, group, dtype=dtype)
    tokenizer = open_tokenizer(directory)
    leader = manifest.placement.head_rank
    engine = Engine(
        model,
        tokenizer,
        rank=rank,
        head_rank=leader,
        group=group,
        max_seq_len=manifest.geometry.max_seq_len,
        prefill_step=32,
        speculate=case.get("speculate", 0),
    )
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for number, prompt in enumerate(case["prompts"], 1):
        inbox.put(Generate((Request if case["raw"] else ask_chat)(number, prompt, case["max_tokens"])))
    inbox.put(None)
    accepted = 0
    answers: dict[int, list[int]] = {number: [] for number in range(1, len(case["prompts"]) + 1)}
    for event in engine.serve(inbox):
        assert rank == leader, f"a follower told {event}"
        if isinstance(event, Token):
            answers[event.id].append(event.token)
        if isinstance(event, Done):
            accepted += event.stats.accepted_tokens
    tokens = list(answers.values())
    checked = check(model, manifest.canary, rank=rank) if manifest.canary else None
    probe = mx.array([[t % manifest.geometry.vocab_size for t in range(3, 40)]])
    hidden = model.transformer(probe, None)
    logits = model(probe)
    mx.eval(hidden, logits)
    mx.synchronize()
    return {
        "tokens": tokens,
        "accepted": accepted,
        "canary": {"worst": checked.verdict.worst, "wrong_at": checked.verdict.wrong_at} if checked else None,
        "hidden": np.array(hidden.astype(mx.float32)).tobytes().hex() if case.get("keep_hidden") else None,
        "logits": np.array(logits.astype(mx.float32)).tolist() if rank == leader else None,
    }


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    rank = int(sys.argv[2])
    os.environ["MLX_RANK"] = str(rank)
    os.environ["MLX_HOSTFILE"] = job["hostfile"]
    group = mx.distributed.init(strict=True, backend="ring") if job["world_size"] > 1 else None
    results = [run_case(case, rank, group) for case in job["cases"]]
    Path(job["out"], f"rank-{rank}.json").write_text(json.dumps(results))
    os._exit(0)  # as the worker does: no destructor of the ring may keep the test waiting


if __name__ == "__main__":
    main()
