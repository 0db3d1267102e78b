"""Whether a shard set's files are the promised ones, without reading all of them at every start.

A file is hashed once. Beside the files `.moectl-verified.json` then remembers its size, times and inode (`node` reads
and writes it), and as long as these are the same, nobody has written to the file or put another in its place. What a
disk loses by itself leaves no such trace: that is for `shard --verify` and `deploy --verify` to find. Nothing here
changes a file but that record.
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
    """Compare all files of a rank with the manifest, and the manifest with what was recorded of it.

    Sizes first, so that a truncated file is told at once; then what has no valid stamp is hashed, at about 1 GB/s.
    Raises IntegrityError that names what is missing or has another size or other bytes.
    """
    files = manifest.files_of(rank)
    wrong = {name: text for name, entry in files.items() if (text := _find_wrong_size(directory / name, entry))}
    if not wrong:
        known = node.read_record(str(directory))
        wanted = {name: [entry.bytes, entry.sha256] for name, entry in files.items()}
        promised = known.get(NAME)
        if isinstance(promised, list) and promised:  # what `shard` or `deploy` wrote there; nothing else vouches for it
            wanted[NAME] = [promised[0], promised[-1]]
        others, _, _ = node.compare(str(directory), wanted, known, False)
        wrong = dict.fromkeys(others, "has other bytes than were promised")
        if not others and known != node.read_record(str(directory)):  # a failed check must not forget what was promised
            node.write_record(str(directory), known)
    if wrong:
        shown = [f"{name} {text}" for name, text in sorted(wrong.items())]
        more = f", and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
        raise IntegrityError(f"{', '.join(shown[:_SHOWN])}{more} (in {directory})", hint=_HINT)


def is_manifest_recorded(directory: Path) -> bool:
    """Whether the manifest is the one that `shard` or `deploy` wrote, as far as anything is recorded of it."""
    promised = node.read_record(str(directory)).get(NAME)
    return not isinstance(promised, list) or node.hash_file(str(directory / NAME)) in promised


def take_stamp(path: Path, sha256: str) -> list[Any] | None:
    """Return the stamp of a file that has just been hashed, None when it has gone."""
    try:
        return node.make_stamp(path.stat(), sha256)
    except OSError:
        return None


def write_stamps(directory: Path, stamps: Mapping[str, list[Any]]) -> None:
    """Add the stamps of a finished set's files to the record, and that of its manifest; not where the disk refuses."""
    before, manifest = node.read_record(str(directory)), directory / NAME
    known = {**before, **stamps, NAME: node.make_stamp(manifest.stat(), node.hash_file(str(manifest)))}
    if known != before:
        node.write_record(str(directory), known)


def sweep(directory: Path) -> None:
    """Delete what is left of records that were being written when a process was killed."""
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
