"""From a model's name to a shard set: names, defaults, finding one again, and never answering with another model's."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest

from moectl.errors import NotSharded, PlanError, ShardsDiffer, UsageError
from moectl.model.manifest import read_manifest
from moectl.model.routing import Routing
from moectl.model.structure import Quantization
from moectl.paths import cache_dir, data_dir
from moectl.shards import prepare
from moectl.shards.prepare import Wanted
from tests.support.tiny import write_checkpoint


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "tiny")


def routed(*counts: int, layers: int = 2) -> Routing:
    return Routing("tiny", sum(counts), 1, (counts,) * layers)


@pytest.mark.parametrize(
    ("wanted", "name"),
    [
        (Wanted(nodes=2), "tiny-bf16-hidden-2"),
        (Wanted(nodes=4), "tiny-bf16-hidden-4"),
        (Wanted(shares=(2, 2)), "tiny-bf16-hidden-2"),
        (Wanted(shares=(1.5, 0.5)), "tiny-bf16-hidden-2-1.5.0.5"),
        (Wanted(split="tensor", nodes=2), "tiny-bf16-tensor-2"),
        (Wanted(split="layers", nodes=2), "tiny-bf16-layers-2"),
        (Wanted(), "tiny-bf16-hidden-1"),
        (Wanted(shares=(1, 5)), "tiny-bf16-hidden-2-1.5"),
        (Wanted(split="experts", shares=(8, 4, 4)), "tiny-bf16-experts-3-8.4.4"),
        (Wanted(split="experts", nodes=4, replicas=2), "tiny-bf16-experts-4-x2"),
        (Wanted(shares=(9, 8, 4), replicas=2), "tiny-bf16-experts-3-x2-9.8.4"),
        (Wanted(nodes=2, routing=routed(*[1] * 16)), "tiny-bf16-experts-2"),
        (Wanted(nodes=2, bits=4), "tiny-q4-hidden-2"),
        (Wanted(nodes=2, bits=8, group_size=32), "tiny-q8g32-hidden-2"),
        (Wanted(nodes=2, mode="mxfp4"), "tiny-mxfp4-hidden-2"),
        (Wanted(nodes=2, recipe="mixed_4_6"), "tiny-mixed_4_6-hidden-2"),
        (Wanted(nodes=2, bits=16), "tiny-bf16-hidden-2"),
    ],
)
def test_shard_sets_are_named_after_what_they_are(wanted: Wanted, name: str, model: Path) -> None:
    made = prepare.shard(str(model), wanted, dry_run=True)
    assert made.directory == data_dir() / "shards" / name
    assert not made.directory.exists()


def test_sets_placed_by_frequency_are_told_apart(model: Path) -> None:
    def name(*counts: int) -> str:
        wanted = Wanted(nodes=2, routing=routed(*counts))
        return prepare.shard(str(model), wanted, dry_run=True).directory.name

    one, other = name(*range(16)), name(9, 8, 7, *range(13))
    assert one.startswith("tiny-bf16-experts-2-")
    assert other.startswith("tiny-bf16-experts-2-")
    assert one != other
    assert one == name(*range(16))


def test_a_dry_run_refuses_the_directory_that_the_run_refuses(model: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    cut = partial(prepare.shard, str(model))
    cut(Wanted(nodes=2), directory=tmp_path / "set")
    for dry_run in (True, False):
        with pytest.raises(UsageError, match="is not empty and is not a shard set"):
            cut(Wanted(nodes=2), directory=tmp_path / "full", dry_run=dry_run)
        with pytest.raises(ShardsDiffer, match="already holds another shard set"):
            cut(Wanted(nodes=2, bits=8), directory=tmp_path / "set", dry_run=dry_run)
    cut(Wanted(nodes=2), directory=tmp_path / "set", dry_run=True)
    cut(Wanted(nodes=2, bits=8), directory=tmp_path / "set", dry_run=True, force=True)


def test_another_models_routing_is_refused(model: Path) -> None:
    wanted = Wanted(nodes=2, routing=routed(*range(16), layers=3))
    with pytest.raises(PlanError, match="are of tiny, with 3 layers of 16 experts; this model has 2 of 16"):
        prepare.shard(str(model), wanted, dry_run=True)


def test_defaults_of_quantisation_are_mlxs(model: Path) -> None:
    def quantization(wanted: Wanted) -> Quantization | None:
        made = prepare.shard(str(model), wanted, cached=True)
        return read_manifest(made.directory).quantization

    assert quantization(Wanted()) is None
    assert quantization(Wanted(bits=4)) == Quantization(4, 64)
    assert quantization(Wanted(mode="mxfp8")) == Quantization(8, 32, "mxfp8")
    assert quantization(Wanted(group_size=32)) == Quantization(4, 32)


def test_a_quantised_source_stays_as_it_is(tmp_path: Path) -> None:
    source = str(write_checkpoint(tmp_path / "four", layout="mlx-quantized"))
    made = prepare.shard(source, Wanted(nodes=2))
    assert read_manifest(made.directory).quantization == Quantization(4, 64)
    with pytest.raises(PlanError, match=r"is quantised .* and cannot become 8-bit"):
        prepare.shard(source, Wanted(nodes=2, bits=8))


def test_another_model_of_the_same_name_is_never_mistaken(tmp_path: Path, model: Path) -> None:
    first = prepare.shard(str(model), Wanted(nodes=2))
    before = read_manifest(first.directory).files
    other = write_checkpoint(tmp_path / "elsewhere" / "tiny", seed=9)
    with pytest.raises(ShardsDiffer, match="has changed since"):
        prepare.shard(str(other), Wanted(nodes=2))
    assert read_manifest(first.directory).files == before
    assert read_manifest(first.directory).files == before


def test_the_cache_follows_the_model_and_leaves_peoples_sets_alone(tmp_path: Path, model: Path) -> None:
    mine = prepare.shard(str(model), Wanted(nodes=2))
    cached = prepare.shard(str(model), Wanted(nodes=2), cached=True)
    assert cached.directory == cache_dir() / "shards" / "tiny-bf16-hidden-2"
    before = read_manifest(cached.directory).files
    other = write_checkpoint(tmp_path / "elsewhere" / "tiny", seed=9)
    prepare.shard(str(other), Wanted(nodes=2), cached=True)
    assert read_manifest(cached.directory).files != before
    assert read_manifest(mine.directory).files == before


def test_a_finished_set_is_found_by_name_and_by_directory(model: Path, tmp_path: Path) -> None:
    made = prepare.shard(str(model), Wanted(nodes=2))
    assert prepare.find_shards("tiny-bf16-hidden-2")[0] == made.directory
    assert prepare.find_shards(made.directory)[1].world_size == 2
    with pytest.raises(NotSharded, match="there is no shard set 'nothing'"):
        prepare.find_shards("nothing")


def test_the_newest_set_for_the_hosts_is_taken(model: Path) -> None:
    for wanted in (Wanted(nodes=2), Wanted(nodes=3), Wanted(nodes=2, bits=4)):
        prepare.shard(str(model), wanted)
    assert prepare.newest_shards(2)[0].name == "tiny-q4-hidden-2"
    assert prepare.newest_shards(3)[0].name == "tiny-bf16-hidden-3"
    with pytest.raises(NotSharded, match="no shard set for 4 hosts") as caught:
        prepare.newest_shards(4)
    assert caught.value.hint == "moectl shard MODEL --nodes 4"


def test_an_unfinished_set_is_no_candidate(model: Path) -> None:
    made = prepare.shard(str(model), Wanted(nodes=2))
    (made.directory / "moectl.json").unlink()
    with pytest.raises(NotSharded):
        prepare.newest_shards(2)
    shutil.rmtree(made.directory)
