"""Parts of traced parameters against mlx-lm's own loading and conversion, bit for bit."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from moectl.model.regions import Region
from moectl.model.structure import Quantization
from moectl.shards.trace.parts import chunks, full, part
from moectl.shards.trace.traced import list_dropped
from tests.support.layouts import LAYOUTS, write_layout
from tests.support.traced import Traced, load_whole, open_traced

OWN_FP8 = "qwen3-moe-fp8"  # mlx-lm cannot load it: see test_fp8_is_read_for_a_family_whose_sanitize_does_not


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write_layout(tmp_path_factory.mktemp(name), name) for name in LAYOUTS}


def equal(one: mx.array, other: mx.array) -> bool:
    """Whether two arrays have the same shape, type and bytes."""
    first, second = (mx.contiguous(a).reshape(-1).view(mx.uint8) for a in (one, other))
    return one.dtype == other.dtype and one.shape == other.shape and mx.array_equal(first, second).item() is True


def compare_all(traced: Traced, whole: dict[str, mx.array]) -> None:
    assert traced.parameters.keys() == whole.keys()
    for name, expected in whole.items():
        assert equal(traced.part(name), expected), name


@pytest.mark.parametrize("name", [n for n in LAYOUTS if n != OWN_FP8])
def test_what_is_stored_comes_out_as_mlx_lm_loads_it(name: str, checkpoints: dict[str, Path]) -> None:
    compare_all(open_traced(checkpoints[name]), load_whole(checkpoints[name]))


@pytest.mark.parametrize(
    ("name", "wanted", "recipe"),
    [
        ("mixtral", Quantization(4, 64, "affine"), None),
        ("mixtral", Quantization(4, 32, "mxfp4"), None),
        ("qwen3-next", Quantization(4, 64, "affine"), None),
        ("qwen3-next", Quantization(4, 16, "nvfp4"), None),
        ("qwen3", Quantization(4, 64, "affine"), "mixed_4_6"),
        ("qwen3", Quantization(3, 32, "affine"), "mixed_3_6"),
        ("deepseek-v3-fp8", Quantization(4, 32, "affine"), None),
        ("gpt-oss-mxfp4", Quantization(8, 32, "affine"), None),
        ("kimi-k25-int4", Quantization(6, 32, "affine"), None),
    ],
)
def test_what_is_quantised_on_the_way_equals_mlx_lms_conversion(
    name: str, wanted: Quantization, recipe: str | None, checkpoints: dict[str, Path]
) -> None:
    traced = open_traced(checkpoints[name], wanted, recipe)
    compare_all(traced, load_whole(checkpoints[name], wanted, recipe))


@st.composite
def regions(draw: st.DrawFn, shape: tuple[int, ...]) -> Region:
    spans = []
    for n in shape:
        start = draw(st.integers(0, n - 1))
        spans.append((start, draw(st.integers(start + 1, n))))
    return tuple(spans)


@pytest.mark.parametrize("name", LAYOUTS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_region_equals_the_same_slice_of_the_whole(
    name: str, checkpoints: dict[str, Path], data: st.DataObject
) -> None:
    quantise = data.draw(st.booleans()) and not name.startswith("mlx")
    traced = open_traced_once(checkpoints[name], Quantization(4, 32, "affine") if quantise else None)
    parameter = data.draw(st.sampled_from(sorted(traced.parameters)))
    node = traced.parameters[parameter]
    region = data.draw(regions(node.shape))
    got = part(node, region, traced.read)
    assert equal(got, traced.part(parameter)[tuple(slice(*span) for span in region)])
    for small in (32, 999):
        pieces = [part(node, r, traced.read).reshape(-1) for r in chunks(region, node.dtype.size, small)]
        assert equal(mx.concatenate(pieces), got.reshape(-1))


_opened: dict[tuple[Path, Quantization | None], Traced] = {}


def open_traced_once(directory: Path, wanted: Quantization | None) -> Traced:
    key = directory, wanted
    if key not in _opened:
        _opened[key] = open_traced(directory, wanted)
    return _opened[key]


def test_fp8_is_read_for_a_family_whose_sanitize_does_not(checkpoints: dict[str, Path]) -> None:
    directory = checkpoints[OWN_FP8]
    weights: dict[str, mx.array] = {}
    for path in directory.glob("model*.safetensors"):
        loaded = mx.load(str(path))
        assert isinstance(loaded, dict)
        weights |= loaded
    for name in [n for n in weights if n.endswith("_scale_inv")]:
        base = name.removesuffix("_scale_inv")
        weights[base] = dequantise(weights[base], weights.pop(name))
    traced = open_traced(directory)
    compare_all(traced, traced.model.sanitize(weights))


def dequantise(weight: mx.array, scale: mx.array) -> mx.array:
    """Return what mlx-lm's model files compute, in their words (deepseek_v3.Model.sanitize)."""
    values = mx.from_fp8(weight, dtype=mx.bfloat16)
    m, n = values.shape
    padded = mx.pad(values, [(0, -m % 128), (0, -n % 128)])
    blocks = padded.reshape(padded.shape[0] // 128, 128, padded.shape[1] // 128, 128)
    return (blocks * scale[:, None, :, None]).reshape(padded.shape)[:m, :n].astype(mx.bfloat16)


def test_a_part_reads_only_what_it_must(checkpoints: dict[str, Path]) -> None:
    def count(name: str, parameter: str, region: Region | None = None) -> tuple[int, int]:
        traced = open_traced(checkpoints[name])
        array = traced.part(parameter, region)
        return traced.read.bytes_read, array.nbytes

    read, size = count("mixtral", "model.layers.1.block_sparse_moe.switch_mlp.up_proj.weight", ((1, 2), (3, 9), (5, 7)))
    assert read == size == 6 * 2 * 2
    # FP8: a byte for each value, and the scales of the blocks that are touched.
    read, size = count("deepseek-v3-fp8", "model.layers.1.mlp.switch_mlp.down_proj.weight", ((0, 2), (10, 20), (0, 96)))
    assert read == size // 2 + 2 * 4
    traced = open_traced(checkpoints["deepseek-v3-fp8"])
    keys = traced.parameters["model.layers.0.self_attn.embed_q.weight"]
    traced.part("model.layers.0.self_attn.embed_q.weight")
    assert traced.read.bytes_read == keys.size + 6 * 4  # without the values beside the keys; a head is in one block


def test_a_large_parameter_takes_the_memory_of_a_few_chunks(tmp_path: Path) -> None:
    directory = write_layout(tmp_path, "deepseek-v3-fp8", hidden_size=1024, moe_intermediate_size=2048)
    traced = open_traced(directory, Quantization(4, 64, "affine"))
    chunk = 1 << 18
    mx.synchronize()
    for part_of in ("weight", "scales"):
        node = traced.parameters[f"model.layers.1.mlp.switch_mlp.down_proj.{part_of}"]
        mx.clear_cache()
        mx.reset_peak_memory()
        before, size = mx.get_active_memory(), 0
        source_bytes = node.inputs[0].nbytes * chunk // node.nbytes  # of what a chunk is quantised from
        for region in chunks(full(node.shape), node.dtype.size, chunk):
            one = part(node, region, traced.read)
            mx.eval(one)
            size += one.nbytes
            del one
            mx.clear_cache()
        assert size == node.nbytes
        assert mx.get_peak_memory() - before < 8 * source_bytes


def test_dropped_tensors_are_listed(checkpoints: dict[str, Path]) -> None:
    def dropped(name: str) -> tuple[str, ...]:
        traced = open_traced(checkpoints[name])
        return list_dropped(traced.tensors, traced.parameters)

    mtp = dropped("deepseek-v3-fp8")
    assert mtp
    assert all(name.startswith("model.layers.61.") for name in mtp)
    assert dropped("qwen3-next") == ("mtp.fc.weight",)
    assert dropped("kimi-k25-int4") == ("mm_projector.proj.weight", "vision_tower.patch.weight")
    assert dropped("gpt-oss-mxfp4") == ()


def test_regions_of_no_axes_have_one_chunk() -> None:
    assert list(chunks((), 4)) == [()]
    assert list(chunks(full((3, 4)), 4, 32)) == [((0, 2), (0, 4)), ((2, 3), (0, 4))]
