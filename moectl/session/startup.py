"""How the running workers of a session become one group that has loaded and checked the model.

They listen, connect and load; each phase has a time limit. The session starts the processes and uses the group.
"""

from __future__ import annotations

import queue
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moectl.engine.protocol import (
    NONCE_BITS,
    AllGather,
    Check,
    Connected,
    Connecting,
    Gathered,
    Listening,
    Load,
    Loaded,
    Ready,
    RunOptions,
    Start,
)
from moectl.errors import IntegrityError, MoectlError, Stalled, Unreachable, VersionMismatch
from moectl.session.backend import check_rdma, make_connect
from moectl.session.blame import Blame
from moectl.session.worker_link import Heard, WorkerLink

if TYPE_CHECKING:
    from moectl.session.session import RankSpec

INIT_EXTRA_S = 5.0
_BEYOND = 100.0  # × the right value: a more exact figure does not help
LINK_HINT = "a link between two of them is cut or very slow: 'moectl doctor --fast' tests each link"


@dataclass(frozen=True, slots=True)
class _Phase:
    """A part of the start: its name, and what is raised when it takes too long."""

    text: str
    late: type[MoectlError] = Unreachable
    hint: str = (
        "'moectl doctor --fast' tests the links between them; --start-timeout allows more time. "
        "Another program may have connected to their ports first: run it again"
    )


_STARTING = _Phase("starting")
_CONNECTING = _Phase("connecting")
_LOADING = _Phase("loading", hint="its disk may be too slow, or its memory too small: 'moectl doctor' tests both")
_CHECKING = _Phase("computing for the first time", Stalled, LINK_HINT)


class StartUp:
    """The start of a session's workers; `refuse_closed` raises when the session was closed meanwhile."""

    def __init__(
        self,
        ranks: Sequence[RankSpec],
        links: Sequence[WorkerLink],
        events: queue.SimpleQueue[Heard],
        blame: Blame,
        options: RunOptions,
        refuse_closed: Callable[[], None],
    ) -> None:
        self._ranks = ranks
        self._links = links
        self._events = events
        self._blame = blame
        self._options = options
        self._start_timeout_s = options.start_timeout_s
        self._refuse_closed = refuse_closed
        self._early: dict[tuple[type[Any], int], Any] = {}  # events of a phase that has not begun for all ranks
        self._gathered: dict[int, str] = {}  # a JACCL exchange under way

    def listen(self) -> dict[int, Listening]:
        """Tell every worker what to open; return their answers, of equal versions."""
        for rank, spec in enumerate(self._ranks):
            self._links[rank].send(
                Start(
                    rank,
                    len(self._ranks),
                    spec.shards,
                    list(spec.addresses),
                    # Longer than we wait, so that our error comes first, not a stack trace on the host.
                    3 * self._start_timeout_s + INIT_EXTRA_S,
                    spec.log,
                    sum(other.host.address == spec.host.address for other in self._ranks),
                    self._options,
                )
            )
        listening = self._collect(Listening, range(len(self._ranks)), self._start_timeout_s, _STARTING)
        for rank, event in listening.items():
            self._links[rank].pid = event.pid
        self._check_versions(listening)
        return listening

    def load(self, order: Load, load_timeout_s: float, check_timeout_s: float) -> dict[int, Ready]:
        """Let all load the model; return what each found when it first computed."""
        everyone = range(len(self._ranks))
        for link in self._links:
            link.send(order)
        self._collect(Loaded, everyone, load_timeout_s, _LOADING)
        for link in self._links:
            link.send(Check())
        ready = self._collect(Ready, everyone, check_timeout_s, _CHECKING)
        self._check_canary(ready)
        return ready

    def connect(self, listening: dict[int, Listening], backend: str) -> None:
        """Make the workers one group."""
        for rank, spec in enumerate(self._ranks):
            if len(listening[rank].ports) != len(spec.addresses):
                raise self._blame.failure(
                    rank, f"{len(listening[rank].ports)} ports for {len(spec.addresses)} addresses"
                )
        endpoints = [
            [f"{address}:{port}" for address, port in zip(spec.addresses, listening[rank].ports, strict=True)]
            for rank, spec in enumerate(self._ranks)
        ]
        hosts = [spec.host for spec in self._ranks]
        if backend != "ring":
            check_rdma(hosts, [listening[rank] for rank in range(len(hosts))])
        nonce = secrets.randbits(NONCE_BITS)
        last = len(self._ranks) - 1
        # The ring's init has no handshake: the last rank dials first, so its neighbours have to be listening by then.
        for some in (range(last), range(last, last + 1)):
            for rank in some:
                self._links[rank].send(make_connect(backend, hosts, endpoints, rank, nonce))
            # A rank that does not wait for the last one may be connected before the others listen.
            self._collect(Connecting, some, self._start_timeout_s, _CONNECTING, early=Connected)
        self._collect(Connected, range(last + 1), self._start_timeout_s, _CONNECTING)

    def _check_versions(self, listening: dict[int, Listening]) -> None:
        """Raise VersionMismatch where a package has several versions; it names them with their hosts."""
        differences = []
        for package in ("moectl", "mlx", "mlx-lm"):
            hosts: dict[str, list[str]] = {}
            for rank, event in sorted(listening.items()):
                hosts.setdefault(event.versions.get(package, "none"), []).append(self._ranks[rank].host.name)
            if len(hosts) > 1:
                found = ", ".join(f"{version} on {' and '.join(names)}" for version, names in hosts.items())
                differences.append(f"{package} {found}")
        if differences:
            raise VersionMismatch(f"versions differ: {'; '.join(differences)}", hint="moectl deploy")

    def _check_canary(self, ready: Mapping[int, Ready]) -> None:
        wrong = {rank: event for rank, event in ready.items() if event.wrong_at is not None}
        if not wrong:
            return
        first = min(event.wrong_at for event in wrong.values() if event.wrong_at is not None)
        # After the first wrong sum every rank's input is wrong.
        guilty = [rank for rank, event in wrong.items() if event.wrong_at == first]
        off = max(wrong[rank].deviation for rank in guilty)
        said = f"by more than {_BEYOND:g} times" if off > _BEYOND else f"by {off:.2g} of the right value"
        if len(guilty) == len(self._ranks) > 1:
            raise IntegrityError(
                f"all ranks compute other results than when the model was sharded: off {said}",
                hint="if mlx or the hosts have changed since then, 'moectl shard --force' makes it again; "
                "--no-canary starts without this check",
            )
        raise IntegrityError(
            f"rank {' and '.join(map(str, guilty))} computes wrong results: off {said} at exchange {first}",
            host=self._ranks[guilty[0]].host.name,
            hint="'moectl deploy --verify' checks its files; if they are right, its memory or its mlx is at fault",
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
        """Return one event of this kind from each of these ranks; the time limit is for all of them.

        `early` is a kind of event that a rank may send already; the next phase collects it.
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
                raise self._blame.failure(missing[0], text, kind=phase.late, hint=phase.hint) from None
            self._refuse_closed()
            if isinstance(event, AllGather):
                self._all_gather(rank, event.data)
            elif isinstance(event, kind) and rank in ranks:
                got[rank] = event
            elif early is not None and isinstance(event, early):
                self._early[early, rank] = event
            elif event is not None:
                raise self._blame.find(rank, event, phase.text)
        return got

    def _all_gather(self, rank: int, data: str) -> None:
        self._gathered[rank] = data
        if len(self._gathered) == len(self._ranks):
            everything = "".join(self._gathered[r] for r in range(len(self._ranks)))
            self._gathered.clear()
            for link in self._links:
                link.send(Gathered(everything))
