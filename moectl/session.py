"""A model running on its hosts: one leash per rank, and what comes up them; the same for one machine and for many.

`Session` starts the workers, makes them join and load, hands them requests, and fails as a whole: the first dead rank,
broken protocol or error ends all of them. It knows nothing of terminals, HTTP or how a shard came to a host.
"""

from __future__ import annotations

import collections
import contextlib
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moectl import errors
from moectl.backend import make_connect
from moectl.errors import LeashLost, MoectlError, PeerLost, RemoteError, Stalled, Unreachable
from moectl.hosts import Host
from moectl.leash import (
    BEAT_S,
    NONCE_BITS,
    Alive,
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
    Order,
    Prefilled,
    Profile,
    Profiled,
    Ready,
    Refused,
    Start,
    Token,
    encode,
    read_messages,
)
from moectl.remote import Process, Remote
from moectl.request import Request
from moectl.vigil import BUSY_MISSES, LOADING_MISSES, MISSES, Pulse, Sleep, StepDeadline

LOG_LINES = 20
EXIT_GRACE_S = 5.0
STUCK_S = 1.0  # for an order to go out before the session closes
KILL_S = 3.0  # for a host to end a worker that does not end by itself
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
class _Ended:
    """A rank's stdout reached its end; `reason` when it was not a plain end of file."""

    reason: str | None = None
    silent: bool = False  # it did not end: it does not answer


