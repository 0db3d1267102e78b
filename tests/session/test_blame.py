"""Which rank is named when several complain: the one at fault, not the one that waited for it."""

from __future__ import annotations

import queue
import signal
import sys
from pathlib import Path

import pytest

from moectl.engine.protocol import Event
from moectl.engine.worker import describe_failure
from moectl.errors import MoectlError, PeerLate, RemoteError
from moectl.hosts.hostfile import Host
from moectl.hosts.remote import LocalRemote
from moectl.session import blame
from moectl.session.blame import Blame
from moectl.session.liveness import Sleep
from moectl.session.session import RankSpec
from moectl.session.worker_link import Ended, Heard, WorkerLink

TIMEOUT = describe_failure(
    RuntimeError(
        "[METAL] Command buffer execution failed: Caused GPU Timeout Error "
        "(00000002:kIOGPUCommandBufferCallbackErrorTimeout)."
    )
)
CRASHED = "Fatal Python error: Segmentation fault"
DEVICES = [(None, "rdma_en3", "rdma_en4"), ("rdma_en2", None, "rdma_en4"), ("rdma_en2", "rdma_en3", None)]


class Gone:
    """Stands in for a worker's process that has ended with this code."""

    def __init__(self, code: int) -> None:
        self.code = code

    def wait(self, timeout_s: float) -> int:
        return self.code


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blame, "BLAME_S", 0.0)


def find(*heard: Heard, count: int = 3, backend: str = "jaccl", code: int = -1, log: str = "") -> MoectlError:
    """Return whom the session blames for the first of these events, with the others on their way."""
    ranks = [
        RankSpec(Host(f"mac{i}", rdma=DEVICES[i][:count]), LocalRemote(), (sys.executable,), "", ())
        for i in range(count)
    ]
    events: queue.SimpleQueue[Heard] = queue.SimpleQueue()
    links = [WorkerLink(i, spec.host, spec.remote, events, lambda host, line: None) for i, spec in enumerate(ranks)]
    for link in links:
        link.process = Gone(code)  # type: ignore[assignment]
        link.log.append(log)
    for later in heard[1:]:
        events.put(later)
    rank, event = heard[0]
    assert event is not None
    return Blame(ranks, links, events, Sleep(), backend).find(rank, event, "generating")


def test_a_rank_whose_gpu_gave_up_is_not_at_fault() -> None:
    error = find((0, TIMEOUT), (2, TIMEOUT))
    assert (type(error), error.host) == (PeerLate, "mac1")
    assert error.message == (
        "rank 1: it kept the others waiting while generating until the GPU of rank 0 gave up (GPU Timeout)"
    )
    assert error.hint == "'moectl doctor' tests the links; 'moectl logs' shows what that rank did"


def test_a_rank_that_failed_by_itself_comes_before_those_whose_gpu_gave_up() -> None:
    killed = find((0, TIMEOUT), (1, Ended()), code=-9, backend="ring")
    assert killed.message == "rank 1: the worker was killed by signal 9 while generating"


def test_no_rank_is_named_where_several_may_be_late() -> None:
    error = find((0, TIMEOUT))
    assert (type(error), error.host) == (PeerLate, None)
    assert error.message == "the GPU of mac0 gave up waiting for another rank while generating (GPU Timeout)"
    assert find((0, TIMEOUT), (1, TIMEOUT), (2, TIMEOUT)).message.startswith("the GPU of mac0, mac1, mac2 gave up")


def test_a_single_rank_waits_for_no_other() -> None:
    error = find((0, TIMEOUT), count=1)
    assert error.message == "rank 0: one piece of work took its GPU too long (GPU Timeout) while generating"
    assert error.hint == "take a smaller --prefill-step, and close programs that use that Mac's GPU"


@pytest.mark.parametrize(("code", "log"), [(-signal.SIGSEGV, ""), (-1, CRASHED)])
@pytest.mark.parametrize("backend", ["jaccl", "jaccl-ring"])
def test_a_crash_over_rdma_names_the_cables(code: int, log: str, backend: str) -> None:
    error = find((1, Ended()), code=code, log=log, backend=backend)
    assert type(error) is RemoteError
    assert error.message == (
        "rank 1: the worker crashed while generating (segmentation fault): over RDMA, a pulled cable does that"
    )
    assert error.hint == "check the Thunderbolt cables: rdma_en2 of mac1 to mac0, rdma_en4 of mac1 to mac2"


def test_another_crash_is_no_cable() -> None:
    assert "cable" not in find((1, Ended()), code=-signal.SIGSEGV, backend="ring").message
    assert "cable" not in find((1, Ended()), code=-signal.SIGKILL).message


def test_the_waiting_rank_of_old_is_still_explained(tmp_path: Path) -> None:
    """A ring's neighbour that lost another, where nothing else is heard."""
    event: Event = describe_failure(RuntimeError("[ring] connection to a peer was lost"))
    assert find((0, event)).message == "rank 0: [ring] connection to a peer was lost"
