"""Shard sets against whole-tensor `mx.quantize`, and what interruptions, full disks and flipped bits do to them."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import safetensors
from hypothesis import HealthCheck, given, settings, strategies as st

from moectl.errors import CheckpointError, IntegrityError, MoectlError, PlanError, ShardsDiffer, StateError, UsageError
from moectl.hosts.onhost.files import RECORD
from moectl.model.geometry import expert_name, read_geometry
from moectl.model.manifest import Manifest, read_manifest
from moectl.model.ownership import Holding, share_out
from moectl.model.placement import Placement, make_placement
from moectl.model.regions import Division, Pieces, Role
from moectl.model.structure import Quantization, Structure
from moectl.shards import build, journal, quantize, recipe, writer
from moectl.shards.blueprint import Blueprint, draw, find_quantization
from moectl.shards.recipe import OutputFile
from moectl.shards.source.checkpoint import open_checkpoint
from moectl.shards.source.sources import Sources, peak_bytes
from moectl.shards.source.tensors import item_bytes
from moectl.shards.trace.formats import quantise
from moectl.shards.trace.traced import Stored, form_of, record, sources as find_sources
from tests.benchmarks.bench_trace import MODELS, headers
from tests.support import layouts, tiny
from tests.support.cutting import assert_same, compare, converting, cut as cut_as
from tests.support.traced import load_whole

SHAPE: dict[str, Any] = dict(n_layers=2, d_model=128, ffn_hidden=384, n_experts=4, vocab_size=96)
PLAIN = ("fused", "v2", "mlx")
Q4 = Quantization(4, 64)
QUANTIZATIONS = [
    None,
    *(Quantization(bits, 64) for bits in (2, 3, 4, 5, 6, 8)),
    Quantization(4, 32),
    Quantization(3, 32),
    Quantization(4, 128),
    Quantization(4, 32, "mxfp4"),
    Quantization(8, 32, "mxfp8"),
    Quantization(4, 16, "nvfp4"),
]


def _name(quantization: Quantization | None) -> str:
    return f"{quantization.mode}-{quantization.bits}-{quantization.group_size}" if quantization else "16"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint per layout, all with the same weights."""
    root = tmp_path_factory.mktemp("sources")
    return {layout: tiny.write_checkpoint(root / layout, layout=layout, **SHAPE) for layout in tiny.LAYOUTS}


@pytest.fixture(scope="module")
def weights() -> dict[str, mx.array]:
    return make_weights(SHAPE)


def make_weights(shape: dict[str, Any], **options: Any) -> dict[str, mx.array]:
    """Return the parameters that a tiny checkpoint has, whatever its layout."""
    geometry = read_geometry(tiny.make_config(**shape))
    return tiny.to_parameters(tiny.make_weights(geometry, **options), geometry)


def draw_at(checkpoint: Any, quantization: Quantization | None) -> Blueprint:
    kept = find_quantization(checkpoint.config)
    return draw(checkpoint, None if quantization == kept else quantization)


def place(structure: Structure, split: str = "hidden", shares: Sequence[float] = (1, 2)) -> Placement:
    return make_placement(structure, split, len(shares), shares=shares)


def plan(
    checkpoint: Any,
    quantization: Quantization | None = Q4,
    split: str = "hidden",
    shares: Sequence[float] = (1, 2),
) -> list[OutputFile]:
    blueprint = draw_at(checkpoint, quantization)
    return recipe.plan_files(blueprint, checkpoint.stored, place(blueprint.structure, split, shares))


def cut(
    checkpoint: Any,
    directory: Path,
    *,
    split: str = "hidden",
    shares: Sequence[float] = (1, 2),
    placement: Placement | None = None,
    quantization: Quantization | None = Q4,
    blueprint: Blueprint | None = None,
    **options: Any,
) -> Manifest:
    blueprint = blueprint or draw_at(checkpoint, quantization)
    placement = placement or place(blueprint.structure, split, shares)
    return build.cut(checkpoint, blueprint, placement, directory, **{"name": "tiny", **options})


