"""A set's files before they are loaded: what was hashed is believed until somebody touches it, damage has a name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moectl.errors import IntegrityError, MoectlError
from moectl.hosts.onhost import files as node
from moectl.hosts.onhost.files import RECORD
from moectl.model.manifest import NAME, read_manifest
from moectl.session.session import Session
from moectl.shards import build
from moectl.shards.verified import check_files
from tests.session.test_session import specs
from tests.support.alphabet import VOCAB_SIZE, write_tokenizer
from tests.support.cutting import cut
from tests.support.tiny import write_checkpoint

LAYER = "rank-1/layer-000.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source")
    write_checkpoint(source, n_experts=4, top_k=2, ffn_hidden=128, vocab_size=VOCAB_SIZE)
    write_tokenizer(source)
    cut(source, directory := tmp_path_factory.mktemp("sets") / "tiny", nodes=2, bits=4)
    return directory


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """A set of which every file has been hashed once."""
    directory = tmp_path / "copy"
    shutil.copytree(made, directory)
    for rank in range(2):
        check_files(directory, read_manifest(directory), rank)
    return directory


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are hashed from now on."""
    names: list[str] = []
    hash_file = node.hash_file

    def count(path: str) -> str:
        names.append(Path(path).name)
        return hash_file(path)

    monkeypatch.setattr(node, "hash_file", count)
    return names


def test_shard_leaves_stamps_of_what_it_hashed(made: Path, hashed: list[str]) -> None:
    for rank in range(2):
        check_files(made, read_manifest(made), rank)
    assert {n for n in hashed if n.endswith(".safetensors")} == set()
    hashed.clear()
    check_files(made, read_manifest(made), 0)
    assert hashed == []


def test_a_copy_is_hashed_once(made: Path, tmp_path: Path, hashed: list[str]) -> None:
    shutil.copytree(made, tmp_path / "copy")  # with its record, times as they were: other inodes
    check_files(tmp_path / "copy", read_manifest(made), 1)
    assert len(hashed) == len(read_manifest(made).files_of(1)) + 1
    hashed.clear()
    check_files(tmp_path / "copy", read_manifest(made), 1)
    assert hashed == []


def test_other_ranks_files_do_not_matter(copy: Path) -> None:
    (copy / LAYER).unlink()
    check_files(copy, read_manifest(copy), 0)


def _flip(path: Path) -> None:
    """Change one bit and leave size and modification time as they were."""
    status = path.stat()
    with path.open("r+b") as f:
        f.seek(status.st_size // 2)
        byte = f.read(1)[0]
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte ^ 16]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _swap(path: Path) -> None:
    """Put the same rank's file of another layer in its place: same size, older, well-formed."""
    other = path.with_name("layer-001.safetensors")
    assert other.stat().st_size == path.stat().st_size
    assert other.read_bytes() != path.read_bytes()
    shutil.copy2(other, path)


def _rename_over(path: Path) -> None:
    """As `mv` does: the inode is another, its times may be anything."""
    other = path.with_name("layer-001.safetensors")
    twin = path.with_name("twin")
    shutil.copy2(other, twin)
    os.utime(twin, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    twin.replace(path)


DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (_flip, "has other bytes than were promised"),
    (_swap, "has other bytes than were promised"),
    (_rename_over, "has other bytes than were promised"),
    (lambda path: os.truncate(path, 100), "has 100 bytes, expected"),
    (lambda path: path.write_bytes(path.read_bytes() + b"x"), r"has \d+ bytes, expected"),
    (Path.unlink, "is missing"),
]


@pytest.mark.parametrize(("damage", "text"), DAMAGES)
@pytest.mark.parametrize("name", [LAYER, "common/layer-000.safetensors"])
def test_damage_is_found_and_named(copy: Path, damage: Callable[[Path], object], text: str, name: str) -> None:
    damage(copy / name)
    for _ in range(2):  # a failed check vouches for nothing
        with pytest.raises(IntegrityError, match=f"{name} {text}") as caught:
            check_files(copy, read_manifest(copy), 1)
        assert caught.value.hint is not None


