"""Each model file of mlx-lm, split in each way over ranks in this process: the same tokens and logits as unsplit.

A dozen that people run are in every run of the tests; `--long` tries all of them. What is refused has to be refused
for the reason that `tests/golden/ways.json` has: a new version of mlx-lm may change it, and that wants a look.
"""

from __future__ import annotations

import json
import pkgutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import mlx.core as mx
import mlx_lm.models
import pytest

from moectl.engine.network.exchange import observed, seam
from moectl.model.placement import SPLITS
from moectl.shards.look.skeleton import Skeleton
from moectl.shards.look.ways import Findings
from tests.support.families import STEPS, families, is_equal, look_at, make_whole, run_greedily, run_split

WAYS: dict[str, dict[str, str]] = json.loads((Path(__file__).parent.parent / "golden/ways.json").read_text("utf-8"))
DOZEN = (
    "dbrx",
    "mixtral",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_5_moe",
    "gpt_oss",
    "deepseek_v3",
    "kimi_k25",
    "glm4_moe",
    "minimax",
    "nemotron_h",
    "gemma4_text",
    "llama",
    "qwen3",
    "ministral3",
)
# Need Metal (bitnet, muse_spark) or a library (olmo), or end the process by themselves, unsplit (phi3small).
CANNOT_RUN = ("bitnet", "muse_spark", "olmo", "phi3small")
OTHERS = [family for family in families() if family not in (*DOZEN, *CANNOT_RUN)]


pytestmark = pytest.mark.usefixtures("uncompiled")


@cache
def seen(family: str, quantised: int | None = None) -> tuple[Skeleton, Findings]:
    return look_at(family, quantised=quantised)


@cache
def unsplit(family: str, quantised: int | None = None) -> list[mx.array]:
    return run_greedily(make_whole(family, quantised=quantised))


def check(family: str, split: str, shares: list[float], quantised: int | None = None) -> list[int]:
    """Compare a split model with the whole one; return the bytes that each rank holds."""
    logits, held, _ = run_split(family, seen(family, quantised), split, shares, quantised=quantised)
    same, off = is_equal(logits, unsplit(family, quantised))
    assert same, f"{off:.1e} off"
    return held


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("family", [*DOZEN, *(pytest.param(family, marks=pytest.mark.long) for family in OTHERS)])
def test_a_split_model_computes_the_same_or_is_refused(family: str, split: str) -> None:
    _, found = seen(family)
    assert found.ways[split] == WAYS[family].get(split)
    if found.ways[split] is None:
        held = check(family, split, [1, 1])
        assert len(held) == 2


@pytest.mark.parametrize(
    ("family", "split"),
    [("mixtral", "hidden"), ("gpt_oss", "tensor"), ("deepseek_v3", "experts"), ("qwen3_next", "layers")],
)
@pytest.mark.parametrize("shares", [[3, 1], [1, 1, 1]], ids=str)
def test_any_shares(family: str, split: str, shares: list[float]) -> None:
    check(family, split, shares)


def test_uneven_shares_hold_more_and_less() -> None:
    more, less = check("mixtral", "experts", [3, 1])
    assert more > 2 * less


@pytest.mark.parametrize(
    ("family", "split", "shares"),
    [
        ("gpt_oss", "experts", [100, 1]),  # no expert, and biases after the down projection
        ("qwen3_next", "hidden", [1, 100]),  # the first rank holds nothing
        ("nemotron_h", "hidden", [1, 1, 1, 1]),
    ],
)
def test_ranks_that_hold_nothing_of_a_unit(family: str, split: str, shares: list[float]) -> None:
    quantised = None if split == "experts" else 64
    check(family, split, shares, quantised)


@pytest.mark.parametrize("split", ["hidden", "tensor", "layers"])
@pytest.mark.parametrize(
    ("family", "group_size"),
    [("mixtral", 32), ("deepseek_v3", 32), ("llama", 64), *((f, 32) for f in ("gpt_oss", "qwen3_5_moe"))],
)
def test_quantised_models(family: str, group_size: int, split: str) -> None:
    check(family, split, [1, 1], group_size)


@pytest.mark.parametrize("split", ["hidden", "experts"])
@pytest.mark.parametrize("family", ["dbrx", "gpt_oss", "deepseek_v3", "nemotron_h"])
def test_ranks_group_their_pairs(family: str, split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moectl.engine.network.experts.GROUP_FROM_PAIRS", 1)
    check(family, split, [2, 1])


def test_more_ranks_than_kv_heads() -> None:
    check("ministral3", "tensor", [1, 1, 1, 1])


def test_a_state_space_layer_may_be_alone_on_a_rank() -> None:
    check("nemotron_h", "layers", [1, 1, 1, 1, 1, 1])  # some ranks have no cache at all


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("bitnet", "it cannot run on this machine: [metal_kernel] No Metal back-end."),
        ("muse_spark", "it cannot run on this machine: [metal_kernel] No Metal back-end."),
        ("phi3small", "mlx-lm's own model file ends the process on a CPU"),
    ],
)
@pytest.mark.skipif(mx.metal.is_available(), reason="a Mac can run them")
def test_what_cannot_run_here_is_refused_in_all_ways(family: str, reason: str) -> None:
    assert all(str(found).startswith(reason) for found in seen(family)[1].ways.values())


@pytest.mark.parametrize(
    "family", ["llama", "gpt_oss", "llama4", "mamba2", "qwen3_next", "deepseek_v32", "baichuan_m1"]
)
def test_every_kind_of_cache_passes_a_pipeline(family: str) -> None:
    check(family, "layers", [1, 1])  # keys and values, rotating, chunked, arrays, lists


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])  # a sum that is ours, and mlx-lm's own
def test_every_sum_is_observed(family: str) -> None:
    seen_sums = []

    def observe(x: mx.array, exchange: Callable[[mx.array], mx.array]) -> mx.array:
        seen_sums.append(x.nbytes)
        return exchange(x)

    with observed(observe):
        _, _, sums = run_split(family, seen(family), "hidden", [1, 1])
    heads = STEPS  # the test itself gathers the logits
    assert len(seen_sums) == 2 * (sums - heads) > 0


def test_large_sums_take_the_all_reduce(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moectl.engine.network.exchange.GATHER_BELOW_BYTES", 100)
    check("deepseek_v3", "hidden", [1, 1])


def test_the_seam_ends() -> None:
    before = mx.distributed.all_sum
    with seam():
        assert mx.distributed.all_sum is not before
    assert mx.distributed.all_sum is before


def test_every_model_file_has_a_small_configuration() -> None:
    parts = {"activations", "base", "bitlinear_layers", "cache", "gated_delta", "mla", "pipeline", "rope_utils", "ssm"}
    files = {module.name for module in pkgutil.iter_modules(mlx_lm.models.__path__)} - parts - {"switch_layers"}
    assert files - {family.partition(" ")[0] for family in families()} == set()
