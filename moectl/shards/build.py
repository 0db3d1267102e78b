"""Cut a checkpoint into a shard set, finish one that was interrupted, and check one that is there.

It knows what is in the directory and what is missing, and writes the manifest last; `pipeline` makes the missing files
of the `recipe`, `journal` remembers those that are done.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from moectl.errors import IntegrityError, NotSharded, ShardsDiffer, StateError, UsageError
from moectl.files import explain_refusal, free_bytes, make_directory, partial_path, replace_file, sync_directory
from moectl.model.canary import Canary
from moectl.model.geometry import Geometry
from moectl.model.manifest import (
    NAME as MANIFEST_NAME,
    FileEntry,
    Manifest,
    Quantization,
    read_manifest,
    refuse_links_outside,
    write_manifest,
)
from moectl.model.placement import Placement
from moectl.shards import journal as journals, sources
from moectl.shards.recipe import CheckpointHeaders, OutputFile, describe, plan_files
from moectl.shards.verified import is_manifest_recorded, sweep, take_stamp, write_stamps
from moectl.shards.writer import OnBytes, OnHashed, OpenQuantise, hash_file, make_files
from moectl.text import format_gb

MAX_JOBS = 16
ComputeCanary = Callable[[Path, Manifest], Canary]
# The weight files of a shard set, by any version of moectl: all that is deleted on the word of a record.
_WEIGHTS = re.compile(r"(common/(embedding|head|outer|layer-\d+)|rank-\d+/layer-\d+)\.safetensors")


class CheckpointReader(CheckpointHeaders, sources.Supply, Protocol):
    """What `cut` needs of `checkpoint.Checkpoint`."""

    @property
    def source(self) -> str: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def sizes(self) -> Mapping[str, int]: ...
    @property
    def sidecars(self) -> Sequence[str]: ...
    @property
    def added(self) -> Mapping[str, Path]: ...


def default_jobs() -> int:
    """Return how many streams to use: one core is left to reading, writing and hashing."""
    return max(1, min(4, (os.cpu_count() or 2) - 1))


def output_bytes(files: Iterable[OutputFile]) -> int:
    """Return the bytes of planned files together; the model's small files come on top."""
    return sum(f.bytes for f in files)


def cut(
    checkpoint: CheckpointReader,
    placement: Placement,
    quantization: Quantization | None,
    directory: Path,
    *,
    name: str,
    quantise: OpenQuantise,
    jobs: int = 1,
    on_bytes: OnBytes = lambda _: None,
    on_file: OnHashed = lambda *_: None,
    compute_canary: ComputeCanary | None = None,
    force: bool = False,
    wait_s: float = 0.0,
) -> Manifest:
    """Write the shard set of a checkpoint to `directory`, or finish an interrupted one; return its manifest.

    `quantise` is `quantize.quantizer`; `jobs` streams work at once. `on_bytes` is told output bytes as they come
    (those of an earlier run at once), on the calling thread; they add up to `output_bytes`. So is `on_file` of every
    weight file that is whole and hashed, once it is remembered; what it raises ends the cut. `compute_canary` runs what
    was cut, for the manifest (None: it gets none). A set that is there with the same settings is left alone, but for a
    canary that it lacks and its small files where the source's have changed, unless `force`, which starts afresh.
    `wait_s`: for so long another one may work on it.
    Raises PlanError, CheckpointError, ShardsDiffer or UsageError (the directory holds something else), StateError (disk
    full, not writable, in use), and IntegrityError or Unreachable from the checkpoint.
    """
    if not 1 <= jobs <= MAX_JOBS:
        raise UsageError(f"{jobs} jobs cannot be; use 1 to {MAX_JOBS}")
    files = plan_files(checkpoint, placement, quantization)
    plain = Manifest(
        name=name,
        source=checkpoint.source,
        revision=checkpoint.revision,
        fingerprint=fingerprint_source(checkpoint),
        config=checkpoint.config,
        quantization=quantization,
        split=placement.split,
        shares=placement.shares,
        unit=placement.unit,
        held=placement.held,
    )
    try:
        make_directory(directory.absolute())
        refuse_links_outside(directory)
        with journals.lock_directory(directory, wait_s=wait_s):
            watch = _Watch(on_bytes, on_file, compute_canary)
            return _cut_locked(checkpoint, plain, files, directory, quantise, jobs, watch, force)
    except OSError as error:
        raise explain_refusal(error, directory) from error


