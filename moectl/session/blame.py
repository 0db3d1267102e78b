"""Which rank made a session fail, and the error that says so: the first rank that failed by itself, with its host.

It only reads events of the workers; the session ends them.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from moectl.engine.protocol import LINK_LOST, Event, Fatal
from moectl.errors import LinkLost, MoectlError, PeerLost, RemoteError, Unreachable, from_json
from moectl.session.liveness import Sleep
from moectl.session.worker_link import Ended, Heard, WorkerLink

if TYPE_CHECKING:
    from moectl.session.session import RankSpec

BLAME_S = 1.0  # to wait for the rank at fault, after another rank said that it lost its neighbour


class Blame:
    """Finds the rank at fault among a session's workers."""

    def __init__(
        self, ranks: Sequence[RankSpec], links: Sequence[WorkerLink], events: queue.SimpleQueue[Heard], sleep: Sleep
    ) -> None:
        self._ranks = ranks
        self._links = links
        self._events = events
        self._sleep = sleep

    def find(self, rank: int, event: Event | Ended, phase: str) -> MoectlError:
        """Return the error of the rank at fault: one that died or failed by itself, not one that lost its neighbour."""
        reports: list[tuple[int, Event | Ended]] = [(rank, event)]
        deadline = time.monotonic() + BLAME_S
        if isinstance(event, Ended) and event.silent:
            self._links[rank].is_silent = True
        while all(_is_about_others(e) for _, e in reports):
            try:
                other, heard = self._events.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            # The end of a rank that has said why is no news.
            if isinstance(heard, Fatal | Ended) and other not in (r for r, _ in reports):
                reports.append((other, heard))
        guilty = next((report for report in reports if not _is_about_others(report[1])), reports[0])
        return self._explain(*guilty, phase)

    def _explain(self, rank: int, event: Event | Ended, phase: str) -> MoectlError:
        if isinstance(event, Ended):
            return self._explain_end(rank, event, phase)
        if not isinstance(event, Fatal):
            return self.failure(rank, f"an unexpected {type(event).__name__} while {phase}")
        guilty = rank if event.rank is None or event.rank not in range(len(self._ranks)) else event.rank
        error = from_json(event.error)
        return self.failure(guilty, error.message, kind=type(error), hint=error.hint)

    def _explain_end(self, rank: int, event: Ended, phase: str) -> MoectlError:
        slept_s = self._sleep.slept_s
        code = self._links[rank].find_exit_code() if event == Ended() else None
        if slept_s is not None and code in (None, LINK_LOST):
            return self.failure(
                rank,
                f"the worker ended while {phase}: this machine slept, or was stopped, for {slept_s:.0f} s",
                kind=LinkLost,
                hint="keep it awake: 'caffeinate -i moectl …' on a Mac, 'systemd-inhibit moectl …' on Linux",
            )
        if event.reason is not None:
            return self.failure(rank, f"{event.reason} (while {phase})")
        return self.failure(rank, f"{_describe_code(code)} while {phase}", hint=self._explain_python(rank, code))

    def _explain_python(self, rank: int, code: int | None) -> str | None:
        """Return what to do when a worker could not start because its interpreter or its packages have gone."""
        log = self._links[rank].log
        words = next((line for line in reversed(log) if "No module named" in line), None)
        if words is None and code not in (126, 127):
            return None
        said = words or next(reversed(log), "")
        return f"moectl deploy, which makes its environment again ({self._ranks[rank].argv[0]} does not work: {said})"

    def failure(
        self, rank: int, message: str, *, kind: type[MoectlError] = RemoteError, hint: str | None = None
    ) -> MoectlError:
        """Return the error of one rank, with the end of its log where there is no other hint."""
        log = list(self._links[rank].log)[-3:]
        if log and hint is None:
            hint = "the end of its log: " + " | ".join(log)
        return kind(f"rank {rank}: {message}", host=self._ranks[rank].host.name, hint=hint)


def _is_about_others(event: Event | Ended) -> bool:
    # A rank that cannot join may not be at fault: its neighbour died.
    return isinstance(event, Fatal) and type(from_json(event.error)) in (PeerLost, Unreachable)


def _describe_code(code: int | None) -> str:
    if code is None:
        return "the connection to the worker was lost"
    if code == -1:
        return "the worker was killed by a signal"  # sshd does not say which
    return f"the worker was killed by signal {-code}" if code < 0 else f"the worker ended with exit code {code}"
