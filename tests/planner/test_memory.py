"""Memory: exact bytes against what ranks hold, published sizes and caches, and the verdicts of known cases."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, strategies as st

from moectl.model.catalog import MODELS
from moectl.model.placement import make_placement
from moectl.model.structure import Quantization
from moectl.planner.chips import default_working_set_bytes
from moectl.planner.memory import (
    COMFORTABLE,
    PREFILL_TOKENS,
    Memory,
    Need,
    Verdict,
    cache_bytes,
    judge,
    rank_need,
    weight_bytes,
)
from moectl.shards.look.outline import outline
from tests.support.families import config_of, look_at, run_split
from tests.support.structures import dbrx

GIB = 1 << 30


def mac(gib: int, in_use: int = 0) -> Memory:
    return Memory(gib * GIB, default_working_set_bytes(gib * GIB), in_use)


def verdict(memory: Memory, split: str, nodes: int, bits: int, context: int = 4096) -> Verdict:
    placement = make_placement(dbrx(bits), split, nodes)
    return max(judge(rank_need(placement, rank, context=context).total, memory.budget) for rank in range(nodes))


@pytest.mark.parametrize(
    ("family", "split", "shares", "quantised"),
    [
        ("dbrx", "experts", (1, 1), None),
        ("dbrx", "hidden", (3, 1), 64),
        ("mixtral", "tensor", (1, 1), None),
        ("gpt_oss", "hidden", (1, 1, 1), None),
        ("deepseek_v3", "tensor", (1, 1), None),
        ("qwen3_next", "experts", (1, 1), None),
        ("nemotron_h", "layers", (1, 1), None),
        ("llama", "layers", (1, 2), 64),
    ],
)
def test_weights_are_those_that_ranks_hold(family: str, split: str, shares: tuple[int, ...], quantised: Any) -> None:
    """The formula equals, to the byte, what ranks keep of a real model, but for a bias that one rank alone adds."""
    found = look_at(family, quantised=quantised)
    placement = make_placement(outline(*found, config_of(family)), split, len(shares), shares=shares)
    _, held, _ = run_split(family, found, split, shares, quantised=quantised)
    for rank, size in enumerate(held):
        assert weight_bytes(placement, rank, 4) == pytest.approx(size, rel=0.005 if family == "gpt_oss" else 0, abs=1)


def test_dbrx_is_as_large_as_its_index_says() -> None:
    assert rank_need(make_placement(dbrx(), "hidden", 1), 0, context=1).weights == 263_193_047_040


@pytest.mark.parametrize(
    ("model", "size_gb"),
    [
        ("mlx-community/dbrx-instruct-4bit", 74.0),
        ("mlx-community/DeepSeek-V3.1-4bit", 378),
        ("mlx-community/GLM-4.7-4bit", 198.6),
        ("mlx-community/MiniMax-M2-4bit", 128.7),
        ("mlx-community/gpt-oss-120b-MXFP4-Q8", 63.4),
        ("mlx-community/gpt-oss-20b-MXFP4-Q8", 12.1),
        ("mlx-community/Qwen3-235B-A22B-Instruct-2507-4bit", 132),
        ("mlx-community/Llama-3.3-70B-Instruct-4bit", 39.7),
    ],
)
def test_sizes_as_published(model: str, size_gb: float) -> None:
    structure = MODELS[model].structure
    assert weight_bytes(make_placement(structure, "hidden", 1), 0, 2) == pytest.approx(size_gb * 1e9, rel=0.005)


@pytest.mark.parametrize(
    ("model", "per_token"),
    [
        ("deepseek-ai/DeepSeek-V3.1", 61 * 576 * 2),  # MLA: 512 + 64 numbers per layer, 70.3 kB
        ("moonshotai/Kimi-K2-Instruct", 61 * 576 * 2),
        ("meta-llama/Llama-3.3-70B-Instruct", 80 * 2 * 8 * 128 * 2),
        ("openai/gpt-oss-120b", 18 * 2 * 8 * 64 * 2),  # every other layer keeps 128 tokens
        ("Qwen/Qwen3-Next-80B-A3B-Instruct", 12 * 2 * 2 * 256 * 2),  # one layer of four has keys and values
        ("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", 6 * 2 * 2 * 128 * 2),
        ("databricks/dbrx-instruct", 163_840),
    ],
)
def test_caches_per_token_of_published_models(model: str, per_token: int) -> None:
    placement = make_placement(MODELS[model].structure, "hidden", 1)
    short, long = (cache_bytes(placement, 0, context, 1, 2) for context in (8192, 16384))
    assert long - short == 8192 * per_token


def test_caches_that_do_not_grow() -> None:
    """Qwen3-Next: 36 layers with a state of 32 × 128 × 128 in float32, and a convolution's of 3 × 8192."""
    placement = make_placement(MODELS["Qwen/Qwen3-Next-80B-A3B-Instruct"].structure, "hidden", 1)
    fixed = 36 * (32 * 128 * 128 * 4 + 3 * 8192 * 2)
    assert cache_bytes(placement, 0, 256, 1, 2) - 256 * 12 * 2 * 2 * 256 * 2 == fixed
    rotating = make_placement(MODELS["openai/gpt-oss-20b"].structure, "hidden", 1)
    tokens = 128 + PREFILL_TOKENS - 1  # of the layers with a window, while a prompt is read
    assert cache_bytes(rotating, 0, 4096, 1, 2) == 12 * 2 * 8 * 64 * 2 * (4096 + tokens)


