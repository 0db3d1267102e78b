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
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from moectl.errors import CheckpointError, IntegrityError, MoectlError, NotSharded
from moectl.files import replace_file
from moectl.model.canary import Canary, build_canary
from moectl.model.geometry import Geometry, read_geometry
from moectl.model.placement import Held, Placement, make_placement, place_experts

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
    held: Held | None = None  # experts of each rank, see `Placement.held`
    canary: Canary | None = None  # what it computes, where that was found out

    @property
    def world_size(self) -> int:
        return len(self.shares)

    @property
    def geometry(self) -> Geometry:
        return read_geometry(self.config)

    @property
    def placement(self) -> Placement:
        if self.held is not None:
            return place_experts(self.geometry, self.held)
        return make_placement(self.geometry, self.split, self.world_size, shares=self.shares, group_size=self.unit)

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
    except (OSError, UnicodeDecodeError) as error:
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
        manifest = _build(raw)
        _ = manifest.placement  # raises when split, shares and config contradict each other
    except IntegrityError:
        raise
    except MoectlError as error:
        # An earlier moectl may have cut what this one refuses.
        fault = "cannot be used" if isinstance(error, CheckpointError) else "is damaged"
        raise IntegrityError(f"{path} {fault}: {error.message}", hint=error.hint or again) from None
    except KeyError as error:
        raise IntegrityError(f"{path} is damaged: it has no {error}", hint=again) from None
    except (ValueError, TypeError, RecursionError) as error:
        raise IntegrityError(f"{path} is damaged: {error}", hint=again) from None
    for name, entry in manifest.files.items():
        if not is_inside(name):
            raise IntegrityError(f"{path} names a file outside its directory: {name!r}", hint=again)
        if not is_entry(entry):
            raise IntegrityError(f"{path} has no valid size and hash for {name!r}", hint=again)
    return manifest


def refuse_links_outside(directory: Path) -> None:
    """Raise IntegrityError when a symbolic link in a shard set leads out of it: nothing there is read or written."""
    from moectl.hosts.onhost import files as node  # Tab reads manifests, and needs to be quick

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
    """Whether an entry that was read holds a size and a SHA-256."""
    return is_count(entry.bytes) and isinstance(entry.sha256, str) and bool(re.fullmatch("[0-9a-f]{64}", entry.sha256))


def is_count(value: object) -> bool:
    """Whether a value that was read is a whole number, not negative."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _build(raw: dict[str, Any]) -> Manifest:
    """Build a manifest of parsed JSON. Raises KeyError, TypeError or ValueError."""
    precision, shares, revision = raw.pop("quantization"), raw.pop("shares"), raw.pop("revision")
    config, unit, files, tensors = raw.pop("config"), raw.pop("unit"), raw.pop("files"), raw.pop("tensors")
    held = _build_held(raw.pop("held", None))  # sets made before there were copies do not have it
    canary = raw.pop("canary", None)
    _require(all(isinstance(raw[key], str) for key in ("name", "source", "fingerprint", "split")), "its texts")
    _require(revision is None or isinstance(revision, str), "its revision")
    _require(isinstance(config, dict), "its config")
    _require(isinstance(shares, list) and all(map(is_count, shares)) and bool(shares), "its shares")
    _require(is_count(unit) and unit > 0, "its unit")
    _require(held is None or (raw["split"], unit, shares) == ("experts", 1, [*map(len, held)]), "its ranks' experts")
    _require(isinstance(files, dict), "its files")
    _require(isinstance(tensors, dict) and all(map(_are_texts, tensors.values())), "its tensors")
    return Manifest(
        **raw,
        revision=revision,
        config=config,
        quantization=_build_quantization(precision),
        shares=tuple(shares),
        unit=unit,
        held=held,
        files={name: FileEntry(**entry) for name, entry in files.items()},
        tensors=tensors,
        canary=None if canary is None else _build_canary(canary, len(shares)),
    )


def _build_canary(raw: Any, ranks: int) -> Canary:
    canary = build_canary(raw)
    prompts = {len(canary.top), len(canary.spread), *map(len, canary.points)}
    _require(len(canary.points) == ranks and len(prompts) == 1, "its canary")
    return canary


def _build_held(held: Any) -> Held | None:
    if held is None:
        return None
    _require(isinstance(held, list) and all(isinstance(numbers, list) for numbers in held), "its ranks' experts")
    _require(all(is_count(number) for numbers in held for number in numbers), "its ranks' experts")
    return tuple(tuple(numbers) for numbers in held)


def _build_quantization(precision: Any) -> Quantization | None:
    if precision is None:
        return None
    q = Quantization(**precision)
    _require(is_count(q.bits) and is_count(q.group_size) and isinstance(q.mode, str), "its quantisation")
    return q


def _are_texts(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(v, str) for v in values)


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise TypeError(f"{what} cannot be read")
