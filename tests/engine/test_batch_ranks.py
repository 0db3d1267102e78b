"""Two real ranks under random load: the same decisions, the same prompt cache, nothing left behind, nobody waiting."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import pytest

from moectl.demo import demo_dir
from moectl.engine.network.load import load_rank
from moectl.engine.protocol import (
    Beat,
    Check,
    Done,
    Generate,
    Load,
    Order,
    Prefilled,
    Refused,
    RunOptions,
    Start,
    encode,
    read_messages,
)
from moectl.engine.request import Request
from moectl.shards.chat.tokenizer import open_tokenizer
from tests.engine.test_batching import PROMPTS, answer_alone, load_demo
from tests.support.alphabet import VOCAB_SIZE, write_tokenizer
from tests.support.cutting import cut
from tests.support.driven import Driven
from tests.support.layouts import write_layout
from tests.support.ring import process_env


def test_a_worker_obeys_the_limits_it_is_started_with(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    cut(demo_dir(), shards, split="hidden", nodes=1)
    start = Start(0, 1, str(shards), [], 10, run=RunOptions(cache_tokens=0, prefill_step=16))
    asked = [Request(1, "a " * 70, 40), *(Request(n, "a " * 40, 2) for n in (2, 3))]
    command = [sys.executable, "-m", "moectl", "worker"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=process_env()) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        orders: list[Order] = [start, Load(kv_tokens=60), Check(), *(Generate(request) for request in asked)]
        worker.stdin.write(b"".join(encode(order) for order in orders))
        worker.stdin.flush()
        beats = threading.Event()
        threading.Thread(target=keep_beating, args=(worker.stdin, beats), daemon=True).start()
        events = []
        for event in read_messages(worker.stdout):
            events.append(event)
            if isinstance(event, Done) and event.id == 3:
                break
        beats.set()
        worker.kill()
    assert [e.id for e in events if isinstance(e, Refused) and "memory for 60" in str(e.to_error())] == [1]
    assert [e.stats.cached_tokens for e in events if isinstance(e, Done)] == [0, 0]
    assert {e.tokens for e in events if isinstance(e, Prefilled) and e.id == 2} >= {16, 32}


def keep_beating(stream: IO[bytes], stop: threading.Event) -> None:
    while not stop.wait(1):
        stream.write(encode(Beat()))
        stream.flush()


def run_load(load: dict[str, Any], shards: Path, directory: Path) -> list[dict[str, Any]]:
    """Run two ranks (see `batch_rank`) under a load; return what each of them wrote."""
    with ExitStack() as held:
        listeners = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        ports = [listener.getsockname()[1] for listener in listeners]
    hostfile = directory / "ring.json"
    hostfile.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
    job = directory / "job.json"
    job.write_text(json.dumps(load | {"shards": str(shards), "hostfile": str(hostfile), "out": str(directory)}))
    command = [sys.executable, "-m", "tests.support.batch_rank", str(job)]
    env = {**process_env(), "MLX_DISABLE_COMPILE": "1"}  # on a CPU it calls a compiler for each function of each shape
    ranks = [subprocess.Popen([*command, str(rank)], env=env, stderr=subprocess.PIPE) for rank in range(2)]
    try:
        for rank, process in enumerate(ranks):
            _, log = process.communicate(timeout=240)
            assert process.returncode == 0, f"rank {rank}: {log.decode()}"
    finally:
        for process in ranks:
            process.kill()
    return [json.loads((directory / f"rank-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("split", ["hidden", "layers"])
def test_ranks_stay_together_under_load(split: str, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    cut(demo_dir(), shards, split=split, nodes=2)
    load = {"requests": 100, "cancels": 80, "seed": 4, "prompts": PROMPTS}
    zero, one = run_load(load, shards, tmp_path)
    leader, follower = (one, zero) if split == "layers" else (zero, one)
    assert follower["tokens"] == follower["reasons"] == {}
    assert sorted(map(int, leader["reasons"])) == list(range(1, 101))
    assert list(leader["reasons"].values()).count("cancelled") > 30
    assert leader["kept"] == follower["kept"] != []
    alone = answer_alone(load_demo(tmp_path / "alone"), PROMPTS[0], 20, ignore_eos=True)
    assert all(leader["tokens"][str(number)] == alone for number in range(10, 101, 10))
    for rank in (zero, one):
        assert abs(rank["after"] - rank["before"]) <= 0.05 * rank["before"]


@pytest.mark.parametrize("split", ["hidden", "layers"])
def test_ranks_whose_caches_hold_states_stay_together_under_load(split: str, tmp_path: Path) -> None:
    """As pipeline stages one rank has states only, and both have to keep and find the same."""
    source = write_layout(tmp_path / "source", "qwen3-next", vocab_size=VOCAB_SIZE)
    write_tokenizer(source)
    shards = tmp_path / "shards"
    cut(source, shards, split=split, nodes=2)
    zero, one = run_load({"requests": 60, "cancels": 40, "seed": 4, "prompts": PROMPTS}, shards, tmp_path)
    leader, follower = (one, zero) if split == "layers" else (zero, one)
    assert follower["tokens"] == follower["reasons"] == {}
    assert sorted(map(int, leader["reasons"])) == list(range(1, 61))
    assert leader["kept"] == follower["kept"] != []
    whole = cut(source, tmp_path / "whole", nodes=1)
    parts = load_rank(tmp_path / "whole", whole, 0), open_tokenizer(source)
    driven = Driven(parts, trimmable=whole.structure.can_trim, batchable=whole.structure.can_batch)
    driven.ask(PROMPTS[0], 20, ignore_eos=True)
    driven.run()
    assert not whole.structure.can_trim
    assert all(leader["tokens"][str(number)] == driven.tokens(1) for number in range(10, 61, 10))