def expected(
    weights: dict[str, mx.array], manifest: Manifest, quantization: Quantization | None
) -> dict[str, dict[str, mx.array]]:
    """Return file → parameters as whole-tensor operations make them: the layout of DBRX's files, told once more."""
    placement, geometry = manifest.placement, read_geometry(manifest.config)
    ranks, split = range(placement.world_size), placement.split

    def spread(name: str, take: Callable[[mx.array], mx.array] = lambda whole: whole) -> dict[str, mx.array]:
        value, q = weights[name], quantization
        if q is None or value.ndim == 1 or ".router." in name or value.shape[-1] % q.group_size:
            return {name: take(value)}
        made = mx.quantize(value, group_size=q.group_size, bits=q.bits, mode=q.mode)
        names = ("weight", "scales", "biases")
        return {name.removesuffix("weight") + n: take(array) for n, array in zip(names, made, strict=False)}

    def divide(name: str, rank: int) -> dict[str, mx.array]:
        """Return what a rank has of a parameter that a split divides."""
        if ".attn." in name:
            total, grain = geometry.n_heads, geometry.n_heads // geometry.kv_n_heads
            axis = 1 if ".out_proj." in name else 0
        elif split == "experts":
            if placement.held is not None:
                numbers = mx.array(placement.held[rank])
                return spread(name, lambda whole: whole[numbers])
            total, grain, axis = geometry.n_experts, 1, 0
        else:
            total, grain = geometry.ffn_hidden, quantization.group_size if quantization else 1
            axis = 2 if ".down_proj." in name else 1
        start, stop = share_out(total, grain, placement.shares)[rank]

        def take(whole: mx.array) -> mx.array:
            length = whole.shape[axis]
            return mx.split(whole, [start * length // total, stop * length // total], axis)[1]

        return spread(name, take)

    line = split == "layers" or placement.world_size == 1
    files = {f"{'rank-0' if line else 'common'}/embedding.safetensors": spread("transformer.wte.weight")}
    files[f"rank-{placement.head_rank}/head.safetensors"] = {
        **spread("transformer.norm_f.weight"),
        **spread("lm_head.weight"),
    }
    divided = {"tensor": (".experts.", ".attn."), "layers": ()}.get(split, (".experts.",))
    for i in range(geometry.n_layers):
        names = [name for name in weights if f".blocks.{i}." in name]
        own = [name for name in names if any(part in name for part in divided)] if not line else []
        shared = {n: array for name in names if name not in own for n, array in spread(name).items()}
        holders = [r for r in ranks if i in range(*placement.layers(r))]
        files[f"{f'rank-{holders[0]}' if line else 'common'}/layer-{i:03d}.safetensors"] = shared
        for rank in ranks if own else ():
            mine = {n: array for name in own for n, array in divide(name, rank).items()}
            files[f"rank-{rank}/layer-{i:03d}.safetensors"] = mine
    return {file: {n: array for n, array in held.items() if array.size} for file, held in files.items()}


def assert_equal(directory: Path, files: dict[str, dict[str, mx.array]]) -> None:
    """Assert that a directory holds exactly these tensors, bit for bit."""
    files = {file: held for file, held in files.items() if held}
    there = {p.relative_to(directory).as_posix() for p in directory.rglob("*.safetensors")}
    assert there == files.keys()
    for file, tensors in files.items():
        got = mx.load(str(directory / file))
        assert isinstance(got, dict)
        assert got.keys() == tensors.keys(), file
        for name, value in tensors.items():
            assert_same(got[name], value, f"{name} in {file}")


def tree(directory: Path) -> dict[str, bytes]:
    """Return every file, hidden ones too; but not the record of inodes and times, which no two directories share."""
    found = (p for p in directory.rglob("*") if p.is_file() and p.name != RECORD)
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in found}


# What comes out.


@pytest.mark.parametrize("quantization", QUANTIZATIONS, ids=_name)
@pytest.mark.parametrize("split", ["experts", "hidden"])
@pytest.mark.parametrize("layout", PLAIN)
def test_output_equals_whole_tensor_quantisation(
    sources: dict[str, Path],
    weights: dict[str, mx.array],
    tmp_path: Path,
    layout: str,
    split: str,
    quantization: Quantization | None,
) -> None:
    checkpoint = open_checkpoint(str(sources[layout]))
    told: list[int] = []
    manifest = cut(
        checkpoint,
        tmp_path / "a" / "b",
        split=split,
        quantization=quantization,
        jobs=2,
        on_bytes=told.append,
    )
    files = expected(weights, manifest, quantization)
    assert_equal(tmp_path / "a" / "b", files)
    planned = plan(checkpoint, quantization, split)
    assert {f.path: f.bytes for f in planned}.items() <= {p: e.bytes for p, e in manifest.files.items()}.items()
    assert sum(told) == build.output_bytes(planned)
    assert build.verify(tmp_path / "a" / "b") == manifest == read_manifest(tmp_path / "a" / "b")
    places = {(name, file) for name, held in manifest.tensors.items() for file in held}
    assert places == {(name, file) for file, held in files.items() for name in held}
    by_one = expected(weights, alone(manifest), quantization)
    whole = {name: array for held in by_one.values() for name, array in held.items()}
    compare(tmp_path / "a" / "b", manifest, whole)  # with the regions that the manifest names
    assert not [p for p in tree(tmp_path / "a" / "b") if "/." in p or p.startswith(".")]


def alone(manifest: Manifest) -> Manifest:
    """Return the manifest of the same set for one host."""
    return replace(manifest, split="hidden", shares=(1,))


@pytest.mark.parametrize("layout", [*PLAIN, "mlx-quantized"])
@pytest.mark.parametrize(("split", "shares"), [("tensor", (1, 2, 1, 2)), ("tensor", (3, 3)), ("layers", (1, 2))])
def test_heads_and_layers_equal_whole_tensor_quantisation(
    tmp_path: Path, layout: str, split: str, shares: tuple[int, ...]
) -> None:
    shape: dict[str, Any] = {"n_layers": 3, "d_model": 256, "n_heads": 8, "kv_n_heads": 4, "n_experts": 3, "top_k": 2}
    checkpoint = open_checkpoint(str(tiny.write_checkpoint(tmp_path / "source", layout=layout, **shape)))
    for quantization in (Q4,) if layout == "mlx-quantized" else (None, Q4):
        out = tmp_path / _name(quantization)
        manifest = cut(checkpoint, out, split=split, shares=shares, quantization=quantization)
        assert_equal(out, expected(make_weights(shape), manifest, quantization))
        assert manifest.placement == place(manifest.structure, split, shares)
        if split == "layers":
            assert not [f for f in manifest.files_of(0) if f.startswith(("common/", "rank-1/"))]


@pytest.mark.parametrize("split", ["experts", "hidden"])
@pytest.mark.parametrize("quantization", QUANTIZATIONS[1:], ids=_name)
def test_quantised_source_is_kept(
    tmp_path: Path, weights: dict[str, mx.array], split: str, quantization: Quantization
) -> None:
    source = tiny.write_checkpoint(
        tmp_path / "source",
        layout="mlx-quantized",
        q_bits=quantization.bits,
        q_group_size=quantization.group_size,
        q_mode=quantization.mode,
        **SHAPE,
    )
    checkpoint = open_checkpoint(str(source))
    assert find_quantization(checkpoint.config) == quantization
    manifest = cut(checkpoint, tmp_path / "out", split=split, shares=(2, 1), quantization=quantization)
    assert_equal(tmp_path / "out", expected(weights, manifest, quantization))


@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_copies_of_experts_are_in_every_owners_shard(
    sources: dict[str, Path], weights: dict[str, mx.array], tmp_path: Path, layout: str
) -> None:
    checkpoint = open_checkpoint(str(sources[layout]))
    structure = draw_at(checkpoint, Q4).structure
    placement = make_placement(structure, "experts", 3, replicas=2, shares=(2, 3, 1), frequencies=[1, 2, 4, 3])
    assert placement.held == ((0, 2, 3), (0, 1, 2, 3), (1,))
    manifest = cut(checkpoint, tmp_path / "out", placement=placement)
    assert_equal(tmp_path / "out", expected(weights, manifest, Q4))
    assert manifest.placement == placement
    assert cut(checkpoint, tmp_path / "out", placement=placement) == manifest
    other = make_placement(structure, "experts", 3, replicas=2, shares=(2, 3, 1))
    with pytest.raises(ShardsDiffer):
        cut(checkpoint, tmp_path / "out", placement=other)


def test_quantised_router_and_other_bits_for_single_tensors_are_kept(
    tmp_path: Path, sources: dict[str, Path], weights: dict[str, mx.array]
) -> None:
    source = tmp_path / "source"
    shutil.copytree(sources["mlx-quantized"], source)
    config = json.loads((source / "config.json").read_text())
    geometry = read_geometry(config)
    canonical = tiny.make_weights(geometry)
    stored = tiny.to_layout(canonical, geometry, "mlx-quantized", quantize_router=True)
    attention = "transformer.blocks.1.norm_attn_norm.attn"
    special = ["lm_head.weight", f"{attention}.Wqkv.weight", *[expert_name(0, e, "w2") for e in range(4)]]
    for name in special:
        made = mx.quantize(canonical[name], group_size=32, bits=8)
        for part, value in zip(("weight", "scales", "biases"), made, strict=True):
            stored[name.removesuffix("weight") + part] = value
        config["quantization"][name.removesuffix(".weight")] = {"bits": 8, "group_size": 32}
    (source / "config.json").write_text(json.dumps(config))
    tiny.write_weights(source, stored, files=2)

    manifest = cut(open_checkpoint(str(source)), tmp_path / "out", shares=(1, 4, 1))
    down = "transformer.blocks.0.ffn.experts.down_proj"
    eight = ["lm_head", *[f"{attention}.{name}_proj" for name in "qkv"], down]
    whole: dict[str, mx.array] = {}
    for name, value in weights.items():
        base = name.removesuffix(".weight")
        if value.ndim == 1:
            whole[name] = value
            continue
        group, bits = (32, 8) if base in eight else (64, 4)
        made = mx.quantize(value, group_size=group, bits=bits)
        whole |= {f"{base}.{part}": array for part, array in zip(("weight", "scales", "biases"), made, strict=True)}
    compare(tmp_path / "out", manifest, whole)
    assert "transformer.blocks.1.ffn.router.layer.scales" in manifest.tensors
    regions = {n: manifest.tensors[f"{down}.{n}"]["rank-1/layer-000.safetensors"] for n in ("weight", "scales")}
    assert regions == {"weight": (((0, 4), (0, 128), (16, 80)),), "scales": (((0, 4), (0, 128), (2, 10)),)}


@pytest.mark.parametrize("layout", ["fused", "mlx"])
def test_floats_get_the_type_of_config_json(tmp_path: Path, layout: str) -> None:
    """As `mlx_lm.convert` makes them, before they are quantised or instead."""
    source = tiny.write_checkpoint(tmp_path / "source", layout=layout, dtype="float32", **SHAPE)
    weights = make_weights(SHAPE, dtype="float32")
    for name, dtype in (("float32", mx.float32), ("bfloat16", mx.bfloat16), ("float16", mx.float16)):
        config = tiny.make_config(dtype=name, **SHAPE)
        (source / "config.json").write_text(json.dumps(config))
        cast = {n: w.astype(dtype) for n, w in weights.items()}
        for quantization in (None, Q4):
            directory = tmp_path / f"{name}-{_name(quantization)}"
            manifest = cut(open_checkpoint(str(source)), directory, quantization=quantization)
            assert_equal(directory, expected(cast, manifest, quantization))


def test_float16_source(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(tiny.write_checkpoint(tmp_path / "source", dtype="float16", **SHAPE)))
    weights = make_weights(SHAPE, dtype="float16")
    for quantization in (None, Q4):
        directory = tmp_path / _name(quantization)
        manifest = cut(checkpoint, directory, quantization=quantization)
        assert_equal(directory, expected(weights, manifest, quantization))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shares_and_block_sizes_give_the_same_bits(
    sources: dict[str, Path], weights: dict[str, mx.array], data: st.DataObject
) -> None:
    layout = data.draw(st.sampled_from(PLAIN))
    split = data.draw(st.sampled_from(["experts", "hidden"]))
    quantization = data.draw(st.sampled_from(QUANTIZATIONS))
    checkpoint = open_checkpoint(str(sources[layout]))
    shares = data.draw(st.lists(st.integers(1, 9) | st.floats(0.1, 9), min_size=1, max_size=4))
    size = st.integers(3_000, 200_000)  # an expert's matrix has 98 304 bytes
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as directory:
        patch.setattr(quantize, "_BLOCK_BYTES", data.draw(size, "block"))
        patch.setattr(writer, "_MEMORY_BYTES", data.draw(size, "memory"))
        patch.setattr(writer, "_COPY_BYTES", data.draw(size, "copy"))
        patch.setattr(recipe, "_PIECE_BYTES", data.draw(size, "piece"))
        patch.setattr(writer, "_FLUSH_BYTES", 50_000)
        jobs = data.draw(st.integers(1, 3), "jobs")
        try:
            made = cut(checkpoint, Path(directory), split=split, shares=shares, quantization=quantization, jobs=jobs)
        except PlanError as error:  # fewer groups of weights than ranks
            if "nodes are too many" not in error.message:
                raise
            return
        assert_equal(Path(directory), expected(weights, made, quantization))


@pytest.mark.parametrize("quantization", [Q4, Quantization(4, 32, "mxfp4"), None], ids=_name)
def test_files_are_as_the_safetensors_library_writes_them(tmp_path: Path, quantization: Quantization | None) -> None:
    checkpoint = open_checkpoint(str(tiny.write_checkpoint(tmp_path / "source", dtype="float32", **SHAPE)))
    cut(checkpoint, tmp_path / "out", quantization=quantization)
    dtypes = {"BF16": "bfloat16", "U32": "uint32", "F32": "float32", "U8": "uint8"}
    for path in sorted((tmp_path / "out").rglob("*.safetensors")):
        data = path.read_bytes()
        kept, tensors = [], {}
        for name, info in safetensors.deserialize(data):  # type: ignore[no-untyped-call]
            values = np.frombuffer(info["data"], np.uint8)
            kept.append(values)
            tensors[name] = safetensors.TensorSpec(
                dtype=dtypes[info["dtype"]],
                shape=info["shape"],
                data_ptr=values.ctypes.data,
                data_len=values.nbytes,
            )
        assert safetensors.serialize(tensors, metadata={"format": "mlx"}) == data, path


@pytest.fixture
def read_bytes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each read of a source file, from now on."""
    counts: list[int] = []
    preadv = os.preadv

    def count(*args: Any) -> int:
        counts.append(preadv(*args))
        return counts[-1]

    monkeypatch.setattr(os, "preadv", count)
    return counts


def test_each_source_byte_is_read_once(sources: dict[str, Path], tmp_path: Path, read_bytes: list[int]) -> None:
    for layout in PLAIN:
        for split in ("experts", "hidden"):
            read_bytes.clear()
            checkpoint = open_checkpoint(str(sources[layout]))
            cut(checkpoint, tmp_path / layout / split, split=split, jobs=2)
            stored = checkpoint.stored.values()
            assert sum(read_bytes) == sum(math.prod(t.shape) * item_bytes(t.dtype) for t in stored)


@pytest.mark.parametrize("layout", ["deepseek-v3-fp8", "kimi-k2-int4", "gpt-oss-mxfp4", "qwen3-next"])
def test_what_is_computed_reads_each_source_byte_once_but_for_scales(
    layout: str, tmp_path: Path, read_bytes: list[int]
) -> None:
    """Scales of blocks that are cut, and scales of which biases are made too, are read again; nothing else is."""
    checkpoint = open_checkpoint(str(layouts.write_layout(tmp_path / "source", layout)))
    blueprint = draw(checkpoint)
    stored = [checkpoint.stored[name] for name in find_sources(blueprint.parameters.values())]
    needed = sum(math.prod(t.shape) * item_bytes(t.dtype) for t in stored)
    for split in ("experts", "hidden"):
        read_bytes.clear()
        build.cut(checkpoint, blueprint, place(blueprint.structure, split), tmp_path / split, name=split, jobs=2)
        assert needed <= sum(read_bytes) < needed * 1.01


def test_streams_are_used_again(sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU stream holds an OS thread for ever: a process that cuts often must not gather them."""
    made: list[mx.Device | mx.DeviceType] = []
    new = mx.new_thread_unsafe_stream

    def count(device: mx.Device | mx.DeviceType) -> mx.Stream:
        made.append(device)
        return new(device)

    monkeypatch.setattr(quantize, "_IDLE", [])
    monkeypatch.setattr(mx, "new_thread_unsafe_stream", count)
    checkpoint = open_checkpoint(str(sources["fused"]))
    for _ in range(4):
        cut(checkpoint, tmp_path / "out", jobs=2, force=True)
    assert 1 <= len(made) <= 2


# What cannot be asked for.


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        (Quantization(7, 64), "cannot have 7 bits; it can have 2, 3, 4, 5, 6, 8"),
        (Quantization(4, 48), "groups of 48; it can have 32, 64, 128"),
        (Quantization(4, 64, "mxfp4"), "groups of 64"),
        (Quantization(4, 64, "fp5"), "affine, mxfp4, mxfp8, nvfp4"),
    ],
)
def test_impossible_quantisation(
    sources: dict[str, Path], tmp_path: Path, quantization: Quantization, words: str
) -> None:
    wanted: dict[str, Any] = asdict(quantization)
    with pytest.raises(PlanError, match=words):
        cut_as(sources["fused"], tmp_path / "out", nodes=2, **wanted)
    assert not (tmp_path / "out").exists()


