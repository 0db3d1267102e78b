"""What the HTTP server needs of a cluster, of an answer and of a controller.

Only types: the controller implements them over a session, tests without one.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from moectl.engine.protocol import Done, Ready, Token
from moectl.engine.request import Request

NOTICE = "moectl: "  # the beginning of a comment in a stream that is meant for people
SILENCE_S = 5.0  # a stream without data for this long sends a comment, so that its reader knows that the server lives
FOR_EVER = -1.0  # seconds to keep a controller alive
STALLED_S = 60.0  # work without progress for this long is not healthy


@dataclass(frozen=True, slots=True)
class Notice:
    """News for a person who waits for an answer; no part of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Thinking:
    """A piece of what the model thinks before it answers; no part of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Health:
    """The state of the cluster, as the controller knows it without asking the workers."""

    ranks: int
    ranks_answered: int  # that have answered a heartbeat in time
    progress_age_s: float  # since the last token or piece of a prompt, or since work came, if that is later
    running: int  # requests that are being answered
    queued: int  # requests that wait for room
    memory_bytes: tuple[int, ...]  # per rank; 0 where it is not known
    restarts: int  # of the cluster, since the controller began

    @property
    def healthy(self) -> bool:
        """Whether every rank answered and any work goes on."""
        idle = self.running == 0 and self.queued == 0
        return self.ranks_answered == self.ranks and (idle or self.progress_age_s <= STALLED_S)


class AnswerEvents(Protocol):
    """One request's events: Token…, then exactly one Done, then the end; a Notice may come at any time before that.

    Iterating raises UsageError when the request is refused, before any Token, and another MoectlError when the cluster
    fails; both end it.
    """

    def __aiter__(self) -> AsyncIterator[Token | Done | Notice]: ...

    def cancel(self) -> None:
        """Stop soon. May be called at any time and more than once; iterating further is not necessary."""
        ...


@dataclass(frozen=True, slots=True)
class ControllerOptions:
    """How to run a controller; a target and RunOptions say what it runs."""

    socket_path: Path
    keep_alive_s: float
    tcp: tuple[str, int] | None = None  # host and port
    api_keys: tuple[str, ...] = ()
    share_cache: bool = False  # the prompt cache, between keys
    restarts: int = 0  # of a failed cluster, within ten minutes
    origins: tuple[str, ...] = ()  # their pages may ask; as `visitors` reads them
    hosts: tuple[str, ...] = ()  # names of this server that are allowed without a key
    aliases: tuple[str, ...] = ()  # as `menu` reads them
    any_model: bool = False  # any name means the model, where there is only one
    pin: str | None = None  # the name of the model that stays loaded


@dataclass(frozen=True, slots=True)
class Listed:
    """One model of a server, as /v1/models lists it."""

    name: str
    created: int
    model: Ready
    loaded: bool = True
    aliases: tuple[str, ...] = ()
    set_name: str = ""
    quantization: str = ""  # "4bit"
    bytes: int = 0  # of all ranks' weights
    demo: bool = False  # the toy
    pinned: bool = False


class Cluster(Protocol):
    """One model of a server: it answers many requests at once, and is loaded for the first one where it is not."""

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
        """What kind of model it is; before it was ever loaded, what its shard set says."""
        ...

    async def submit(self, request: Request) -> AnswerEvents:
        """Accept a request, whose id is 0: the cluster numbers it. Returns soon, answered or queued.

        Raises QueueFull when no more may wait, StateError when the cluster is stopping, RemoteError when it has failed.
        """
        ...


class Models(Protocol):
    """All models of a server, of which one at most is loaded."""

    @property
    def loaded_name(self) -> str | None:
        """The name of the model that is loaded."""
        ...

    def find(self, name: str | None) -> Cluster:
        """Return the model that a client means, by any of its names; "" and None: no name.

        Raises BadField when there is none of this name.
        """
        ...

    def listed(self) -> Sequence[Listed]:
        """Return all models, the one for requests without a name first, unless another one is loaded."""
        ...

    def health(self) -> Health:
        """Return how the cluster is; never waits, never raises."""
        ...
