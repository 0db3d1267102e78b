"""Large sums: over MLX's ring of three and more ranks in pieces that go one way round, otherwise whole."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from moectl.engine.network import exchange
from moectl.engine.network.exchange import ONE_WAY_BYTES, sum_over_ranks
from tests.support.fake_group import run_ranks
from tests.support.ring import process_env

SIZE = 4_000_000  # bytes: three pieces on three ranks, a prompt's chunk of a wide model


def count_sums(ranks: int, size: int) -> list[int]:
    """Return how many sums of the backend each rank has taken for an array of this many bytes; checks the result."""

    def work(rank: int, group: Any) -> int:
        x = mx.arange(size // 4, dtype=mx.float32).reshape(1, 2, -1) * (rank + 1)
        found = sum_over_ranks(x, group)
        assert mx.array_equal(found, x / (rank + 1) * (ranks * (ranks + 1) // 2)).item()
        assert (found.shape, found.dtype) == (x.shape, x.dtype)
        return int(group.sums)

    return run_ranks(ranks, work)


@pytest.mark.parametrize(
    ("backend", "ranks", "size", "sums"),
    [
        ("ring", 3, 3000, 3),
        ("ring", 4, 3000, 2),
        ("ring", 3, 1192, 1),  # MLX sends it one way round
        ("ring", 2, 3000, 1),  # such rings are not said to hang
        ("jaccl", 3, 3000, 1),
    ],
)
def test_a_large_sum_goes_one_way_round(
    backend: str, ranks: int, size: int, sums: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "GATHER_BELOW_BYTES", 64)
    monkeypatch.setattr(exchange, "ONE_WAY_BYTES", 400)
    monkeypatch.setattr(exchange, "_backend", backend)
    assert count_sums(ranks, size) == [sums] * ranks


@pytest.mark.parametrize("count", [4, pytest.param(2000, marks=pytest.mark.long)])
def test_three_ranks_sum_large_arrays(count: int, tmp_path: Path) -> None:
    """Over a real ring; with --long about as often as in a prompt of 25 thousand tokens."""
    assert SIZE > 2 * 3 * ONE_WAY_BYTES
    with ExitStack() as held:
        listeners = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        ports = [listener.getsockname()[1] for listener in listeners]
    hostfile = tmp_path / "ring.json"
    hostfile.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
    command = [sys.executable, "-m", "tests.support.ring_sums", str(count), str(SIZE)]
    ranks = [
        subprocess.Popen(
            command, env=process_env(MLX_RANK=str(rank), MLX_HOSTFILE=str(hostfile)), stderr=subprocess.PIPE
        )
        for rank in range(3)
    ]
    try:
        for process in ranks:
            _, log = process.communicate(timeout=60 + count)
            assert process.returncode == 0, log.decode()
    finally:
        for process in ranks:
            process.kill()