def fingerprint_source(checkpoint: CheckpointReader) -> str:
    """Return a hash that tells one state of the weight files from another without reading them.

    A commit of the Hub never changes; a directory may without a change of names or sizes, so its times count too.
    Raises CheckpointError when a file cannot be asked.
    """
    state = [(file, size, _version(checkpoint, file)) for file, size in sorted(checkpoint.sizes.items())]
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def _version(checkpoint: CheckpointReader, file: str) -> int | str:
    if checkpoint.revision is not None:
        return checkpoint.revision
    try:
        return checkpoint.path(file).stat().st_mtime_ns
    except OSError as error:
        raise sources.explain_unreadable(file, error) from error


def verify(directory: Path, *, on_bytes: OnBytes = lambda _: None) -> Manifest:
    """Hash every file of a shard set again and return its manifest.

    Raises NotSharded, and IntegrityError that names the files that are missing or have another size or bytes.
    """
    manifest = read_manifest(directory)
    refuse_links_outside(directory)
    if not is_manifest_recorded(directory):
        raise IntegrityError(
            f"{directory / MANIFEST_NAME} is not as it was written", hint="run the same 'moectl shard' again"
        )
    problems = []
    for file, entry in manifest.files.items():
        problem = _find_problem(directory / file, entry, on_bytes)
        if problem:
            problems.append(f"{file} {problem}")
    if problems:
        named = ", ".join(problems[:3]) + (f", and {len(problems) - 3} more" if len(problems) > 3 else "")
        raise IntegrityError(
            f"{len(problems)} of {len(manifest.files)} files in {directory} are damaged: {named}",
            hint="delete those files and run the same 'moectl shard' again: it makes only them",
        )
    return manifest


def _find_problem(path: Path, entry: FileEntry, on_bytes: OnBytes) -> str | None:
    try:
        size = path.stat().st_size
        if size != entry.bytes:
            return f"has {size} bytes instead of {entry.bytes}"
        return None if hash_file(path, on_bytes) == entry.sha256 else "has other bytes"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _tell_files(files: Mapping[str, FileEntry], on_file: OnHashed) -> None:
    for file, entry in files.items():
        on_file(file, entry)


@dataclass(frozen=True, slots=True)
class _Watch:
    """Who is told of a cut, and what is made of it in the end."""

    on_bytes: OnBytes
    on_file: OnHashed
    compute_canary: ComputeCanary | None

    def add_canary(self, directory: Path, manifest: Manifest) -> Manifest:
        if manifest.canary is not None or self.compute_canary is None:
            return manifest
        return replace(manifest, canary=self.compute_canary(directory, manifest))


def _cut_locked(
    checkpoint: CheckpointReader,
    plain: Manifest,  # without files
    files: Sequence[OutputFile],
    directory: Path,
    quantise: OpenQuantise,
    jobs: int,
    watch: _Watch,
    force: bool,
) -> Manifest:
    sweep(directory)
    binding = _bind(plain, files)
    done = None if force else _find_done(directory, plain, files, binding)
    if done is None:
        _clear(directory, files)
        done = {}
    old = _read_old(directory)
    if old is not None and len(done) == len(files) and _is_current(checkpoint, directory, old, plain):
        watch.on_bytes(output_bytes(files))
        _tell_files(done, watch.on_file)
        return _keep(directory, old, watch.add_canary(directory, replace(old, name=plain.name)))
    with journals.Journal(directory, binding, done) as journal:
        (directory / MANIFEST_NAME).unlink(missing_ok=True)  # after the journal: one of the two says that this is ours
        # A file has its final name before it has its hash: it is whole, and need not be made again.
        named = [f for f in files if f.path not in done and _size(directory / f.path) == f.bytes]
        missing = [f for f in files if f.path not in done and f not in named]
        _check_space(checkpoint, directory, missing)
        watch.on_bytes(output_bytes(f for f in files if f.path in done))
        _tell_files(done, watch.on_file)
        stamps: dict[str, list[Any]] = {}

        def finish_file(file: str, entry: FileEntry) -> None:
            journal.record(file, entry)
            if stamp := take_stamp(directory / file, entry.sha256):
                stamps[file] = stamp
            watch.on_file(file, entry)

        make_files(
            checkpoint,
            directory,
            missing,
            named,
            quantise=quantise,
            jobs=jobs,
            on_bytes=watch.on_bytes,
            on_hashed=finish_file,
        )
        manifest = watch.add_canary(directory, _complete(checkpoint, directory, plain, files, journal.done))
        _drop_stale(directory, old, manifest)
        write_manifest(directory, manifest)
        write_stamps(directory, stamps)
        sync_directory(directory)
        journal.remove()
    return manifest


