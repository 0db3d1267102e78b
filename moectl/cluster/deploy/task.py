"""What the process that deploys to one host has to know, and what it tells while it works and at its end."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from moectl.cluster.deploy.relay import FLOOR_BYTES_S
from moectl.errors import MoectlError
from moectl.hosts.hostfile import Host
from moectl.hosts.macos import is_older_wheel, parse_version
from moectl.model.manifest import FileEntry


@dataclass(frozen=True, slots=True)
class FileSurvey:
    """What a host tells of its disk, interpreter and files: the answer of `onhost.deploy`'s survey."""

    python: str
    version: str
    root: str
    directory: str
    free: int
    device: int
    env: bool
    writable: bool
    packages: dict[str, str]
    code: str
    stamp: str
    wheels: dict[str, int]  # missing ones → bytes that are there of them
    missing: dict[str, int]
    kept: list[str]
    corrupt: list[str]
    known: dict[str, str]  # hashes that an earlier push recorded
    begun: dict[str, int]  # of the planned files, the bytes that are there
    macos: str = ""  # its version; empty on another system
    wheel: str = ""  # platform tag of the wheel of mlx in the environment, or in this python
    glibc: str = ""  # its version; empty on another system
    executable: str = ""  # the program that a firewall sees; `python` may be a link, or start another one

    @property
    def has_older_mlx(self) -> bool:
        """Whether its mlx was built for an older macOS than the one with RDMA, which it has."""
        return is_older_wheel(self.wheel, parse_version(self.macos))


@dataclass(frozen=True, slots=True)
class Planned:
    """A host was looked at: this many bytes will be copied, this many are there and right."""

    rank: int
    host: str
    copy_bytes: int
    keep_bytes: int


@dataclass(frozen=True, slots=True)
class Working:
    """A host is busy with something that has no progress in bytes."""

    rank: int
    host: str
    what: str


@dataclass(frozen=True, slots=True)
class Advanced:
    """This many more bytes are in place on a host; negative takes back."""

    rank: int
    host: str
    bytes: int


@dataclass(frozen=True, slots=True)
class HostResult:
    """The result for one host. Paths are absolute there; `python` is empty when a dry run would make it."""

    rank: int
    host: Host
    error: MoectlError | None = None
    python: str = ""
    root: str = ""
    directory: str = ""
    copied_bytes: int = 0  # in a dry run: that would be copied
    kept_bytes: int = 0
    free_after_bytes: int = 0
    duration_s: float = 0.0
    relayed_bytes: int = 0  # of those copied, that came from another host

    @property
    def ok(self) -> bool:
        return self.error is None


Event = Planned | Working | Advanced | HostResult
OnEvent = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class HostTask:
    """Everything that the process for one host has to know."""

    rank: int
    host: Host
    shards: Path
    name: str
    files: dict[str, FileEntry]  # moectl.json last
    versions: dict[str, str]
    code: str  # hash of the operator's moectl
    wheels: dict[Path, FileEntry]  # moectl's own first, then those of a wheelhouse, and in the end their list
    dry_run: bool
    verify: bool
    relay: bool = False  # whether this host may take files from others, and give them
    growing: bool = False  # `files` is empty: they are added as they are made
    planned: dict[str, int] = field(default_factory=dict)  # sizes of the files that are being made
    floor_bytes_s: float = FLOOR_BYTES_S
    found: FileSurvey | None = None  # what the host told already

    @property
    def stamp(self) -> str:
        """What the environment's stamp says when there is nothing to install."""
        ours = next(iter(self.wheels.values()))
        return json.dumps({"versions": self.versions, "wheel": ours.sha256}, sort_keys=True)
