"""One of several ranks under load, a process of its own: `python -m tests.support.batch_rank JOB.json RANK`.

Orders come as on a node, through an inbox that another thread fills: the same requests for all ranks, but each rank
gets them in its own time, and cancels are told to all at moments that only the leader's progress decides. It writes
what it told, what its prompt cache holds, and how many bytes it held before and after.
"""

from __future__ import annotations

import gc
import json
import os
import queue
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any

import mlx.core as mx

from moectl.engine.caches import count_row_tokens
from moectl.engine.engine import Engine
from moectl.engine.network.exchange import seam
from moectl.engine.network.load import load_rank
from moectl.engine.protocol import Cancel, Done, Generate, Token
from moectl.engine.request import Request
from moectl.model.manifest import read_manifest
from moectl.shards.chat.tokenizer import open_tokenizer


def make_requests(job: dict[str, Any]) -> list[Request]:
    """Return the load, every tenth request of which is a plain one that is never cancelled."""
    source = random.Random(job["seed"])
    requests = []
    for number in range(1, job["requests"] + 1):
        more: dict[str, Any] = source.choice(
            [{}, {"temperature": 1.2, "seed": 3}, {"logprobs": 2}, {"stop": ("the", "e")}, {"frequency_penalty": 1.0}]
        )
        prompt = source.choice(job["prompts"]) * source.choice([1, 1, 4])
        max_tokens = source.randint(1, 40)
        if number % 10 == 0:
            more, prompt, max_tokens = {"ignore_eos": True}, job["prompts"][0], 20
        requests.append(Request(number, prompt, max_tokens, **more))
    return requests


class Controller(threading.Thread):
    """Put orders into a rank's inbox at its own pace; the leader's waits now and then until all is answered."""

    def __init__(self, job: dict[str, Any], rank: int, engine: Engine, inbox: queue.SimpleQueue[Any]) -> None:
        super().__init__(daemon=True)
        self._job, self._rank, self._engine, self._inbox = job, rank, engine, inbox

    def run(self) -> None:
        pace = random.Random(self._rank)
        wishes = random.Random(self._job["seed"] + 1)
        cancelled = 0
        for request in make_requests(self._job):
            if self._engine._leads and pace.random() < self._job.get("lone", 0):
                while self._engine._admitted < request.id - 1 or self._engine._running:
                    time.sleep(0.002)
            self._inbox.put(Generate(request))
            if pace.random() < 0.3:
                time.sleep(pace.random() * 0.05)
            if cancelled < self._job["cancels"] and wishes.random() < 0.8:
                wish = wishes.randint(max(1, request.id - 12), request.id + 1)
                if wish % 10:
                    cancelled += 1
                    self._inbox.put(Cancel(wish))
        self._inbox.put(None)


def held_bytes(engine: Engine) -> int:
    engine._cache.shrink(0)
    gc.collect()
    mx.synchronize(engine._generator.stream)
    mx.clear_cache()
    return mx.get_active_memory()


def load(engine: Engine, job: dict[str, Any], rank: int) -> tuple[dict[int, list[int]], dict[int, str], int]:
    """Serve a load; return tokens and the finish reason of each answer, both empty on followers.

    And how many tokens were confirmed that prompt lookup had proposed.
    """
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    Controller(job, rank, engine, inbox).start()
    tokens: dict[int, list[int]] = {}
    reasons: dict[int, str] = {}
    accepted = 0
    for event in engine.serve(inbox):
        if isinstance(event, Token):
            tokens.setdefault(event.id, []).append(event.token)
        if isinstance(event, Done):
            assert event.id not in reasons
            reasons[event.id] = event.finish_reason
            accepted += event.stats.accepted_tokens
    return tokens, reasons, accepted


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    rank = int(sys.argv[2])
    os.environ["MLX_RANK"] = str(rank)
    os.environ["MLX_HOSTFILE"] = job["hostfile"]
    group = mx.distributed.init(strict=True, backend="ring")
    directory = Path(job["shards"])
    manifest = read_manifest(directory)
    model = load_rank(directory, manifest, rank, group)
    leader = manifest.placement.head_rank

    def make_engine() -> Engine:
        return Engine(
            model,
            open_tokenizer(directory),
            rank=rank,
            head_rank=leader,
            group=group,
            vocab_size=manifest.structure.vocab_size,
            max_seq_len=512,
            prefill_step=16,
            kv_tokens=1200,
            cache_tokens=400,
            speculate=job.get("speculate", 0),
            trimmable=manifest.structure.can_trim,
            batchable=manifest.structure.can_batch,
            row_tokens=count_row_tokens(manifest.structure),
        )

    with seam():
        load(make_engine(), job | {"requests": 20, "cancels": 8}, rank)
        engine = make_engine()
        before = held_bytes(engine)
        tokens, reasons, accepted = load(engine, job, rank)
    kept = engine._cache.prompts
    out = {
        "tokens": tokens,
        "reasons": reasons,
        "kept": kept,
        "accepted": accepted,
        "before": before,
        "after": held_bytes(engine),
    }
    Path(job["out"], f"rank-{rank}.json").write_text(json.dumps(out))
    os._exit(0)


if __name__ == "__main__":
    main()