def test_small_files_and_the_manifest_count_too(copy: Path) -> None:
    manifest = read_manifest(copy)
    text = (copy / NAME).read_text()
    (copy / NAME).write_text(text.replace('"rope_theta": 500000.0', '"rope_theta": 500001.0'))
    assert read_manifest(copy) != manifest  # well-formed, and another model
    with pytest.raises(IntegrityError, match=r"moectl\.json has other bytes"):
        check_files(copy, read_manifest(copy), 0)
    with pytest.raises(IntegrityError, match="has changed since it was written"):
        build.verify(copy)
    (copy / NAME).write_text(text)
    check_files(copy, manifest, 0)
    _flip(copy / "config.json")
    with pytest.raises(IntegrityError, match=r"config\.json has other bytes"):
        check_files(copy, manifest, 0)


def test_many_are_counted(copy: Path) -> None:
    for path in copy.glob("*/*.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(IntegrityError, match=r"common/.*, common/.*, common/.*, and \d more"):
        check_files(copy, read_manifest(copy), 0)


@pytest.mark.parametrize("record", ["", "[]", "no json", '{"moectl.json": 1, "config.json": [1, 2]}'])
def test_a_record_that_says_nothing_costs_a_hash(copy: Path, record: str, hashed: list[str]) -> None:
    (copy / RECORD).write_text(record)
    check_files(copy, read_manifest(copy), 0)
    assert len(hashed) == len(read_manifest(copy).files_of(0))


def test_a_record_does_not_vouch_for_another_promise(copy: Path) -> None:
    """The record says that the bytes have a hash; whether that is the promised one is for the manifest to say."""
    raw = json.loads((copy / NAME).read_text())
    raw["files"][LAYER]["sha256"] = "0" * 64
    (copy / NAME).write_text(json.dumps(raw))
    (copy / RECORD).write_text(json.dumps({k: v for k, v in node.read_record(str(copy)).items() if k != NAME}))
    with pytest.raises(IntegrityError, match=f"{LAYER} has other bytes"):
        check_files(copy, read_manifest(copy), 1)


def test_clocks_do_not_matter(copy: Path, hashed: list[str]) -> None:
    """Files from the past and the future: times are compared with themselves only."""
    for number, path in enumerate(sorted(copy.glob("*/*.safetensors"))):
        os.utime(path, (0, [1, 4e9][number % 2]))
    check_files(copy, read_manifest(copy), 0)
    hashed.clear()
    check_files(copy, read_manifest(copy), 0)
    assert hashed == []


def test_a_worker_refuses_before_it_loads(copy: Path) -> None:
    _flip(copy / LAYER)
    with (
        pytest.raises(MoectlError, match=f"host1: rank 1: {LAYER} has other bytes than were promised") as caught,
        Session(specs(copy)),
    ):
        pass
    assert caught.value.exit_code == 7


def test_what_the_hint_about_damaged_files_says_finds_what_mends_them(tmp_path: Path) -> None:
    """Without a host: `moectl shard --verify` names the files, and what it says makes them again."""
    write_checkpoint(tmp_path / "tiny", n_experts=4, top_k=2, ffn_hidden=128, vocab_size=VOCAB_SIZE)
    write_tokenizer(tmp_path / "tiny")
    directory = tmp_path / "set"
    manifest = cut(tmp_path / "tiny", directory, nodes=2, bits=4)
    _flip(directory / LAYER)
    with pytest.raises(IntegrityError) as caught:
        check_files(directory, manifest, 1)
    assert caught.value.hint == "moectl deploy (on this machine: moectl shard --verify DIR)"
    command = (sys.executable, "-m", "moectl", "shard", "--verify", str(directory))
    found = subprocess.run(command, capture_output=True, text=True)
    assert (found.returncode, LAYER in found.stderr, "Hint: delete those files and run" in found.stderr) == (
        7,
        True,
        True,
    )
    (directory / LAYER).unlink()
    cut(tmp_path / "tiny", directory, nodes=2, bits=4)
    check_files(directory, manifest, 1)
    assert subprocess.run(command, capture_output=True).returncode == 0
