"""Drive moectl.shards.source.checkpoint and the real huggingface_hub in a process of its own, against the tests' hub.

HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE are read when huggingface_hub is imported, so a test cannot set them
where it runs.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from moectl.shards.source import checkpoint, hub
from moectl.shards.source.checkpoint import Checkpoint, open_checkpoint

CHUNK_BYTES = 16 << 10


@dataclass(slots=True)
class Report:
    """What a run over a checkpoint saw."""

    revision: str | None = None
    tensors: int = 0
    hashes: dict[str, str] = field(default_factory=dict)  # weight file → sha256
    paths: dict[str, str] = field(default_factory=dict)
    peak_bytes: int = 0  # of the work directory
    left: list[str] = field(default_factory=list)  # in the work directory at the end
    progress: dict[str, list[tuple[int, int]]] = field(default_factory=dict)


def start_client(environment: dict[str, str]) -> ProcessPoolExecutor:
    """Start a process with these variables, in which huggingface_hub is not imported yet."""
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, mp_context=spawn, initializer=enter, initargs=(environment,))


def enter(environment: dict[str, str]) -> None:
    """Set the environment and scale huggingface_hub's chunks, and our waits, to tiny files."""
    for name in (
        "HF_TOKEN",
        "HF_HUB_OFFLINE",
        "HF_ENDPOINT",
        "HF_HOME",
        "HF_HUB_CACHE",
        "http_proxy",
        "HTTP_PROXY",
    ):
        os.environ.pop(name, None)
    os.environ.update({"HF_HUB_DISABLE_TELEMETRY": "1", **environment})
    hub._RETRY_WAITS_S = (0.01, 0.01, 0.01, 0.01)
    from huggingface_hub import constants

    constants.DOWNLOAD_CHUNK_SIZE = CHUNK_BYTES


def only_open(source: str, token: str | None = None, revision: str | None = None) -> Report:
    """Open a checkpoint, draw its model and close it."""
    _log_in(token)
    with open_checkpoint(source, revision=revision) as opened:
        draw(opened)
        return Report(opened.revision, len(opened.stored))


def draw(opened: Checkpoint) -> None:
    """Draw a checkpoint's model: what mlx-lm imports reads the environment, too."""
    from moectl.shards import blueprint

    blueprint.draw(opened)


def list_sidecars(source: str) -> tuple[str, ...]:
    """Return the small files that a checkpoint carries along."""
    _log_in(None)
    with open_checkpoint(source) as opened:
        return opened.sidecars


def fetch(source: str, work_dir: Path, *, keep_source: bool = False, token: str | None = None) -> Report:
    """Go through all weight files as `shard` does: the next one comes while this one is read."""
    _log_in(token)
    report = Report()

    def watch(file: str, done: int, total: int) -> None:
        report.progress.setdefault(file, []).append((done, total))
        report.peak_bytes = max(report.peak_bytes, sum(p.stat().st_size for p in _files(work_dir)))

    with open_checkpoint(source, work_dir=work_dir, keep_source=keep_source, on_bytes=watch) as opened:
        draw(opened)
        report.revision, report.tensors = opened.revision, len(opened.stored)
        _consume(opened, report)
    report.left = sorted(p.name for p in _files(work_dir))
    return report


def _consume(opened: Checkpoint, report: Report) -> None:
    files = list(opened.sizes)
    for file, following in zip(files, [*files[1:], None], strict=True):
        path = opened.path(file)
        if following is not None:
            opened.prefetch(following)
        report.hashes[file] = hashlib.sha256(path.read_bytes()).hexdigest()
        report.paths[file] = str(path)
        if following is not None:
            opened.path(following)  # both are there now: the most that may ever be
        opened.release(file)


def pull(source: str) -> Path:
    """Pull a checkpoint into the Hugging Face cache."""
    _log_in(None)
    return checkpoint.pull(source)


def abandon(source: str, work_dir: Path) -> list[str]:
    """Close a checkpoint in the middle of a download; return what is left."""
    _log_in(None)
    begun = threading.Event()

    def watch(file: str, done: int, total: int) -> None:
        if done >= CHUNK_BYTES:
            begun.set()

    opened = open_checkpoint(source, work_dir=work_dir, on_bytes=watch)
    opened.prefetch(next(iter(opened.sizes)))
    assert begun.wait(30)
    opened.close()
    return sorted(p.name for p in _files(work_dir))


def _log_in(token: str | None) -> None:
    os.environ.pop("HF_TOKEN", None)
    if token is not None:
        os.environ["HF_TOKEN"] = token


def _files(root: Path) -> list[Path]:
    return [p for p in root.rglob("*") if p.is_file()] if root.exists() else []
