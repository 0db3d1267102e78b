"""The seam between the HTTP server and what answers: a cluster, an answer, and how they are.

Only shapes. The controller implements them over a session; tests implement them over nothing.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from moectl.engine.protocol import Done, Ready, Token
from moectl.engine.request import Request

NOTICE = "moectl: "  # how a comment in a stream begins that is meant for people
SILENCE_S = 5.0  # a stream that has nothing to say for so long says a comment: its reader knows that the server lives
FOR_EVER = -1.0  # seconds to keep a controller alive
STALLED_S = 60.0  # without progress for so long while there is work: not healthy


@dataclass(frozen=True, slots=True)
class Notice:
    """What a person who waits for an answer should know meanwhile; no part of it."""

    text: str


@dataclass(frozen=True, slots=True)
class Health:
    """How the cluster is at this moment, as far as the controller knows without asking anybody."""

    ranks: int
    ranks_answered: int  # that were heard of within their time
    progress_age_s: float  # since the last token or piece of a prompt, or since there is work, whichever is later
    running: int  # requests that are being answered
    queued: int  # requests that wait for room
    memory_bytes: tuple[int, ...]  # per rank; 0 where it is not known
    restarts: int  # of the cluster, since the controller began

    @property
    def healthy(self) -> bool:
        """Whether every rank answered, and work, where there is some, goes on."""
        idle = self.running == 0 and self.queued == 0
        return self.ranks_answered == self.ranks and (idle or self.progress_age_s <= STALLED_S)


class AnswerEvents(Protocol):
    """One request's events: Token…, then exactly one Done, then the end; a Notice may come at any time before that.

    Iterating raises UsageError when the request is refused (before any Token), another MoectlError when the cluster
    fails; both end it.
    """

    def __aiter__(self) -> AsyncIterator[Token | Done | Notice]: ...

    def cancel(self) -> None:
        """Stop soon. May be called at any time, more than once, and after the end; nobody need iterate any further."""
        ...


@dataclass(frozen=True, slots=True)
class ControllerOptions:
    """How to run a controller; what to run, and with what options, are the session's."""

    socket_path: Path
    keep_alive_s: float
    tcp: tuple[str, int] | None = None  # host and port
    api_key: str | None = None
    restarts: int = 0  # of a failed cluster, within a while
    origins: tuple[str, ...] = ()  # whose pages may ask, as `visitors` reads them
    hosts: tuple[str, ...] = ()  # names of this server that are allowed without a key


class Control(Protocol):
    """What the owner of a controller may do to it, over its Unix socket only."""

    def describe(self) -> dict[str, Any]:
        """Return what it runs, as JSON."""
        ...

    def keep_alive(self, seconds: float, *, asks: bool) -> None:
        """Stay for so long when idle, below 0 for ever; `asks`: a question is about to come, wait for that first.

        Raises RemoteError when it is too late for that.
        """
        ...

    def stop(self, grace_s: float) -> None:
        """End soon; answers in progress have this many seconds."""
        ...


class Cluster(Protocol):
    """A loaded model that answers many requests at once."""

    @property
    def name(self) -> str:
        """The model's name, as clients give it."""
        ...

    @property
    def created(self) -> int:
        """When the model was made or loaded, in seconds since 1970."""
        ...

    @property
    def model(self) -> Ready:
        """What kind of model it is."""
        ...

    async def submit(self, request: Request) -> AnswerEvents:
        """Accept a request, whose id is 0: the cluster numbers it. Returns soon, answered or queued.

        Raises QueueFull when no more may wait, StateError when the cluster is stopping, RemoteError when it has failed.
        """
        ...

    def health(self) -> Health:
        """Return how the cluster is; never waits, never raises."""
        ...
