"""The one seam to a host: run a command, put a file, start a process on a leash. Here: the contract and this machine.

`ssh` implements the same contract over paramiko. It knows nothing of models, shards or ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol


@dataclass(frozen=True, slots=True)
class Completed:
    """What a finished command left: exit code and its output as bytes."""

    code: int
    stdout: bytes
    stderr: bytes


class Process(Protocol):
    """A running child on a host. Closing `stdin` is the leash let go: the child has to exit by itself."""

    stdin: IO[bytes]
    stdout: IO[bytes]
    stderr: IO[bytes]

    def wait(self, timeout_s: float | None = None) -> int:
        """Return the exit code; raise TimeoutError after `timeout_s` seconds."""
        ...

    def kill(self) -> None:
        """End the child at once (over SSH: close the channel)."""
        ...


class Remote(Protocol):
    """One host. Paths on it are POSIX strings; a leading `~/` is the login user's home."""

    name: str

    def run(
        self, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float | None = 60.0, check: bool = True
    ) -> Completed:
        """Run argv (no shell interpretation) to its end; raise CommandFailed on non-zero when `check`."""
        ...

    def start(self, argv: Sequence[str], *, env: Mapping[str, str] | None = None) -> Process:
        """Start argv with pipes on all three streams and return at once."""
        ...

    def put(
        self, source: Path, destination: str, *, sha256: str, on_bytes: Callable[[int], None] | None = None
    ) -> None:
        """Copy a file: resume `destination.partial`, verify its SHA-256 on the host, rename to its final name.

        `on_bytes(n)` is called as n more bytes are in place (kept ones included). Raises IntegrityError on a wrong
        hash, CommandFailed when the host refuses (disk full, no permission), Unreachable when the connection is lost.
        """
        ...

    def close(self) -> None:
        """Close the connection; idempotent."""
        ...