def test_matrices_without_whole_groups_stay_floats(tmp_path: Path) -> None:
    """As `mlx_lm.convert` leaves them; before, such a precision was refused."""
    shape: dict[str, Any] = {**SHAPE, "d_model": 96}
    checkpoint = open_checkpoint(str(tiny.write_checkpoint(tmp_path / "source", **shape)))
    manifest = cut(checkpoint, tmp_path / "out")
    assert_equal(tmp_path / "out", expected(make_weights(shape), manifest, Q4))
    attention, experts = "transformer.blocks.0.norm_attn_norm.attn", "transformer.blocks.0.ffn.experts"
    assert f"{attention}.q_proj.scales" not in manifest.tensors
    assert f"{experts}.down_proj.scales" in manifest.tensors


@pytest.mark.parametrize(
    ("layout", "quantization", "first"), [("fused", Quantization(4, 128), 0), ("mlx-quantized", Q4, 64)]
)
def test_shares_are_rounded_to_whole_groups(
    sources: dict[str, Path],
    weights: dict[str, mx.array],
    tmp_path: Path,
    layout: str,
    quantization: Quantization,
    first: int,
) -> None:
    """A rank may get nothing of the experts; it has its part of the work on what all ranks have."""
    manifest = cut(open_checkpoint(str(sources[layout])), tmp_path / "out", shares=(1, 11), quantization=quantization)
    assert_equal(tmp_path / "out", expected(weights, manifest, quantization))
    held = mx.load(str(tmp_path / "out/rank-1/layer-000.safetensors"))
    assert isinstance(held, dict)
    assert held["transformer.blocks.0.ffn.experts.up_proj.scales"].shape[1] == 384 - first
    assert (tmp_path / "out/rank-0/layer-000.safetensors").exists() == (first > 0)


