"""A model running on its hosts: its start and its use, over one leash per rank; the same for one machine and for many.

`Session` starts the workers, makes them join and load, hands them requests, and fails as a whole: the first dead rank,
broken protocol or error ends all of them. How one leash is held is `tether`'s. It knows nothing of terminals, HTTP or
how a shard came to a host.
"""

from __future__ import annotations

import contextlib
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from moectl import errors
from moectl.engine.protocol import (
    BEAT_S,
    LEASH_LOST,
    NONCE_BITS,
    AllGather,
    Beat,
    Cancel,
    Connected,
    Connecting,
    Done,
    Event,
    Fatal,
    Gathered,
    Generate,
    Listening,
    Load,
    Loaded,
    Order,
    Prefilled,
    Profile,
    Profiled,
    Ready,
    Refused,
    RunOptions,
    Start,
    Token,
)
from moectl.engine.request import Request
from moectl.errors import LeashLost, MoectlError, PeerLost, RemoteError, Stalled, Unreachable
from moectl.hosts.hostfile import Host
from moectl.hosts.remote import Remote
from moectl.session.backend import make_connect
from moectl.session.liveness import LOADING_MISSES, MISSES, Sleep, StepDeadline
from moectl.session.worker_link import Ended, Heard, Tether, end_all

INIT_EXTRA_S = 5.0
_BEYOND = 100.0  # times too large: no figure helps
BLAME_S = 1.0  # how long to wait for the rank at fault after another one said that it lost it
PREFILL_STEP = 512  # the engine's, where nothing else is asked for


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


@dataclass(frozen=True, slots=True)
class _Phase:
    """A part of the start: its name, and what is raised when it takes too long."""

    text: str
    late: type[MoectlError] = Unreachable
    hint: str = (
        "'moectl doctor --fast' looks at the links between them; --start-timeout allows more time. "
        "A stranger that was quicker to connect to their ports looks the same: run it again"
    )


_LINK_HINT = "a link between two of them is cut, or one is very slow: 'moectl doctor --fast' looks at each"
_STARTING = _Phase("starting")
_CONNECTING = _Phase("connecting")
_LOADING = _Phase("loading", hint="its disk may be too slow, or its memory too small: 'moectl doctor' looks at both")
_CHECKING = _Phase("computing for the first time", Stalled, _LINK_HINT)

_WAKE = (0, None)  # among the events: look again whether to go on, and for how long


