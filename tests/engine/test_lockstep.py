"""Every way of splitting gives the tokens of one process: ranks × splits × shares × precisions × models.

One set of processes per rank count runs all cases on one ring (see `lockstep_rank`). Each combination of ranks, split,
shares and model runs at one precision, which changes from one to the next; `--long` runs all precisions.
"""

from __future__ import annotations

import itertools
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moectl.demo import demo_dir
from tests.support.alphabet import VOCAB_SIZE, write_tokenizer
from tests.support.cutting import cut
from tests.support.ring import process_env
from tests.support.tiny import write_checkpoint

TOKENS = 40  # more than a prefill chunk of the test (32)
BITS = (16, 8, 4)
MODELS = ("demo", "random", "deep")
# Demo: 4 units of the hidden dimension, 4 layers, 2 KV heads; random: 6, 2, 2; deep: 6, 4, 4. All have 16 experts.
SHARES: dict[str, dict[str, dict[int, list[tuple[int, ...]]]]] = {
    "demo": {
        "hidden": {1: [(4,)], 2: [(2, 2), (1, 3)], 3: [(1, 1, 2), (2, 1, 1)], 4: [(1, 1, 1, 1)]},
        "experts": {1: [(16,)], 2: [(8, 8), (5, 11)], 3: [(6, 5, 5), (1, 12, 3)], 4: [(4, 4, 4, 4), (7, 1, 2, 6)]},
        "tensor": {2: [(2, 2)]},
        "layers": {2: [(2, 2)], 3: [(2, 1, 1)], 4: [(1, 1, 1, 1)]},
    },
    "random": {
        "hidden": {1: [(6,)], 2: [(3, 3), (5, 1)], 3: [(2, 2, 2), (1, 3, 2)], 4: [(1, 2, 1, 2)]},
        "copies": {2: [(16, 9)], 4: [(8, 8, 8, 8)]},  # of whole experts, two at most
        "experts": {1: [(16,)], 2: [(8, 8), (15, 1)], 3: [(6, 5, 5), (9, 4, 3)], 4: [(4, 4, 4, 4), (1, 3, 10, 2)]},
    },
    "deep": {
        "hidden": {1: [(6,)]},
        "experts": {1: [(16,)]},
        "tensor": {2: [(3, 3), (1, 5)], 4: [(2, 2, 1, 1)]},
        "layers": {2: [(1, 3)], 3: [(1, 2, 1)], 4: [(1, 1, 1, 1)]},
    },
}
PROMPTS = {
    "demo": ["Tell me a long story about experts.", "What is expert parallelism?"],
    # Longer than a prefill chunk of the test (32), shorter, and one token.
    "random": ["the quick brown fox jumps over the lazy dog again and again", "mixture", "x"],
    "deep": ["the quick brown fox jumps over the lazy dog again and again", "mixture", "x"],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    random = tmp_path_factory.mktemp("random")
    write_checkpoint(random, vocab_size=VOCAB_SIZE)
    write_tokenizer(random)
    deep = tmp_path_factory.mktemp("deep")
    write_checkpoint(deep, vocab_size=VOCAB_SIZE, n_layers=4, d_model=256, n_heads=4, kv_n_heads=4)
    write_tokenizer(deep)
    return {"demo": demo_dir(), "random": random, "deep": deep}


def cut_case(source: Path, out: Path, split: str, shares: tuple[int, ...], bits: int) -> Path:
    split, replicas = ("experts", 2) if split == "copies" else (split, 1)
    precision: dict[str, Any] = {} if bits == 16 else {"bits": bits, "group_size": 64}
    cut(source, out, name=out.name, split=split, shares=shares, replicas=replicas, **precision)
    return out


def run_ranks(world_size: int, cases: list[dict[str, Any]], directory: Path, **env: str) -> list[list[dict[str, Any]]]:
    """Run the cases on one ring of this size; return results by rank, then by case."""
    with ExitStack() as held:
        listeners = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(world_size)]
        ports = [listener.getsockname()[1] for listener in listeners]
    hostfile = directory / f"ring-{world_size}.json"
    hostfile.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
    job = directory / f"job-{world_size}.json"
    job.write_text(
        json.dumps({"world_size": world_size, "hostfile": str(hostfile), "cases": cases, "out": str(directory)})
    )
    command = [sys.executable, "-m", "tests.support.lockstep_rank", str(job)]
    ranks = [
        subprocess.Popen([*command, str(rank)], env={**process_env(), **env}, stderr=subprocess.PIPE)
        for rank in range(world_size)
    ]
    try:
        for rank, process in enumerate(ranks):
            _, log = process.communicate(timeout=300)
            assert process.returncode == 0, f"rank {rank}: {log.decode()}"
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
    return [json.loads((directory / f"rank-{rank}.json").read_text()) for rank in range(world_size)]


