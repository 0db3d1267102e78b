"""One line of `doctor`: what was looked at, whether it is right, and the command that mends it."""

from __future__ import annotations

import enum
import shlex
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from moectl.errors import MoectlError
    from moectl.hosts.hostfile import Host


class Level(enum.IntEnum):
    """How good or bad a finding is, worst last."""

    SKIP = 0  # it could not be looked at; the text says why
    OK = 1
    WARN = 2
    FAIL = 3

    @property
    def word(self) -> str:
        return "FAIL" if self is Level.FAIL else self.name.lower()


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check."""

    check: str  # a short name for scripts: "ssh", "disk"
    level: Level
    text: str
    fix: str | None = None  # a command, or what a person has to do
    values: Mapping[str, Any] = field(default_factory=dict)  # numbers behind the text, for --json


def ok(check: str, text: str, **values: Any) -> Finding:
    """Return a finding that all is well."""
    return Finding(check, Level.OK, text, None, values)


def warn(check: str, text: str, fix: str | None, **values: Any) -> Finding:
    """Return a finding that costs speed or safety and does not stop moectl."""
    return Finding(check, Level.WARN, text, fix, values)


def fail(check: str, text: str, fix: str | None, **values: Any) -> Finding:
    """Return a finding that stops moectl."""
    return Finding(check, Level.FAIL, text, fix, values)


def skip(check: str, text: str) -> Finding:
    """Return a finding that something could not be looked at."""
    return Finding(check, Level.SKIP, text)


def fail_with(check: str, error: MoectlError, fix: str | None = None) -> Finding:
    """Return one of moectl's errors as a finding; the line already begins with the host's name."""
    return fail(check, error.message.rstrip("."), error.hint or fix)


def worst(findings: Iterable[Finding]) -> Level:
    """Return the worst level; OK where there are no findings."""
    return max((finding.level for finding in findings), default=Level.OK)


def at_host(host: Host, command: str) -> str:
    """Return what an operator types to run a shell command on a host."""
    if host.is_local:
        return command
    terminal = ["-t"] if "sudo" in command.split() else []  # sudo asks for a password
    port = ["-p", str(host.port)] if host.port else []
    name = f"{host.user}@{host.name}" if host.user else host.name
    return shlex.join(["ssh", *terminal, *port, name, command])