class Session:
    """Workers on a leash; use as a context manager, or call `close`."""

    def __init__(
        self,
        ranks: Sequence[RankSpec],
        *,
        backend: str = "ring",
        start_timeout_s: float = 30.0,
        load_timeout_s: float = 1800.0,
        step_timeout_s: float = 120.0,
        patience: float = 1.0,
        kv_tokens: int | None = None,
        on_log: Callable[[str, str], None] = lambda host, line: None,
        **run: Any,
    ) -> None:
        """Take what to run; `patience` stretches the time that a step may take, after a session that was too slow.

        `kv_tokens`: how many tokens' keys and values there is room for, whatever the hosts say now. `run` is what
        `RunOptions` takes.
        """
        self._ranks = ranks
        self._backend = backend
        self._start_timeout_s = start_timeout_s
        self._load_timeout_s = load_timeout_s
        self._step_timeout_s = step_timeout_s
        self._patience = patience
        self._run = RunOptions(**run)
        self._kv_tokens = kv_tokens
        self._events: queue.SimpleQueue[Heard] = queue.SimpleQueue()
        self._tethers = [Tether(rank, spec.host, spec.remote, self._events, on_log) for rank, spec in enumerate(ranks)]
        self._early: dict[tuple[type[Any], int], Any] = {}  # events of a phase that has not begun for all
        self._gathered: dict[int, str] = {}  # a JACCL exchange under way
        self._closed = threading.Event()
        self._changing = threading.Lock()  # while a worker is added, or it is closed: none is added after that
        self._closer: threading.Thread | None = None
        self._failure_so_far: MoectlError | None = None
        self._ready: Ready | None = None
        self._unanswered: set[int] = set()  # ids of what was asked and has not ended
        self._sleep = Sleep()
        self._deadline = StepDeadline(step_timeout_s, self._run.prefill_step or PREFILL_STEP, patience)
        self._joined = False  # a worker that joins cannot answer

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
        for rank, spec in enumerate(self._ranks):
            self._send(
                rank,
                Start(
                    rank,
                    len(self._ranks),
                    spec.shards,
                    list(spec.addresses),
                    # Longer than this side waits, so that the reason is told here and not by a stack on the host.
                    3 * self._start_timeout_s + INIT_EXTRA_S,
                    spec.log,
                    sum(other.host.address == spec.host.address for other in self._ranks),
                    **asdict(self._run),
                ),
            )
        listening = self._collect(Listening, range(len(self._ranks)), self._start_timeout_s, _STARTING)
        for rank, event in listening.items():
            self._tethers[rank].pid = event.pid
        self._check_versions(listening)
        if len(self._ranks) > 1:
            self._connect(listening)
        self._joined = True
        if self._kv_tokens is None:  # every rank holds every token's, so that the least room is all there is
            known = [event.kv_tokens for event in listening.values() if event.kv_tokens is not None]
            self._kv_tokens = min(known, default=None)
        self._send_all(Load(self._kv_tokens))
        everybody = range(len(self._ranks))
        self._collect(Loaded, everybody, self._load_timeout_s, _LOADING, early=Ready)
        ready = self._collect(Ready, everybody, self._step_timeout_s * self._patience, _CHECKING)
        self._check_canary(ready)
        self._deadline.learn(max(r.token_s for r in ready.values()), max(r.step_s for r in ready.values()))
        self._ready = ready[0]
        self._send_all(Beat())  # whose answer says what they hold

    def _launch(self, rank: int, spec: RankSpec) -> None:
        process = spec.remote.start(spec.argv, env=spec.env)  # may take long: nobody who closes waits for it
        with self._changing:
            if not self._closed.is_set():
                self._tethers[rank].hold(process)
                return
        with contextlib.suppress(OSError, ValueError, MoectlError):
            process.close()
        self._refuse_closed()

    def _refuse_closed(self) -> None:
        if self._closed.is_set():
            raise errors.StateError("the session is closed")

    def _connect(self, listening: dict[int, Listening]) -> None:
        for rank, spec in enumerate(self._ranks):
            if len(listening[rank].ports) != len(spec.addresses):
                raise self._failure(rank, f"{len(listening[rank].ports)} ports for {len(spec.addresses)} addresses")
        endpoints = [
            [f"{address}:{port}" for address, port in zip(spec.addresses, listening[rank].ports, strict=True)]
            for rank, spec in enumerate(self._ranks)
        ]
        hosts = [spec.host for spec in self._ranks]
        nonce = secrets.randbits(NONCE_BITS)
        last = len(self._ranks) - 1
        # The ring's init has no handshake: the last rank dials first, so its neighbours have to be listening by then.
        for some in (range(last), range(last, last + 1)):
            for rank in some:
                self._send(rank, make_connect(self._backend, hosts, endpoints, rank, nonce))
            # A rank that need not wait for the last one may be connected before others are ready to be.
            self._collect(Connecting, some, self._start_timeout_s, _CONNECTING, early=Connected)
        self._collect(Connected, range(last + 1), self._start_timeout_s, _CONNECTING)

    def _check_versions(self, listening: dict[int, Listening]) -> None:
        """Raise VersionMismatch that tells, for every package of which there are several versions, who has which."""
        differences = []
        for package in ("moectl", "mlx", "mlx-lm"):
            hosts: dict[str, list[str]] = {}
            for rank, event in sorted(listening.items()):
                hosts.setdefault(event.versions.get(package, "none"), []).append(self._ranks[rank].host.name)
            if len(hosts) > 1:
                found = ", ".join(f"{version} on {' and '.join(names)}" for version, names in hosts.items())
                differences.append(f"{package} {found}")
        if differences:
            raise errors.VersionMismatch(f"versions differ: {'; '.join(differences)}", hint="moectl deploy")

    def _check_canary(self, ready: Mapping[int, Ready]) -> None:
        wrong = {rank: event for rank, event in ready.items() if event.wrong_at is not None}
        if not wrong:
            return
        first = min(event.wrong_at for event in wrong.values() if event.wrong_at is not None)
        # After the first wrong sum everybody's input is wrong.
        guilty = [rank for rank, event in wrong.items() if event.wrong_at == first]
        off = max(wrong[rank].deviation for rank in guilty)
        said = "beyond all measure" if off > _BEYOND else f"by {off:.2g} of what is right"
        if len(guilty) == len(self._ranks) > 1:
            raise errors.IntegrityError(
                f"all ranks compute other results than when the model was sharded: off {said}",
                hint="if mlx or the hosts are others than then, 'moectl shard --force' makes it anew; "
                "--no-canary starts it all the same",
            )
        raise errors.IntegrityError(
            f"rank {' and '.join(map(str, guilty))} computes wrong results: off {said} at exchange {first}",
            host=self._ranks[guilty[0]].host.name,
            hint="'moectl deploy --verify' checks its files; if they are right, its memory or its mlx is not",
        )

    def _collect(
        self,
        kind: type[Any],
        ranks: Sequence[int],
        timeout_s: float,
        phase: _Phase,
        *,
        early: type[Any] | None = None,
    ) -> dict[int, Any]:
        """Return one event of this kind from each of these ranks, within the time in all.

        `early` is what a rank may say already; it is collected by the next phase.
        """
        deadline = time.monotonic() + timeout_s
        got = {rank: self._early.pop((kind, rank)) for rank in ranks if (kind, rank) in self._early}
        while len(got) < len(ranks):
            try:
                rank, event = self._events.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                missing = [r for r in ranks if r not in got]
                names = ", ".join(self._ranks[r].host.name for r in missing)
                text = f"no answer while {phase.text} within {timeout_s:g} s (waiting for {names})"
                raise self._failure(missing[0], text, kind=phase.late, hint=phase.hint) from None
            self._refuse_closed()
            if isinstance(event, AllGather):
                self._all_gather(rank, event.data)
            elif isinstance(event, kind) and rank in ranks:
                got[rank] = event
            elif early is not None and isinstance(event, early):
                self._early[early, rank] = event
            elif event is not None:
                self._raise_if_bad(rank, event, phase.text)
        return got

    def _all_gather(self, rank: int, data: str) -> None:
        self._gathered[rank] = data
        if len(self._gathered) == len(self._ranks):
            everything = "".join(self._gathered[r] for r in range(len(self._ranks)))
            self._gathered.clear()
            self._send_all(Gathered(everything))

    # Use.

    def generate(self, request: Request) -> Iterator[Token | Done]:
        """Yield an answer as it comes; the last item is Done.

        Raises UsageError when the model refuses the request and MoectlError itself when an error ended this answer
        alone (the session goes on), any other when a rank failed or nothing came for `step_timeout_s` (the session is
        over, and says so again when asked again).
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
                    raise event.error
                case _:
                    pass  # progress, or the tail of an answer that nobody waits for any more

    def submit(self, request: Request) -> None:
        """Hand a request to every rank; what comes of it is among `events`. Ids count up from 1, without gaps."""
        self._deadline.expect(request.id, is_first=not self._unanswered, chars=request.chars)
        self._unanswered.add(request.id)
        self._events.put(_WAKE)  # whoever waits for ever may wait for so long only now
        try:
            self._send_all(Generate(request))
        except BaseException:  # it cannot be encoded, so no rank has got it, and the number is free
            self._unanswered.discard(request.id)
            self._deadline.forget(request.id)
            raise

    def events(self) -> Iterator[Prefilled | Token | Done | Refused]:
        """Yield what comes of all requests, for ever; waiting has an end only while a request is unanswered.

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
                    self._raise_if_bad(rank, bad, self._phase)

    @property
    def _phase(self) -> str:
        if not self._unanswered:
            return "idle"
        return "reading a prompt" if self._deadline.is_reading else "generating"

    @property
    def memory_bytes(self) -> tuple[int, ...]:
        """Bytes of arrays that each rank holds, as it last said."""
        return tuple(tether.memory_bytes for tether in self._tethers)

    def count_alive(self, within_s: float) -> int:
        """Return how many ranks have answered a heartbeat in this time."""
        now = time.monotonic()
        return sum(now - tether.pulse.heard_s <= within_s for tether in self._tethers)

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
                    self._raise_if_bad(rank, event, "profiling")
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
        """For how many tokens' keys and values there is room; None where nobody counted."""
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
            if self._find_quiet(1) is not None:  # somebody may be gone: soon it is known who
                try:
                    return self._events.get(timeout=(MISSES + 1) * BEAT_S)
                except queue.Empty:
                    if (rank := self._find_quiet(MISSES)) is not None:
                        return rank, self._tethers[rank].describe_silence()
            hosts = ", ".join(spec.host.name for spec in self._ranks)
            waited_s = self._deadline.seconds if self._unanswered else self._step_timeout_s
            raise self._fail(
                Stalled(
                    f"nothing was computed for {waited_s:.3g} s by {hosts}, though all answer (while {self._phase})",
                    hint=_LINK_HINT,
                )
            ) from None

    def _find_quiet(self, beats: int) -> int | None:
        return next((rank for rank, tether in enumerate(self._tethers) if tether.pulse.quiet >= beats), None)

    def _fail(self, error: MoectlError) -> MoectlError:
        """Remember why the session is over; return the error."""
        self._failure_so_far = error
        return error

    def cancel(self, request_id: int) -> None:
        """Ask all ranks to stop an answer; its Done follows within a few steps."""
        self._send_all(Cancel(request_id))

    def close(self) -> None:
        """Let go of every leash and return when each worker is gone; idempotent, and any thread's to call."""
        with self._changing:
            if self._closer is None:
                self._closed.set()
                # No daemon: this process does not end before its workers have, whoever gives up waiting here.
                closer = threading.Thread(target=self._end, name="close")
                closer.start()
                self._closer = closer
        self._closer.join()

    def _end(self) -> None:
        self._events.put(_WAKE)
        end_all(self._tethers)

    def _beat(self) -> None:
        while not self._closed.wait(BEAT_S):
            self._sleep.beat()
            most = MISSES if self._ready is not None else LOADING_MISSES
            for rank, tether in enumerate(self._tethers):
                asked = tether.beat()
                if self._joined and tether.pulse.count(most, asked=asked):
                    self._events.put((rank, tether.describe_silence()))

    def _send(self, rank: int, order: Order) -> None:
        self._tethers[rank].send(order)

    def _send_all(self, order: Order) -> None:
        for tether in self._tethers:
            tether.send(order)

    # Whose fault it is, and what to say of it.

    def _raise_if_bad(self, rank: int, event: Event | Ended, phase: str) -> None:
        """Raise for the rank at fault: the one that died or erred by itself, not those that lost it as a peer."""
        reports: list[tuple[int, Event | Ended]] = [(rank, event)]
        deadline = time.monotonic() + BLAME_S
        if isinstance(event, Ended) and event.silent:
            self._tethers[rank].is_silent = True
        while all(_is_about_others(e) for _, e in reports):
            try:
                other, heard = self._events.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            # The end of one that has already said why is no news.
            if isinstance(heard, Fatal | Ended) and other not in (r for r, _ in reports):
                reports.append((other, heard))
        guilty = next((report for report in reports if not _is_about_others(report[1])), reports[0])
        raise self._fail(self._explain(*guilty, phase))

    def _explain(self, rank: int, event: Event | Ended, phase: str) -> MoectlError:
        if isinstance(event, Ended):
            return self._explain_end(rank, event, phase)
        if not isinstance(event, Fatal):
            return self._failure(rank, f"an unexpected {type(event).__name__} while {phase}")
        guilty = rank if event.rank is None or event.rank not in range(len(self._ranks)) else event.rank
        return self._failure(guilty, event.message, kind=errors.find_kind(event.kind), hint=event.hint)

    def _explain_end(self, rank: int, event: Ended, phase: str) -> MoectlError:
        slept_s = self._sleep.slept_s
        code = self._tethers[rank].find_exit_code() if event == Ended() else None
        if slept_s is not None and code in (None, LEASH_LOST):
            return self._failure(
                rank,
                f"the worker let go while {phase}: this machine slept, or was stopped, for {slept_s:.0f} s",
                kind=LeashLost,
                hint="keep it awake: 'caffeinate -i moectl …' on a Mac, 'systemd-inhibit moectl …' on Linux",
            )
        if event.reason is not None:
            return self._failure(rank, f"{event.reason} (while {phase})")
        return self._failure(rank, f"{_describe_code(code)} while {phase}", hint=self._explain_python(rank, code))

    def _explain_python(self, rank: int, code: int | None) -> str | None:
        """Return what to do when a worker could not even start: its interpreter, or what that needs, has gone."""
        log = self._tethers[rank].log
        words = next((line for line in reversed(log) if "No module named" in line), None)
        if words is None and code not in (126, 127):
            return None
        said = words or next(reversed(log), "")
        return f"moectl deploy, which makes its environment again ({self._ranks[rank].argv[0]} does not work: {said})"

    def _failure(
        self, rank: int, message: str, *, kind: type[MoectlError] = RemoteError, hint: str | None = None
    ) -> MoectlError:
        log = list(self._tethers[rank].log)[-3:]
        if log and hint is None:
            hint = "its last words: " + " | ".join(log)
        return kind(f"rank {rank}: {message}", host=self._ranks[rank].host.name, hint=hint)


def _is_about_others(event: Event | Ended) -> bool:
    # A rank that cannot join may be without fault as well: its neighbour died.
    return isinstance(event, Fatal) and event.kind in (PeerLost.__name__, Unreachable.__name__)


def _describe_code(code: int | None) -> str:
    if code is None:
        return "the connection to the worker was lost"
    if code == -1:
        return "the worker was killed by a signal"  # sshd does not tell which
    return f"the worker was killed by signal {-code}" if code < 0 else f"the worker ended with exit code {code}"
