"""A model running on its hosts: started and used over one link per rank; the same for one machine and for many.

`Session` starts the workers, makes them join and load, hands them requests, and fails as a whole: the first dead rank,
broken protocol or error ends all of them. `worker_link` is the link to one worker. Nothing here knows terminals, HTTP
or how a shard came to a host.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from moectl import errors
from moectl.engine.protocol import (
    BEAT_S,
    DEFAULT_OPTIONS,
    PREFILL_STEP,
    Beat,
    Cancel,
    Done,
    Event,
    Generate,
    Load,
    Order,
    Prefilled,
    Profile,
    Profiled,
    Ready,
    Refused,
    RunOptions,
    Token,
)
from moectl.engine.request import Request
from moectl.errors import MoectlError, Stalled
from moectl.hosts.hostfile import Host
from moectl.hosts.remote import Remote
from moectl.session.backend import choose_backend
from moectl.session.blame import Blame
from moectl.session.liveness import LOADING_MISSES, MISSES, Sleep, StepDeadline
from moectl.session.startup import LINK_HINT, StartUp
from moectl.session.worker_link import Ended, Heard, WorkerLink, end_all


@dataclass(frozen=True, slots=True)
class RankSpec:
    """Where one rank runs and what it reads there."""

    host: Host
    remote: Remote
    argv: tuple[str, ...]  # starts the worker on the host
    shards: str  # the shard set's directory on the host
    addresses: tuple[str, ...]  # IPv4 addresses for tensor traffic
    env: Mapping[str, str] = field(default_factory=dict)  # added to the worker's environment
    log: str | None = None  # file on the host for a copy of the worker's log


def _least(numbers: Iterable[int | None]) -> int | None:
    """Return the smallest number that is known."""
    return min((number for number in numbers if number is not None), default=None)


_WAKE = (0, None)  # an event that only makes the reader look again whether to go on, and for how long


class Session:
    """The workers of one run; use as a context manager, or call `close`."""

    def __init__(
        self,
        ranks: Sequence[RankSpec],
        options: RunOptions = DEFAULT_OPTIONS,
        *,
        backend: str = "ring",
        load_timeout_s: float = 1800.0,
        step_timeout_s: float = 120.0,
        patience: float = 1.0,
        kv_tokens: int | None = None,
        on_log: Callable[[str, str], None] = lambda host, line: None,
    ) -> None:
        """Take what to run, and the backend that is wanted.

        `patience` multiplies the time that a step may take, after a session that was too slow. `kv_tokens` is for how
        many tokens' keys and values there is room; None: as many as the hosts report.
        """
        self._ranks = ranks
        self._backend = backend
        self._load_timeout_s = load_timeout_s
        self._step_timeout_s = step_timeout_s
        self._patience = patience
        self._options = options
        self._kv_tokens = kv_tokens
        self._events: queue.SimpleQueue[Heard] = queue.SimpleQueue()
        self._links = [
            WorkerLink(rank, spec.host, spec.remote, self._events, on_log) for rank, spec in enumerate(ranks)
        ]
        self._closed = threading.Event()
        self._changing = threading.Lock()  # while a worker is added or the session is closed: none is added after that
        self._closer: threading.Thread | None = None
        self._failure_so_far: MoectlError | None = None
        self._ready: Ready | None = None
        self._unanswered: set[int] = set()  # ids of what was asked and has not ended
        self._sleep = Sleep()
        self._blame = Blame(ranks, self._links, self._events, self._sleep, backend)
        self._deadline = StepDeadline(step_timeout_s, PREFILL_STEP, patience)
        self._joined = False  # before that, a worker cannot answer heartbeats

    def __enter__(self) -> Session:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Start-up: listen, connect, load; each phase bounded.

    def start(self) -> None:
        """Start every worker, make them one group and load the model; raise what went wrong, with the host named."""
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()
        for rank, spec in enumerate(self._ranks):
            self._refuse_closed()
            self._launch(rank, spec)
        up = StartUp(self._ranks, self._links, self._events, self._blame, self._options, self._refuse_closed)
        listening = up.listen()
        if len(self._ranks) > 1:
            hosts = [spec.host for spec in self._ranks]
            up.connect(listening, choose_backend(self._backend, hosts, split=listening[0].split))
        self._joined = True
        if self._kv_tokens is None:  # every rank holds every token's, so the smallest room counts
            self._kv_tokens = _least(event.kv_tokens for event in listening.values())
        step = self._options.prefill_step or _least(event.prefill_step for event in listening.values())
        self._deadline.chunk_tokens = step or PREFILL_STEP
        ready = up.load(Load(self._kv_tokens, step), self._load_timeout_s, self._step_timeout_s * self._patience)
        self._deadline.learn(max(r.token_s for r in ready.values()), max(r.step_s for r in ready.values()))
        self._ready = ready[0]
        self._send_all(Beat())  # the answer says how much memory a rank holds

    def _launch(self, rank: int, spec: RankSpec) -> None:
        process = spec.remote.start(spec.argv, env=spec.env)  # not under the lock: it may take long
        with self._changing:
            if not self._closed.is_set():
                self._links[rank].hold(process)
                return
        with contextlib.suppress(OSError, ValueError, MoectlError):
            process.close()
        self._refuse_closed()

    def _refuse_closed(self) -> None:
        if self._closed.is_set():
            raise errors.StateError("the session is closed")

    # Use.

    def generate(self, request: Request) -> Iterator[Token | Done]:
        """Yield an answer as it comes; the last item is Done.

        Raises UsageError when the model refuses the request, and MoectlError itself when an error ended this answer
        alone: the session goes on. Any other error means that a rank failed or nothing came in time: the session is
        over, and further calls raise the same.
        """
        self.submit(request)
        for event in self.events():
            match event:
                case Token(id=id_) if id_ == request.id:
                    yield event
                case Done(id=id_) if id_ == request.id:
                    yield event
                    return
                case Refused(id=id_) if id_ == request.id:
                    raise event.to_error()
                case _:
                    pass  # progress, or the end of an answer that was given up

    def submit(self, request: Request) -> None:
        """Hand a request to every rank; `events` yields its answer. Ids count up from 1, without gaps."""
        self._deadline.expect(request.id, is_first=not self._unanswered, chars=request.chars)
        self._unanswered.add(request.id)
        self._events.put(_WAKE)  # a reader that waited without an end has a deadline now
        try:
            self._send_all(Generate(request))
        except BaseException:  # it cannot be encoded: no rank has got it, and the next request gets its number
            self._unanswered.discard(request.id)
            self._deadline.forget(request.id)
            raise

    def events(self) -> Iterator[Prefilled | Token | Done | Refused]:
        """Yield the events of all requests, for ever; waiting has a deadline only while a request is unanswered.

        Raises MoectlError when a rank failed, nothing came in time, or the session was closed.
        """
        while True:
            rank, event = self._next_event(self._deadline.left_s if self._unanswered else None)
            match event:
                case Done(id=id_) | Refused(id=id_):
                    self._unanswered.discard(id_)
                    self._deadline.forget(id_)
                    yield event
                case Prefilled(id=id_, tokens=tokens, cached=cached):
                    self._deadline.read(id_, tokens, cached=cached)
                    yield event
                case Token(id=id_):
                    self._deadline.step(id_)
                    yield event
                case Profiled() | None:
                    pass
                case bad:
                    raise self._fail(self._blame.find(rank, bad, self._phase))

    @property
    def _phase(self) -> str:
        if not self._unanswered:
            return "idle"
        return "reading a prompt" if self._deadline.is_reading else "generating"

    @property
    def memory_bytes(self) -> tuple[int, ...]:
        """Bytes of arrays that each rank holds, as it last said."""
        return tuple(link.memory_bytes for link in self._links)

    def count_alive(self, within_s: float) -> int:
        """Return how many ranks have answered a heartbeat in this time."""
        now = time.monotonic()
        return sum(now - link.pulse.heard_s <= within_s for link in self._links)

    def profile(self, order: Profile) -> list[Profiled]:
        """Take decode steps apart on every rank; return what each measured, by rank.

        `order.id` is the next one of the count that requests use too. Raises MoectlError as `generate` does.
        """
        self._send_all(order)
        self._unanswered.add(order.id)
        got: dict[int, Profiled] = {}
        while len(got) < len(self._ranks):
            rank, event = self._next_event(self._step_timeout_s)
            match event:
                case Profiled(id=id_) if id_ == order.id:
                    got[rank] = event
                case Prefilled() | Token() | Done() | Refused() | Profiled() | None:
                    pass
                case _:
                    raise self._fail(self._blame.find(rank, event, "profiling"))
        self._unanswered.discard(order.id)
        return [got[rank] for rank in range(len(self._ranks))]

    @property
    def model(self) -> Ready:
        """What rank 0 said of the model when it was loaded."""
        if self._ready is None:
            raise errors.StateError("no model is loaded yet")
        return self._ready

    @property
    def kv_tokens(self) -> int | None:
        """For how many tokens' keys and values there is room; None where it is not known."""
        return self._kv_tokens

    @property
    def hosts(self) -> tuple[str, ...]:
        """The hosts' names in rank order."""
        return tuple(spec.host.name for spec in self._ranks)

    def _next_event(self, timeout_s: float | None) -> tuple[int, Event | Ended | None]:
        if self._failure_so_far is not None:
            raise self._failure_so_far
        self._refuse_closed()
        try:
            return self._events.get(timeout=timeout_s)
        except queue.Empty:
            if self._sleep.slept_s is not None:
                self._deadline.forgive()
                return _WAKE
            if self._find_quiet(1) is not None:  # a rank may be gone: soon it is known which
                try:
                    return self._events.get(timeout=(MISSES + 1) * BEAT_S)
                except queue.Empty:
                    if (rank := self._find_quiet(MISSES)) is not None:
                        return rank, self._links[rank].describe_silence()
            hosts = ", ".join(spec.host.name for spec in self._ranks)
            waited_s = self._deadline.seconds if self._unanswered else self._step_timeout_s
            raise self._fail(
                Stalled(
                    f"nothing was computed for {waited_s:.3g} s by {hosts}, though all answer (while {self._phase})",
                    hint=LINK_HINT,
                )
            ) from None

    def _find_quiet(self, beats: int) -> int | None:
        return next((rank for rank, link in enumerate(self._links) if link.pulse.quiet >= beats), None)

    def _fail(self, error: MoectlError) -> MoectlError:
        """Remember why the session is over; return the error."""
        self._failure_so_far = error
        return error

    def cancel(self, request_id: int) -> None:
        """Ask all ranks to stop an answer; its Done follows within a few steps."""
        self._send_all(Cancel(request_id))

    def close(self) -> None:
        """Close every link and return when each worker is gone; idempotent, any thread may call it."""
        with self._changing:
            if self._closer is None:
                self._closed.set()
                # No daemon: this process must not end before its workers have.
                closer = threading.Thread(target=self._end, name="close")
                closer.start()
                self._closer = closer
        self._closer.join()

    def _end(self) -> None:
        self._events.put(_WAKE)
        end_all(self._links)

    def _beat(self) -> None:
        while not self._closed.wait(BEAT_S):
            self._sleep.beat()
            most = MISSES if self._ready is not None else LOADING_MISSES
            for rank, link in enumerate(self._links):
                asked = link.beat()
                if self._joined and link.pulse.count(most, asked=asked):
                    self._events.put((rank, link.describe_silence()))

    def _send_all(self, order: Order) -> None:
        for link in self._links:
            link.send(order)
