"""Each layout of a checkpoint, cut in each way: the files hold mlx-lm's own parameters, bit for bit."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from moectl.errors import PlanError
from moectl.model.structure import Quantization
from moectl.shards.blueprint import draw
from moectl.shards.checkpoint import open_checkpoint
from moectl.shards.ways import SPLITS
from tests.support.cutting import compare, cut
from tests.support.layouts import LAYOUTS, write_layout
from tests.support.traced import load_whole, open_traced


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_split_of_each_layout(layout: str, tmp_path: Path) -> None:
    source = write_layout(tmp_path / "source", layout)
    whole = load(source, layout)
    splits = [split for split in SPLITS if can(source, split)]
    assert "hidden" in splits
    for split in splits:
        if split == "tensor" and layout in ("mlx-overrides", "mlx-mixed"):
            with pytest.raises(PlanError, match="heads cannot be divided by 2 nodes"):  # one group is two heads wide
                cut(source, tmp_path / split, split=split, nodes=2)
        else:
            compare(tmp_path / split, cut(source, tmp_path / split, split=split, nodes=2), whole)


def load(source: Path, layout: str) -> dict[str, mx.array]:
    """Return mlx-lm's parameters; FP8 that its own file cannot read, as `trace` computes it as a whole."""
    if layout != "qwen3-moe-fp8":
        return load_whole(source)
    traced = open_traced(source)
    return {name: traced.part(name) for name in traced.parameters}


def can(source: Path, split: str) -> bool:
    with open_checkpoint(str(source)) as checkpoint:
        return draw(checkpoint).found.ways[split] is None


@pytest.mark.parametrize("layout", ["mixtral", "deepseek-v3-fp8", "gpt-oss-mxfp4", "qwen3-next"])
@pytest.mark.parametrize(
    ("bits", "group", "mode"), [(4, 64, "affine"), (3, 32, "affine"), (8, 32, "mxfp8"), (4, 16, "nvfp4")]
)
def test_quantised_while_cutting(layout: str, bits: int, group: int, mode: str, tmp_path: Path) -> None:
    source = write_layout(tmp_path / "source", layout)
    whole = load_whole(source, Quantization(bits, group, mode))
    manifest = cut(source, tmp_path / "set", split="hidden", nodes=2, bits=bits, group_size=group, mode=mode)
    compare(tmp_path / "set", manifest, whole)


@pytest.mark.parametrize("shares", [(3, 1), (1, 1, 1), (100, 1)])
@pytest.mark.parametrize("split", ["hidden", "experts"])
def test_any_shares(split: str, shares: tuple[int, ...], tmp_path: Path) -> None:
    source = write_layout(tmp_path / "source", "deepseek-v3-fp8")
    compare(tmp_path / "set", cut(source, tmp_path / "set", split=split, shares=shares), load_whole(source))
