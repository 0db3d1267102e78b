"""Every published layout, cut and loaded on ranks: the logits of mlx-lm's own loading. What is damaged is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.utils import load_model

from moectl.engine.network.load import load_rank
from moectl.errors import IntegrityError, PlanError
from moectl.model.manifest import Manifest, read_manifest
from moectl.shards.look.skeleton import find_classes
from tests.support.cutting import cut
from tests.support.families import is_equal, run_greedily, run_set
from tests.support.layouts import LAYOUTS, write_layout
from tests.support.tiny import write_checkpoint

NAMES = (*LAYOUTS, "dbrx")
FP8_BY_MOECTL = ("qwen3-moe-fp8",)  # mlx-lm does not read it


pytestmark = pytest.mark.usefixtures("uncompiled")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("load")


@cache
def source_of(name: str, base: Path) -> Path:
    directory = base / name
    if name == "dbrx":
        return write_checkpoint(directory, n_experts=4, top_k=2, ffn_hidden=128)
    return write_layout(directory, name)


@cache
def unsplit(name: str, base: Path) -> list[mx.array]:
    """The logits of a checkpoint as mlx-lm loads it, or of an uncut set where it does not."""
    if name in FP8_BY_MOECTL:
        cut(source_of(name, base), base / f"{name}-whole", nodes=1)
        return run_greedily(load_rank(base / f"{name}-whole", read_manifest(base / f"{name}-whole"), 0))
    model, _ = load_model(source_of(name, base), lazy=True, get_model_classes=find_classes)
    model.update(
        tree_map(lambda a: a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a, model.parameters())
    )
    return run_greedily(model)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        *((name, {"split": "hidden", "nodes": 2}) for name in NAMES),
        *((name, {"split": "experts", "shares": (3, 1)}) for name in ("mixtral", "gpt-oss-mxfp4", "dbrx")),
        *((name, {"split": "experts", "nodes": 3, "replicas": 2}) for name in ("mixtral", "gpt-oss-mxfp4", "dbrx")),
        *((name, {"split": "tensor", "nodes": 2}) for name in ("qwen3", "gpt-oss-mxfp4", "mlx-mla", "dbrx")),
        *((name, {"split": "layers", "nodes": 2}) for name in ("qwen3-next", "deepseek-v3-fp8", "mlx-mixed", "dbrx")),
        ("kimi-k25-int4", {"split": "hidden", "nodes": 1}),
    ],
)
def test_ranks_load_what_mlx_lm_loads(name: str, wanted: dict[str, Any], base: Path, tmp_path: Path) -> None:
    cut(source_of(name, base), tmp_path, **wanted)
    same, off = is_equal(run_set(tmp_path), unsplit(name, base), 1e-3)
    assert same, off


@pytest.mark.parametrize("split", ["hidden", "experts", "layers"])
def test_quantised_while_cutting(split: str, base: Path, tmp_path: Path) -> None:
    cut(source_of("dbrx", base), tmp_path / "whole", nodes=1, bits=4, group_size=64)
    cut(source_of("dbrx", base), tmp_path / split, split=split, nodes=2, bits=4, group_size=64)
    same, off = is_equal(run_set(tmp_path / split), run_set(tmp_path / "whole"))
    assert same, off


def test_floats_get_the_type_to_compute_in_but_where_the_model_wants_its_own(base: Path, tmp_path: Path) -> None:
    cut(source_of("deepseek-v3-fp8", base), tmp_path, split="hidden", nodes=2)
    model = load_rank(tmp_path, read_manifest(tmp_path), 0, dtype=mx.bfloat16)
    found = {name: array.dtype for name, array in tree_flatten(model.parameters())}
    kept = {name for name, dtype in found.items() if dtype == mx.float32 and not model.cast_predicate(name)}
    assert kept
    assert all(dtype in (mx.bfloat16, mx.uint32) for name, dtype in found.items() if name not in kept)


def test_a_bias_that_is_another_ranks_is_zero_in_the_type_to_compute_in(base: Path, tmp_path: Path) -> None:
    cut(source_of("gpt-oss-mxfp4", base), tmp_path, split="hidden", nodes=2)
    model = load_rank(tmp_path, read_manifest(tmp_path), 1, dtype=mx.bfloat16)
    bias = model.layers[0].mlp.experts.down_proj.bias
    assert bias.dtype == mx.bfloat16
    assert not bias.any().item()


@pytest.fixture
def finished(base: Path, tmp_path: Path) -> tuple[Path, Manifest]:
    return tmp_path, cut(source_of("mixtral", base), tmp_path, split="hidden", nodes=2)


def test_what_another_rank_needs_is_not_read(finished: tuple[Path, Manifest]) -> None:
    directory, manifest = finished
    for path in directory.glob("rank-1/*"):
        path.unlink()
    load_rank(directory, manifest, 0)
    with pytest.raises(IntegrityError, match="cannot be read"):
        load_rank(directory, manifest, 1)


def test_a_shortened_file_is_refused(finished: tuple[Path, Manifest]) -> None:
    directory, manifest = finished
    file = next(directory.glob("rank-0/*.safetensors"))
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(IntegrityError, match="bytes, expected"):
        load_rank(directory, manifest, 0)


def test_a_file_with_other_arrays_is_refused(finished: tuple[Path, Manifest]) -> None:
    directory, manifest = finished
    file = sorted(directory.glob("rank-0/*.safetensors"))[-1]
    mx.save_safetensors(str(file), {"other": mx.zeros((4,))})
    path = str(file.relative_to(directory))
    entry = replace(manifest.files[path], bytes=file.stat().st_size)
    with pytest.raises(IntegrityError, match="has no tensor"):
        load_rank(directory, replace(manifest, files={**manifest.files, path: entry}), 0)


def test_a_set_that_was_cut_in_another_place_is_refused(finished: tuple[Path, Manifest]) -> None:
    directory, manifest = finished
    with pytest.raises(IntegrityError, match="expected"):
        load_rank(directory, replace(manifest, shares=(3, 1)), 0)
    _swap(directory)
    with pytest.raises(IntegrityError, match="expected"):
        load_rank(directory, read_manifest(directory), 1)


def _swap(directory: Path) -> None:
    """Give each rank the other's regions in the manifest: equal shapes of other places."""
    file = directory / "moectl.json"
    raw = json.loads(file.read_text())
    for files in raw["tensors"].values():
        if {"rank-0", "rank-1"} <= {path.partition("/")[0] for path in files}:
            one, other = sorted(files)
            files[one], files[other] = files[other], files[one]
    file.write_text(json.dumps(raw))


def test_a_model_that_cannot_be_split_so_is_refused(finished: tuple[Path, Manifest]) -> None:
    directory, manifest = finished
    config = {**manifest.config, "model_type": "phi3small"}
    with pytest.raises(PlanError):
        load_rank(directory, replace(manifest, config=config), 0)


def test_loading_takes_no_more_than_a_layer_above_the_model(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", n_layers=6, d_model=256, ffn_hidden=512, n_experts=8, vocab_size=512)
    manifest = cut(source, tmp_path / "set", nodes=1)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = load_rank(tmp_path / "set", manifest, 0)
    held = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    layer = sum(array.nbytes for _, array in tree_flatten(model.layers[0].parameters()))
    assert mx.get_active_memory() - before < 1.05 * held
    assert mx.get_peak_memory() - before < held + 1.2 * layer
