"""What blocks, and what does not belong, is found in bounded time: in joining, in a step, and without a controller."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from moectl.engine.protocol import RunOptions
from moectl.engine.request import Request
from moectl.errors import PeerLost, Stalled, Unreachable
from moectl.hosts.hostfile import Host
from moectl.session.session import RankSpec, Session
from tests.engine.test_lockstep import cut_case
from tests.session.test_session import specs, stand_ins
from tests.support.alphabet import VOCAB_SIZE, write_tokenizer
from tests.support.ring import process_env
from tests.support.running import processes, wait_for, workers
from tests.support.tiny import write_checkpoint

# Stands in for a backend that waits for ever and lets no Python thread run meanwhile, as JACCL's init does.
BLOCKED_INIT = """
import ctypes
import mlx.core as mx
mx.distributed.init = lambda *a, **k: ctypes.PyDLL(None).sleep(1000)
mx.distributed.is_available = lambda *a: True  # also for JACCL, which is on Macs only
"""
# One that waits for ever in a step: heartbeats are answered all the time.
BLOCKED_STEP = """
import time
import moectl.engine.network.exchange as reduce
real, count = reduce.run_exchange, [0]
def block(x, exchange):
    count[0] += 1
    if count[0] > 40:
        time.sleep(1000)
    return real(x, exchange)
reduce.run_exchange = block
"""
STRANGER = """
import moectl.engine.group as group_
real = group_._check_peers
group_._check_peers = lambda group, start, nonce: real(group, start, nonce ^ 1)
"""


def program(patch: str) -> tuple[str, ...]:
    """Return the argv of a worker with something changed in it."""
    return (sys.executable, "-c", f"{patch}\nfrom moectl.engine.worker import main\nmain()  # moectl worker")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source")
    write_checkpoint(source, vocab_size=VOCAB_SIZE)
    write_tokenizer(source)
    return cut_case(source, tmp_path_factory.mktemp("shards") / "two", "hidden", (2, 4), 16)


def over_rdma(ranks: list[RankSpec]) -> list[RankSpec]:
    devices = [(None, "rdma_en3"), ("rdma_en2", None)]
    return [replace(spec, host=Host(f"host{i}", rdma=devices[i])) for i, spec in enumerate(ranks)]


@pytest.mark.parametrize("backend", [pytest.param("jaccl", marks=pytest.mark.long), "ring"])
def test_an_init_that_blocks_is_bounded(shards: Path, backend: str) -> None:
    ranks = over_rdma(specs(shards, program(BLOCKED_INIT)))
    with pytest.raises(Unreachable, match=r"no answer while connecting within 3 s \(waiting for host0, host1\)"):
        Session(ranks, RunOptions(start_timeout_s=3), backend=backend).__enter__()
    wait_for(lambda: not workers())


CONTROLLER = """
import sys
from tests.system.test_detection import BLOCKED_INIT, program
from tests.session.test_session import specs
from pathlib import Path
from moectl.engine.protocol import RunOptions
from moectl.session.session import Session
Session(specs(Path(sys.argv[1]), program(BLOCKED_INIT)), RunOptions(start_timeout_s=60)).start()
"""


def test_workers_whose_interpreter_is_blocked_go_with_their_controller(shards: Path) -> None:
    command = [sys.executable, "-c", CONTROLLER, str(shards)]
    with subprocess.Popen(command, env=process_env(), stderr=subprocess.PIPE, text=True) as controller:
        wait_for(lambda: len(watchers()) == 2, 60)  # they have come to init
        time.sleep(0.3)
        os.kill(controller.pid, signal.SIGKILL)
        wait_for(lambda: not workers() and not watchers())


def watchers() -> list[int]:
    return processes("hangs_up.poll()")


def test_a_step_that_blocks_is_found_though_heartbeats_flow(shards: Path) -> None:
    ranks = specs(shards)
    ranks[1] = replace(ranks[1], argv=program(BLOCKED_STEP))
    with (
        Session(ranks, step_timeout_s=3) as session,
        pytest.raises(Stalled, match=r"nothing was computed for 3 s by host0, host1, though all answer"),
    ):
        list(session.generate(Request(1, "hello", 400)))
    wait_for(lambda: not workers())


@pytest.mark.long  # on a clock: tests/session/test_liveness.py::test_quick_steps_get_the_least_time_and_patience_more
def test_the_time_for_a_step_follows_from_the_steps_before(shards: Path) -> None:
    ranks = specs(shards)
    ranks[1] = replace(ranks[1], argv=program(BLOCKED_STEP))
    with (
        Session(ranks, step_timeout_s=100) as session,
        pytest.raises(Stalled, match="nothing was computed for 5 s"),
    ):
        list(session.generate(Request(1, "hello", 400)))


def test_who_does_not_belong_is_found_before_anything_is_summed(shards: Path) -> None:
    ranks = specs(shards)
    ranks[1] = replace(ranks[1], argv=program(STRANGER))
    with pytest.raises(PeerLost, match="does not belong to this launch"):
        Session(ranks).__enter__()
    wait_for(lambda: not workers())


def test_what_ends_while_idle_is_found_without_a_request() -> None:
    with Session(stand_ins("quick", "quick")) as session:
        os.kill(processes("def tell(kind_")[0], signal.SIGKILL)
        with pytest.raises(Exception, match="the worker was killed by signal 9 while idle"):
            next(session.events())


# Somebody else has the port by the time the ring wants it.
PORT_TAKEN = """
import json, os, socket
import mlx.core as mx
real = mx.distributed.init
def init(*arguments, **options):
    with open(os.environ["MLX_HOSTFILE"]) as f:
        host, _, port = json.load(f)[int(os.environ["MLX_RANK"])][0].partition(":")
    held = socket.create_server((host, int(port)))
    return real(*arguments, **options)
mx.distributed.init = init
"""


def test_a_port_that_is_taken_is_told(shards: Path) -> None:
    ranks = specs(shards)
    ranks[0] = replace(ranks[0], argv=program(PORT_TAKEN))
    with pytest.raises(Unreachable, match="host0: rank 0: cannot join the ring group"):
        Session(ranks, RunOptions(start_timeout_s=20)).__enter__()
    wait_for(lambda: not workers())