_WAKE = (0, None)  # among the events: look again whether to go on, and for how long
_Heard = tuple[int, "Event | _Ended | None"]


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
        dtype: str | None = None,
        force: bool = False,
        prefill_step: int | None = None,
        speculate: int = 0,
        patience: float = 1.0,
        canary: bool = True,
        agree_routing: bool = False,
        paranoia: int = 0,
        kv_tokens: int | None = None,
        on_log: Callable[[str, str], None] = lambda host, line: None,
    ) -> None:
        """Take what to run; `patience` stretches the time that a step may take, after a session that was too slow.

        `kv_tokens`: there is room for so many tokens' keys and values, whatever the hosts say now.
        """
        self._ranks = ranks
        self._backend = backend
        self._start_timeout_s = start_timeout_s
        self._load_timeout_s = load_timeout_s
        self._step_timeout_s = step_timeout_s
        self._dtype = dtype
        self._force = force
        self._prefill_step = prefill_step
        self._speculate = speculate
        self._canary = canary
        self._agree_routing = agree_routing
        self._paranoia = paranoia
        self._kv_tokens = kv_tokens
        self._on_log = on_log
        self._events: queue.SimpleQueue[_Heard] = queue.SimpleQueue()
        self._logs = [collections.deque[str](maxlen=LOG_LINES) for _ in ranks]
        self._processes: list[Process | None] = [None] * len(ranks)
        self._sending = [threading.Lock() for _ in ranks]
        self._gathered: dict[int, str] = {}  # a JACCL exchange under way
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []
        self._failure_so_far: MoectlError | None = None
        self._ready: Ready | None = None
        self._unanswered: set[int] = set()  # ids of what was asked and has not ended
        self._pulses = [Pulse() for _ in ranks]
        self._memory_bytes = [0 for _ in ranks]
        self._beaten = [False for _ in ranks]  # whether the last beat went out to it, or would, if it read
        self._beating = [False for _ in ranks]  # whether one is being sent
        self._sleep = Sleep()
        self._deadline = StepDeadline(step_timeout_s, prefill_step or PREFILL_STEP, patience)
        self._joined = False  # a worker that joins cannot answer
        self._pids: dict[int, int] = {}  # of the workers, on their hosts
        self._silent: set[int] = set()  # ranks that are waited for no more

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
        self._spawn(self._beat, "heartbeat")
        for rank, spec in enumerate(self._ranks):
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
                    self._start_timeout_s + INIT_EXTRA_S,
                    self._dtype,
                    spec.log,
                    self._force,
                    sum(other.host.address == spec.host.address for other in self._ranks),
                    self._canary,
                    self._agree_routing,
                    self._paranoia,
                    prefill_step=self._prefill_step,
                    speculate=self._speculate,
                ),
            )
        listening = self._collect(Listening, range(len(self._ranks)), self._start_timeout_s, "starting")
        self._pids = {rank: event.pid for rank, event in listening.items() if event.pid is not None}
        self._check_versions(listening)
        if len(self._ranks) > 1:
            self._connect(listening)
        self._joined = True
        if self._kv_tokens is None:  # every rank holds every token's, so that the least room is all there is
            known = [event.kv_tokens for event in listening.values() if event.kv_tokens is not None]
            self._kv_tokens = min(known, default=None)
        for rank in range(len(self._ranks)):
            self._send(rank, Load(self._kv_tokens))
        ready = self._collect(Ready, range(len(self._ranks)), self._load_timeout_s, "loading")
        self._check_canary(ready)
        self._deadline.learn(max(r.token_s for r in ready.values()), max(r.step_s for r in ready.values()))
        self._ready = ready[0]
        for rank in range(len(self._ranks)):
            self._send(rank, Beat())  # whose answer says what it holds

    def _launch(self, rank: int, spec: RankSpec) -> None:
        process = spec.remote.start(spec.argv, env=spec.env)
        self._processes[rank] = process
        self._spawn(lambda: self._read_events(rank, process), f"events-{rank}")
        self._spawn(lambda: self._read_log(rank, process), f"log-{rank}")

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
            self._collect(Connecting, some, self._start_timeout_s, "connecting")
        self._collect(Connected, range(last + 1), self._start_timeout_s, "connecting")

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

    def _collect(self, kind: type[Any], ranks: Sequence[int], timeout_s: float, phase: str) -> dict[int, Any]:
        """Return one event of this kind from each of these ranks, within the time in all."""
        deadline = time.monotonic() + timeout_s
        got: dict[int, Any] = {}
        while len(got) < len(ranks):
            try:
                rank, event = self._events.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                missing = ", ".join(self._ranks[r].host.name for r in ranks if r not in got)
                raise self._failure(
                    next(r for r in ranks if r not in got),
                    f"no answer while {phase} within {timeout_s:g} s (waiting for {missing})",
                    kind=Unreachable,
                    hint="'moectl doctor --fast' looks at the links between them; --start-timeout allows more time. "
                    "A stranger that was quicker to connect to their ports looks the same: run it again",
                ) from None
            if self._closed.is_set():
                raise errors.StateError("the session is closed")
            if isinstance(event, AllGather):
                self._all_gather(rank, event.data)
            elif isinstance(event, kind):
                got[rank] = event
            elif event is not None:
                self._raise_if_bad(rank, event, phase)
        return got

    def _all_gather(self, rank: int, data: str) -> None:
        self._gathered[rank] = data
        if len(self._gathered) == len(self._ranks):
            everything = "".join(self._gathered[r] for r in range(len(self._ranks)))
            self._gathered.clear()
            for r in range(len(self._ranks)):
                self._send(r, Gathered(everything))

    # Use.

    def generate(self, request: Request) -> Iterator[Token | Done]:
        """Yield an answer as it comes; the last item is Done.

        Raises UsageError when the model refuses the request (the session goes on), any other MoectlError when a rank
        failed or nothing came for `step_timeout_s` (the session is over, and says so again when asked again).
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
                    raise errors.UsageError(event.message, hint=event.hint)
                case _:
                    pass  # progress, or the tail of an answer that nobody waits for any more

    def submit(self, request: Request) -> None:
        """Hand a request to every rank; what comes of it is among `events`. Ids count up from 1, without gaps."""
        self._deadline.expect(request.id, is_first=not self._unanswered)
        self._unanswered.add(request.id)
        for rank in range(len(self._ranks)):
            self._send(rank, Generate(request))
        self._events.put(_WAKE)  # whoever waits for ever may wait for so long only now

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
                case Prefilled(id=id_, tokens=tokens):
                    self._deadline.read(id_, tokens)
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
        return tuple(self._memory_bytes)

    def count_alive(self, within_s: float) -> int:
        """Return how many ranks have answered a heartbeat in this time."""
        now = time.monotonic()
        return sum(now - pulse.heard_s <= within_s for pulse in self._pulses)

    def profile(self, order: Profile) -> list[Profiled]:
        """Take decode steps apart on every rank; return what each measured, by rank.

        `order.id` is the next one of the count that requests use too. Raises MoectlError as `generate` does.
        """
        for rank in range(len(self._ranks)):
            self._send(rank, order)
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

    def _next_event(self, timeout_s: float | None) -> tuple[int, Event | _Ended | None]:
        if self._failure_so_far is not None:
            raise self._failure_so_far
        if self._closed.is_set():
            raise errors.StateError("the session is closed")
        try:
            return self._events.get(timeout=timeout_s)
        except queue.Empty:
            if self._sleep.slept_s is not None:
                self._deadline.forgive()
                return _WAKE
            if any(pulse.is_missed for pulse in self._pulses):  # somebody may be gone: soon it is known who
                with contextlib.suppress(queue.Empty):
                    return self._events.get(timeout=(MISSES + 1) * BEAT_S)
            hosts = ", ".join(spec.host.name for spec in self._ranks)
            waited_s = self._deadline.seconds if self._unanswered else self._step_timeout_s
            raise self._fail(
                Stalled(
                    f"nothing was computed for {waited_s:.3g} s by {hosts}, though all answer (while {self._phase})",
                    hint="a link between two of them is cut, or one is very slow: 'moectl doctor --fast' looks at each",
                )
            ) from None

    def _fail(self, error: MoectlError) -> MoectlError:
        """Remember why the session is over; return the error."""
        self._failure_so_far = error
        return error

    def cancel(self, request_id: int) -> None:
        """Ask all ranks to stop an answer; its Done follows within a few steps."""
        for rank in range(len(self._ranks)):
            self._send(rank, Cancel(request_id))

    def close(self) -> None:
        """Let go of every leash and wait until each worker is gone; idempotent."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._events.put(_WAKE)
        started = {rank: process for rank, process in enumerate(self._processes) if process is not None}
        for rank, process in started.items():
            # Closing waits for whoever is sending, and that one for a worker that may be frozen.
            if not self._sending[rank].acquire(timeout=STUCK_S):
                self._silent.add(rank)
            else:
                self._sending[rank].release()
                if rank not in self._silent:
                    _quietly(process.stdin.close)
        deadline = time.monotonic() + EXIT_GRACE_S
        killers = [self._spawn_killer(rank, process) for rank, process in started.items() if rank in self._silent]
        for rank, process in started.items():
            if rank in self._silent:
                continue
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except (TimeoutError, MoectlError, OSError):
                killers.append(self._spawn_killer(rank, process))
        for thread in (*killers, *self._threads):
            thread.join(EXIT_GRACE_S)
        for process in started.values():
            _quietly(process.close)

    def _spawn_killer(self, rank: int, process: Process) -> threading.Thread:
        thread = threading.Thread(target=self._kill, args=(rank, process), name=f"kill-{rank}", daemon=True)
        thread.start()
        return thread

    def _kill(self, rank: int, process: Process) -> None:
        # A worker that is stopped does not mind its leash, and over SSH letting go of it is all that `kill` can do.
        spec = self._ranks[rank]
        if not spec.host.is_local and rank in self._pids:
            _quietly(lambda: spec.remote.run(["kill", "-9", str(self._pids[rank])], timeout_s=KILL_S, check=False))
        _quietly(process.kill)

    # Plumbing: one thread per stream, one for heartbeats.

    def _spawn(self, target: Callable[[], None], name: str) -> None:
        thread = threading.Thread(target=target, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _beat(self) -> None:
        while not self._closed.wait(BEAT_S):
            self._sleep.beat()
            for rank, pulse in enumerate(self._pulses):
                self._send_beat(rank)
                if self._joined and pulse.count(most := self._most_misses(rank)):
                    reason = f"the worker has not answered for {most * BEAT_S:g} s: it is frozen, or its host is gone"
                    self._events.put((rank, _Ended(reason, silent=True)))

    def _most_misses(self, rank: int) -> int:
        if not self._beaten[rank]:
            return BUSY_MISSES
        return MISSES if self._ready is not None else LOADING_MISSES

    def _send_beat(self, rank: int) -> None:
        # Where the lock is held, bytes are on their way: that is as good as a beat, and the others need theirs.
        process, lock = self._processes[rank], self._sending[rank]
        if process is None:
            self._beaten[rank] = False
        elif lock.acquire(blocking=False):
            self._beaten[rank] = self._beating[rank] = True
            # By itself: where a worker is frozen and its pipe is full, this stays for long.
            threading.Thread(target=self._write_beat, args=(rank, process), daemon=True).start()
        else:
            self._beaten[rank] = self._beating[rank]  # or a long order is being sent

    def _write_beat(self, rank: int, process: Process) -> None:
        try:
            process.stdin.write(encode(Beat()))
            process.stdin.flush()
        except (OSError, ValueError):
            pass  # as in `_send`
        finally:
            self._beating[rank] = False
            self._sending[rank].release()

    def _send(self, rank: int, order: Order) -> None:
        process = self._processes[rank]
        if process is None:
            return
        try:
            with self._sending[rank]:
                process.stdin.write(encode(order))
                process.stdin.flush()
        except (OSError, ValueError):
            pass  # its death is reported by the thread that reads it, with the reason

    def _read_events(self, rank: int, process: Process) -> None:
        reason = None
        try:
            for event in read_messages(process.stdout):
                self._pulses[rank].hear()
                if isinstance(event, Alive):
                    self._memory_bytes[rank] = event.memory_bytes
                else:
                    self._events.put((rank, event))  # type: ignore[arg-type]
        except MoectlError as error:
            reason = error.message
        except (OSError, ValueError) as error:
            reason = f"the connection broke: {error}"
        self._events.put((rank, _Ended(reason)))

    def _read_log(self, rank: int, process: Process) -> None:
        try:
            for raw in process.stderr:
                line = raw.decode("utf-8", "replace").rstrip()
                self._logs[rank].append(line)
                with contextlib.suppress(OSError):  # whoever listens may be gone; the worker must not block on that
                    self._on_log(self._ranks[rank].host.name, line)
        except (OSError, ValueError):
            pass  # closed under us

    def _raise_if_bad(self, rank: int, event: Event | _Ended, phase: str) -> None:
        """Raise for the rank at fault: the one that died or erred by itself, not those that lost it as a peer."""
        reports: list[tuple[int, Event | _Ended]] = [(rank, event)]
        deadline = time.monotonic() + BLAME_S
        if isinstance(event, _Ended) and event.silent:
            self._silent.add(rank)
        while all(isinstance(e, Fatal) and e.kind == PeerLost.__name__ for _, e in reports):
            try:
                other, heard = self._events.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            # The end of one that has already said why is no news.
            if isinstance(heard, Fatal | _Ended) and other not in (r for r, _ in reports):
                reports.append((other, heard))
        raise self._fail(self._explain(*reports[-1], phase))

    def _explain(self, rank: int, event: Event | _Ended, phase: str) -> MoectlError:
        slept_s = self._sleep.slept_s
        if slept_s is not None and isinstance(event, _Ended):
            return self._failure(
                rank,
                f"the worker let go while {phase}: this machine slept, or was stopped, for {slept_s:.0f} s",
                kind=LeashLost,
                hint="keep it awake: 'caffeinate -i moectl …' on a Mac, 'systemd-inhibit moectl …' on Linux",
            )
        match event:
            case Fatal():
                return self._failure(rank, event.message, kind=_kind(event.kind), hint=event.hint)
            case _Ended(reason=None):
                text = self._exit_text(rank)
                return self._failure(rank, f"{text} while {phase}", hint=self._explain_python(rank, text))
            case _Ended():
                return self._failure(rank, f"{event.reason} (while {phase})")
            case _:
                return self._failure(rank, f"an unexpected {type(event).__name__} while {phase}")

    def _explain_python(self, rank: int, text: str) -> str | None:
        """Return what to do when a worker could not even start: its interpreter, or what that needs, has gone."""
        words = next((line for line in reversed(self._logs[rank]) if "No module named" in line), None)
        if words is None and not text.endswith(("code 126", "code 127")):
            return None
        said = words or next(reversed(self._logs[rank]), "")
        return f"moectl deploy, which makes its environment again ({self._ranks[rank].argv[0]} does not work: {said})"

    def _exit_text(self, rank: int) -> str:
        process = self._processes[rank]
        assert process is not None
        try:
            code = process.wait(EXIT_GRACE_S)
        except (TimeoutError, MoectlError, OSError):
            return "the connection to the worker was lost"
        if code == -1:
            return "the worker was killed by a signal"  # sshd does not tell which
        return f"the worker was killed by signal {-code}" if code < 0 else f"the worker ended with exit code {code}"

    def _failure(
        self, rank: int, message: str, *, kind: type[MoectlError] = RemoteError, hint: str | None = None
    ) -> MoectlError:
        log = list(self._logs[rank])[-3:]
        if log and hint is None:
            hint = "its last words: " + " | ".join(log)
        return kind(f"rank {rank}: {message}", host=self._ranks[rank].host.name, hint=hint)


def _kind(name: str) -> type[MoectlError]:
    kind = getattr(errors, name, RemoteError)
    return kind if isinstance(kind, type) and issubclass(kind, MoectlError) else RemoteError


def _quietly(action: Callable[[], object]) -> None:
    with contextlib.suppress(OSError, ValueError, MoectlError):
        action()