Case = tuple[str, str, tuple[int, ...], int]


def list_cases(world_size: int, *, every: bool) -> Iterator[Case]:
    """List the cases of so many ranks: each at every precision, or at one, which changes from case to case."""
    turn = itertools.cycle(BITS[world_size % 3 :] + BITS[: world_size % 3])
    for model in MODELS:
        for split, by_size in SHARES[model].items():
            for shares in by_size.get(world_size, []):
                # The demo's two heads of one rank are 32 wide, half a quantisation group.
                possible = BITS[:1] if (model, split) == ("demo", "tensor") else BITS
                for bits in possible if every else [next(bits for bits in turn if bits in possible)]:
                    yield model, split, shares, bits


def make_cases(cases: list[Case], models: dict[str, Path], directory: Path) -> list[dict[str, Any]]:
    return [
        {
            "shards": str(
                cut_case(
                    models[model],
                    directory / f"{len(shares)}-{number}",
                    split,
                    shares,
                    bits,
                )
            ),
            "prompts": PROMPTS[model],
            "max_tokens": TOKENS,
            "raw": model != "demo",
        }
        for number, (model, split, shares, bits) in enumerate(cases)
    ]


@pytest.fixture(scope="module")
def alone(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[Case, dict[str, Any]]:
    """Results of one process: by hidden units at every precision, and by experts at one."""
    directory = tmp_path_factory.mktemp("alone")
    every = [case for case in list_cases(1, every=True) if case[1] == "hidden"]
    cases = every + [case for case in list_cases(1, every=False) if case[1] == "experts"]
    [results] = run_ranks(1, make_cases(cases, models, directory), directory)
    return dict(zip(cases, results, strict=True))


def test_one_process_gives_enough_tokens(alone: dict[Case, dict[str, Any]]) -> None:
    for (model, split, shares, bits), one in alone.items():
        answers = [len(tokens) for tokens in one["tokens"]]
        assert max(answers) == TOKENS
        assert model == "demo" or set(answers) == {TOKENS}
        if split == "experts":
            [units] = SHARES[model]["hidden"][1]
            assert one["tokens"] == alone[model, "hidden", units, bits]["tokens"], (model, shares)


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.long), 4])
def test_tokens_and_logits_equal_one_process(
    world_size: int,
    models: dict[str, Path],
    alone: dict[Case, dict[str, Any]],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    cases = list(list_cases(world_size, every=request.config.getoption("--long")))
    assert {bits for *_, bits in cases} == set(BITS)
    results = run_ranks(world_size, make_cases(cases, models, tmp_path), tmp_path)
    for number, (model, split, shares, bits) in enumerate(cases):
        case = f"{model} {split} {shares} {bits} bits"
        [units] = SHARES[model]["hidden"][1]
        one = alone[model, "hidden", units, bits]
        leader = results[world_size - 1 if split == "layers" else 0][number]
        assert leader["tokens"] == one["tokens"], case
        np.testing.assert_allclose(leader["logits"], one["logits"], atol=1e-4, rtol=0, err_msg=case)


@pytest.mark.parametrize("split", ["hidden", "experts"])
def test_bf16_ranks_are_bit_identical(split: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    # All experts are used by every token: a near-tie of the router cannot turn rounding into another expert.
    write_checkpoint(source, vocab_size=VOCAB_SIZE, n_experts=6, top_k=6)
    write_tokenizer(source)
    shares = (3, 2, 1)
    common = {"prompts": ["mixture of experts"], "max_tokens": 8, "raw": True, "dtype": "bfloat16", "keep_hidden": True}
    split_case = {"shards": str(cut_case(source, tmp_path / "split", split, shares, 16)), **common}
    whole = (sum(shares),)
    alone_case = {"shards": str(cut_case(source, tmp_path / "whole", split, whole, 16)), **common}
    three = run_ranks(3, [split_case], tmp_path)
    [[one]] = run_ranks(1, [alone_case], tmp_path)
    assert len({results[0]["hidden"] for results in three}) == 1
    expected = np.array(one["logits"])
    difference = np.abs(np.array(three[0][0]["logits"]) - expected).max() / np.abs(expected).max()
    assert 0 < difference < 4 * 2.0**-8  # bf16 keeps 8 bits; sums in another order differ by a few last places
