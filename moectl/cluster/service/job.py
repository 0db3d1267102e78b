"""What the service runs, how it stands, and what launchd and systemd have in common.

`moectl service install` records the job in the state directory, beside the file that launchd or systemd reads.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from moectl.errors import StateError
from moectl.files import make_private_directory, write_whole
from moectl.hosts.remote import Completed, LocalRemote
from moectl.paths import state_dir
from moectl.records import build
from moectl.server.background import SERVICE, log_path
from moectl.text import last_line

SCHEMA = "moectl.service-record/1"
RETRY_S = 30  # from the end of a failed start to the next one: a host may need minutes to boot
ENDING_S = 60  # for answers in progress and the workers' orderly end
TOOL_S = 60.0
# What changes where moectl finds its files and hosts. Keys and tokens are not among them.
CARRIED = (
    "HF_ENDPOINT",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "HF_TOKEN_PATH",
    "MOECTL_SSH_CONFIG",
    "XDG_CACHE_HOME",
    "XDG_CONFIG_HOME",
    "XDG_DATA_HOME",
    "XDG_STATE_HOME",
)


@dataclass(frozen=True, slots=True)
class ServiceJob:
    """What is started, and when."""

    at: str  # "boot" or "login"
    program: tuple[str, ...]  # the words that start moectl
    words: tuple[str, ...]  # the flags of `serve`
    environment: dict[str, str]
    log: str
    url: str

    @property
    def serve(self) -> tuple[str, ...]:
        """The command that the service is."""
        return (*self.program, "serve", *self.words)

    @property
    def again(self) -> tuple[str, ...]:
        """The command before it: what setup has to repeat after a restart."""
        return (*self.program, "setup", "--again", "--quiet")


@dataclass(frozen=True, slots=True)
class Standing:
    """How an installed service stands, as launchd or systemd tells it."""

    state: str  # "running", "starting", "waiting" for its next start, "failed" or "stopped"
    enabled: bool
    pid: int | None = None
    up_s: float | None = None
    exit_code: int | None = None  # of its last end; None where there was none
    starts: int | None = None


class Manager(Protocol):
    """What starts the service on this system."""

    name: str  # "systemd" or "launchd"

    def path(self, at: str) -> Path:
        """Return where the file for this time of start lies."""
        ...

    def render(self, job: ServiceJob) -> bytes:
        """Return what that file holds."""
        ...

    def refuse(self, at: str) -> None:
        """Raise StateError where a service cannot be started at that time here."""
        ...

    def needs_root(self, at: str) -> bool:
        """Return whether only root can install, start and remove it."""
        ...

    def install(self, job: ServiceJob) -> str:
        """Put the file in its place and start the service; return what a person should know. Raises CommandFailed."""
        ...

    def start(self, at: str) -> None:
        """Start an installed service that does not run. Raises CommandFailed."""
        ...

    def stop(self, at: str) -> None:
        """End it until the next start. Raises CommandFailed."""
        ...

    def remove(self, at: str) -> None:
        """Stop it, and remove its file. Raises CommandFailed."""
        ...

    def look(self, at: str) -> Standing:
        """Return how it stands. Raises StateError."""
        ...


def make_job(at: str, words: Sequence[str], url: str) -> ServiceJob:
    """Return the job of this moectl, with what its environment says about files."""
    found = {name: os.environ[name] for name in CARRIED if os.environ.get(name)}
    return ServiceJob(at, find_program(), tuple(words), found, str(log_path(SERVICE)), url)


def find_program() -> tuple[str, ...]:
    """Return the words that start this moectl from anywhere: its script, else its python."""
    script = Path(sys.executable).with_name("moectl")
    if os.access(script, os.X_OK):
        return (str(script),)
    return (sys.executable, "-P", "-m", "moectl")


def tool(*argv: str) -> Completed:
    """Run a program of launchd or systemd; its exit code is the caller's to judge. Raises CommandFailed."""
    return LocalRemote().run(argv, check=False, timeout_s=TOOL_S)


def said(done: Completed) -> str:
    """Return why a program failed, in one line."""
    return last_line(done.stderr) or last_line(done.stdout) or f"exit code {done.code}"


def prepare_log(job: ServiceJob) -> None:
    """Make the log for its owner alone; launchd and systemd would let all read it. Raises StateError."""
    path = Path(job.log)
    try:
        make_private_directory(path.parent)
        path.touch(mode=0o600)
    except OSError as error:
        raise StateError(f"cannot write {path}: {error.strerror}", hint="is XDG_STATE_HOME writable?") from None


# The record.


def record_path() -> Path:
    """Return the file on this machine that says what the service runs."""
    return state_dir() / "service.json"


def write_record(job: ServiceJob) -> None:
    """Record what was installed. Raises StateError."""
    try:
        make_private_directory(record_path().parent)
    except OSError as error:
        raise StateError(
            f"cannot write {record_path()}: {error.strerror}", hint="is XDG_STATE_HOME writable?"
        ) from None
    write_whole(record_path(), json.dumps({"schema": SCHEMA, **asdict(job)}, indent=1).encode() + b"\n")


def read_record() -> ServiceJob | None:
    """Return what was installed; None where there is no record that can be read."""
    try:
        raw = json.loads(record_path().read_text(encoding="utf-8"))
        if raw.pop("schema") != SCHEMA:
            return None
        return build(ServiceJob, raw)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return None  # it is only a note: the file of launchd or systemd counts


def forget_record() -> None:
    """Remove the record."""
    record_path().unlink(missing_ok=True)
