"""Cut a checkpoint into a shard set, finish an interrupted one, and check a finished one.

It writes the manifest last. `earlier` says which files can be kept, `writer` makes the missing files of the `recipe`,
`journal` records those that are done.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moectl.durable import make_directory, sync_directory
from moectl.errors import IntegrityError, StateError, UsageError
from moectl.files import explain_refusal, free_bytes, partial_path
from moectl.model.canary import Canary
from moectl.model.manifest import (
    NAME as MANIFEST_NAME,
    FileEntry,
    Manifest,
    read_manifest,
    refuse_links_outside,
    write_manifest,
)
from moectl.model.placement import Placement
from moectl.model.regions import Region
from moectl.shards import journal as journals
from moectl.shards.blueprint import Blueprint
from moectl.shards.earlier import bind, clear, find_done, is_current, read_old, size_of
from moectl.shards.recipe import OutputFile, plan_files
from moectl.shards.sidecars import CheckpointReader, copy_sidecar, list_sidecars
from moectl.shards.source import sources
from moectl.shards.verified import is_manifest_recorded, sweep, take_stamp, write_stamps
from moectl.shards.writer import OnBytes, OnHashed, hash_file, make_files
from moectl.text import format_gb

MAX_JOBS = 16
ComputeCanary = Callable[[Path, Manifest], Canary | None]


def default_jobs() -> int:
    """Return how many streams to use: one core is left to reading, writing and hashing."""
    return max(1, min(4, (os.cpu_count() or 2) - 1))


def output_bytes(files: Iterable[OutputFile]) -> int:
    """Return the bytes of all planned files, without the model's small files."""
    return sum(f.bytes for f in files)


def cut(
    checkpoint: CheckpointReader,
    blueprint: Blueprint,
    placement: Placement,
    directory: Path,
    *,
    name: str,
    jobs: int = 1,
    on_bytes: OnBytes = lambda _: None,
    on_file: OnHashed = lambda *_: None,
    compute_canary: ComputeCanary | None = None,
    force: bool = False,
    wait_s: float = 0.0,
) -> Manifest:
    """Write the shard set of a checkpoint to `directory`, or finish an interrupted one; return its manifest.

    `jobs` threads work at once. The calling thread calls `on_bytes` with output
    bytes as they are written (those of an earlier run first), `output_bytes` in all, and `on_file` for every weight
    file that is whole, hashed and recorded; an exception of `on_file` ends the cut. `compute_canary` runs the result to
    make the canary of the manifest (None: there is none). A finished set with the same settings is not changed, except
    for a missing canary and small files that have changed in the source; `force` starts afresh. For `wait_s`, another
    process may work on the directory.
    Raises PlanError, CheckpointError, ShardsDiffer or UsageError (the directory holds something else), StateError (disk
    full, not writable, in use), and IntegrityError or Unreachable from the checkpoint.
    """
    if not 1 <= jobs <= MAX_JOBS:
        raise UsageError(f"{jobs} jobs are not possible; use 1 to {MAX_JOBS}")
    files = plan_files(blueprint, checkpoint.stored, placement)
    plain = _describe(checkpoint, blueprint, placement, name)
    try:
        make_directory(directory.absolute())
        refuse_links_outside(directory)
        with journals.lock_directory(directory, wait_s=wait_s):
            watch = _Watch(on_bytes, on_file, compute_canary)
            return _cut_locked(checkpoint, plain, files, directory, jobs, watch, force)
    except OSError as error:
        raise explain_refusal(error, directory) from error


def check(
    checkpoint: CheckpointReader, blueprint: Blueprint, placement: Placement, directory: Path, *, name: str
) -> None:
    """Raise what `cut` would raise for what the directory holds; write nothing."""
    files = plan_files(blueprint, checkpoint.stored, placement)
    plain = _describe(checkpoint, blueprint, placement, name)
    try:
        if directory.exists():
            find_done(directory, plain, files, bind(plain, files))
    except OSError as error:
        raise explain_refusal(error, directory) from error


def _describe(checkpoint: CheckpointReader, blueprint: Blueprint, placement: Placement, name: str) -> Manifest:
    """Return the manifest of a shard set before it has files."""
    return Manifest(
        name=name,
        source=checkpoint.source,
        revision=checkpoint.revision,
        fingerprint=fingerprint_source(checkpoint),
        config=checkpoint.config,
        structure=blueprint.structure,
        quantization=blueprint.quantization,
        table=blueprint.table,
        split=placement.split,
        shares=placement.shares,
        held=placement.held,
    )


def fingerprint_source(checkpoint: CheckpointReader) -> str:
    """Return a hash of the state of the weight files, made without reading them.

    A commit of the Hub never changes. A directory may change without new names or sizes, so its times count too.
    Raises CheckpointError when a file cannot be examined.
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
            f"{directory / MANIFEST_NAME} has changed since it was written", hint="run the same 'moectl shard' again"
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
    """The callbacks of a cut."""

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
    jobs: int,
    watch: _Watch,
    force: bool,
) -> Manifest:
    sweep(directory)
    binding = bind(plain, files)
    done = None if force else find_done(directory, plain, files, binding)
    if done is None:
        clear(directory, files)
        done = {}
    old = read_old(directory)
    if old is not None and len(done) == len(files) and is_current(checkpoint, directory, old, plain):
        watch.on_bytes(output_bytes(files))
        _tell_files(done, watch.on_file)
        return _keep(directory, old, watch.add_canary(directory, replace(old, name=plain.name)))
    with journals.Journal(directory, binding, done) as journal:
        (directory / MANIFEST_NAME).unlink(missing_ok=True)  # after the journal: one of them marks the set as ours
        # A file gets its final name before it is hashed: with that name it is whole, and is not made again.
        named = [f for f in files if f.path not in done and size_of(directory / f.path) == f.bytes]
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


def _keep(directory: Path, old: Manifest, new: Manifest) -> Manifest:
    """Keep a finished set; only its manifest may change, in other fields than the files."""
    if old != new:
        write_manifest(directory, new)
    write_stamps(directory, {})  # adds that of the manifest, which has just been compared with the source
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
    entries = {file: copy_sidecar(checkpoint, directory, file) for file in list_sidecars(checkpoint)}
    entries |= {f.path: done[f.path] for f in files}
    tensors: dict[str, dict[str, tuple[Region, ...]]] = {}
    for file in files:
        for tensor, regions in file.tensors.items():
            tensors.setdefault(tensor, {})[file.path] = regions
    return replace(plain, files=dict(sorted(entries.items())), tensors=tensors)


def _drop_stale(directory: Path, old: Manifest | None, new: Manifest) -> None:
    """Delete the small files that the source no longer has: all files there count as parts of the tokenizer."""
    for file in old.files if old is not None else ():
        if file not in new.files:
            (directory / file).unlink(missing_ok=True)


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