def test_a_cut_through_a_group_is_refused_and_the_hint_mends_it() -> None:
    node = Stored("w", form_of((128, 384), mx.bfloat16))
    pieces = Pieces(Role.HIDDEN, 384)

    def hold(stop: int, bits: int, group_size: int) -> object:
        scales = record(quantise, node, group_size, bits, "affine")[1]
        holding = Holding(Division(-1, pieces), ((0, stop),), adds=True)
        return recipe._hold(scales, "scales", holding, "down_proj.scales")[0].shape

    with pytest.raises(PlanError, match=r"cuts through a group of down_proj\.scales: .* \(0, 96\) of 384") as caught:
        hold(96, 4, 64)
    assert caught.value.hint == "choose other shares, a smaller --q-group-size, or another --split"
    assert hold(128, 4, 64) == (128, 2)  # other shares
    assert hold(96, 4, 32) == (128, 3)  # smaller groups


@pytest.mark.parametrize(
    "wanted", [{"bits": 16}, {"bits": 8, "group_size": 64}, {"bits": 4, "group_size": 32}], ids=str
)
def test_quantised_source_cannot_be_requantised(
    sources: dict[str, Path], tmp_path: Path, wanted: dict[str, Any]
) -> None:
    with pytest.raises(PlanError, match=r"is quantised .4-bit affine, groups of 64. and cannot become"):
        cut_as(sources["mlx-quantized"], tmp_path / "out", nodes=2, **wanted)
    assert not (tmp_path / "out").exists()


def test_jobs_are_bounded(sources: dict[str, Path], tmp_path: Path) -> None:
    for jobs in (0, build.MAX_JOBS + 1):
        with pytest.raises(UsageError, match=f"{jobs} jobs"):
            cut(open_checkpoint(str(sources["fused"])), tmp_path / "out", jobs=jobs)


# Running again.


def test_finished_set_is_left_alone(sources: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(sources["fused"]))
    first = cut(checkpoint, tmp_path / "out")
    before = _stamps(tmp_path / "out")
    told: list[int] = []
    assert cut(checkpoint, tmp_path / "out", on_bytes=told.append) == first
    assert _stamps(tmp_path / "out") == before
    assert sum(told) == build.output_bytes(plan(checkpoint))
    assert cut(checkpoint, tmp_path / "out", name="other") == replace(first, name="other")
    assert read_manifest(tmp_path / "out").name == "other"


def _stamps(directory: Path) -> dict[str, tuple[int, int]]:
    return {
        p.relative_to(directory).as_posix(): (p.stat().st_ino, p.stat().st_mtime_ns)
        for p in directory.rglob("*")
        if p.is_file()
    }


def test_lost_and_cut_files_are_made_again_and_no_others(sources: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(sources["fused"]))
    cut(checkpoint, tmp_path / "out")
    whole, before = tree(tmp_path / "out"), _stamps(tmp_path / "out")
    (tmp_path / "out/rank-1/layer-000.safetensors").unlink()
    os.truncate(tmp_path / "out/rank-0/head.safetensors", 100)
    (tmp_path / "out/LICENSE").unlink()
    there: list[bool] = []
    # While files are remade nothing may take the directory for a whole set.
    with converting(before=lambda: there.append((tmp_path / "out/moectl.json").exists())):
        cut(checkpoint, tmp_path / "out")
    assert set(there) == {False}
    assert tree(tmp_path / "out") == whole
    after = _stamps(tmp_path / "out")
    changed = {f for f in before if f.endswith(".safetensors") and after[f] != before[f]}
    assert changed == {"rank-1/layer-000.safetensors", "rank-0/head.safetensors"}


def test_other_settings_are_refused_until_forced(sources: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(sources["fused"]))
    cut(checkpoint, tmp_path / "out", shares=(1, 1, 1))
    whole = tree(tmp_path / "out")
    other = Quantization(8, 64)
    with pytest.raises(UsageError, match="already holds another shard set: fused, 4-bit affine") as caught:
        cut(checkpoint, tmp_path / "out", quantization=other)
    assert "--force" in str(caught.value.hint)
    assert tree(tmp_path / "out") == whole
    cut(checkpoint, tmp_path / "out", quantization=other, force=True)
    cut(checkpoint, tmp_path / "fresh", quantization=other)
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


def test_changed_source_is_refused_until_forced(tmp_path: Path, sources: dict[str, Path]) -> None:
    source = tmp_path / "source"
    shutil.copytree(sources["fused"], source)
    cut(open_checkpoint(str(source)), tmp_path / "out")
    tiny.write_checkpoint(source, seed=1, **SHAPE)
    checkpoint = open_checkpoint(str(source))
    with pytest.raises(UsageError, match="source has changed since") as caught:
        cut(checkpoint, tmp_path / "out")
    assert caught.value.hint == "make it again with --force, or choose another directory with -o"
    cut(checkpoint, tmp_path / "other")
    cut(checkpoint, tmp_path / "out", force=True)
    assert_equal(tmp_path / "out", expected(make_weights(SHAPE, seed=1), read_manifest(tmp_path / "out"), Q4))


def _damage_end(path: Path) -> None:
    path.write_text(path.read_text()[:-20])


def _damage_start(path: Path) -> None:
    path.write_text("{" + path.read_text()[400:])


def _damage_schema(path: Path) -> None:
    path.write_text(path.read_text().replace("moectl.shards/2", "moectl.shards/1"))


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    ("damage", "kept"),
    [(_damage_end, True), (_damage_start, True), (_damage_schema, True), (lambda p: p.write_bytes(b"\xff"), False)],
    ids=["cut", "torn", "old", "garbage"],
)
def test_a_damaged_manifest_is_mended(
    sources: dict[str, Path], tmp_path: Path, damage: Callable[[Path], object], kept: bool, force: bool
) -> None:
    """Weights are kept, and hashed, where it still says what they were made of."""
    checkpoint = open_checkpoint(str(sources["fused"]))
    out = tmp_path / "out"
    cut(checkpoint, out)
    whole, before = tree(out), _stamps(out)
    damage(out / "moectl.json")
    cut(checkpoint, out, force=force)
    assert tree(out) == whole
    after = _stamps(out)
    weights = {f for f in before if f.endswith(".safetensors")}
    assert all((after[f] == before[f]) == (kept and not force) for f in weights)


