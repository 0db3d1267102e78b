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

import pytest
from hypothesis import given, strategies as st

from moectl.engine.network.canary_run import compute_canary
from moectl.engine.protocol import Done, RunOptions
from moectl.engine.request import Request
from moectl.errors import IntegrityError
from moectl.hosts.onhost.files import RECORD
from moectl.model.canary import (
    CHUNK,
    TOLERANCE,
    TOLERANCE_LOW_PRECISION,
    TOLERANCE_OF_CHOICE,
    Canary,
    choose_tolerance,
    cut_chunks,
    decode_points,
    encode_points,
    judge,
    judge_logits,
    make_prompts,
)
from moectl.model.manifest import FileEntry, parse_manifest, read_manifest, write_manifest
from moectl.session.session import Session
from moectl.shards.writer import hash_file
from tests.session.test_session import specs
from tests.support.alphabet import VOCAB_SIZE, write_tokenizer
from tests.support.cutting import cut
from tests.support.families import write_family
from tests.support.ring import process_env
from tests.support.tiny import write_checkpoint, write_words

point = st.lists(st.floats(-1e6, 1e6, width=32), min_size=5, max_size=5)


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
    expected = [[1.0, 2.0, 3.0, 4.0, math.sqrt(30)]] * 5
    found = [list(point[:4]) for point in expected]
    assert judge(expected, found, tolerance=0.01).wrong_at is None
    found[3] = [1.0, 2.0, 3.0, 5.0]
    found[2][0] += 0.001
    verdict = judge(expected, found, tolerance=0.01)
    assert verdict.wrong_at == 3
    assert verdict.worst == pytest.approx(1 / math.sqrt(30))
    assert judge(expected, found, tolerance=0.5).wrong_at is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_wrong(bad: float) -> None:
    verdict = judge([[1.0, 1.0, 1.0, 1.0, 2.0]], [[1.0, bad, 1.0, 1.0]], tolerance=10)
    assert (verdict.worst, verdict.wrong_at) == (math.inf, 0)
    canary = Canary("float32", (), (((3, 1.0), (4, 0.5)),), (1.0,))
    assert judge_logits(canary, 0, [1.0, bad]) == math.inf
    assert judge_logits(canary, 0, [1.0, 0.75]) == 0.25


def test_numbers_that_cancel_out_are_judged_by_the_size_of_the_array() -> None:
    verdict = judge([[0.01, 0.0, 0.0, 0.0, 2.0]], [[0.02, 0.0, 0.0, 0.0]], tolerance=0.01)
    assert verdict.worst == pytest.approx(0.005)
    assert verdict.wrong_at is None


def test_a_rank_that_adds_nothing_is_judged_by_the_others_size() -> None:
    expected = [[1.0, 1.0, 1.0, 1.0, 2.0], [0.0] * 5]
    assert judge(expected, [[1.0] * 4, [1e-4] * 4], tolerance=0.01).wrong_at is None
    assert judge(expected, [[1.0] * 4, [1.0] * 4], tolerance=0.01).wrong_at == 1


def test_only_float32_on_both_sides_is_compared_closely() -> None:
    canary = Canary("float32", (), (), ())
    assert choose_tolerance(canary, "float32") == TOLERANCE
    assert choose_tolerance(canary, "bfloat16") == TOLERANCE_LOW_PRECISION
    assert choose_tolerance(canary, "bfloat16", chooses=True) == TOLERANCE_OF_CHOICE
    assert choose_tolerance(replace(canary, dtype="bfloat16"), "float32") == TOLERANCE_LOW_PRECISION


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    source = tmp_path_factory.mktemp("source")
    write_checkpoint(source, vocab_size=VOCAB_SIZE, n_layers=4, d_model=256, n_heads=4, kv_n_heads=4)
    write_tokenizer(source)
    found = {}
    for split, shares in {"hidden": (2, 4), "layers": (2, 2), "tensor": (3, 3)}.items():
        found[split] = tmp_path_factory.mktemp("sets") / split
        cut(source, found[split], split=split, shares=shares, compute_canary=compute_canary)
    return found


def test_it_is_computed_where_it_lacks_and_kept(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", vocab_size=VOCAB_SIZE)

    def cut_again(compute: Any) -> Canary | None:
        cut(source, tmp_path / "set", split="hidden", nodes=2, compute_canary=compute)
        return read_manifest(tmp_path / "set").canary

    def fail(*_: Any) -> Canary:
        raise AssertionError("computed again")

    assert cut_again(None) is None
    assert cut_again(lambda *_: None) is None  # it cannot be computed
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


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("dbrx", "the canary's prompts do not reach every expert, so it does not check these: layer 0: "),
        ("iquestloopcoder", "has no canary, so its starts are not checked: its layers are not run one after the other"),
    ],
)
def test_what_it_does_not_check_is_said(family: str, said: str, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "set"
    if family == "dbrx":
        write_words(write_checkpoint(source, n_experts=256, top_k=1, ffn_hidden=32, d_model=32, n_layers=1))
    else:
        write_words(write_family(family, source))
    command = [sys.executable, "-m", "moectl", "shard", str(source), "-o", str(out), "--nodes", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env=process_env(), check=True)
    assert "Warning: " in done.stderr
    assert said in done.stderr
    canary = read_manifest(out).canary
    assert canary is None or len(canary.unmet) >= 256 - 46


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


@pytest.mark.long
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
    again = tmp_path / "again"
    cut(source, again, split="hidden", shares=(2, 4), compute_canary=compute_canary)
    with Session(specs(again)) as session:
        assert isinstance(list(session.generate(Request(1, "hello", 4)))[-1], Done)
    wrong = damage(sets["hidden"], tmp_path / "wrong", "common/layer-001.safetensors")
    with Session(specs(wrong), RunOptions(canary=False)) as session:
        assert not session.model.checked
        assert isinstance(list(session.generate(Request(1, "hello", 4)))[-1], Done)