def _bind(plain: Manifest, files: Sequence[OutputFile]) -> dict[str, Any]:
    """Return what an unfinished directory is bound to: as long as it is equal, its files may be kept."""
    q = plain.quantization
    held = {"held": [list(numbers) for numbers in plain.held]} if plain.held else {}
    return held | {
        "schema": "moectl.journal/1",
        "source": plain.source,
        "revision": plain.revision,
        "config": plain.config,
        "quantization": [q.bits, q.group_size, q.mode] if q else None,
        "split": plain.split,
        "shares": list(plain.shares),
        "unit": plain.unit,
        "fingerprint": plain.fingerprint,
        "files": {f.path: f.bytes for f in files},
    }


def _read_old(directory: Path) -> Manifest | None:
    """Return the manifest of the set that is there, None when there is none that can be read."""
    try:
        return read_manifest(directory)
    except (NotSharded, IntegrityError):
        return None


def _is_current(checkpoint: CheckpointReader, directory: Path, old: Manifest, plain: Manifest) -> bool:
    """Whether everything but the weights is as the source has it, and every file has its size."""
    small = set(_sidecars(checkpoint))
    # A commit of the Hub never changes, a directory may, and so may what comes from elsewhere.
    changing = small if checkpoint.revision is None else set(checkpoint.added)
    return (
        old.config == plain.config
        and small == {f for f in old.files if not _WEIGHTS.fullmatch(f)}
        and all(_size(directory / file) == entry.bytes for file, entry in old.files.items())
        and all(_hash_sidecar(checkpoint, f) == old.files[f].sha256 for f in changing)
    )


def _keep(directory: Path, old: Manifest, new: Manifest) -> Manifest:
    """Leave a whole set alone, but for what its manifest says beside the files."""
    if old != new:
        write_manifest(directory, new)
    write_stamps(directory, {})  # of the manifest: it has just been compared with the source
    (directory / journals.NAME).unlink(missing_ok=True)
    return new


def _complete(
    checkpoint: CheckpointReader,
    directory: Path,
    plain: Manifest,
    files: Sequence[OutputFile],
    done: Mapping[str, FileEntry],
) -> Manifest:
    """Copy the small files and return the manifest of all."""
    entries = {file: _copy_sidecar(checkpoint, directory, file) for file in _sidecars(checkpoint)}
    entries |= {f.path: done[f.path] for f in files}
    tensors: dict[str, list[str]] = {}
    for file in files:
        for tensor in file.tensors:
            tensors.setdefault(tensor, []).append(file.path)
    return replace(plain, files=dict(sorted(entries.items())), tensors=tensors)


def _drop_stale(directory: Path, old: Manifest | None, new: Manifest) -> None:
    """Delete the small files that the source has no more: a tokenizer is read from what is there."""
    for file in old.files if old is not None else ():
        if file not in new.files:
            (directory / file).unlink(missing_ok=True)


def _find_done(
    directory: Path, plain: Manifest, files: Sequence[OutputFile], binding: Mapping[str, Any]
) -> dict[str, FileEntry] | None:
    """Return the files that an earlier run finished and hashed; None when what is there has to go.

    Raises ShardsDiffer or UsageError when the directory holds something else.
    """
    held = journals.read_journal(directory)
    ours = held is not None and held[0] == binding
    try:
        return _done_of(directory, plain, files, read_manifest(directory))
    except NotSharded:
        pass
    except IntegrityError:
        # It can be made again, and the weights need not if it still says what they were made of: they are hashed.
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
    return {f: e for f, e in held[1].items() if f in binding["files"] and _size(directory / f) == e.bytes}


