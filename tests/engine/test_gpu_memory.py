"""What a rank may wire and keep on a Mac's GPU, and when it is told."""

from __future__ import annotations

import sys
from pathlib import Path

import mlx.core as mx
import pytest

from moectl.engine.gpu_memory import limit_memory, release, working_set_bytes
from moectl.hosts.hostfile import Host
from moectl.hosts.remote import LocalRemote
from moectl.model.placement import make_placement
from moectl.planner.memory import (
    CACHE_LIMIT_BYTES,
    CPU_DTYPE_BYTES,
    METAL_DTYPE_BYTES,
    WIRED_EXTRA_BYTES,
    Need,
    rank_need,
)
from moectl.session.session import RankSpec, Session
from tests.engine.test_lockstep import cut_case
from tests.support.alphabet import VOCAB_SIZE, write_tokenizer
from tests.support.ring import rank_env
from tests.support.structures import dbrx
from tests.support.tiny import write_checkpoint

GIB = 1 << 30
NEED = Need(20 * GIB, 2 * GIB, 3 * GIB, GIB // 2, GIB, 0, CACHE_LIMIT_BYTES)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Return what MLX is told on a Mac whose GPU may use 64 GiB."""
    told: dict[str, int] = {}
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 64 * GIB})
    for name in ("set_wired_limit", "set_cache_limit"):
        monkeypatch.setattr(mx, name, lambda limit, name=name: told.__setitem__(name, limit))
    return told


def test_metal_says_what_its_gpu_may_use(told: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    assert working_set_bytes() == 64 * GIB
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    assert working_set_bytes() is None


def test_a_rank_wires_what_it_needs_and_some_more(told: dict[str, int]) -> None:
    limit_memory(NEED, ranks_here=1)
    assert told == {"set_wired_limit": NEED.arrays + 2 * GIB + WIRED_EXTRA_BYTES, "set_cache_limit": 2 * GIB}


def test_ranks_on_one_mac_share_what_its_gpu_may_use(told: dict[str, int]) -> None:
    limit_memory(NEED, ranks_here=4)
    assert told["set_wired_limit"] == 16 * GIB


def test_nothing_is_told_without_metal(told: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    limit_memory(NEED, ranks_here=1)
    assert told == {}


def test_what_is_kept_of_freed_arrays_is_in_the_need() -> None:
    placement = make_placement(dbrx(), "hidden", 2)
    gpu = rank_need(placement, 0, context=4096, dtype_bytes=METAL_DTYPE_BYTES)
    assert 0 < gpu.freed < CACHE_LIMIT_BYTES
    assert gpu.freed == gpu.activations + gpu.communication
    assert gpu.total == gpu.runtime + gpu.arrays + gpu.freed
    assert NEED.freed == CACHE_LIMIT_BYTES
    assert rank_need(placement, 0, context=4096, dtype_bytes=CPU_DTYPE_BYTES).freed == 0


# A worker that has a GPU which computes nothing, and says in its log what MLX is told.
WORKER = """
import sys
import mlx.core as mx
from mlx_lm.generate import BatchGenerator
from moectl.engine import gpu_memory, worker
class Metal:
    is_available = staticmethod(lambda: True)
make, limit = BatchGenerator.__init__, gpu_memory.limit_memory
def tell(name):
    def do(value):
        print(f"{name} {value}", file=sys.stderr, flush=True)
        return 0
    return do
def generator(self, *values, **named):
    print("engine", file=sys.stderr, flush=True)
    make(self, *values, **named)
def limited(need, *, ranks_here):
    metal, mx.metal, mx.device_info = mx.metal, Metal, lambda: {"max_recommended_working_set_size": 1 << 36}
    mx.set_wired_limit, mx.set_cache_limit = tell("wired"), tell("cache")
    limit(need, ranks_here=ranks_here)
    mx.metal = metal
BatchGenerator.__init__, worker.limit_memory = generator, limited
worker.main()
"""


def test_a_worker_sets_its_limits_after_the_engine_which_lifts_them(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write_checkpoint(source, vocab_size=VOCAB_SIZE)
    write_tokenizer(source)
    shards = cut_case(source, tmp_path / "one", "hidden", (1,), 16)
    heard: list[str] = []
    spec = RankSpec(
        Host("mac1"), LocalRemote(), (sys.executable, "-c", WORKER), str(shards), ("127.0.0.1",), rank_env()
    )
    with Session([spec], on_log=lambda host, line: heard.append(line)):
        pass
    acts = [line for line in heard if line.split()[0] in ("engine", "wired", "cache")]
    assert [line.split()[0] for line in acts[:3]] == ["engine", "wired", "cache"]
    assert WIRED_EXTRA_BYTES <= int(acts[1].split()[1]) < 3 * WIRED_EXTRA_BYTES


def test_what_cannot_be_given_back_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(limit: int) -> int:
        raise RuntimeError("no such device")

    monkeypatch.setattr(mx, "set_wired_limit", fail)
    release()