def test_weights_under_a_manifest_that_says_nothing_are_not_trusted(sources: dict[str, Path], tmp_path: Path) -> None:
    other = tiny.write_checkpoint(tmp_path / "other", seed=5, **SHAPE)
    cut(open_checkpoint(str(other)), tmp_path / "out")
    _damage_end(tmp_path / "out/moectl.json")
    checkpoint = open_checkpoint(str(sources["fused"]))
    cut(checkpoint, tmp_path / "out")
    cut(checkpoint, tmp_path / "fresh")
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


def test_changed_small_files_are_copied_again_and_weights_are_not(sources: dict[str, Path], tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(sources["fused"], source)
    (source / "merges.txt").write_text("a b\n")
    cut(open_checkpoint(str(source)), out)
    before = _stamps(out)
    same_size = (source / "tokenizer_config.json").read_text().replace("Fast", "Slow")
    (source / "tokenizer_config.json").write_text(same_size)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "merges.txt").unlink()
    config = json.loads((source / "config.json").read_text())
    config["attn_config"]["rope_theta"] = 10_000.0
    (source / "config.json").write_text(json.dumps(config))
    made = cut(open_checkpoint(str(source)), out)
    assert made.config["attn_config"]["rope_theta"] == 10_000.0
    assert (out / "tokenizer_config.json").read_text() == same_size
    assert (out / "chat_template.jinja").exists()
    assert not (out / "merges.txt").exists()
    assert build.verify(out) == made
    after = _stamps(out)
    assert {f: s for f, s in after.items() if f.endswith(".safetensors")} == {
        f: s for f, s in before.items() if f.endswith(".safetensors")
    }
    assert cut(open_checkpoint(str(source)), out) == made
    assert _stamps(out) == after


@pytest.mark.parametrize(
    "header",
    [
        {"files": {"../precious.safetensors": 1}},
        {"files": {"rank-0/../../precious.safetensors": 1}},
        {"files": {"precious": 1}},
        {"files": 7},
        {"files": [["../precious.safetensors"]]},
        {"files": None},
    ],
    ids=str,
)
def test_a_crafted_journal_deletes_nothing_of_others(
    sources: dict[str, Path], tmp_path: Path, header: dict[str, Any]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    precious = [tmp_path / "precious.safetensors", tmp_path / "precious", out / "precious"]
    for path in precious:
        path.write_text("mine")
    (out / "rank-0").mkdir()
    (out / journal.NAME).write_text(json.dumps(header) + "\n")
    with pytest.raises(UsageError, match="other settings"):
        cut(open_checkpoint(str(sources["fused"])), out)
    cut(open_checkpoint(str(sources["fused"])), out, force=True)
    assert all(path.read_text() == "mine" for path in precious)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(tiny.json_values | st.fixed_dictionaries({"file": tiny.json_values, "bytes": tiny.json_values})))
def test_a_nonsense_journal_never_surprises(tmp_path: Path, lines: list[Any]) -> None:
    (tmp_path / journal.NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
    held = journal.read_journal(tmp_path)
    assert held is not None
    assert all(isinstance(f, str) and isinstance(e.bytes, int) for f, e in held[1].items())


def test_somebodys_directory_is_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "out" / "rank-0").mkdir(parents=True)
    (tmp_path / "out" / "rank-0" / "head.safetensors").write_text("mine")
    for force in (False, True):
        with pytest.raises(UsageError, match="not empty and is not a shard set"):
            cut(open_checkpoint(str(sources["fused"])), tmp_path / "out", force=force)
    assert tree(tmp_path / "out") == {"rank-0/head.safetensors": b"mine"}


def test_two_at_once_are_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with journal.lock_directory(tmp_path / "out"), pytest.raises(StateError, match="another moectl shard"):
        cut(open_checkpoint(str(sources["fused"])), tmp_path / "out")
    cut(open_checkpoint(str(sources["fused"])), tmp_path / "out")


def test_who_may_wait_finds_what_another_one_makes(sources: dict[str, Path], tmp_path: Path) -> None:
    checkpoint, out = open_checkpoint(str(sources["fused"])), tmp_path / "out"
    made, found = cut(checkpoint, out), []
    held = journal.lock_directory(out)
    held.__enter__()
    asking = threading.Thread(target=lambda: found.append(cut(checkpoint, out, wait_s=20)))
    asking.start()
    asking.join(0.3)
    assert found == []
    held.__exit__(None, None, None)
    asking.join()
    assert found == [made]
    with journal.lock_directory(out), pytest.raises(StateError, match="another moectl shard"):
        cut(checkpoint, out, wait_s=0.2)


# Interruptions.

_SCRIPT = """
import os, signal, sys
from pathlib import Path
countdown = sys.maxsize
def fatal(call):
    def wrapped(*args, **kwargs):
        global countdown
        countdown -= 1
        if countdown == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)
    return wrapped
for name in ("pwrite", "fsync", "replace", "rename", "unlink", "open"):
    setattr(os, name, fatal(getattr(os, name)))
Path.replace = fatal(Path.replace)
from tests.support.cutting import cut
countdown = int(sys.argv[3])
cut(Path(sys.argv[1]), Path(sys.argv[2]), split="hidden", shares=(1, 5), bits=4, group_size=64,
    force=sys.argv[4:] == ["force"])
print(int(sys.argv[3]) - countdown)
"""


def _cut_and_kill(source: Path, directory: Path, after: int, *options: str) -> tuple[int, int]:
    """Cut in a process that kills itself at the n-th call that touches the disk; return (code, calls)."""
    command = [sys.executable, "-c", _SCRIPT, str(source), str(directory), str(after), *options]
    root = Path(build.__file__).parent.parent.parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False, timeout=120)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode, int(done.stdout) if done.returncode == 0 else after


