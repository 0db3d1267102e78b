"""Files outlive a power cut on macOS too: one full flush for each, before it gets its name. Here fcntl is patched."""

from __future__ import annotations

import ast
import errno
import fcntl
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moectl import durable
from moectl.files import append_line, replace_file
from moectl.hosts.onhost import files as node
from moectl.shards.writer import _Output
from tests.support.architecture import modules

FULL = 51  # F_FULLFSYNC in macOS's <sys/fcntl.h>


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A Mac's disk: what is asked of it, in order."""
    asked: list[str] = []
    real, fsync, replace = fcntl.fcntl, os.fsync, os.replace

    def control(fd: int, what: int, *rest: Any) -> Any:
        if what != FULL:
            return real(fd, what, *rest)
        asked.append("full")
        return 0

    def flush(fd: int) -> None:
        asked.append("fsync")
        fsync(fd)

    def rename(source: Any, target: Any) -> None:
        asked.append("rename")
        replace(source, target)

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", FULL, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", control)
    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", rename)
    monkeypatch.setattr(Path, "replace", lambda path, target: rename(path, target))
    return asked


WHOLE = ["full", "rename", "fsync"]  # the last one is of the directory


def test_a_small_file_is_flushed_to_the_platter_before_its_name(disk: list[str], tmp_path: Path) -> None:
    """As the manifest, the journal, the record of a deployment are written, here and on a host."""
    replace_file(tmp_path / "moectl.json", b"{}")
    assert disk == WHOLE
    disk.clear()
    node.write(str(tmp_path / "record"), b"{}")
    assert disk == WHOLE


def test_a_received_file_is_flushed_once(disk: list[str], tmp_path: Path) -> None:
    sha256 = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"  # of "x"
    node.receive(lambda count: b"x", str(tmp_path / "part"), 1, sha256, lambda kept: None)
    assert disk == WHOLE


def test_a_part_of_a_shard_set_is_flushed_once(disk: list[str], tmp_path: Path) -> None:
    file: Any = SimpleNamespace(path="part.safetensors", pieces=(), header=b"head", bytes=4)
    with ThreadPoolExecutor(1) as flusher:
        _Output(file, tmp_path, flusher).finish()
    assert disk == WHOLE


def test_each_line_of_the_journal_is_flushed(disk: list[str], tmp_path: Path) -> None:
    with (tmp_path / "journal").open("wb") as f:
        append_line(f.fileno(), {"file": "a"})
    assert disk == ["full"]


@pytest.mark.parametrize("refusal", [errno.ENOTSUP, errno.EINVAL, errno.ENOTTY])
def test_a_file_system_that_refuses_it_gets_a_plain_fsync(
    disk: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: int
) -> None:
    def refuse(fd: int, what: int) -> int:
        raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    replace_file(tmp_path / "moectl.json", b"{}")
    assert disk == ["fsync", "rename", "fsync"]


def test_a_disk_that_fails_is_no_refusal(disk: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int, what: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "fcntl", fail)
    with pytest.raises(OSError, match="Input/output error"):
        replace_file(tmp_path / "moectl.json", b"{}")
    assert list(tmp_path.iterdir()) == []


def test_where_fcntl_does_not_know_it_there_is_fsync(disk: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(fcntl, "F_FULLFSYNC")
    with open(os.devnull, "wb") as f:  # noqa: PTH123
        monkeypatch.setattr(os, "fsync", lambda fd: disk.append("fsync"))
        durable.sync_file(f.fileno())
    assert disk == ["fsync"]


def test_every_fsync_goes_through_one_module() -> None:
    users = {
        name
        for name, tree in modules().items()
        for found in ast.walk(tree)
        if isinstance(found, ast.Attribute) and found.attr in ("fsync", "F_FULLFSYNC")
    }
    assert users == {"durable"}
