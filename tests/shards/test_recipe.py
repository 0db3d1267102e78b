"""Each layout of a checkpoint, cut in each way: the files hold mlx-lm's own parameters, bit for bit."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from moectl.errors import PlanError
from moectl.model.manifest import Manifest
from moectl.model.regions import Region
from moectl.model.structure import Quantization
from moectl.shards.ways import SPLITS
from tests.support.cutting import cut
from tests.support.layouts import LAYOUTS, write_layout
from tests.support.traced import load_whole, open_traced


def compare(directory: Path, manifest: Manifest, whole: dict[str, mx.array]) -> None:
    """See that each file holds the regions that the manifest says, and that together they are all."""
    files = {name: mx.load(str(directory / name)) for name in manifest.files if name.endswith(".safetensors")}
    found = {(name, file) for file, arrays in files.items() for name in arrays}
    assert found == {(name, file) for name, places in manifest.tensors.items() for file in places}
    for name, places in manifest.tensors.items():
        covered = mx.zeros(whole[name].shape, dtype=mx.bool_)
        for file, regions in places.items():
            array = files[file][name]  # type: ignore[index]
            wanted = join(whole[name], regions)
            assert array.dtype == whole[name].dtype, name
            assert mx.array_equal(array.view(mx.uint8), wanted.view(mx.uint8)), f"{name} in {file}"
            for region in regions or (tuple((0, n) for n in array.shape),):
                covered[tuple(slice(*span) for span in region)] = True
        assert covered.all(), f"{name} is not whole"
    assert set(whole) == set(manifest.tensors)


def join(array: mx.array, regions: tuple[Region, ...]) -> mx.array:
    if not regions:
        return array
    axis = next((i for i in range(array.ndim) if any(region[i] != (0, array.shape[i]) for region in regions)), 0)
    return mx.concatenate([array[tuple(slice(*span) for span in region)] for region in regions], axis=axis)


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
    from moectl.shards.blueprint import draw
    from moectl.shards.checkpoint import open_checkpoint

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