def test_caches_are_divided_with_their_heads() -> None:
    llama, deepseek = MODELS["meta-llama/Llama-3.3-70B-Instruct"], MODELS["deepseek-ai/DeepSeek-V3.1"]
    for model, part in ((llama, 0.5), (deepseek, 1.0)):  # what MLA keeps has no heads
        sizes = [cache_bytes(make_placement(model.structure, s, 2), 0, 4096, 1, 2) for s in ("hidden", "tensor")]
        assert sizes[1] == part * sizes[0]


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


# The blog: two 16 GB minis and a pipeline over both. Llama-3.2-3B ran on one and on two; 22 GB of Qwen-32B's weights
# crashed them: 11 GB on each, beside caches and about 1 GB more, where 11.45 GB can be used.


def worst(model: str, split: str, nodes: int, quantization: Quantization | None) -> Verdict:
    placement = make_placement(MODELS[model].quantised(quantization).structure, split, nodes)
    return max(judge(rank_need(placement, r, context=4096).total, mac(16).budget) for r in range(nodes))


def test_the_blogs_experiments() -> None:
    llama, qwen = "meta-llama/Llama-3.2-3B-Instruct", "Qwen/Qwen2.5-32B-Instruct"
    assert worst(llama, "layers", 1, Quantization(8, 64)) is Verdict.FITS  # one node is enough
    assert worst(llama, "layers", 2, None) is Verdict.FITS
    five_bits = Quantization(5, 64)
    assert weight_bytes(make_placement(MODELS[qwen].quantised(five_bits).structure, "layers", 1), 0, 2) > 22e9
    for split in ("layers", "hidden", "tensor"):
        assert worst(qwen, split, 2, five_bits) is Verdict.TOO_MUCH
    assert worst(qwen, "layers", 2, Quantization(4, 64)) is Verdict.BORDERLINE
    assert worst(qwen, "layers", 2, Quantization(3, 64)) is Verdict.FITS


def test_other_programs_make_what_fits_borderline() -> None:
    need = Need(7_500_000_000, 537_000_000, 100_000_000, 0, 600_000_000, 0).total
    assert judge(need, mac(16).budget) is Verdict.FITS
    assert judge(need, mac(16, in_use=4_000_000_000).budget) is Verdict.BORDERLINE


@given(st.integers(0, 1 << 40), st.integers(0, 1 << 40))
def test_judge_is_monotone(need: int, budget: int) -> None:
    assert judge(need, budget) <= judge(need + 1, budget)
    assert judge(need, budget) >= judge(need, budget + 1)
    assert (judge(need, budget) is Verdict.FITS) == (need <= COMFORTABLE * budget)


@given(st.integers(1, 1 << 40), st.integers(0, 1 << 40))
def test_a_budget_is_never_negative_and_use_only_lowers_it(total: int, in_use: int) -> None:
    assert 0 <= Memory(total, None, in_use).budget <= Memory(total).budget < total or total < 4
