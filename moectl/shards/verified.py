"""Whether a shard set's files are the promised ones, without reading all of them at every start.

A file is hashed once. Then `.moectl-verified.json` beside the files records its size, times and inode (`onhost.files`
reads and writes it). As long as these are the same, no program has written to the file or replaced it. Bytes that a
disk loses by itself leave no such trace: `shard --verify` and `deploy --verify` find them. It writes only that record.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moectl.errors import IntegrityError
from moectl.hosts.onhost import files as node
from moectl.model.manifest import NAME, FileEntry, Manifest

_HINT = "moectl deploy (on this machine: moectl shard --verify DIR)"
_SHOWN = 3


def check_files(directory: Path, manifest: Manifest, rank: int) -> None:
    """Compare all files of a rank with the manifest, and the manifest with its record.

    Sizes come first, so that a truncated file is found at once; then files without a valid record are hashed, at about
    1 GB/s. Raises IntegrityError that names the files that are missing or have another size or other bytes.
    """
    files = manifest.files_of(rank)
    wrong = {name: text for name, entry in files.items() if (text := _find_wrong_size(directory / name, entry))}
    if not wrong:
        known = node.read_record(str(directory))
        wanted = {name: [entry.bytes, entry.sha256] for name, entry in files.items()}
        promised = known.get(NAME)
        if isinstance(promised, list) and promised:  # `shard` or `deploy` wrote it; there is no other proof
            wanted[NAME] = [promised[0], promised[-1]]
        others, _, _ = node.compare(str(directory), wanted, known, False)
        wrong = dict.fromkeys(others, "has other bytes than were promised")
        if not others and known != node.read_record(str(directory)):  # a failed check must not change the record
            node.write_record(str(directory), known)
    if wrong:
        shown = [f"{name} {text}" for name, text in sorted(wrong.items())]
        more = f", and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
        raise IntegrityError(f"{', '.join(shown[:_SHOWN])}{more} (in {directory})", hint=_HINT)


def is_manifest_recorded(directory: Path) -> bool:
    """Whether the manifest is the one that `shard` or `deploy` wrote; True where there is no record of it."""
    promised = node.read_record(str(directory)).get(NAME)
    return not isinstance(promised, list) or node.hash_file(str(directory / NAME)) in promised


def take_stamp(path: Path, sha256: str) -> list[Any] | None:
    """Return the record's entry for a file that has just been hashed, None when the file is gone."""
    try:
        return node.make_stamp(path.stat(), sha256)
    except OSError:
        return None


def write_stamps(directory: Path, stamps: Mapping[str, list[Any]]) -> None:
    """Add the entries of a finished set's files and of its manifest to the record, where the disk allows it."""
    before, manifest = node.read_record(str(directory)), directory / NAME
    known = {**before, **stamps, NAME: node.make_stamp(manifest.stat(), node.hash_file(str(manifest)))}
    if known != before:
        node.write_record(str(directory), known)


def sweep(directory: Path) -> None:
    """Delete the temporary records of processes that were killed while they wrote."""
    for left in directory.glob(f"{node.RECORD}.*.tmp"):
        left.unlink(missing_ok=True)


def _find_wrong_size(path: Path, entry: FileEntry) -> str | None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None if size == entry.bytes else f"has {size} bytes, expected {entry.bytes}"
