"""Estimated memory beside what MLX really takes: real ranks over the ring, on the demo and on a larger model.

`--long` measures each pair of split and precision, and 1 GB of weights. `test_measured_families` is shorter.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from moectl.demo import demo_dir
from moectl.engine.protocol import Done, RunOptions
from moectl.engine.request import Request
from moectl.model.manifest import read_manifest
from moectl.planner.memory import CPU_DTYPE_BYTES, rank_need
from moectl.session import target
from moectl.shards import prepare
from moectl.shards.prepare import Wanted
from tests.support.alphabet import VOCAB_SIZE, write_tokenizer
from tests.support.ring import rank_env
from tests.support.tiny import write_checkpoint

# Different tokens, since equal ones would all go to the same experts, and those to one rank.
PROMPT = tuple(random.Random(3).choices(range(10, VOCAB_SIZE), k=508))


@pytest.fixture(autouse=True)
def quiet_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let waiting ranks leave the cores to the one that works."""
    for name, value in rank_env().items():
        monkeypatch.setenv(name, value)


def measure(model: Path, wanted: Wanted, directory: Path) -> float:
    """Return the estimate of rank 0's arrays divided by its measured peak, after a long prompt and a few tokens.

    The estimate is of a whole chunk of a prompt (512 tokens), which this one fills: no other step takes as much, since
    the canary's chunks are short.
    """
    made = prepare.shard(str(model), wanted, directory=directory)
    manifest = read_manifest(made.directory)
    with target.open_session(target.Local(made.directory, manifest), RunOptions()) as session:
        ends = [
            list(session.generate(Request(n, "", 8, prompt_tokens=PROMPT, cache_prompt=False)))[-1] for n in (1, 2, 3)
        ]
    done = [end for end in ends if isinstance(end, Done)]
    assert done[0].stats.prompt_tokens == len(PROMPT)
    peak = max(end.stats.peak_memory_bytes for end in done)  # on a busy machine one pass may not reach it
    need = rank_need(manifest.placement, 0, context=len(PROMPT), dtype_bytes=CPU_DTYPE_BYTES)
    return need.arrays / peak


@pytest.mark.parametrize(
    ("split", "bits"),
    [
        ("hidden", 4),
        ("experts", 8),
        ("hidden", 16),
        pytest.param("hidden", 8, marks=pytest.mark.long),
        pytest.param("experts", 4, marks=pytest.mark.long),
        pytest.param("experts", 16, marks=pytest.mark.long),
    ],
)
def test_the_demo_within_14_percent(split: str, bits: int, tmp_path: Path) -> None:
    """It is so small that arrays which happen to be queued count, and which of them are is a matter of timing."""
    wanted = Wanted(split=split, nodes=2, bits=bits)
    ratio = measure(demo_dir(), wanted, tmp_path / "set")
    assert ratio == pytest.approx(1, abs=0.14)


@pytest.mark.long
@pytest.mark.parametrize(("n_layers", "least_bytes"), [(5, 8.5e8), (6, 1e9)])
def test_a_large_model_within_6_percent(n_layers: int, least_bytes: float, tmp_path: Path) -> None:
    sizes = {"d_model": 1024, "ffn_hidden": 2048, "n_heads": 8, "kv_n_heads": 2, "max_seq_len": 1024}
    model = write_checkpoint(tmp_path / "large", vocab_size=VOCAB_SIZE, n_layers=n_layers, **sizes)  # type: ignore[arg-type]
    write_tokenizer(model)
    assert sum(f.stat().st_size for f in model.glob("*.safetensors")) > least_bytes
    ratio = measure(model, Wanted(split="hidden", nodes=2, bits=4), tmp_path / "set")
    assert ratio == pytest.approx(1, abs=0.06)
