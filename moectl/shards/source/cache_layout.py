"""Directories of other programs: snapshots in the Hugging Face cache, and git clones without their large files.

It looks only at names and at the first bytes of files.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from pathlib import Path

from moectl.errors import CheckpointError, IntegrityError, UsageError

_POINTER = b"version https://git-lfs.github.com/spec/"
_POINTER_BYTES = 1024  # Git LFS reads no larger file as a pointer


def find_snapshot(directory: Path, revision: str | None = None) -> Path:
    """Return the snapshot for a directory models--OWNER--NAME of the cache, or for its directory snapshots.

    Any other directory is returned unchanged. Raises CheckpointError that names the snapshots when none has this
    revision, UsageError for a revision of another directory.
    """
    repository = directory.resolve()  # "." has no name
    if repository.name == "snapshots":
        repository = repository.parent
    snapshots = repository / "snapshots"
    if _repository_of(repository) is None or not snapshots.is_dir():
        if revision is not None:
            raise UsageError(
                f"--revision {revision}: {directory} is a directory, which holds one revision only",
                hint="leave --revision out, or name a repository of the Hub",
            )
        return directory
    wanted = revision or "main"
    ref = repository / "refs" / wanted
    commit = ref.read_text(encoding="utf-8", errors="replace").strip() if ref.is_file() else wanted
    if (snapshots / commit).is_dir():
        return snapshots / commit
    there = sorted(path for path in snapshots.iterdir() if path.is_dir())
    raise CheckpointError(
        f"{directory} has no snapshot of {wanted}",
        hint="give one of its snapshots: " + ", ".join(map(str, there)) if there else "download it again",
    )


def name_snapshot(directory: Path) -> tuple[str, str] | None:
    """Return (repository, commit) of a snapshot's directory in the cache, None for any other directory."""
    directory = directory.resolve()
    repository = _repository_of(directory.parent.parent)
    if directory.parent.name != "snapshots" or repository is None or not re.fullmatch("[0-9a-f]{40}", directory.name):
        return None
    return repository, directory.name


def refuse_pointers(root: Path, files: Iterable[str]) -> None:
    """Raise IntegrityError when one of a directory's files is a pointer of Git LFS."""
    found = [file for file in files if _is_pointer(root / file)]
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise IntegrityError(
            f"{found[0]} in {root} is a Git LFS pointer, not the file{more}",
            hint=f"git -C {shlex.quote(str(root))} lfs pull",
        )


def _repository_of(directory: Path) -> str | None:
    kind, _, name = directory.name.partition("--")
    return name.replace("--", "/", 1) if kind == "models" and name else None


def _is_pointer(path: Path) -> bool:
    try:
        if path.stat().st_size > _POINTER_BYTES:
            return False
        with path.open("rb") as f:
            return f.read(len(_POINTER)) == _POINTER
    except OSError:
        return False  # its reader reports the error
