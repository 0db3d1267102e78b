"""Ranks that load at different speeds: none builds an exchange before all have loaded.

On a Mac the GPU's watchdog ends a rank whose GPU waits for another rank's load.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from moectl.engine.network.canary_run import compute_canary
from moectl.errors import MoectlError
from moectl.session.session import RankSpec, Session
from tests.session.test_session import specs
from tests.support.alphabet import VOCAB_SIZE, write_tokenizer
from tests.support.cutting import cut
from tests.support.metal import TIMED_OUT, WORKER, Modes
from tests.support.tiny import write_checkpoint


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set for two ranks with a canary, which the ranks compute at their start."""
    source, directory = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("shards") / "two"
    write_checkpoint(source, vocab_size=VOCAB_SIZE)
    write_tokenizer(source)
    cut(source, directory, split="hidden", shares=(2, 4), compute_canary=compute_canary)
    return directory


def ranks(shards: Path, modes: Modes) -> list[RankSpec]:
    more = {"MLX_DISABLE_COMPILE": "1", **modes.env()}  # a compiler on a CPU would be what others wait for
    return [replace(spec, env={**spec.env, **more}) for spec in specs(shards, (sys.executable, *WORKER))]


def test_no_rank_computes_before_all_have_loaded(shards: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    with Session(ranks(shards, Modes(delays={"load": {"1": 1.0}}, trace=str(trace)))) as session:
        assert session.model.checked
    lines = trace.read_text().splitlines()
    first = lines.index("0 exchange", lines.index("0 loaded"))
    assert lines.index("1 loaded") < first


@pytest.mark.long
def test_no_gpu_waits_for_another_ranks_load(shards: Path) -> None:
    """The watchdog is quiet, and where a rank does not wait for Check it ends the rank that has loaded first."""
    modes = Modes(streams=True, watch_s=2.0, delays={"load": {"1": 5.0}})
    with Session(ranks(shards, modes)) as session:
        assert session.model.checked
    with pytest.raises(MoectlError, match=f"host0: rank 0: .* exit code {TIMED_OUT}"):
        Session(ranks(shards, replace(modes, left_out=("check",)))).__enter__()
