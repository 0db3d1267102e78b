"""What a set computes is known from when it was cut; a rank that computes something else is named."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, strategies as st

from moectl.demo import demo_dir
from moectl.engine.network import canary_run
from moectl.engine.network.canary_run import compute_canary
from moectl.engine.protocol import Done, RunOptions
from moectl.engine.request import Request
from moectl.errors import IntegrityError
from moectl.hosts.onhost.files import RECORD
from moectl.model.canary import (
    CHUNK,
    LONG,
    TOLERANCE,
    TOLERANCE_LOW_PRECISION,
    Canary,
    choose_tolerance,
    cut_chunks,
    decode_points,
    describe_unmet,
    encode_points,
    judge,
    judge_logits,
    make_prompts,
)
from moectl.model.manifest import FileEntry, parse_manifest, read_manifest, write_manifest
from moectl.model.placement import make_placement
from moectl.session.session import Session
from moectl.shards.build import cut
from moectl.shards.checkpoint import open_checkpoint
from moectl.shards.quantize import quantizer
from moectl.shards.writer import hash_file
from tests.engine.test_lockstep import cut_case
from tests.session.test_session import specs
from tests.support.alphabet import VOCAB_SIZE, write_tokenizer
from tests.support.ring import process_env
from tests.support.tiny import write_checkpoint, write_words

point = st.lists(st.floats(-1e6, 1e6, width=32), min_size=4, max_size=4)


@given(st.lists(point))
def test_numbers_survive_as_text(points: list[list[float]]) -> None:
    back = decode_points(encode_points(points))
    assert len(back) == len(points)
    for one, other in zip(points, back, strict=True):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-38)


def test_prompts_are_shorter_and_longer_than_a_chunk() -> None:
    short, long = make_prompts(100, 10_000)
    assert len(short) < CHUNK < len(long)
    assert all(0 <= token < 100 for token in (*short, *long))
    assert [len(chunk) for chunk in cut_chunks(long)] == [CHUNK, 8, 1]
    assert [len(chunk) for chunk in cut_chunks(short)] == [4, 1]
    assert all(len(prompt) <= 64 for prompt in make_prompts(100, 64))


def test_the_first_exchange_that_is_off_is_told() -> None:
    expected = [[1.0, 2.0, 3.0, 4.0]] * 5
    found = [list(point) for point in expected]
    assert judge(expected, found, tolerance=0.01).wrong_at is None
    found[3] = [1.0, 2.0, 3.0, 5.0]
    found[2][0] += 0.001
    verdict = judge(expected, found, tolerance=0.01)
    assert verdict.wrong_at == 3
    assert verdict.worst == pytest.approx(1 / math.sqrt(30))
    assert judge(expected, found, tolerance=0.5).wrong_at is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_wrong(bad: float) -> None:
    verdict = judge([[1.0] * 4], [[1.0, bad, 1.0, 1.0]], tolerance=10)
    assert (verdict.worst, verdict.wrong_at) == (math.inf, 0)
    canary = Canary("float32", (), (((3, 1.0), (4, 0.5)),), (1.0,))
    assert judge_logits(canary, 0, [1.0, bad]) == math.inf
    assert judge_logits(canary, 0, [1.0, 0.75]) == 0.25


def test_a_rank_that_adds_nothing_is_judged_by_the_others_size() -> None:
    expected = [[1.0] * 4, [0.0] * 4]
    assert judge(expected, [[1.0] * 4, [1e-4] * 4], tolerance=0.01).wrong_at is None
    assert judge(expected, [[1.0] * 4, [1.0] * 4], tolerance=0.01).wrong_at == 1


def test_only_float32_on_both_sides_is_compared_closely() -> None:
    canary = Canary("float32", (), (), ())
    assert choose_tolerance(canary, "float32") == TOLERANCE
    assert choose_tolerance(canary, "bfloat16") == TOLERANCE_LOW_PRECISION
    assert choose_tolerance(replace(canary, dtype="bfloat16"), "float32") == TOLERANCE_LOW_PRECISION


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    source = tmp_path_factory.mktemp("source")
    write_checkpoint(source, vocab_size=VOCAB_SIZE, n_layers=4, d_model=256, n_heads=4, kv_n_heads=4)
    write_tokenizer(source)
    found = {}
    for split, shares in {"hidden": (2, 4), "layers": (2, 2), "tensor": (3, 3)}.items():
        found[split] = cut_case(source, tmp_path_factory.mktemp("sets") / split, split, shares, 16, canary=True)
    return found


def test_it_is_computed_where_it_lacks_and_kept(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_checkpoint(source, vocab_size=VOCAB_SIZE)
    checkpoint = open_checkpoint(str(source))
    placement = make_placement(checkpoint.geometry, "hidden", 2)

    def cut_again(compute: Any) -> Canary | None:
        cut(checkpoint, placement, None, tmp_path / "set", name="set", quantise=quantizer, compute_canary=compute)
        return read_manifest(tmp_path / "set").canary

    def fail(*_: Any) -> Canary:
        raise AssertionError("computed again")

    assert cut_again(None) is None
    found = cut_again(compute_canary)
    assert found is not None
    assert cut_again(fail) == cut_again(None) == found


@pytest.mark.parametrize("change", ["points", "top", "spread"])
def test_a_damaged_one_is_refused(sets: dict[str, Path], change: str) -> None:
    manifest = read_manifest(sets["hidden"])
    assert manifest.canary is not None
    for value in ([], "x", [["x"]], [[["x", 1]]], None, [None]):
        raw = json.loads(manifest.to_json())
        raw["canary"][change] = value
        with pytest.raises(IntegrityError, match="damaged"):
            parse_manifest(json.dumps(raw), Path("moectl.json"))


def test_an_older_one_is_checked_as_it_was_made(
    sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sets of before these fields say nothing of the chunk, which was 512, and all their tokens were routed."""
    old = tmp_path / "old"
    shutil.copytree(sets["hidden"], old)
    (old / RECORD).unlink(missing_ok=True)
    monkeypatch.setattr(canary_run, "CHUNK", 512)
    monkeypatch.setattr(canary_run, "LONG", None)
    raw = json.loads(replace(read_manifest(old), canary=compute_canary(old, read_manifest(old))).to_json())
    del raw["canary"]["chunk"], raw["canary"]["deals"], raw["canary"]["unmet"]
    manifest = parse_manifest(json.dumps(raw), Path("moectl.json"))
    assert manifest.canary is not None
    assert (manifest.canary.chunk, manifest.canary.deals) == (512, False)
    write_manifest(old, manifest)
    with Session(specs(old)) as session:
        assert session.model.checked
        assert session.model.deviation < TOLERANCE / 10
        assert session.model.wrong_at is None


