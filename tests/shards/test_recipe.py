"""Each layout of a checkpoint, cut in each way: the files hold mlx-lm's own parameters, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from moectl.errors import PlanError
from moectl.model.placement import SPLITS, make_placement
from moectl.model.structure import Quantization
from moectl.shards.blueprint import draw
from moectl.shards.recipe import Computed, plan_files
from moectl.shards.source.checkpoint import open_checkpoint
from moectl.shards.trace.traced import sources
from tests.support.cutting import compare, cut
from tests.support.layouts import LAYOUTS, write_layout
from tests.support.tiny import write_checkpoint
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
        return load_whole(source, cast=layout in ("mixtral", "qwen3-next", "qwen3", "qwen3-moe"))
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


@pytest.mark.parametrize("layout", [*LAYOUTS, "fused", "v2"])
def test_what_is_stored_as_it_is_wanted_is_not_computed(layout: str, tmp_path: Path) -> None:
    """Copies take the writer's byte path, and so does what is only turned or quantised."""
    if layout in LAYOUTS:
        source = write_layout(tmp_path / "source", layout)
    else:
        source = write_checkpoint(tmp_path / "source", layout=layout)
    with open_checkpoint(str(source)) as checkpoint:
        blueprint = draw(checkpoint)
        files = plan_files(blueprint, checkpoint.stored, make_placement(blueprint.structure, "hidden", 2))
        pieces = [piece for file in files for piece in file.pieces]
        computed = {s for p in pieces if isinstance(p.work, Computed) for s in sources([p.work.node])}
    by_layout = {
        "deepseek-v3-fp8": {"weight", "weight_scale_inv"},
        "qwen3-moe-fp8": {"weight", "weight_scale_inv"},
        "mlx-mla": set[str](),
        "kimi-k2-int4": {"weight_scale"},  # of which biases are made
        "kimi-k25-int4": {"weight_scale"},
        "qwen3-next": {"weight", "A_log"},
    }
    assert {name.rpartition(".")[2] for name in computed} == by_layout.get(layout, set())
    if layout in ("mixtral", "qwen3", "gpt-oss-mxfp4"):
        assert all(piece.is_copy for piece in pieces)
    if layout == "qwen3-next":
        assert all("norm" in name or "A_log" in name for name in computed)  # 1 is added, or float32 becomes bfloat16


_KIMI = """
import sys
from types import SimpleNamespace
from tests.benchmarks.bench_trace import MODELS, make_headers
from tests.support.memory import peak_bytes
from moectl.model.placement import make_placement
from moectl.model.structure import Quantization
from moectl.shards.blueprint import draw
from moectl.shards.recipe import plan_files
config = MODELS[sys.argv[1]]
stored = make_headers(config)
before = peak_bytes()
blueprint = draw(SimpleNamespace(config=config, stored=stored), Quantization(4, 64))
files = plan_files(blueprint, stored, make_placement(blueprint.structure, "hidden", 4))
print(len(stored), len(files), sum(file.bytes for file in files), peak_bytes() - before)
"""


@pytest.mark.parametrize(("model", "headers", "size"), [("kimi-k2", 139_583, 577e9), ("kimi-k2-int4", 208_215, 640e9)])
def test_the_largest_model_is_laid_out_in_little_memory(model: str, headers: int, size: float) -> None:
    """Kimi K2 by its headers, on four ranks in 4 bits. It takes about 6 s of CPU."""
    root = Path(__file__).parent.parent.parent
    done = subprocess.run([sys.executable, "-c", _KIMI, model], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names, files, total, memory = map(int, done.stdout.split())
    assert (names, files) == (headers, 2 + 61 * 5)
    assert total == pytest.approx(size, rel=0.01)  # 1026 G values; int4 has groups of 32
    assert 0 < memory < 256 << 20


@pytest.mark.parametrize("recipe", ["mixed_2_6", "mixed_3_4", "mixed_4_6"])
@pytest.mark.parametrize("layout", ["qwen3", "mixtral", "deepseek-v3-fp8"])
def test_mlx_lms_mixtures_of_precisions(layout: str, recipe: str, tmp_path: Path) -> None:
    source = write_layout(tmp_path / "source", layout, **({"num_hidden_layers": 9} if layout == "qwen3" else {}))
    # mlx_lm.convert takes the bits of the recipe; only the group size is the caller's
    whole = load_whole(source, Quantization(4, 64), recipe)
    manifest = cut(source, tmp_path / "set", split="hidden", nodes=2, recipe=recipe)
    compare(tmp_path / "set", manifest, whole)
    assert manifest.table is not None
    assert {entry["bits"] for entry in manifest.table.values() if isinstance(entry, dict)}
