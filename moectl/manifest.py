"""The manifest of a shard set, `moectl.json`: what was made of what, and the bytes and hash of every file.

It is the only state that moectl keeps about a model, and the contract between `shard`, `deploy` and the workers. It
reads and writes that one file; it neither makes nor moves the files that it lists.

Layout of a shard set (paths in the manifest are relative, with forward slashes):
    moectl.json                         this file, written last
    config.json tokenizer* LICENSE …    copied from the source
    common/embedding.safetensors        the embedding
    common/layer-000.safetensors …      a layer's replicated tensors, stored once
    common/head.safetensors             final norm and head
    rank-0/layer-000.safetensors …      that rank's experts, one stacked array per projection
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from moectl.errors import IntegrityError, NotSharded
from moectl.geometry import Geometry, read_geometry
from moectl.plan import Placement, make_placement

NAME = "moectl.json"
SCHEMA = "moectl.shards/1"


@dataclass(frozen=True, slots=True)
class Quantization:
    """How weights are quantised, in MLX's words. Router and norms never are."""

    bits: int
    group_size: int
    mode: str = "affine"


@dataclass(frozen=True, slots=True)
class FileEntry:
    """Size in bytes and lower-case hex SHA-256 of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """One shard set: (model, quantisation, split, shares)."""

    name: str
    source: str  # repo id or the directory's name
    revision: str | None  # commit hash of the Hub repository, None for a directory
    fingerprint: str  # of the source's weight files, see `shards.fingerprint_source`
    config: dict[str, Any]  # the source's config.json
    quantization: Quantization | None  # None = 16-bit copy
    split: str
    shares: tuple[int, ...]
    unit: int
    files: dict[str, FileEntry] = field(default_factory=dict)
    tensors: dict[str, list[str]] = field(default_factory=dict)  # tensor name → the files that hold (a part of) it

    @property
    def world_size(self) -> int:
        return len(self.shares)

    @property
    def geometry(self) -> Geometry:
        return read_geometry(self.config)

    @property
    def placement(self) -> Placement:
        return make_placement(self.geometry, self.split, self.world_size, shares=self.shares, group_size=self.unit)

    def files_of(self, rank: int) -> dict[str, FileEntry]:
        """Return the files that a rank needs: its own, the common ones and the small ones at the top."""
        own = f"rank-{rank}/"
        return {p: f for p, f in self.files.items() if not p.startswith("rank-") or p.startswith(own)}

    def to_json(self) -> str:
        """Return the manifest's text; equal manifests give equal bytes."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `moectl.json` durably: temporary name, fsync, rename."""
    temporary = directory / f".{NAME}.partial"
    with temporary.open("w", encoding="utf-8") as f:
        f.write(manifest.to_json())
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(directory / NAME)


def read_manifest(directory: Path) -> Manifest:
    """Read and check `moectl.json` of a shard set.

    Raises NotSharded when there is none, IntegrityError when it is damaged, of another schema, or names a path outside
    the directory.
    """
    path = directory / NAME
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise NotSharded(f"{directory} is not a shard set: it has no {NAME}", hint="moectl shard MODEL") from None
    except (OSError, UnicodeDecodeError) as error:
        raise IntegrityError(f"{path} cannot be read: {error}", hint="run the same 'moectl shard' again") from None
    return parse_manifest(text, path)


def parse_manifest(text: str, path: Path | PurePosixPath) -> Manifest:
    """Parse a manifest's text; `path` only names it in errors. Raises IntegrityError."""
    try:
        raw = json.loads(text)
        if raw.pop("schema", None) != SCHEMA:
            raise IntegrityError(f"{path} is not of schema {SCHEMA}", hint="make the shard set again with this moectl")
        precision = raw.pop("quantization")
        quantization = Quantization(**precision) if precision else None
        files = {p: FileEntry(**f) for p, f in raw.pop("files").items()}
        manifest = Manifest(quantization=quantization, files=files, shares=tuple(raw.pop("shares")), **raw)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise IntegrityError(f"{path} is damaged: {error}", hint="run the same 'moectl shard' again") from None
    for name, entry in files.items():
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
            raise IntegrityError(f"{path} names a file outside its directory: {name!r}")
        if not isinstance(entry.bytes, int) or entry.bytes < 0 or not re.fullmatch("[0-9a-f]{64}", str(entry.sha256)):
            raise IntegrityError(f"{path} has no valid size and hash for {name!r}")
    _ = manifest.placement  # raises when split, shares and config contradict each other
    return manifest
