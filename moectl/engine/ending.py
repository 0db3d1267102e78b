"""The end of a worker: it gives its memory back where it can, and it ends in a bounded time whatever hangs.

A Mac may keep the memory that a process had wired for its GPU when the process is killed, or ends while its GPU works:
only a restart of the Mac frees that. (Reported by users of MLX; not seen by us.) After a broken exchange a call into
the backend may never return, and it may hold the interpreter lock meanwhile: the kernel's timer needs neither.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import sys
import time
from typing import NoReturn

from moectl.engine.protocol import LINK_LOST, Order

# Nothing but a Mac keeps the memory of a process that has ended. Less than a controller waits before it kills.
ORDERLY_S = 2.5 if sys.platform == "darwin" else 0.5
_MARGIN_S = 0.2  # in which the worker says why it ends
_log = logging.getLogger("moectl.worker")


class LinkEnded(SystemExit):
    """The link to the controller has ended; raised where the worker takes its next order."""


class Orders(queue.SimpleQueue["Order | None"]):
    """Orders as they come; after the last one, `get` raises LinkEnded."""

    def end(self, reason: str) -> None:
        """Note that no more orders come, and why."""
        self.put(LinkEnded(reason))  # type: ignore[arg-type]

    def get(self, block: bool = True, timeout: float | None = None) -> Order | None:
        """Return the next order."""
        order = super().get(block, timeout)
        if isinstance(order, LinkEnded):
            raise order
        return order


def limit_end() -> None:
    """Let the kernel end this process when ORDERLY_S have passed."""
    signal.setitimer(signal.ITIMER_REAL, ORDERLY_S)


def end_with_link(reason: str) -> NoReturn:
    """End this process because its link has ended: when the main thread has not done so before ORDERLY_S are over."""
    limit_end()
    time.sleep(ORDERLY_S - _MARGIN_S)
    exit_now(reason, code=LINK_LOST)


def exit_now(reason: str, *, code: int) -> NoReturn:
    """Log why, and end without destructors: those of a broken ring may wait for ever."""
    with contextlib.suppress(Exception):  # the log's reader may be gone
        _log.info("ends: %s", reason)
    os._exit(code)
