"""What a host could not do with a file, as one of our errors. `onhost.files` describes it there."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moectl.errors import CommandFailed, IntegrityError, MoectlError, Unreachable
from moectl.hosts.onhost import files as node
from moectl.records import build
from moectl.text import format_gb

# macOS refuses them to what sshd starts.
PRIVATE = (
    "name another place with dir=; on a Mac, ~/Desktop, ~/Documents, ~/Downloads and other disks need 'Allow full disk "
    "access for remote users' (System Settings, General, Sharing, Remote Login)"
)


@dataclass(frozen=True, slots=True)
class Failure:
    """What `onhost.files.describe_failure` says; each kind of error has its own fields."""

    error: str
    free: int = 0
    needed: int = 0
    step: int = 0
    code: int = 0
    said: str = ""
    sha256: str = ""
    kept: int = 0
    reason: str = ""
    path: str = ""
    full: bool = False  # whether a disk has no more room


def source_size(source: Path) -> int:
    """Return the size in bytes of a file about to be sent; raise IntegrityError when it cannot be read."""
    try:
        return source.stat().st_size
    except OSError as error:
        raise IntegrityError(f"{source} cannot be read: {error.strerror}", hint="moectl shard --verify") from None


def put_error(answer: Mapping[str, Any], source: Path, destination: str, sha256: str, host: str) -> MoectlError:
    """Return our error for a failure that `onhost.files.describe_failure` described."""
    failure = read_failure(answer, host)
    match failure.error:
        case "full":
            room = room_text(failure.free, failure.needed)
            return CommandFailed(
                f"{room} for {destination}", host=host, hint=f"free space on {host}, then run it again"
            )
        case "mismatch":
            return _mismatch_error(failure.sha256, source, destination, sha256, host)
        case "busy":
            return CommandFailed(
                f"another push is writing {destination}",
                host=host,
                hint="wait for the other deploy to end; two hosts on one machine need a dir= each",
            )
        case "cut":
            return Unreachable(f"the connection was lost while {destination} was sent", host=host)
        case "os":
            hint = f"free space (or inodes) on {host}, then run it again" if failure.full else None
            if failure.reason == os.strerror(errno.EPERM):
                hint = PRIVATE
            return CommandFailed(f"cannot write {failure.path or destination}: {failure.reason}", host=host, hint=hint)
        case "unexpected":
            return CommandFailed(f"its python failed: {failure.reason}", host=host)
        case "outside":
            return IntegrityError(
                f"{failure.path} leads out of the shard set's directory",
                host=host,
                hint="remove that symbolic link there; to keep shards on another disk, name it with dir=",
            )
    return CommandFailed(f"cannot write {destination}: {failure.error}", host=host)


def read_failure(answer: Mapping[str, Any], host: str) -> Failure:
    """Return the failure in a host's answer. Raises CommandFailed when the answer is not valid."""
    try:
        return build(Failure, dict(answer))
    except ValueError as error:
        raise CommandFailed(f"its python gave an answer that makes no sense: {error}", host=host) from None


def _mismatch_error(found: str, source: Path, destination: str, sha256: str, host: str) -> IntegrityError:
    try:
        damaged = node.hash_file(str(source)) != sha256
    except OSError:
        damaged = True
    if damaged:
        return IntegrityError(f"{source} is not what its manifest promises", hint="moectl shard --verify")
    seen = f"sha256 {found[:8]}… expected {sha256[:8]}…"
    return IntegrityError(f"{destination} is corrupt: {seen}", host=host, hint="run the same command again")


def room_text(free: int, needed: int) -> str:
    """Say how much room a disk has, and how much is needed."""
    return f"disk full: {format_gb(free)} free, {format_gb(needed)} needed"
