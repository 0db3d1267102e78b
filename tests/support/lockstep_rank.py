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
from moectl.engine.network.exchange import seam
from moectl.engine.network.load import load_rank
from moectl.engine.network.stages import _End
from moectl.engine.protocol import Done, Generate, Token
from moectl.engine.request import Request
from moectl.model.manifest import read_manifest
from moectl.shards.chat.tokenizer import open_tokenizer
from moectl.shards.look.hooks import Hook, hooked
from tests.support.metal import install
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
        vocab_size=manifest.structure.vocab_size,
        max_seq_len=manifest.structure.context,
        prefill_step=32,
        speculate=case.get("speculate", 0),
        trimmable=manifest.structure.can_trim,
        batchable=manifest.structure.can_batch,
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
    probe = mx.array([[t % manifest.structure.vocab_size for t in range(3, 40)]])
    hidden, logits = run_probe(model, probe)
    mx.eval(hidden, logits)
    mx.synchronize()
    return {
        "tokens": tokens,
        "accepted": accepted,
        "hidden": np.array(hidden.astype(mx.float32)).tobytes().hex() if case.get("keep_hidden") else None,
        "logits": np.array(logits.astype(mx.float32)).tolist() if rank == leader else None,
    }


def run_probe(model: Any, probe: mx.array) -> tuple[mx.array, mx.array]:
    """Return the state after the last layer (nothing on a rank that does not compute it), and the logits."""
    seen = [mx.array([])]

    def note(call: Hook, *args: Any, **kwargs: Any) -> mx.array:
        try:
            seen.append(call(*args, **kwargs))
        except _End as end:
            seen.append(end.state)
            raise
        return seen[-1]

    with hooked([(model.layers[-1], note)]):
        logits = model(probe)
    return seen[-1], logits


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    rank = int(sys.argv[2])
    os.environ["MLX_RANK"] = str(rank)
    os.environ["MLX_HOSTFILE"] = job["hostfile"]
    install()
    group = mx.distributed.init(strict=True, backend="ring") if job["world_size"] > 1 else None
    with seam():
        results = [run_case(case, rank, group) for case in job["cases"]]
    Path(job["out"], f"rank-{rank}.json").write_text(json.dumps(results))
    os._exit(0)  # as the worker does: no destructor of the ring may keep the test waiting


if __name__ == "__main__":
    main()
