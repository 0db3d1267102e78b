"""Ranks on a CPU that go a Mac's ways (`tests.support.metal`): the same tokens, no wait that its GPU would not bear.

On a Mac the GPU's watchdog ends a rank whose GPU waits more than about 5 s for others. Here the limit is lower.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moectl.engine.network.exchange import seam
from tests.engine.test_lockstep import PROMPTS, SHARES, TOKENS, cut_case, list_cases, make_cases, models, run_ranks
from tests.support.lockstep_rank import run_case
from tests.support.metal import Modes

__all__ = ["models"]
GPU, STREAMS = Modes(gpu=True), Modes(streams=True)
# In float32 also as on a GPU: bfloat16's ties fall the one way or the other.
EXACT = {"dtype": "float32"}
pytestmark = pytest.mark.usefixtures("uncompiled")  # MLX's compiler takes longer here than all else


def run_in(modes: Modes, size: int, cases: list[dict[str, Any]], directory: Path) -> list[list[dict[str, Any]]]:
    return run_ranks(size, [{**case, **EXACT} for case in cases], directory, MLX_DISABLE_COMPILE="1", **modes.env())


def name_of(modes: Modes) -> str:
    return "gpu" if modes.gpu else "streams"


@pytest.mark.parametrize("modes", [GPU, STREAMS], ids=name_of)
@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.long), pytest.param(4, marks=pytest.mark.long)])
def test_a_macs_ways_give_the_same_tokens(
    size: int, modes: Modes, models: dict[str, Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """One short case for each mode; with `--long` the matrix of test_lockstep, each case at one precision."""
    cases, tokens = list(list_cases(size, every=False)), TOKENS
    if not request.config.getoption("--long"):
        cases = [case for case in cases if case[:2] == ("random", "experts" if modes.gpu else "hidden")][:1]
        tokens = 8
    whole = {(model, bits): (model, "hidden", SHARES[model]["hidden"][1][0], bits) for model, _, _, bits in cases}
    with seam():
        jobs = make_cases([*whole.values()], models, tmp_path)
        alone = [run_case({**job, **EXACT, "max_tokens": tokens}, 0, None) for job in jobs]
    expected = dict(zip(whole, alone, strict=True))
    jobs = [{**job, "max_tokens": tokens} for job in make_cases(cases, models, tmp_path)]
    results = run_in(modes, size, jobs, tmp_path)
    for number, (model, split, shares, bits) in enumerate(cases):
        case, one = f"{model} {split} {shares} {bits} bits", expected[model, bits]
        leader = results[size - 1 if split == "layers" else 0][number]
        assert leader["tokens"] == one["tokens"], case
        np.testing.assert_allclose(leader["logits"], one["logits"], atol=1e-4, rtol=0, err_msg=case)


@pytest.mark.long
def test_ranks_in_a_macs_types_and_ways_agree_bit_by_bit(models: dict[str, Path], tmp_path: Path) -> None:
    shards = cut_case(models["random"], tmp_path / "set", "hidden", (2, 4), 4)
    case = {"shards": str(shards), "prompts": PROMPTS["random"], "max_tokens": 8, "raw": True, "keep_hidden": True}
    modes = Modes(gpu=True, streams=True)
    [first], [second] = run_ranks(2, [case], tmp_path, MLX_DISABLE_COMPILE="1", **modes.env())
    assert first["hidden"] == second["hidden"]
    mantissas = np.frombuffer(bytes.fromhex(first["hidden"]), np.uint32) & 0xFFFF
    assert not mantissas.any()  # it was bfloat16


# What one rank does late, in which split, and the protection without which the others' GPUs would wait for it.
LATE = [
    ("read", "1", "hidden", (2, 4), "meet"),  # the text of a long request is turned into tokens
    ("chunk", "0", "layers", (1, 3), "alone"),
]


@pytest.mark.long
@pytest.mark.parametrize(("place", "rank", "split", "shares", "protection"), LATE)
def test_no_gpu_waits_for_a_late_rank(
    place: str, rank: str, split: str, shares: tuple[int, ...], protection: str, models: dict[str, Path], tmp_path: Path
) -> None:
    case = {
        "shards": str(cut_case(models["deep"], tmp_path / "set", split, shares, 16)),
        "prompts": PROMPTS["deep"],
        "max_tokens": TOKENS,
        "raw": True,
    }
    trace = tmp_path / "trace"
    modes: dict[str, Any] = {"streams": True, "watch_s": 2.0, "delays": {place: {rank: 5.0}}, "trace": str(trace)}
    results = run_in(Modes(**modes), 2, [case], tmp_path)
    assert [len(tokens) for tokens in results[split == "layers"][0]["tokens"]] == [TOKENS] * len(PROMPTS["deep"])
    assert "timed out" not in trace.read_text()
    with pytest.raises(AssertionError, match="rank 0"):
        run_in(Modes(**modes, left_out=(protection,)), 2, [case], tmp_path)
    assert f"{1 - int(rank)} timed out" in trace.read_text()
