"""Every error that moectl raises on purpose. It knows nothing of click, of terminals or of any library.

MoectlError (1)
├── UsageError (2)               the command line or its values make no sense
│   ├── ShardsDiffer             a directory holds a shard set of another source or other settings
│   └── BadField                 a field of an API request makes no sense; `param` names it
├── PartialFailure (3)           some hosts or checks failed, others did not
├── HostsError (4)               the hosts file is wrong
├── PlanError (4)                the split, the shares or the model cannot work
│   └── CheckpointError (4)      the model cannot be had, or is not one that moectl runs
├── HostError (5)                a host cannot be used
│   ├── Unreachable              no route, refused, timed out
│   ├── AuthFailed               no key was accepted
│   └── HostKeyError             unknown or changed host key
├── RemoteError (6)              a host was reached, and what ran there failed
│   ├── CommandFailed            a command returned non-zero
│   ├── VersionMismatch          python, mlx, mlx-lm or moectl differ
│   ├── PeerLost                 a rank's connection to another rank broke
│   │   └── Stalled              nothing comes over it any more, or too slowly
│   ├── LinkLost                 the workers ended because this machine slept or was stopped
│   └── RanksDisagree            ranks that should compute the same do not
├── IntegrityError (7)           bytes on disk are not those that were promised
└── StateError (8)               something has to be done first
    ├── NotSharded
    ├── NotDeployed
    ├── AlreadyRunning           another controller has it
    └── QueueFull                as many requests wait as may; `retry_after_s` says when to ask again

Errors carry what a person needs (message, host, hint) and what a script needs (exit_code). `__main__` is the only
place that turns them into text and a process exit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# C0, C1, the line separators, and what turns the direction of writing round.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]+")


class MoectlError(Exception):
    """Say what failed and why in one line; `hint` is a command or action that mends it."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None, host: str | None = None) -> None:
        # What another machine or a file said may be quoted here: it gets no second line, and no hold of a terminal.
        message, hint = _CONTROLS.sub(" ", message), hint and _CONTROLS.sub(" ", hint)
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.host = host

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process borders (one push process per host): keep the keyword-only fields.
        return (_rebuild, (type(self), self.message, self.hint, self.host))

    def __str__(self) -> str:
        return f"{self.host}: {self.message}" if self.host else self.message


def _rebuild(kind: type[MoectlError], message: str, hint: str | None, host: str | None) -> MoectlError:
    return kind(message, hint=hint, host=host)


class UsageError(MoectlError):
    exit_code = 2


class ShardsDiffer(UsageError):
    pass


class BadField(UsageError):
    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        host: str | None = None,
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint, host=host)
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


class RemoteError(MoectlError):
    exit_code = 6


class CommandFailed(RemoteError):
    pass


class VersionMismatch(RemoteError):
    pass


class PeerLost(RemoteError):
    pass


class Stalled(PeerLost):
    pass


class LinkLost(RemoteError):
    pass


class RanksDisagree(RemoteError):
    def __init__(
        self, message: str, *, hint: str | None = None, host: str | None = None, rank: int | None = None
    ) -> None:
        super().__init__(message, hint=hint, host=host)
        self.rank = rank  # the one that is alone with what it computed, where there is one


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
    def __init__(
        self, message: str, *, hint: str | None = None, host: str | None = None, retry_after_s: float = 1.0
    ) -> None:
        super().__init__(message, hint=hint, host=host)
        self.retry_after_s = retry_after_s


def unexpected(error: BaseException, hint: str | None = None, host: str | None = None) -> MoectlError:
    """Return the error of an exception that is a bug in moectl."""
    return MoectlError(f"unexpected {type(error).__name__}: {error} (a bug in moectl)", hint=hint, host=host)


def with_hint(error: MoectlError, hint: str | None) -> MoectlError:
    """Return the same error with another hint, where there is one; the one that is on its way keeps its own."""
    return _rebuild(type(error), error.message, hint, error.host) if hint else error


def to_json(error: MoectlError) -> dict[str, Any]:
    """Return an error as JSON: for a script, or for `from_json` in another process."""
    kind = type(error).__name__
    return {"code": error.exit_code, "kind": kind, "host": error.host, "message": error.message, "hint": error.hint}


def from_json(raw: Mapping[str, Any]) -> MoectlError:
    """Return the error that another process has told; a hint or host that is no text is left out."""
    hint, host = (value if isinstance(value := raw.get(name), str) else None for name in ("hint", "host"))
    return _find_kind(raw.get("kind"))(str(raw.get("message", "")), hint=hint, host=host)


def _find_kind(name: object) -> type[MoectlError]:
    """Return the class of an error by its name; RemoteError where it is none of these."""
    kind = globals().get(str(name))
    return kind if isinstance(kind, type) and issubclass(kind, MoectlError) else RemoteError


def error_json(error: MoectlError | None) -> dict[str, Any] | None:
    """Return an error as a part of a document that names its host beside it."""
    return None if error is None else {name: value for name, value in to_json(error).items() if name != "host"}