@pytest.mark.parametrize("split", ["hidden", "layers", "tensor"])
def test_weights_on_disk_and_in_memory_give_the_same(sets: dict[str, Path], split: str) -> None:
    """A GPU has a rank's part of a layer in memory, a CPU reads it piece by piece."""
    manifest = read_manifest(sets[split])
    in_memory = canary_run._Reference(sets[split], manifest, None).compute(lambda *_: None)
    assert manifest.canary is not None
    for prompt, top in enumerate(in_memory.top):
        assert judge_logits(manifest.canary, prompt, [logit for _, logit in top]) < TOLERANCE / 10
    for ours, theirs in zip(in_memory.points, manifest.canary.points, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            verdict = judge(decode_points(other), decode_points(one), tolerance=TOLERANCE / 10)
            assert verdict.wrong_at is None


@pytest.mark.parametrize("model", ["demo", "random"])
def test_a_few_dozen_tokens_reach_every_expert(sets: dict[str, Path], tmp_path: Path, model: str) -> None:
    directory = cut_case(demo_dir(), tmp_path / "demo", "hidden", (2, 2), 16) if model == "demo" else sets["hidden"]
    canary = compute_canary(directory, read_manifest(directory))
    assert sum(map(len, make_prompts(VOCAB_SIZE, 2048, canary.chunk))) < 60
    assert canary.unmet == ()
    assert describe_unmet(canary) is None


def test_experts_that_no_token_reached_are_told(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "set"
    write_words(write_checkpoint(source, n_experts=256, top_k=1, ffn_hidden=32, d_model=32, n_layers=1))
    command = [sys.executable, "-m", "moectl", "shard", str(source), "-o", str(out), "--nodes", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env=process_env(), check=True)
    canary = read_manifest(out).canary
    assert canary is not None
    assert len(canary.unmet) >= 256 - 46
    assert "the canary's prompts do not reach every expert, so it does not check these: layer 0: " in done.stderr


_MEASURE = """
import os, sys
from pathlib import Path
import mlx.core as mx, numpy
from moectl.model.manifest import read_manifest
from moectl.engine.network import canary_run as reference

def peak():
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

read, preadv = [], os.preadv
os.preadv = lambda *args: read.append(preadv(*args)) or read[-1]
before = peak()
reference.compute_canary(Path(sys.argv[1]), read_manifest(Path(sys.argv[1])))
print(peak() - before, sum(read))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_it_reads_each_weight_once_and_holds_little(tmp_path: Path) -> None:
    sizes = {"d_model": 1024, "ffn_hidden": 2048, "n_layers": 1, "n_heads": 8, "kv_n_heads": 2, "n_experts": 10}
    source = write_checkpoint(tmp_path / "source", **sizes)  # type: ignore[arg-type]
    directory = cut_case(source, tmp_path / "set", "hidden", (16, 16), 16)
    weights = sum(file.stat().st_size for file in directory.rglob("*.safetensors"))
    assert weights > 120e6
    command = [sys.executable, "-c", _MEASURE, str(directory)]
    found = subprocess.run(command, capture_output=True, text=True, env=process_env(), check=True)
    over, read = map(int, found.stdout.split())
    assert over < 64 << 20  # one rank's part of the experts in float32 would be 126 MB
    assert 0.95 * weights < read < 1.05 * weights


def damage(directory: Path, out: Path, file: str) -> Path:
    """Return a copy of a set in which a file holds other weights and everything else agrees with them."""
    shutil.copytree(directory, out)
    path, manifest = out / file, read_manifest(directory)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    path.write_bytes(data)
    (out / RECORD).unlink(missing_ok=True)  # or the file would be missed before anything is computed
    files = {**manifest.files, file: FileEntry(len(data), hash_file(path, lambda _: None))}
    write_manifest(out, replace(manifest, files=files))
    return out


@pytest.mark.parametrize(
    ("split", "file", "guilty"),
    [
        ("hidden", "rank-1/layer-002.safetensors", "host1: rank 1 computes wrong results"),
        pytest.param(
            "tensor",
            "rank-1/layer-001.safetensors",
            "host1: rank 1 computes wrong results",
            marks=pytest.mark.long,
        ),
        ("layers", "rank-0/layer-001.safetensors", "host0: rank 0 computes wrong results"),
    ],
)
def test_the_rank_at_fault_is_named(sets: dict[str, Path], tmp_path: Path, split: str, file: str, guilty: str) -> None:
    wrong = damage(sets[split], tmp_path / "wrong", file)
    with pytest.raises(IntegrityError, match=guilty) as caught, Session(specs(wrong)):
        pass
    assert caught.value.exit_code == 7


def test_what_the_hint_about_all_ranks_says_starts_them(sets: dict[str, Path], tmp_path: Path) -> None:
    wrong = damage(sets["hidden"], tmp_path / "wrong", "common/layer-001.safetensors")
    with pytest.raises(IntegrityError, match="all ranks compute other results") as caught, Session(specs(wrong)):
        pass
    assert caught.value.exit_code == 7
    assert caught.value.hint == (
        "if mlx or the hosts have changed since then, 'moectl shard --force' makes it again; "
        "--no-canary starts without this check"
    )
    shutil.rmtree(wrong)
    source = sets["hidden"].parent / "again"
    write_checkpoint(source, vocab_size=VOCAB_SIZE, n_layers=4, d_model=256, n_heads=4, kv_n_heads=4)
    write_tokenizer(source)
    again = cut_case(source, tmp_path / "again", "hidden", (2, 4), 16, canary=True)
    with Session(specs(again)) as session:
        assert isinstance(list(session.generate(Request(1, "hello", 4)))[-1], Done)
    wrong = damage(sets["hidden"], tmp_path / "wrong", "common/layer-001.safetensors")
    with Session(specs(wrong), RunOptions(canary=False)) as session:
        assert not session.model.checked
        assert isinstance(list(session.generate(Request(1, "hello", 4)))[-1], Done)


@pytest.mark.parametrize("expert", [0, 7, 15])
def test_each_expert_of_each_layer_counts(sets: dict[str, Path], tmp_path: Path, expert: int) -> None:
    """Whatever the routers choose: the long prompt's tokens are dealt out to all experts."""
    manifest = read_manifest(sets["hidden"])
    assert manifest.canary is not None
    for layer in range(manifest.geometry.n_layers):
        wrong = tmp_path / str(layer)
        shutil.copytree(sets["hidden"], wrong)
        path = wrong / f"rank-1/layer-{layer:03}.safetensors"
        weights = mx.load(str(path))
        assert isinstance(weights, dict)
        name = next(name for name in weights if "w1.weight" in name)
        change = mx.ones(weights[name].shape).at[expert].multiply(0.5).astype(weights[name].dtype)
        weights[name] = weights[name] * change
        mx.save_safetensors(str(path), weights)
        files = {**manifest.files, str(path.relative_to(wrong)): FileEntry(path.stat().st_size, "0" * 64)}
        found = compute_canary(wrong, replace(manifest, files=files))
        expected = decode_points(manifest.canary.points[1][LONG])
        assert judge(expected, decode_points(found.points[1][LONG]), tolerance=TOLERANCE).wrong_at == layer
