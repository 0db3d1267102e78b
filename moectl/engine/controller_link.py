"""The worker's end of its link to the controller: orders come in on stdin, events go out on stdout."""

from __future__ import annotations

import os
import queue
import select
import threading
from collections.abc import Callable, Iterator
from typing import IO, Any

from moectl import errors
from moectl.engine.ending import Orders
from moectl.engine.protocol import (
    BEAT_S,
    MAX_LINE_BYTES,
    SILENCE_S,
    Alive,
    Beat,
    Event,
    Gathered,
    decode,
    encode,
)


class ControllerLink:
    """The worker's end: a queue of orders, filled by a thread.

    When the link has ended, the queue raises LinkEnded after its last order, and the thread calls `on_end(reason)`.
    """

    def __init__(self, down: IO[bytes], up: IO[bytes], *, on_end: Callable[[str], None]) -> None:
        self.orders = Orders()
        self.gathered: queue.SimpleQueue[Gathered] = queue.SimpleQueue()
        self.memory_bytes: Callable[[], int] = lambda: 0  # of this worker's arrays; told with every heartbeat
        self._down = down
        self._up = up
        self._sending = threading.Lock()
        self._on_end = on_end
        self._thread = threading.Thread(target=self._listen, name="controller link", daemon=True)
        self._thread.start()

    def tell(self, event: Event) -> None:
        """Send an event; the process ends if the controller does not listen any more."""
        line = encode(event)
        try:
            with self._sending:
                self._up.write(line)
                self._up.flush()
        except OSError:
            os._exit(1)

    def take(self, kind: type[Any]) -> Any:
        """Wait for the next order, which has to be of this kind."""
        order = self.orders.get()
        if not isinstance(order, kind):
            raise errors.RemoteError(f"expected {kind.__name__} from the controller, got {type(order).__name__}")
        return order

    def join(self) -> None:
        """Wait until the link has ended, and `on_end` has returned."""
        self._thread.join()

    def _listen(self) -> None:
        try:
            for line in self._lines():
                order = decode(line)
                if isinstance(order, Gathered):
                    self.gathered.put(order)
                elif isinstance(order, Beat):
                    self.tell(Alive(self.memory_bytes()))
                else:
                    self.orders.put(order)  # type: ignore[arg-type]
            reason = "the controller closed the link"
        except Exception as error:  # this thread must not end without ending the worker
            reason = str(error)
        self.orders.end(reason)
        self._on_end(reason)

    def _lines(self) -> Iterator[bytes]:
        # Unbuffered reads under select: a buffered readline would hide lines from select.
        pending = bytearray()
        silent_s = 0.0
        # Counted in beats: if this machine sleeps, or this process is stopped, one of them passes and not all.
        while silent_s < SILENCE_S:
            if not select.select([self._down], [], [], BEAT_S)[0]:
                silent_s += BEAT_S
                continue
            silent_s = 0.0
            chunk = os.read(self._down.fileno(), 1 << 20)
            if not chunk:
                return
            *ends, rest = chunk.split(b"\n")  # only what is new is searched: long lines come in many pieces
            for end in ends:
                pending += end
                yield bytes(pending)
                pending.clear()
            pending += rest
            if len(pending) > MAX_LINE_BYTES:
                raise errors.RemoteError(f"a line of more than {MAX_LINE_BYTES} bytes from the controller")
        raise errors.RemoteError(f"nothing heard from the controller for {SILENCE_S:g} s")