def _done_of(directory: Path, plain: Manifest, files: Sequence[OutputFile], there: Manifest) -> dict[str, FileEntry]:
    """Return the files of a finished shard set that can be kept. Raises ShardsDiffer when it is another one."""
    mine = {f.path: f.bytes for f in files}
    same = replace(there, name=plain.name, config=plain.config, files={}, tensors={}, canary=None) == plain
    kept = {f: e for f, e in there.files.items() if f in mine}
    if same and _shapes(there.geometry) == _shapes(plain.geometry) and {f: e.bytes for f, e in kept.items()} == mine:
        return {f: e for f, e in kept.items() if _size(directory / f) == e.bytes}
    if there.fingerprint != plain.fingerprint and there.source == plain.source:
        raise ShardsDiffer(
            f"{there.source} is not as it was when {directory} was made of it",
            hint="make it again with --force, or choose another directory with -o",
        )
    raise ShardsDiffer(
        f"{directory} already holds another shard set: {there.source}, "
        f"{describe(there.quantization)}, {there.split} {','.join(map(str, there.shares))}",
        hint="choose another directory with -o, or replace it with --force",
    )


def _shapes(geometry: Geometry) -> tuple[object, ...]:
    """Return all of a config that matters to the weights; the rest of it is read when the model runs."""
    outer, layer, expert = geometry.outer_shapes(), geometry.layer_shapes(0), geometry.expert_shapes
    return (geometry.n_layers, geometry.n_experts, outer, layer, expert)


def _names_settings(path: Path, plain: Manifest) -> bool:
    """Whether a damaged manifest, or one of another schema, still says that it was made of this with these settings."""
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
    for key in ("source", "revision", "quantization", "split", "shares", "unit", "held"):
        if there.get(key) != here.get(key):
            return f": {key} {there.get(key)} there, {here.get(key)} now"
    return ": the source has changed" if there.get("fingerprint") != here["fingerprint"] else ""


def _refuse_strangers(directory: Path) -> None:
    # Hidden names may be ours (a lock, a download beside) or the desktop's; anything else is somebody's work.
    if any(not p.name.startswith(".") for p in directory.iterdir()):
        raise UsageError(f"{directory} is not empty and is not a shard set", hint="choose a new directory with -o")


def _clear(directory: Path, files: Sequence[OutputFile]) -> None:
    """Delete what an earlier shard set left, by the names that its records and this plan give."""
    old = {f.path for f in files}
    held = journals.read_journal(directory)
    if held is not None:
        old |= {f for f in held[0].get("files", {}) if _WEIGHTS.fullmatch(f)}
    try:
        old |= set(read_manifest(directory).files)
    except NotSharded:
        if held is None:
            _refuse_strangers(directory)
    except IntegrityError:  # ours, though it does not say what was made
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


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _check_space(checkpoint: CheckpointReader, directory: Path, missing: Sequence[OutputFile]) -> None:
    """Raise StateError unless the disk has room for what is missing."""
    there = sum(p.stat().st_blocks * 512 for p in (partial_path(directory / f.path) for f in missing) if p.exists())
    needed = max(0, output_bytes(missing) - there)
    downloads = sources.peak_bytes(missing, checkpoint.sizes) if checkpoint.revision is not None else 0
    free = free_bytes(directory)
    if needed + downloads > free:
        more = f" and {format_gb(downloads)} for downloads" if downloads else ""
        raise StateError(
            f"{directory} has {format_gb(free)} free, {format_gb(needed)}{more} are needed",
            hint="free some space, or choose another disk with -o",
        )


def _sidecars(checkpoint: CheckpointReader) -> list[str]:
    skip = (MANIFEST_NAME, "model.safetensors.index.json")
    return sorted({"config.json", *(s for s in checkpoint.sidecars if s not in skip)})


def _read_sidecar(checkpoint: CheckpointReader, file: str) -> bytes:
    try:
        return checkpoint.path(file).read_bytes()
    except OSError as error:
        raise sources.explain_unreadable(file, error) from error


def _hash_sidecar(checkpoint: CheckpointReader, file: str) -> str:
    return hashlib.sha256(_read_sidecar(checkpoint, file)).hexdigest()


def _copy_sidecar(checkpoint: CheckpointReader, directory: Path, file: str) -> FileEntry:
    data = _read_sidecar(checkpoint, file)
    replace_file(directory / file, data)
    return FileEntry(len(data), hashlib.sha256(data).hexdigest())
