"""How a worker ends: what it gives back, in which order, and that nothing keeps it for long."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from moectl.engine import ending
from moectl.engine.ending import LinkEnded, Orders
from moectl.engine.protocol import LINK_LOST, Cancel
from moectl.session.worker_link import EXIT_GRACE_S

# A worker that does something instead of serving; `hangs` holds the interpreter lock, as a destructor in C++ may.
WORKER = """
import ctypes, sys, time
from moectl.engine import worker
hangs = lambda: ctypes.PyDLL(None).sleep(1000)
def serve(link):
    {}
worker.run(serve)
"""


def end(serve: str, program: str = WORKER) -> tuple[int, str]:
    """Return a worker's exit code and its log; its link is closed at once."""
    process = subprocess.Popen(
        [sys.executable, "-c", program.format(serve)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stderr is not None
    with process, process.stdin, process.stderr:
        process.stdin.close()
        return process.wait(60), process.stderr.read()


@pytest.mark.parametrize(
    ("serve", "code"),
    [
        ("link.orders.get()", LINK_LOST),  # idle
        ("time.sleep(1000)", LINK_LOST),  # at work, and the interpreter is free
        ("time.sleep(0.2); hangs()", -signal.SIGALRM),  # nothing of Python runs any more
    ],
)
def test_a_worker_ends_whatever_it_does(serve: str, code: int) -> None:
    assert end(serve)[0] == code


def test_a_worker_that_is_idle_says_why_it_ends() -> None:
    assert "ends: the controller closed the link" in end("link.orders.get()")[1]


def test_a_controller_waits_longer_than_a_worker_needs() -> None:
    assert ending.ORDERLY_S < EXIT_GRACE_S


def test_orders_before_the_end_are_still_given() -> None:
    orders = Orders()
    orders.put(Cancel(1))
    orders.end("gone")
    assert orders.get() == Cancel(1)
    assert not orders.empty()
    with pytest.raises(LinkEnded, match=r"^gone$"):
        orders.get()


# A worker on a Mac, which tells what it does at its end.
MAC = """
import os, sys, weakref
import mlx.core as mx
from moectl.engine import ending, worker
act = lambda *words: os.write(2, f"act: {{' '.join(map(str, words))}}\\n".encode())
for name in ("synchronize", "set_wired_limit", "clear_cache"):
    setattr(mx, name, lambda *values, name=name: act(name, *values))
mx.metal.is_available = lambda: True
ending.signal.setitimer = lambda which, seconds: act("limit")
class Model: pass
def serve(link):
    model = Model()
    model.itself = model
    weakref.finalize(model, act, "dropped")
    {}
worker.run(serve)
"""


@pytest.mark.parametrize(
    ("serve", "wanted", "code"),
    [
        ("link.orders.get()", ["synchronize", "dropped", "set_wired_limit 0", "clear_cache"], LINK_LOST),
        # After a broken exchange waiting for the GPU has no end: what hangs is ended by the limit.
        ("raise RuntimeError('[ring] gone')", ["dropped", "set_wired_limit 0", "clear_cache"], 1),
    ],
)
def test_the_order_at_the_end(serve: str, wanted: list[str], code: int) -> None:
    found, log = end(serve, MAC)
    acts = [line.removeprefix("act: ") for line in log.splitlines() if line.startswith("act: ")]
    assert acts[0] == "limit"
    assert [act for act in acts if act != "limit"] == wanted
    assert found == code
