"""The canary in models of any family: right ranks pass, each fault is found, and the rank at fault is named."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from moectl.engine.network.canary_check import check
from moectl.engine.network.canary_run import compute_canary
from moectl.engine.network.load import load_rank
from moectl.engine.network.reference import survey
from moectl.errors import IntegrityError
from moectl.model.canary import LONG, TOLERANCE, NoReference, decode_points, describe_unmet, judge
from moectl.model.manifest import FileEntry, Manifest
from moectl.model.regions import Region
from moectl.shards.look.skeleton import make_skeleton
from tests.support.cutting import cut
from tests.support.fake_group import run_ranks
from tests.support.families import config_of, write_family
from tests.support.ring import process_env
from tests.support.tiny import write_checkpoint

WAYS = {
    "mixtral": ("hidden", "experts", "tensor", "layers"),
    "deepseek_v3": ("experts", "tensor"),  # shared experts, latent attention, mlx-lm's own sum
    "gpt_oss": ("hidden", "tensor"),  # biases, windows, one vector per head
    "qwen3_next": ("hidden", "layers"),  # linear attention
    "nemotron_h": ("experts", "layers"),  # state space, a matrix behind the experts
    "gemma4_text": ("tensor",),  # layers that share caches, and return more than a state
    "kimi_k3": ("hidden",),  # what it computes of weights is kept, and layers get an object that they change
    "nanbeige (looped)": ("tensor",),  # each layer runs twice
    "gptj": ("hidden",),  # its layers are called by names of arguments
    "afm7": ("hidden",),  # layers that take keys of another one
    "phi3": ("hidden",),  # two matrices in one
    "llama": ("tensor", "layers"),
}
MORE = {
    **{family: ("hidden", "experts", "tensor", "layers") for family in ("deepseek_v3", "gpt_oss", "qwen3_next")},
    "nemotron_h": ("hidden", "experts", "tensor", "layers"),
    "gemma4_text": ("hidden", "experts"),
    "kimi_k3": ("experts",),
    "phi3": ("layers",),
    "llama": ("hidden",),
}


pytestmark = pytest.mark.usefixtures("uncompiled")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("canary")


@cache
def make_set(base: Path, family: str, split: str, *wanted: tuple[str, Any]) -> tuple[Path, Manifest]:
    """Return a set with its canary."""
    source, directory = base / family, base / "-".join(map(str, (family, split, *wanted)))
    if not source.exists():
        write_family(family, source)
    manifest = cut(source, directory, split=split, **{"nodes": 2, **dict(wanted)})
    return directory, replace(manifest, canary=compute_canary(directory, manifest))


def run_check(directories: Sequence[Path], manifest: Manifest, dtype: mx.Dtype | None = None) -> list[int | None]:
    """Return by rank the first wrong exchange; each rank loads from a directory of its own."""
    canary = manifest.canary
    assert canary is not None

    def run(rank: int, group: Any) -> int | None:
        model = load_rank(directories[rank], resized(manifest, directories[rank]), rank, group, dtype=dtype)
        return check(model, canary, manifest.placement, rank=rank).verdict.wrong_at

    return run_ranks(manifest.world_size, run)


def resized(manifest: Manifest, directory: Path) -> Manifest:
    files = {name: FileEntry((directory / name).stat().st_size, entry.sha256) for name, entry in manifest.files.items()}
    return replace(manifest, files=files)


def guilty(wrong_at: list[int | None]) -> list[int]:
    """Return the ranks of which the first wrong exchange is."""
    first = min((n for n in wrong_at if n is not None), default=None)
    return [rank for rank, number in enumerate(wrong_at) if number == first is not None]


@pytest.mark.parametrize(
    ("family", "split"),
    [
        *((family, split) for family, ways in WAYS.items() for split in ways),
        *(
            pytest.param(family, split, marks=pytest.mark.long)
            for family, ways in MORE.items()
            for split in ways
            if split not in WAYS[family]
        ),
    ],
)
def test_ranks_compute_what_the_undivided_model_says(family: str, split: str, base: Path) -> None:
    directory, manifest = make_set(base, family, split)
    assert manifest.canary is not None
    assert manifest.canary.unmet == ()
    assert any(map(decode_points, manifest.canary.points[0]))
    assert run_check([directory] * 2, manifest) == [None, None]


@pytest.mark.parametrize(
    ("family", "split", "wanted"),
    [
        ("mixtral", "experts", {"nodes": 3, "replicas": 2}),  # ranks share out the pairs of a chunk
        ("mixtral", "hidden", {"nodes": 2, "bits": 4, "group_size": 32}),
        ("gpt_oss", "experts", {"shares": (100, 1)}),  # a rank without experts
        ("deepseek_v3", "tensor", {"shares": (3, 1)}),
        ("ministral3", "tensor", {"nodes": 4}),  # more ranks than KV heads
        ("nemotron_h", "layers", {"nodes": 6}),  # some without a cache
        ("llama", "hidden", {"nodes": 1}),
    ],
)
def test_any_shares(family: str, split: str, wanted: dict[str, Any], base: Path) -> None:
    directory, manifest = make_set(base, family, split, *wanted.items())
    assert manifest.canary is not None
    assert manifest.canary.unmet == ()
    assert run_check([directory] * manifest.world_size, manifest) == [None] * manifest.world_size


def load(path: Path) -> dict[str, mx.array]:
    found = mx.load(str(path))
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize(("family", "split"), [("qwen3_next", "hidden"), ("gpt_oss", "tensor"), ("mixtral", "tensor")])
def test_ranks_that_round_to_16_bits_pass_and_wrong_ones_do_not(
    family: str, split: str, base: Path, tmp_path: Path
) -> None:
    """Some tokens may go to other experts there: that counts for nothing."""
    directory, manifest = make_set(base, family, split)
    assert run_check([directory] * 2, manifest, mx.bfloat16) == [None, None]
    wrong = copy_with(directory, tmp_path / "wrong", "rank-1/layer-001.safetensors", flip, "down_proj")
    assert guilty(run_check([directory, wrong], manifest, mx.bfloat16)) == [1]


def copy_with(directory: Path, out: Path, file: str, change: Any, name: str = "") -> Path:
    """Return a copy of a set in which `change` was applied to one array of a file."""
    shutil.copytree(directory, out)
    arrays = load(out / file)
    found = next(key for key in sorted(arrays) if name in key)
    arrays[found] = change(arrays[found])
    mx.eval(arrays)
    mx.save_safetensors(str(out / file), arrays, metadata={"format": "mlx"})
    return out


def flip(array: mx.array) -> mx.array:
    """Return an array of which one bit of one byte is another."""
    bits = array.reshape(-1).view(mx.uint16 if array.dtype.size == 2 else mx.uint32)
    bits[bits.size // 3] = bits[bits.size // 3] ^ (1 << (bits.itemsize * 8 - 2))
    return bits.view(array.dtype).reshape(array.shape)


@pytest.mark.parametrize(
    ("family", "split", "matrix"),
    [
        ("mixtral", "hidden", "w2"),
        ("deepseek_v3", "experts", "down_proj"),
        ("deepseek_v3", "tensor", "o_proj"),
        ("gpt_oss", "tensor", "sinks"),
        ("qwen3_next", "hidden", "up_proj"),
        ("nemotron_h", "experts", "fc1"),
        ("llama", "tensor", "k_proj"),
        ("llama", "layers", "v_proj"),
    ],
)
def test_one_changed_byte_names_its_rank(family: str, split: str, matrix: str, base: Path, tmp_path: Path) -> None:
    directory, manifest = make_set(base, family, split)
    matrix = {"w2": "down_proj"}.get(matrix, matrix)
    files = [file for file, _ in sorted(manifest.files.items()) if file.startswith("rank-1/layer")]
    file = next(f for f in files if any(matrix in name for name in load(directory / f)))
    wrong = copy_with(directory, tmp_path / "wrong", file, flip, matrix)
    assert guilty(run_check([directory, wrong], manifest)) == [1]


def test_a_pipelines_first_rank_is_named(base: Path, tmp_path: Path) -> None:
    directory, manifest = make_set(base, "qwen3_next", "layers")
    wrong = copy_with(directory, tmp_path / "wrong", "rank-0/layer-000.safetensors", flip, "in_proj")
    assert guilty(run_check([wrong, directory], manifest)) == [0]


def test_swapped_files_name_both_ranks(base: Path, tmp_path: Path) -> None:
    directory, manifest = make_set(base, "mixtral", "hidden", ("nodes", 4))
    wrong = tmp_path / "wrong"
    shutil.copytree(directory, wrong)
    for one, other in ((1, 2), (2, 1)):
        name = "layer-001.safetensors"
        shutil.copy(directory / f"rank-{one}" / name, wrong / f"rank-{other}" / name)
    assert guilty(run_check([wrong] * 4, manifest)) == [1, 2]


@pytest.mark.parametrize(("ranks", "named"), [([1], [1]), ([0, 1], [0, 1])])
def test_a_wrong_norm_names_those_that_have_it(ranks: list[int], named: list[int], base: Path, tmp_path: Path) -> None:
    directory, manifest = make_set(base, "llama", "hidden")
    wrong = copy_with(
        directory, tmp_path / "wrong", "common/layer-002.safetensors", lambda a: a * 1.5, "post_attention_layernorm"
    )
    places = [wrong if rank in ranks else directory for rank in range(2)]
    assert guilty(run_check(places, manifest)) == named


def test_a_wrong_division_is_refused_when_it_is_cut(base: Path, tmp_path: Path) -> None:
    """Gate and up are one matrix: the first rank gets the gates of all, and the second the rest."""
    directory, manifest = make_set(base, "phi3", "hidden")
    wrong, name = tmp_path / "wrong", "model.layers.1.mlp.gate_up_proj.weight"
    shutil.copytree(directory, wrong)
    files = [f"rank-{rank}/layer-001.safetensors" for rank in range(2)]
    halves = [load(directory / file) for file in files]
    gates, ups = zip(*(mx.split(half[name], 2) for half in halves), strict=True)
    for file, half, rows in zip(files, halves, (gates, ups), strict=True):
        mx.save_safetensors(str(wrong / file), {**half, name: mx.concatenate(list(rows))}, metadata={"format": "mlx"})
    count, columns = halves[0][name].shape
    places: dict[str, tuple[Region, ...]] = {
        file: (((rank * count, (rank + 1) * count), (0, columns)),) for rank, file in enumerate(files)
    }
    regions = {**manifest.tensors, name: places}
    with pytest.raises(IntegrityError, match=r"parts of layer 1 of set do not add up to the model's") as caught:
        compute_canary(wrong, resized(replace(manifest, tensors=regions), wrong))
    assert caught.value.hint == "choose another --split; --no-canary cuts it without this check"
    assert make_set(base, "phi3", "layers")[1].canary is not None


def test_a_missing_part_is_an_error(base: Path) -> None:
    directory, manifest = make_set(base, "mixtral", "hidden")
    name = next(name for name in manifest.tensors if "down_proj" in name)
    places = {file: regions for file, regions in manifest.tensors[name].items() if "rank-0" in file}
    with pytest.raises(IntegrityError, match=r"no rank has 64 to 128 of model.layers.0"):
        compute_canary(directory, replace(manifest, tensors={**manifest.tensors, name: places}))


def test_a_file_that_was_cut_short_is_told(base: Path, tmp_path: Path) -> None:
    directory, manifest = make_set(base, "mixtral", "hidden")
    shutil.copytree(directory, tmp_path / "short")
    path = tmp_path / "short/rank-1/layer-001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match=r"rank-1/layer-001.safetensors has .* bytes, expected"):
        compute_canary(tmp_path / "short", manifest)


def test_a_matrix_that_is_used_past_its_module_is_in_memory(base: Path) -> None:
    assert survey(make_skeleton(config_of("llama"))) == (set(), 4)
    assert survey(make_skeleton(config_of("seed_oss"))) == ({"model.embed_tokens.weight"}, 4)
    directory, manifest = make_set(base, "seed_oss", "hidden")
    assert run_check([directory] * 2, manifest) == [None, None]


def test_one_that_is_too_large_for_that_has_no_canary(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, manifest = make_set(base, "seed_oss", "hidden")
    monkeypatch.setattr("moectl.engine.network.reference._DIRECT_BYTES", 1000)
    with pytest.raises(NoReference, match="it uses large matrices in a way in which they cannot stay on disk"):
        compute_canary(directory, manifest)


@pytest.mark.parametrize("expert", [0, 3])
def test_each_expert_of_each_layer_counts(expert: int, base: Path, tmp_path: Path) -> None:
    """Whatever the routers choose: the long prompt's tokens are dealt out to all experts."""
    directory, manifest = make_set(base, "mixtral", "hidden")
    assert manifest.canary is not None
    for layer in range(manifest.structure.n_layers):

        def halve(array: mx.array) -> mx.array:
            return (array * mx.ones(array.shape).at[expert].multiply(0.5)).astype(array.dtype)

        file = f"rank-1/layer-{layer:03}.safetensors"
        wrong = copy_with(directory, tmp_path / str(layer), file, halve, "gate_proj")
        found = compute_canary(wrong, resized(manifest, wrong))
        expected = decode_points(manifest.canary.points[1][LONG])
        assert judge(expected, decode_points(found.points[1][LONG]), tolerance=TOLERANCE).wrong_at == layer


