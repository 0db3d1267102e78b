"""Memory: exact bytes against the recipe that lays shards out, and the verdicts of known cases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, strategies as st

from moectl.model.geometry import DBRX, Geometry
from moectl.model.placement import make_placement
from moectl.model.structure import Quantization
from moectl.planner.chips import default_working_set_bytes
from moectl.planner.memory import COMFORTABLE, Memory, Need, Verdict, judge, rank_need
from moectl.shards.recipe import plan_files
from moectl.shards.tensors import SourceTensor

GIB = 1 << 30
Q4 = Quantization(4, 64)


@dataclass
class Headers:
    """A checkpoint that is nothing but shapes."""

    geometry: Geometry
    quantization: None = None

    @property
    def tensors(self) -> dict[str, SourceTensor]:
        return {
            name: SourceTensor(name, "model.safetensors", "BF16", shape, 0)
            for name, shape in self.geometry.checkpoint_shapes()
        }


SMALL = Geometry(3, 128, 4, 2, 384, 6, 2, 512, 1024, 1e4, None, 1.0)


def mac(gib: int, in_use: int = 0) -> Memory:
    return Memory(gib * GIB, default_working_set_bytes(gib * GIB), in_use)


def verdict(memory: Memory, split: str, nodes: int, bits: int, context: int = 4096) -> Verdict:
    quantization = None if bits == 16 else Quantization(bits, 64)
    placement = make_placement(DBRX, split, nodes, group_size=64)
    return max(
        judge(rank_need(placement, quantization, rank, context=context).total, memory.budget) for rank in range(nodes)
    )


@pytest.mark.parametrize("split", ["hidden", "experts", "tensor", "layers"])
@pytest.mark.parametrize("quantization", [None, Q4, Quantization(8, 32)])
@pytest.mark.parametrize("nodes", [1, 2, 3])
def test_weights_are_those_of_the_files(split: str, quantization: Quantization | None, nodes: int) -> None:
    """The formula equals, to the byte, what the recipe would write; followers leave the head in its file."""
    if split == "tensor" and nodes == 3:
        nodes = 2
    group = quantization.group_size if quantization else None
    placement = make_placement(SMALL, split, nodes, group_size=group)
    source: Any = Headers(SMALL)
    files = {f.path: f.bytes - len(f.header) for f in plan_files(source, placement, quantization)}
    for rank in range(nodes):
        held = sum(size for path, size in files.items() if path.startswith((f"rank-{rank}/", "common/")))
        if rank and split != "layers":
            held -= files["common/head.safetensors"] - SMALL.d_model * 2
        elif split == "layers" and rank < nodes - 1:
            held += SMALL.d_model * 2  # the last norm, which the formula counts on every rank
        assert rank_need(placement, quantization, rank, context=1).weights == held


def test_dbrx_is_as_large_as_its_index_says() -> None:
    assert rank_need(make_placement(DBRX, "hidden", 1), None, 0, context=1).weights == 263_193_047_040


@pytest.mark.parametrize(
    ("gib", "split", "nodes", "bits", "expected"),
    [
        (192, "experts", 1, 16, Verdict.TOO_MUCH),
        (192, "experts", 2, 16, Verdict.FITS),
        (96, "hidden", 1, 4, Verdict.BORDERLINE),
        (24, "hidden", 4, 4, Verdict.TOO_MUCH),
        (24, "tensor", 4, 4, Verdict.TOO_MUCH),
        (24, "layers", 4, 4, Verdict.TOO_MUCH),
        (32, "tensor", 4, 4, Verdict.FITS),
        (32, "layers", 4, 4, Verdict.FITS),
        (32, "hidden", 4, 4, Verdict.BORDERLINE),
        (32, "tensor", 2, 4, Verdict.TOO_MUCH),
    ],
)
def test_known_clusters(gib: int, split: str, nodes: int, bits: int, expected: Verdict) -> None:
    assert verdict(mac(gib), split, nodes, bits) is expected


def test_room_of_the_papers_cluster() -> None:
    """2 × 192 GB hold DBRX in bf16 with room for 10 to 17 thousand tokens."""
    fits = [ctx for ctx in range(1024, 32769, 256) if verdict(mac(192), "experts", 2, 16, ctx) is Verdict.FITS]
    assert 10_000 <= max(fits) <= 17_000


# The blog: two 16 GB minis, a pipeline over both; its third experiment, 22 GB of weights, crashed them.


def blog_need(weights_gb: float, nodes: int, context: int = 4096) -> int:
    """A dense 32 B model of 64 layers and 8 KV heads of 128 in a pipeline: half of it each."""
    kv = 64 * 2 * 8 * 128 * 2 * context
    return Need(int(weights_gb * 1e9) // nodes, kv // nodes, 100_000_000, 0, 600_000_000, 0).total


def test_the_blogs_experiments() -> None:
    assert judge(blog_need(22.0, 2), mac(16).budget) is Verdict.TOO_MUCH
    assert judge(blog_need(18.4, 2), mac(16).budget) is Verdict.BORDERLINE
    # One that fits, until other programs hold memory: then it is borderline, which is where swapping is warned of.
    assert judge(blog_need(15.0, 2), mac(16).budget) is Verdict.FITS
    assert judge(blog_need(15.0, 2), mac(16, in_use=4_000_000_000).budget) is Verdict.BORDERLINE
    assert judge(blog_need(5.0, 1), mac(16).budget) is Verdict.FITS  # one node is enough


@given(st.integers(0, 1 << 40), st.integers(0, 1 << 40))
def test_judge_is_monotone(need: int, budget: int) -> None:
    assert judge(need, budget) <= judge(need + 1, budget)
    assert judge(need, budget) >= judge(need, budget + 1)
    assert (judge(need, budget) is Verdict.FITS) == (need <= COMFORTABLE * budget)


@given(st.integers(1, 1 << 40), st.integers(0, 1 << 40))
def test_a_budget_is_never_negative_and_use_only_lowers_it(total: int, in_use: int) -> None:
    assert 0 <= Memory(total, None, in_use).budget <= Memory(total).budget < total or total < 4
