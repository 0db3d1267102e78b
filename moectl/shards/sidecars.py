"""What `cut` needs of a checkpoint, and the small files that it copies from one into a shard set."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from moectl.files import replace_file
from moectl.model.manifest import NAME as MANIFEST_NAME, FileEntry
from moectl.shards.blueprint import Headers
from moectl.shards.source import sources


class CheckpointReader(Headers, sources.Supply, Protocol):
    """The part of `checkpoint.Checkpoint` that `cut` uses."""

    @property
    def source(self) -> str: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def sizes(self) -> Mapping[str, int]: ...
    @property
    def sidecars(self) -> Sequence[str]: ...
    @property
    def added(self) -> Mapping[str, Path]: ...


def list_sidecars(checkpoint: CheckpointReader) -> list[str]:
    """Return the names of the small files to copy."""
    skip = (MANIFEST_NAME, "model.safetensors.index.json")
    return sorted({"config.json", *(s for s in checkpoint.sidecars if s not in skip)})


def _read_sidecar(checkpoint: CheckpointReader, file: str) -> bytes:
    try:
        return checkpoint.path(file).read_bytes()
    except OSError as error:
        raise sources.explain_unreadable(file, error) from error


def hash_sidecar(checkpoint: CheckpointReader, file: str) -> str:
    """Return the SHA-256 of a small file of the checkpoint."""
    return hashlib.sha256(_read_sidecar(checkpoint, file)).hexdigest()


def copy_sidecar(checkpoint: CheckpointReader, directory: Path, file: str) -> FileEntry:
    """Copy a small file into a shard set; return its entry for the manifest."""
    data = _read_sidecar(checkpoint, file)
    replace_file(directory / file, data)
    return FileEntry(len(data), hashlib.sha256(data).hexdigest())