def test_experts_that_no_token_reached_are_told(tmp_path: Path) -> None:
    sizes = {"n_experts": 256, "top_k": 1, "ffn_hidden": 32, "d_model": 32, "n_layers": 1}
    manifest = cut(write_checkpoint(tmp_path / "source", **sizes), tmp_path / "set", nodes=1)  # type: ignore[arg-type]
    canary = compute_canary(tmp_path / "set", manifest)
    assert 256 - 46 <= len(canary.unmet) < 256
    assert "so it does not check these: layer 0: " in str(describe_unmet(canary))


_MEASURE = """
import os, sys
from pathlib import Path
import mlx.core as mx, numpy
from moectl.model.manifest import read_manifest
from moectl.engine.network import canary_run

def peak():
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

read, preadv = [], os.preadv
os.preadv = lambda *args: read.append(preadv(*args)) or read[-1]
before = peak()
canary_run.compute_canary(Path(sys.argv[1]), read_manifest(Path(sys.argv[1])))
print(peak() - before, sum(read))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("split", ["hidden", "experts"])
def test_it_reads_each_weight_once_and_holds_little(split: str, tmp_path: Path) -> None:
    sizes = {"d_model": 1024, "ffn_hidden": 2048, "n_layers": 1, "n_heads": 8, "kv_n_heads": 2, "n_experts": 10}
    source = write_checkpoint(tmp_path / "source", **sizes)  # type: ignore[arg-type]
    cut(source, tmp_path / "set", split=split, nodes=2)
    weights = sum(file.stat().st_size for file in (tmp_path / "set").rglob("*.safetensors"))
    assert weights > 120e6
    command = [sys.executable, "-c", _MEASURE, str(tmp_path / "set")]
    found = subprocess.run(command, capture_output=True, text=True, env=process_env(), check=True)
    over, read = map(int, found.stdout.split())
    assert over < 64 << 20  # one rank's part of the experts in float32 would be 126 MB
    assert 0.95 * weights < read < 1.05 * weights
