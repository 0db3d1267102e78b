"""The manifest of a shard set, `moectl.json`: its source, its settings, and the bytes and hash of every file.

It is the only state that moectl keeps about a model, and the contract between `shard`, `deploy` and the workers. This
module reads and writes that one file.

Layout of a shard set (paths in the manifest are relative, with forward slashes):
    moectl.json                         this file, written last
    config.json tokenizer* LICENSE …    copied from the source
    common/embedding.safetensors        what comes before the layers
    common/layer-000.safetensors …      a layer's tensors that every rank has, stored once
    rank-0/layer-000.safetensors …      that rank's part of a layer
    rank-0/head.safetensors             what comes after the layers, for the rank that has it
Names of tensors are those of mlx-lm's parameters.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from moectl.errors import IntegrityError, MoectlError, NotSharded
from moectl.files import replace_file
from moectl.model.canary import Canary
from moectl.model.ownership import Held
from moectl.model.placement import SPLITS, Placement
from moectl.model.regions import Region
from moectl.model.structure import Quantization, Structure
from moectl.records import build

NAME = "moectl.json"
SCHEMA = "moectl.shards/2"


@dataclass(frozen=True, slots=True)
class FileEntry:
    """Size in bytes and lower-case hex SHA-256 of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)  # no slots, because of its cached properties
class Manifest:
    """One shard set: (model, quantisation, split, shares)."""

    name: str
    source: str  # repo id or the directory's name
    revision: str | None  # commit hash of the Hub repository, None for a directory
    fingerprint: str  # of the source's weight files, see `shards.build.fingerprint_source`
    config: dict[str, Any]  # the source's config.json
    structure: Structure
    quantization: Quantization | None  # of most weights; None = 16-bit copy
    table: dict[str, Any] | None  # config.json's `quantization`, as mlx-lm writes it: also of single modules
    split: str
    shares: tuple[int | float, ...]
    files: dict[str, FileEntry] = field(default_factory=dict)
    tensors: dict[str, dict[str, tuple[Region, ...]]] = field(default_factory=dict)  # name → file → regions; none: all
    held: Held | None = None  # experts of each rank, see `Placement.held`
    canary: Canary | None = None  # None where it was not computed

    @property
    def world_size(self) -> int:
        return len(self.shares)

    @cached_property
    def placement(self) -> Placement:
        return Placement(self.split, self.shares, self.structure, self.held)

    def files_of(self, rank: int) -> dict[str, FileEntry]:
        """Return the files that a rank needs: its own, the common ones and the small ones at the top."""
        return {p: f for p, f in self.files.items() if is_for(p, rank)}

    def to_json(self) -> str:
        """Return the manifest's text; equal manifests give equal bytes."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def is_for(name: str, rank: int) -> bool:
    """Whether a rank needs this file of a shard set."""
    return is_shared(name) or name.startswith(f"rank-{rank}/")


def is_shared(name: str) -> bool:
    """Whether all ranks need this file of a shard set."""
    return not name.startswith("rank-")


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `moectl.json` durably. Raises OSError."""
    replace_file(directory / NAME, manifest.to_json().encode())


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
    except (OSError, ValueError) as error:  # no UTF-8, or a path that no file can have
        raise IntegrityError(f"{path} cannot be read: {error}", hint="run the same 'moectl shard' again") from None
    return parse_manifest(text, path)


def parse_manifest(text: str, path: Path | PurePosixPath) -> Manifest:
    """Parse a manifest's text; `path` only names it in errors. Raises IntegrityError."""
    again = "run the same 'moectl shard' again"
    try:
        raw = json.loads(text)
        if not isinstance(raw, dict):
            raise ValueError("it is not a JSON object")
        if raw.pop("schema", None) != SCHEMA:
            raise IntegrityError(f"{path} is not of schema {SCHEMA}", hint=again)
        if not raw.keys() >= {"files", "tensors"}:
            raise ValueError("it has no files")
        manifest = build(Manifest, raw)
        _check(manifest)
        _ = manifest.placement.layers(0)  # raises when split, shares and structure contradict each other
    except IntegrityError:
        raise
    except MoectlError as error:
        raise IntegrityError(f"{path} is damaged: {error.message}", hint=error.hint or again) from None
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{path} is damaged: {error}", hint=again) from None
    for name, entry in manifest.files.items():
        if not is_inside(name):
            raise IntegrityError(f"{path} names a file outside its directory: {name!r}", hint=again)
        if not is_entry(entry):
            raise IntegrityError(f"{path} has no valid size and hash for {name!r}", hint=again)
    return manifest


def refuse_links_outside(directory: Path) -> None:
    """Raise IntegrityError when a symbolic link in a shard set leads out of it, before anything is read or written."""
    from moectl.hosts.onhost import files as node  # slow to import, and Tab reads manifests

    try:
        node.refuse_links_outside(str(directory))
    except node.Outside as error:
        raise IntegrityError(
            f"{error.args[0]} is a symbolic link that leads out of the shard set",
            hint="remove it; to keep a shard set on another disk, put the whole directory there",
        ) from None


def is_inside(name: str) -> bool:
    """Whether a file's name in a record stays within the directory of that record."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and not {"..", "\\", "\0"} & {*path.parts, *name}


def is_entry(entry: FileEntry) -> bool:
    """Whether an entry holds a size and a SHA-256."""
    return is_count(entry.bytes) and isinstance(entry.sha256, str) and bool(re.fullmatch("[0-9a-f]{64}", entry.sha256))


def is_count(value: object) -> bool:
    """Whether a value is a whole number, not negative."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check(manifest: Manifest) -> None:
    """Raise ValueError where parts of a manifest contradict each other."""
    held, canary, q = manifest.held, manifest.canary, manifest.quantization
    kinds, order = manifest.structure.kinds, manifest.structure.order
    _require(bool(manifest.shares) and all(0 < share < float("inf") for share in manifest.shares), "its shares")
    _require(manifest.split in SPLITS, "its split")
    _require(bool(order) and all(0 <= kind < len(kinds) for kind in order), "its structure")
    _require(q is None or min(q.bits, q.group_size) >= 0, "its quantisation")
    if held is not None:
        experts = set(range(manifest.structure.n_experts))
        in_order = all(numbers and list(numbers) == sorted(set(numbers)) for numbers in held)
        alike = manifest.split == "experts" and len(held) == manifest.world_size
        _require(alike and in_order and {e for numbers in held for e in numbers} == experts, "its ranks' experts")
    if canary is not None:
        prompts = {len(canary.top), len(canary.spread), *map(len, canary.points)}
        _require(len(canary.points) == manifest.world_size and len(prompts) == 1, "its canary")


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"{what} cannot be read")