@pytest.mark.parametrize(
    ("layout", "attempts"), [pytest.param("fused", 2, marks=pytest.mark.long), ("deepseek-v3-fp8", 1)]
)
def test_kill_at_any_moment_then_resume(sources: dict[str, Path], tmp_path: Path, layout: str, attempts: int) -> None:
    """What is copied and turned, and (of FP8) what is computed, is the same bytes after any interruption."""
    source = sources[layout] if layout in sources else layouts.write_layout(tmp_path / "source", layout)
    code, calls = _cut_and_kill(source, tmp_path / "whole", sys.maxsize)
    assert code == 0
    whole = tree(tmp_path / "whole")
    draw = random.Random(2)
    kills = 0
    for attempt in range(attempts):
        directory = tmp_path / str(attempt)
        code, after = -1, draw.randint(2, calls // 2)
        while code != 0:
            code, _ = _cut_and_kill(source, directory, after)
            if code != 0:
                kills += 1
                _assert_only_whole_files(directory, whole)
            after *= 2
        assert tree(directory) == whole
    assert kills >= attempts


def test_kill_while_replacing_another_set(sources: dict[str, Path], tmp_path: Path) -> None:
    source = sources["fused"]
    _cut_and_kill(source, tmp_path / "whole", sys.maxsize)
    checkpoint = open_checkpoint(str(source))
    for after in (4, 28):
        directory = tmp_path / str(after)
        cut(checkpoint, directory, quantization=Quantization(8, 64), shares=(5, 1))
        assert _cut_and_kill(source, directory, after, "force")[0] == -signal.SIGKILL
        assert _cut_and_kill(source, directory, sys.maxsize, "force")[0] == 0
        assert tree(directory) == tree(tmp_path / "whole")


def _assert_only_whole_files(directory: Path, whole: dict[str, bytes]) -> None:
    for file, data in tree(directory).items():
        if not Path(file).name.startswith("."):
            assert data == whole[file], file


@pytest.mark.parametrize("jobs", [1, 2, 4])
def test_resume_keeps_what_is_finished(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int
) -> None:
    """At most one file that was begun is made again, finished ones are not even read again."""
    checkpoint = open_checkpoint(str(sources["fused"]))
    cut(checkpoint, tmp_path / "whole")
    total = build.output_bytes(plan(checkpoint))
    hashed: list[str] = []
    opened: list[str] = []
    begun: list[Any] = []
    hash_file, output = writer.hash_file, writer._Output

    def count(path: Path, on_bytes: Any) -> str:
        hashed.append(path.relative_to(path.parent.parent).as_posix())
        return str(hash_file(path, on_bytes))

    def make(file: Any, *args: Any) -> Any:
        assert all(earlier.remaining == 0 for earlier in begun), "two files at once"
        opened.append(file.path)
        begun.append(output(file, *args))
        return begun[-1]

    monkeypatch.setattr(writer, "hash_file", count)
    monkeypatch.setattr(writer, "_Output", make)
    for fraction in (0.1, 0.2, 0.5, 0.8):
        directory = tmp_path / str(fraction)
        opened.clear()
        with interrupted(int(fraction * total)):
            cut(checkpoint, directory, jobs=jobs)
        begun.clear()
        kept = _stamps(directory)
        named = {f for f in kept if f.endswith(".safetensors")}
        assert len(set(opened) - named) <= 1
        journaled = journal.read_journal(directory)
        opened.clear()
        hashed.clear()
        cut(checkpoint, directory, jobs=jobs)
        assert tree(directory) == tree(tmp_path / "whole")
        assert not named & set(opened)
        assert journaled is not None
        assert not set(journaled[1]) & set(hashed)
        assert {f: s for f, s in _stamps(directory).items() if f in named} == {f: kept[f] for f in named}


def test_an_interrupted_run_leaves_no_lock_taken(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second Ctrl-C can strike when a lock has just been taken: so the thread that hears it may take none."""
    takers: set[str] = set()

    class Watched(threading.Condition):
        def __enter__(self) -> bool:
            takers.add(threading.current_thread().name)
            return super().__enter__()

    class Run(writer._Run):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self._turn = Watched()

    monkeypatch.setattr(writer, "_Run", Run)
    with interrupted(10_000):
        cut(open_checkpoint(str(sources["fused"])), tmp_path, jobs=2)
    assert takers >= {"cut 0", "cut 1", "stop"}
    assert threading.main_thread().name not in takers


@contextmanager
def interrupted(after_bytes: int) -> Iterator[None]:
    """Send this process a real SIGINT once so many bytes are converted, and expect that it is heard."""
    left = after_bytes
    once = threading.Lock()  # taken by the one thread that sends it: a second signal would cut the cleaning up short

    def strike(made: int) -> None:
        nonlocal left
        left -= made
        if left < 0 and once.acquire(blocking=False):
            os.kill(os.getpid(), signal.SIGINT)
            # The main thread has the signal before this piece is reported as done.
            threading.Event().wait(0.2)

    with converting(after=strike), pytest.raises(KeyboardInterrupt):
        yield


@pytest.mark.parametrize("jobs", [1, 3])
def test_ctrl_c_stops_and_leaves_nothing_half(sources: dict[str, Path], tmp_path: Path, jobs: int) -> None:
    checkpoint = open_checkpoint(str(sources["v2"]))
    whole = cut(checkpoint, tmp_path / "whole")
    with interrupted(60_000):
        cut(checkpoint, tmp_path / "out", jobs=jobs)
    assert not [t for t in threading.enumerate() if t.name.startswith(("cut", "hash", "flush"))]
    left = tree(tmp_path / "out")
    assert "moectl.json" not in left
    assert not [f for f in left if f.endswith(".partial")]
    _assert_only_whole_files(tmp_path / "out", tree(tmp_path / "whole"))
    assert cut(checkpoint, tmp_path / "out") == whole


def test_torn_journal_is_read_as_far_as_it_goes(sources: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(sources["fused"]))
    whole = cut(checkpoint, tmp_path / "whole")
    for keep in (0, 7, -1, -20):
        directory = tmp_path / f"out{keep}"
        with interrupted(200_000):
            cut(checkpoint, directory)
        path = directory / journal.NAME
        data = path.read_bytes()
        assert data.count(b"\n") > 1
        path.write_bytes(data[:keep])
        if keep >= 0:  # not even the header is left: nothing says that the files are ours
            with pytest.raises(UsageError, match="other settings"):
                cut(checkpoint, directory)
        assert cut(checkpoint, directory, force=keep >= 0) == whole
        assert tree(directory) == tree(tmp_path / "whole")


def test_unfinished_set_with_other_settings_is_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(sources["fused"]))
    with interrupted(100_000):
        cut(checkpoint, tmp_path / "out")
    with pytest.raises(UsageError, match=r"quantization \[4, 64, 'affine'\] there, \[8, 64, 'affine'\] now") as caught:
        cut(checkpoint, tmp_path / "out", quantization=Quantization(8, 64))
    assert caught.value.hint == "choose another directory with -o, or start afresh with --force"
    cut(checkpoint, tmp_path / "out", quantization=Quantization(8, 64), force=True)
    cut(checkpoint, tmp_path / "fresh", quantization=Quantization(8, 64))
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


# Disks.


def test_space_is_checked_first(sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(str(sources["fused"]))
    needed = build.output_bytes(plan(checkpoint))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(StateError, match=rf"has 0\.\d MB free, {needed / 1e6:.1f} MB are needed"):
        cut(checkpoint, tmp_path / "out")
    assert not [f for f in tree(tmp_path / "out") if f.endswith(".safetensors")]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    cut(checkpoint, tmp_path / "out")


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_full_disk_is_a_clear_error_and_can_be_resumed(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, jobs: int
) -> None:
    checkpoint = open_checkpoint(str(sources["fused"]))
    whole = cut(checkpoint, tmp_path / "whole")
    real = getattr(os, call)
    left = 8

    def fail(*args: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(StateError, match=r"disk is full: .*No space left on device; .* free") as caught:
            cut(checkpoint, tmp_path / "out", jobs=jobs)
    assert "it continues" in str(caught.value.hint)
    _assert_only_whole_files(tmp_path / "out", tree(tmp_path / "whole"))
    assert not [f for f in tree(tmp_path / "out") if f.endswith("safetensors.partial")]
    assert cut(checkpoint, tmp_path / "out", jobs=jobs) == whole


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small disk")
def test_a_disk_that_fills_up_meanwhile(sources: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(sources["fused"]))
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], check=True)
    try:

        def fill(_: int) -> None:
            with (disk / "ballast").open("ab", buffering=0) as f:
                while f.write(bytes(4096)):
                    pass

        filled: Callable[[int], None] = _once(fill)
        with pytest.raises(StateError, match="disk is full"):
            cut(checkpoint, disk / "out", on_bytes=filled)
        assert not [f for f in tree(disk / "out") if f.endswith(".partial") and "safetensors" in f]
        (disk / "ballast").unlink()
        cut(checkpoint, disk / "out")
        build.verify(disk / "out")
    finally:
        subprocess.run(["umount", disk], check=True)


def _once(call: Callable[[int], None]) -> Callable[[int], None]:
    calls = [call]

    def wrapped(count: int) -> None:
        if calls:
            with pytest.raises(OSError, match="No space left"):
                calls.pop()(count)

    return wrapped


def test_unwritable_directory() -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)
        source = tiny.write_checkpoint(root / "source", **SHAPE)
        checkpoint = open_checkpoint(str(source))
        blueprint = draw_at(checkpoint, Q4)  # while mlx-lm's model files can be read
        (root / "held").mkdir(mode=0o555)
        (root / "file").touch()
        (root / "open").mkdir()
        (root / "open").chmod(0o777)
        with _nobody():
            with pytest.raises(StateError, match=r"held.* cannot be written: Permission denied") as caught:
                cut(checkpoint, root / "held", blueprint=blueprint)
            assert caught.value.hint == "choose another directory with -o, or set XDG_DATA_HOME and XDG_CACHE_HOME"
            cut(checkpoint, root / "open" / "set", blueprint=blueprint)
            with pytest.raises(StateError, match=r"held/out cannot be written: Permission denied"):
                cut(checkpoint, root / "held" / "out", blueprint=blueprint)
        for path in (root / "file", root / "file" / "out"):
            with pytest.raises(UsageError, match="is not a directory") as refused:
                cut(checkpoint, path)
            assert refused.value.hint == "choose another directory with -o"
        cut(checkpoint, root / "other")
        build.verify(root / "other")
        assert not list((root / "held").iterdir())


@contextmanager
def _nobody() -> Iterator[None]:
    """Root may write anywhere: be somebody else for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_error_of_a_callback_comes_through(sources: dict[str, Path], tmp_path: Path) -> None:
    def fail(_: int) -> None:
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        cut(open_checkpoint(str(sources["fused"])), tmp_path / "out", on_bytes=fail)
    assert not [f for f in tree(tmp_path / "out") if f.endswith("safetensors.partial")]


def test_source_cut_short_while_reading(tmp_path: Path, sources: dict[str, Path]) -> None:
    source = tmp_path / "source"
    shutil.copytree(sources["fused"], source)
    checkpoint = open_checkpoint(str(source))

    def shorten() -> None:
        for path in source.glob("*.safetensors"):
            os.truncate(path, 40_000)

    with converting(before=shorten), pytest.raises(CheckpointError, match="ended too early"):
        cut(checkpoint, tmp_path / "out")


@pytest.mark.parametrize("call", ["preadv", "open"])
def test_a_source_that_cannot_be_read_is_named(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    checkpoint = open_checkpoint(str(sources["fused"]))
    real = getattr(os, call)

    def fail(first: Any, *args: Any) -> Any:
        if call == "preadv" or str(first).startswith(str(sources["fused"])):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(first, *args)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(
            CheckpointError, match=r"source file model-0000.-of-00002\.safetensors cannot be read: Input"
        ):
            cut(checkpoint, tmp_path / "out")


def test_a_small_file_that_cannot_be_read_is_named(tmp_path: Path, sources: dict[str, Path]) -> None:
    source = tmp_path / "source"
    shutil.copytree(sources["fused"], source)
    checkpoint = open_checkpoint(str(source))
    with pytest.MonkeyPatch.context() as patch:
        read = Path.read_bytes

        def fail(path: Path) -> bytes:
            if path == source / "LICENSE":
                raise OSError(errno.EACCES, os.strerror(errno.EACCES))
            return read(path)

        patch.setattr(Path, "read_bytes", fail)
        with pytest.raises(CheckpointError, match="source file LICENSE cannot be read: Permission"):
            cut(checkpoint, tmp_path / "out")


# Checking.


def test_verify_names_what_is_damaged(sources: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = cut(open_checkpoint(str(sources["fused"])), out)
    told: list[int] = []
    assert build.verify(out, on_bytes=told.append) == manifest
    assert sum(told) == sum(e.bytes for e in manifest.files.values())
    victim = out / "rank-0/layer-001.safetensors"
    data = victim.read_bytes()
    for position in (0, len(data) // 2, len(data) - 1):
        flipped = bytearray(data)
        flipped[position] ^= 1
        victim.write_bytes(flipped)
        with pytest.raises(IntegrityError, match=r"1 of \d+ files .*rank-0/layer-001.safetensors has other"):
            build.verify(out)
    victim.write_bytes(data[:-1])
    (out / "rank-0/head.safetensors").unlink()
    (out / "LICENSE").write_bytes(b"")
    with pytest.raises(IntegrityError) as caught:
        build.verify(out)
    assert "3 of " in caught.value.message
    assert f"rank-0/layer-001.safetensors has {len(data) - 1} bytes instead of {len(data)}" in str(caught.value)
    assert "rank-0/head.safetensors is missing" in str(caught.value)
    with pytest.raises(MoectlError, match="not a shard set"):
        build.verify(tmp_path)
    # What the hint says, done: only these three are made again.
    assert caught.value.hint == "delete those files and run the same 'moectl shard' again: it makes only them"
    damaged = [victim, out / "rank-0/head.safetensors", out / "LICENSE"]
    for path in damaged:
        path.unlink(missing_ok=True)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert cut(open_checkpoint(str(sources["fused"])), out) == manifest
    assert build.verify(out) == manifest
    assert {path: path.stat().st_mtime_ns for path in before} == before


# From afar, and large.


class Remote:
    """A checkpoint whose files have to be fetched: a directory behind `path`, `prefetch` and `release`."""

    revision = "0123abcd"

    def __init__(self, source: Path, work: Path) -> None:
        self._inner = open_checkpoint(str(source))
        self._source, self._work = source, work
        work.mkdir(exist_ok=True)
        self.fetched: list[str] = []
        self.here: set[str] = set()
        self.most = self.most_bytes = 0
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def prefetch(self, file: str) -> None:
        with self._lock:
            if file in self.here:
                return
            shutil.copy(self._source / file, self._work / file)
            if file.endswith(".safetensors"):
                self.fetched.append(file)
                self.here.add(file)
                self.most = max(self.most, len(self.here))
                self.most_bytes = max(self.most_bytes, sum(self._inner.sizes[f] for f in self.here))

    def path(self, file: str) -> Path:
        self.prefetch(file)
        return self._work / file

    def release(self, file: str) -> None:
        with self._lock:
            self.here.remove(file)
            (self._work / file).unlink()


@pytest.mark.parametrize("jobs", [1, 2])
def test_remote_files_come_one_by_one_and_go(tmp_path: Path, jobs: int) -> None:
    source = tiny.write_checkpoint(tmp_path / "source", files=1, **{**SHAPE, "n_layers": 6})
    stored = mx.load(str(source / "model.safetensors"))
    assert isinstance(stored, dict)
    (source / "model.safetensors").unlink()
    tiny.write_weights(source, {n: stored[n] for n in tiny.order_names(stored)}, files=17)
    whole = cut(open_checkpoint(str(source)), tmp_path / "whole")
    remote = Remote(source, tmp_path / "work")
    made = cut(remote, tmp_path / "out", jobs=jobs)
    assert made.revision == "0123abcd"
    assert made.files == whole.files
    assert sorted(remote.fetched) == sorted(remote.sizes)  # each once
    assert not remote.here
    assert not list((tmp_path / "work").glob("*.safetensors"))
    assert remote.most_bytes <= peak_bytes(plan(remote), remote.sizes)
    # A layer's 8 tensors lie in up to four files of 3; one more is on its way.
    assert 3 <= remote.most <= 5


def test_files_of_what_is_computed_come_one_by_one_and_go(tmp_path: Path) -> None:
    """DeepSeek-V3 in FP8, a file for each layer: the one that is read and the next. Nothing comes in vain."""
    source = layouts.write_layout(tmp_path / "source", "deepseek-v3-fp8", files=None, num_hidden_layers=4)
    remote = Remote(source, tmp_path / "work")
    made = cut(remote, tmp_path / "out", jobs=2)
    compare(tmp_path / "out", made, load_whole(source, Q4))
    assert remote.fetched == sorted(remote.sizes)[:-1]  # in order, each once; not the layer of multi-token prediction
    assert remote.most == 2
    assert not remote.here


@pytest.mark.parametrize(("layout", "split"), [("v2", "experts"), ("v2", "hidden"), ("fused", "layers")])
def test_a_lost_file_fetches_only_what_it_is_made_of(tmp_path: Path, layout: str, split: str) -> None:
    source = tiny.write_checkpoint(tmp_path / "source", layout=layout, files=20, **SHAPE)
    remote = Remote(source, tmp_path / "work")
    cut(remote, tmp_path / "out", split=split)
    whole = tree(tmp_path / "out")
    for lost in (f for f in whole if f.startswith("rank-") and "layer" in f):
        (tmp_path / "out" / lost).unlink()
        remote.fetched.clear()
        cut(remote, tmp_path / "out", split=split)
        (file,) = [f for f in plan(remote, split=split) if f.path == lost]
        assert set(remote.fetched) == {piece.file for piece in file.pieces}, lost
        assert not remote.here
        assert tree(tmp_path / "out") == whole


def test_the_next_file_of_the_real_model_comes_while_others_are_worked_on(tmp_path: Path) -> None:
    """The 61 files of databricks/dbrx-instruct as holes, on four ranks: the network is idle only while pieces are."""
    checkpoint = open_checkpoint(str(tiny.write_hollow_dbrx(tmp_path)))
    files = plan(checkpoint, shares=(1, 1, 1, 1))
    pieces = [p for f in files for p in f.pieces]
    order = list(dict.fromkeys(p.file for p in pieces))
    assert order == sorted(checkpoint.sizes)
    assert len(order) == 61
    begun: dict[str, int] = {}  # file → the piece that was at work when it began to come
    first: dict[str, int] = {}  # file → the first piece that needs it
    held: set[str] = set()
    most_bytes = at = 0

    class Supply:
        def prefetch(self, file: str) -> None:
            nonlocal most_bytes
            begun.setdefault(file, at)
            held.add(file)
            most_bytes = max(most_bytes, sum(checkpoint.sizes[f] for f in held))

        def path(self, file: str) -> Path:
            self.prefetch(file)
            return checkpoint.path(file)

        def release(self, file: str) -> None:
            held.remove(file)

    passing = Sources(Supply(), files)
    for file in files:
        for piece in file.pieces:
            at += 1
            first.setdefault(piece.file, at)
            passing.open(piece.file)
        for source in file.sources:
            passing.done(source)
    assert not held
    # Each begins to come with the first piece of the one before it, which has more than one.
    assert all(begun[later] == first[sooner] < first[later] - 1 for sooner, later in pairwise(order))
    assert most_bytes == peak_bytes(files, checkpoint.sizes) <= sum(sorted(checkpoint.sizes.values())[-3:])


def test_resume_fetches_only_what_is_still_needed(tmp_path: Path) -> None:
    shape = {**SHAPE, "n_layers": 6}
    source = tiny.write_checkpoint(tmp_path / "source", files=12, **shape)
    whole = cut(open_checkpoint(str(source)), tmp_path / "whole")
    first = Remote(source, tmp_path / "work")
    total = sum(e.bytes for e in whole.files.values())
    with interrupted(total * 2 // 3):
        cut(first, tmp_path / "out")
    done = {f for f in tree(tmp_path / "out") if f.endswith(".safetensors")}
    second = Remote(source, tmp_path / "work2")
    cut(second, tmp_path / "out")
    planned = plan(second)
    needed = {p.file for f in planned if f.path not in done for p in f.pieces}
    assert set(second.fetched) == needed
    assert len(needed) < 12
    assert {f: d for f, d in tree(tmp_path / "out").items() if f != "moectl.json"} == {
        f: d for f, d in tree(tmp_path / "whole").items() if f != "moectl.json"
    }


def test_space_for_downloads_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny.write_checkpoint(tmp_path / "source", files=6, **SHAPE)
    remote = Remote(source, tmp_path / "work")
    needed = build.output_bytes(plan(remote)) + peak_bytes(plan(remote), remote.sizes)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(StateError, match="for downloads are needed"):
        cut(remote, tmp_path / "out")
    assert not remote.fetched


def test_ctrl_c_is_heard_during_a_download(tmp_path: Path) -> None:
    source = tiny.write_checkpoint(tmp_path / "source", files=2, **SHAPE)
    never = threading.Event()

    class Stalled(Remote):
        def path(self, file: str) -> Path:
            os.kill(os.getpid(), signal.SIGINT)
            never.wait()
            raise AssertionError("unreachable")

    with pytest.raises(KeyboardInterrupt):
        cut(Stalled(source, tmp_path / "work"), tmp_path / "out")
    never.set()


_RSS_SCRIPT = """
import json, sys
from pathlib import Path
from tests.support.cutting import cut
from tests.support.memory import peak_bytes
before = peak_bytes()
cut(Path(sys.argv[1]), Path(sys.argv[2]), jobs=int(sys.argv[4]), **json.loads(sys.argv[3]))
print(peak_bytes() - before)
"""


def measure_cut(source: Path, directory: Path, *, jobs: int, **wanted: Any) -> int:
    """Cut in a process of its own; return the bytes by which its memory grew above that of its modules."""
    command = [sys.executable, "-c", _RSS_SCRIPT, str(source), str(directory), json.dumps(wanted), str(jobs)]
    root = Path(build.__file__).parent.parent.parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False, timeout=300)
    shutil.rmtree(directory, ignore_errors=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize(("bits", "jobs"), [(8, 2), (16, 4)])
def test_memory_does_not_grow_with_the_model(tmp_path: Path, bits: int, jobs: int) -> None:
    """One expert at DBRX's real width, 0.6 GB of holes: one result matrix alone is 66 MB in 8 bits."""
    shape: dict[str, Any] = dict(n_layers=1, d_model=6144, n_heads=48, kv_n_heads=8, ffn_hidden=10752)
    config = tiny.make_config(n_experts=1, top_k=1, vocab_size=64, **shape)
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    tiny.write_hollow(source / "model.safetensors", {n: ("BF16", s) for n, s in tiny.fused_shapes(config).items()})
    assert 0 < measure_cut(source, tmp_path / "out", jobs=jobs, bits=bits) < 256 << 20


@pytest.mark.parametrize(
    ("packed", "bits", "jobs"), [pytest.param(False, 4, 2, marks=pytest.mark.long), (False, 16, 4), (True, None, 2)]
)
def test_memory_does_not_grow_with_what_is_computed(tmp_path: Path, packed: bool, bits: int | None, jobs: int) -> None:
    """Two layers of DeepSeek-V3's width as holes, in FP8 (one result: 132 MB of floats) or int4."""
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 64}
    sizes |= {"intermediate_size": 9216, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    config = {**MODELS["kimi-k2-int4" if packed else "kimi-k2"], **sizes}
    (tmp_path / "source").mkdir()
    (tmp_path / "source/config.json").write_text(json.dumps(config))
    shapes = {name: (dtype, shape) for name, dtype, shape in headers(config)}
    tiny.write_hollow(tmp_path / "source/model.safetensors", shapes)
    assert 0 < measure_cut(tmp_path / "source", tmp_path / "out", jobs=jobs, bits=bits) < 256 << 20
