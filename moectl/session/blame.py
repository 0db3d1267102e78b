"""Which rank made a session fail, and the error that says so: the first rank that failed by itself, with its host.

It only reads events of the workers; the session ends them.
"""

from __future__ import annotations

import queue
import signal
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from moectl.engine.protocol import LINK_LOST, Event, Fatal
from moectl.errors import LinkLost, MoectlError, PeerLate, PeerLost, RemoteError, Unreachable, from_json
from moectl.session.liveness import Sleep
from moectl.session.worker_link import Ended, Heard, WorkerLink

if TYPE_CHECKING:
    from moectl.session.session import RankSpec

BLAME_S = 1.0  # to wait for the rank at fault, after another rank said that it lost its neighbour


class Blame:
    """Finds the rank at fault among a session's workers."""

    def __init__(
        self,
        ranks: Sequence[RankSpec],
        links: Sequence[WorkerLink],
        events: queue.SimpleQueue[Heard],
        sleep: Sleep,
        backend: str,
    ) -> None:
        self._ranks = ranks
        self._links = links
        self._events = events
        self._sleep = sleep
        self._backend = backend

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
        guilty = next((report for report in reports if not _is_about_others(report[1])), None)
        if guilty is None and (waiting := [rank for rank, e in reports if _kind_of(e) is PeerLate]):
            return self._explain_late(waiting, {rank for rank, _ in reports}, phase)
        return self._explain(*(guilty or reports[0]), phase)

    def _explain_late(self, waiting: Sequence[int], heard: set[int], phase: str) -> MoectlError:
        """Return the error of ranks whose GPUs gave up: not they are at fault, but one that has not failed."""
        if len(self._ranks) == 1:
            hint = "take a smaller --prefill-step, and close programs that use that Mac's GPU"
            return self.failure(0, f"one piece of work took its GPU too long (GPU Timeout) while {phase}", hint=hint)
        hint = "'moectl doctor' tests the links; 'moectl logs' shows what that rank did"
        late = [rank for rank in range(len(self._ranks)) if rank not in heard]
        if len(late) == 1:
            text = f"it kept the others waiting while {phase} until the GPU of rank {waiting[0]} gave up (GPU Timeout)"
            return self.failure(late[0], text, kind=PeerLate, hint=hint)
        names = ", ".join(self._ranks[rank].host.name for rank in waiting)
        return PeerLate(f"the GPU of {names} gave up waiting for another rank while {phase} (GPU Timeout)", hint=hint)

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
        if self._backend.startswith("jaccl") and self._has_crashed(rank, code):
            text = f"the worker crashed while {phase} (segmentation fault): over RDMA, a pulled cable does that"
            return self.failure(rank, text, hint=f"check the Thunderbolt cables: {self._list_cables(rank)}")
        return self.failure(rank, f"{_describe_code(code)} while {phase}", hint=self._explain_python(rank, code))

    def _has_crashed(self, rank: int, code: int | None) -> bool:
        # sshd does not say which signal it was; faulthandler's words are in the log.
        return code == -signal.SIGSEGV or any("Segmentation fault" in line for line in self._links[rank].log)

    def _list_cables(self, rank: int) -> str:
        host = self._ranks[rank].host
        ends = zip(host.rdma, self._ranks, strict=False)
        return ", ".join(f"{device} of {host.name} to {peer.host.name}" for device, peer in ends if device)

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
    return _kind_of(event) in (PeerLost, PeerLate, Unreachable)


def _kind_of(event: Event | Ended) -> type[MoectlError] | None:
    """Return the class of the error that a rank told; None where it told none."""
    return type(from_json(event.error)) if isinstance(event, Fatal) else None


def _describe_code(code: int | None) -> str:
    if code is None:
        return "the connection to the worker was lost"
    if code == -1:
        return "the worker was killed by a signal"  # sshd does not say which
    return f"the worker was killed by signal {-code}" if code < 0 else f"the worker ended with exit code {code}"
