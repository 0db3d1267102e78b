"""Every error that moectl raises on purpose. It knows nothing of click, of terminals or of any library.

MoectlError (1)
├── UsageError (2)               the command line or a value in it is wrong
│   ├── ShardsDiffer             a directory holds a shard set of another source or other settings
│   └── BadField                 a field of an API request is wrong; `param` names it
├── PartialFailure (3)           some hosts or checks failed, others did not
├── HostsError (4)               the hosts file is wrong
├── PlanError (4)                the split, the shares or the model cannot work
│   └── CheckpointError (4)      the model cannot be read or downloaded, or moectl cannot run it
├── HostError (5)                a host cannot be used
│   ├── Unreachable              no route, refused, timed out
│   ├── AuthFailed               no key was accepted
│   ├── HostKeyError             unknown or changed host key
│   └── HostUnfit                its GPU or its RDMA has to be mended first
├── RemoteError (6)              a host was reached, but what ran there failed
│   ├── CommandFailed            a command returned non-zero
│   ├── VersionMismatch          python, mlx, mlx-lm or moectl differ
│   ├── PeerLost                 a rank's connection to another rank broke
│   │   ├── PeerLate             a rank's GPU gave up waiting for another rank
│   │   └── Stalled              data no longer comes over it, or comes too slowly
│   ├── LinkLost                 the workers ended because they heard nothing of this machine
│   └── RanksDisagree            ranks that have to compute the same result do not
├── IntegrityError (7)           a file does not hold the bytes that its manifest lists
└── StateError (8)               another command, or some change, has to come first
    ├── NotSharded
    ├── NotDeployed
    ├── AlreadyRunning           another controller runs
    └── QueueFull                too many requests wait; `retry_after_s` says when to ask again

Errors carry what a person needs (message, host, hint) and what a script needs (exit_code). `__main__` is the only
place that turns them into text and a process exit.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

# C0, C1, the line separators, and the marks that change the direction of writing.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]+")


class MoectlError(Exception):
    """Say what failed and why in one line; `hint` is a command or an action that solves it."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None, host: str | None = None) -> None:
        # A message may quote another machine or a file: control characters could change a terminal or add lines.
        message, hint = _CONTROLS.sub(" ", message), hint and _CONTROLS.sub(" ", hint)
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.host = host

    def __str__(self) -> str:
        return f"{self.host}: {self.message}" if self.host else self.message


class UsageError(MoectlError):
    exit_code = 2


class ShardsDiffer(UsageError):
    pass


class BadField(UsageError):
    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, **common: str | None
    ) -> None:
        super().__init__(message, **common)
        self.param = param
        self.code = code  # OpenAI's short name of the reason, where it has one


class PartialFailure(MoectlError):
    exit_code = 3


class HostsError(MoectlError):
    exit_code = 4


class PlanError(MoectlError):
    exit_code = 4


class CheckpointError(PlanError):
    pass


class HostError(MoectlError):
    exit_code = 5


class Unreachable(HostError):
    pass


class AuthFailed(HostError):
    pass


class HostKeyError(HostError):
    pass


class HostUnfit(HostError):
    pass


class RemoteError(MoectlError):
    exit_code = 6


class CommandFailed(RemoteError):
    pass


class VersionMismatch(RemoteError):
    pass


class PeerLost(RemoteError):
    pass


class PeerLate(PeerLost):
    pass


class Stalled(PeerLost):
    pass


class LinkLost(RemoteError):
    pass


class RanksDisagree(RemoteError):
    def __init__(self, message: str, *, rank: int | None = None, **common: str | None) -> None:
        super().__init__(message, **common)
        self.rank = rank  # the only one with another result, where there is one


class IntegrityError(MoectlError):
    exit_code = 7


class StateError(MoectlError):
    exit_code = 8


class NotSharded(StateError):
    pass


class NotDeployed(StateError):
    pass


class AlreadyRunning(StateError):
    pass


class QueueFull(StateError):
    def __init__(self, message: str, *, retry_after_s: float = 1.0, **common: str | None) -> None:
        super().__init__(message, **common)
        self.retry_after_s = retry_after_s


def unexpected(error: BaseException, hint: str | None = None, host: str | None = None) -> MoectlError:
    """Return the error of an exception that is a bug in moectl."""
    return MoectlError(f"unexpected {type(error).__name__}: {error} (a bug in moectl)", hint=hint, host=host)


def with_hint(error: MoectlError, hint: str | None) -> MoectlError:
    """Return a copy of an error with another hint, or the error itself where there is none."""
    if not hint:
        return error
    changed = copy.copy(error)
    changed.hint = hint
    return changed


def to_json(error: MoectlError) -> dict[str, Any]:
    """Return an error as JSON: for a script, or for `from_json` in another process."""
    kind = type(error).__name__
    return {"code": error.exit_code, "kind": kind, "host": error.host, "message": error.message, "hint": error.hint}


def from_json(raw: Mapping[str, Any]) -> MoectlError:
    """Return the error that `to_json` of another process described; a hint or host that is no text is left out."""
    hint, host = (value if isinstance(value := raw.get(name), str) else None for name in ("hint", "host"))
    return _find_kind(raw.get("kind"))(str(raw.get("message", "")), hint=hint, host=host)


def _find_kind(name: object) -> type[MoectlError]:
    """Return the class of an error by its name; RemoteError for an unknown name."""
    kind = globals().get(str(name))
    return kind if isinstance(kind, type) and issubclass(kind, MoectlError) else RemoteError


def error_json(error: MoectlError | None) -> dict[str, Any] | None:
    """Return an error as JSON without its host, for a document that names the host elsewhere."""
    return None if error is None else {name: value for name, value in to_json(error).items() if name != "host"}
