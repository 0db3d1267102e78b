"""What an earlier run left in the directory of a shard set: which of its files can be kept, and which have to go."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from moectl.errors import IntegrityError, NotSharded, ShardsDiffer, UsageError
from moectl.files import partial_path
from moectl.model.manifest import NAME as MANIFEST_NAME, FileEntry, Manifest, read_manifest
from moectl.shards import journal as journals
from moectl.shards.recipe import OutputFile
from moectl.shards.sidecars import CheckpointReader, hash_sidecar, list_sidecars

# The weight files of a shard set of any version of moectl. Of the files that a journal lists, only these are deleted.
_WEIGHTS = re.compile(r"(common|rank-\d+)/(embedding|head|outer|layer-\d+)\.safetensors")


def bind(plain: Manifest, files: Sequence[OutputFile]) -> dict[str, Any]:
    """Return the settings of a shard set: files of an unfinished one may be kept as long as these are equal."""
    q = plain.quantization
    held = {"held": [list(numbers) for numbers in plain.held]} if plain.held else {}
    return held | {
        "schema": "moectl.journal/2",
        "source": plain.source,
        "revision": plain.revision,
        "config": plain.config,
        "quantization": [q.bits, q.group_size, q.mode] if q else None,
        "table": plain.table,
        "split": plain.split,
        "shares": list(plain.shares),
        "fingerprint": plain.fingerprint,
        "files": {f.path: f.bytes for f in files},
    }


def read_old(directory: Path) -> Manifest | None:
    """Return the manifest that is there, None when there is none that can be read."""
    try:
        return read_manifest(directory)
    except (NotSharded, IntegrityError):
        return None


def is_current(checkpoint: CheckpointReader, directory: Path, old: Manifest, plain: Manifest) -> bool:
    """Whether the config and the small files equal the source's, and every file has its size."""
    small = set(list_sidecars(checkpoint))
    # A commit of the Hub never changes; a directory may, and so may files that were added from elsewhere.
    changing = small if checkpoint.revision is None else set(checkpoint.added)
    return (
        old.config == plain.config
        and small == {f for f in old.files if not _WEIGHTS.fullmatch(f)}
        and all(size_of(directory / file) == entry.bytes for file, entry in old.files.items())
        and all(hash_sidecar(checkpoint, f) == old.files[f].sha256 for f in changing)
    )


def find_done(
    directory: Path, plain: Manifest, files: Sequence[OutputFile], binding: Mapping[str, Any]
) -> dict[str, FileEntry] | None:
    """Return the files that an earlier run finished and hashed; None when all files there have to be deleted.

    Raises ShardsDiffer or UsageError when the directory holds something else.
    """
    held = journals.read_journal(directory)
    ours = held is not None and held[0] == binding
    try:
        return _done_of(directory, plain, files, read_manifest(directory))
    except NotSharded:
        pass
    except IntegrityError:
        # The manifest is made again. The weights are kept, and hashed, if it still shows their settings.
        if not ours:
            return {} if _names_settings(directory / MANIFEST_NAME, plain) else None
    if held is None:
        _refuse_strangers(directory)
        return {}
    if not ours:
        what = _difference(held[0], binding)
        raise ShardsDiffer(
            f"{directory} holds an unfinished shard set made with other settings{what}",
            hint="choose another directory with -o, or start afresh with --force",
        )
    return {f: e for f, e in held[1].items() if f in binding["files"] and size_of(directory / f) == e.bytes}


def _done_of(directory: Path, plain: Manifest, files: Sequence[OutputFile], there: Manifest) -> dict[str, FileEntry]:
    """Return the files of a finished shard set that can be kept. Raises ShardsDiffer when it is another one."""
    mine = {f.path: f.bytes for f in files}
    # What the weights do not depend on is read when the model runs.
    structure = replace(there.structure, context=plain.structure.context)
    plain_there = replace(there, name=plain.name, config=plain.config, structure=structure, files={}, tensors={})
    same = replace(plain_there, canary=None) == plain
    kept = {f: e for f, e in there.files.items() if f in mine}
    if same and {f: e.bytes for f, e in kept.items()} == mine:
        return {f: e for f, e in kept.items() if size_of(directory / f) == e.bytes}
    if there.fingerprint != plain.fingerprint and there.source == plain.source:
        raise ShardsDiffer(
            f"{there.source} has changed since {directory} was made from it",
            hint="make it again with --force, or choose another directory with -o",
        )
    raise ShardsDiffer(
        f"{directory} already holds another shard set: {there.source}, "
        f"{there.quantization or '16-bit'}, {there.split} {','.join(map(str, there.shares))}",
        hint="choose another directory with -o, or replace it with --force",
    )


def _names_settings(path: Path, plain: Manifest) -> bool:
    """Whether the text of a damaged manifest, or one of another schema, still holds this source and these settings."""
    text = path.read_text(encoding="utf-8", errors="replace")
    quantization = plain.quantization and asdict(plain.quantization)
    settings: dict[str, Any] = {
        "fingerprint": plain.fingerprint,
        "quantization": quantization,
        "shares": plain.shares,
        "split": plain.split,
    }
    if plain.held is not None:
        settings["held"] = plain.held
    return all(json.dumps({k: v}, indent=1, sort_keys=True)[2:-2] in text for k, v in settings.items())


def _difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    for key in ("source", "revision", "quantization", "table", "split", "shares", "held"):
        if there.get(key) != here.get(key):
            return f": {key} {there.get(key)} there, {here.get(key)} now"
    return ": the source has changed" if there.get("fingerprint") != here["fingerprint"] else ""


def _refuse_strangers(directory: Path) -> None:
    # Hidden files may be ours (a lock, a download) or the desktop's; every other file belongs to the user.
    if any(not p.name.startswith(".") for p in directory.iterdir()):
        raise UsageError(f"{directory} is not empty and is not a shard set", hint="choose a new directory with -o")


def clear(directory: Path, files: Sequence[OutputFile]) -> None:
    """Delete the files of an earlier shard set: those that its records and this plan name."""
    old = {f.path for f in files}
    held = journals.read_journal(directory)
    if held is not None:
        old |= {f for f in held[0].get("files", {}) if _WEIGHTS.fullmatch(f)}
    try:
        old |= set(read_manifest(directory).files)
    except NotSharded:
        if held is None:
            _refuse_strangers(directory)
    except IntegrityError:  # it is ours, but does not list its files
        old |= {f for f in _weights_in(directory) if _WEIGHTS.fullmatch(f)}
    for file in old:
        path = directory / file
        path.unlink(missing_ok=True)
        partial_path(path).unlink(missing_ok=True)
        if path.parent != directory and path.parent.is_dir() and not any(path.parent.iterdir()):
            path.parent.rmdir()
    (directory / MANIFEST_NAME).unlink(missing_ok=True)
    (directory / journals.NAME).unlink(missing_ok=True)


def _weights_in(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.glob("*/*.safetensors")}


def size_of(path: Path) -> int | None:
    """Return the size of a file, None where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return None
