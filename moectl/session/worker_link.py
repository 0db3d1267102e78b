"""The controller's end of its link to one worker: orders go down, events come up, and the worker is ended.

Each stream has a thread of its own, so that a frozen worker blocks no other. It knows one rank and none of the others;
`session` decides what events mean.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moectl.engine.protocol import BEAT_S, Alive, Beat, Event, Order, encode, read_messages
from moectl.errors import MoectlError
from moectl.hosts.hostfile import Host
from moectl.hosts.remote import Process, Remote
from moectl.session.liveness import Pulse

LOG_LINES = 20
EXIT_GRACE_S = 5.0
STUCK_S = 1.0  # for orders to go out before the link is closed
KILL_S = 3.0  # for a host to kill a worker
PIECE_BYTES = 16384  # of an order: less than a beat's time on any line worth having
# The host may have been restarted meanwhile, and the number be another's. A Mac may keep the wired memory of a process
# that is killed: there it gets a last chance ($1, in half seconds) to end by itself, now that its link is closed.
_KILL = """
runs() { ps -o args= -p "$0" | grep -q "moectl worker"; }
[ "$(uname -s)" = Darwin ] || set -- 0
while [ "$1" -gt 0 ] && runs; do sleep 0.5; set -- $(($1 - 1)); done
runs && kill -9 "$0"
"""
_LAST_CHANCE = "4"


@dataclass(frozen=True, slots=True)
class Ended:
    """A rank's stdout reached its end; `reason` when it was not a plain end of file."""

    reason: str | None = None
    silent: bool = False  # it did not end: it does not answer


Heard = tuple[int, Event | Ended | None]


class WorkerLink:
    """The link to one rank; its events go to `events`, except answers to heartbeats."""

    def __init__(
        self,
        rank: int,
        host: Host,
        remote: Remote,
        events: queue.SimpleQueue[Heard],
        on_log: Callable[[str, str], None],
    ) -> None:
        self.pulse = Pulse()
        self.memory_bytes = 0  # of arrays, as it last said
        self.pid: int | None = None  # on its host
        self.is_silent = False  # it is not waited for any more
        self.log: deque[str] = deque(maxlen=LOG_LINES)
        self.process: Process | None = None
        self._rank = rank
        self._host = host
        self._remote = remote
        self._events = events
        self._on_log = on_log
        self._orders: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()  # as they are sent; None: close the link
        self._is_writing = False
        self._pieces = 0  # of orders that have gone out so far
        self._pieces_before = 0  # that was at the beat before
        self._is_closed = threading.Event()
        self._threads: list[threading.Thread] = []

    def hold(self, process: Process) -> None:
        """Begin to send orders to a worker and to read its events."""
        self.process = process
        for target in (self._write_orders, self._read_events, self._read_log):
            name = f"{target.__name__.strip('_')}-{self._rank}"
            thread = threading.Thread(target=target, args=(process,), name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def send(self, order: Order) -> None:
        """Send an order after those before it; never waits."""
        self._orders.put(encode(order))  # here, so that an order that cannot be encoded is the caller's error

    def beat(self) -> bool:
        """Send a heartbeat; return whether an answer is due.

        While the bytes of an order move, they take the place of the heartbeat.
        """
        if self.process is None:
            return False
        moves, self._pieces_before = self._pieces != self._pieces_before, self._pieces
        if self._is_writing or not self._orders.empty():
            return not moves
        self.send(Beat())
        return True

    def describe_silence(self) -> Ended:
        """Return the end of a worker that does not answer."""
        silent_s = self.pulse.quiet * BEAT_S
        return Ended(f"the worker has not answered for {silent_s:g} s: it is frozen, or its host is gone", silent=True)

    def find_exit_code(self) -> int | None:
        """Return the exit code of a worker whose output has ended; None where it will never be known."""
        assert self.process is not None
        try:
            return self.process.wait(EXIT_GRACE_S)
        except (TimeoutError, MoectlError, OSError):
            return None

    def finish(self) -> None:
        """Close the link once all orders are out."""
        self._orders.put(None)

    def wait(self, closed_by_s: float, gone_by_s: float) -> bool:
        """Return whether the worker has gone by itself, until these times on the monotonic clock."""
        assert self.process is not None
        if self.is_silent or not self._is_closed.wait(_left(closed_by_s)):
            return False
        try:
            self.process.wait(_left(gone_by_s))
        except (TimeoutError, MoectlError, OSError):
            return False
        return True

    def kill(self) -> None:
        """Kill a worker that does not end with its link."""
        assert self.process is not None
        # A stopped worker does not see the end of its link, and over SSH the process can do no more than that.
        if self.pid is not None:
            argv = ["sh", "-c", _KILL, str(self.pid), _LAST_CHANCE]
            _quietly(lambda: self._remote.run(argv, timeout_s=KILL_S, check=False))
        _quietly(self.process.kill)

    def close(self) -> None:
        """Close the streams of a worker that has gone, or cannot be reached to be ended."""
        assert self.process is not None
        _quietly(self.process.kill)  # else its readers would wait for a host that is not there
        for thread in self._threads:
            thread.join(EXIT_GRACE_S)
        _quietly(self.process.close)

    # One thread for each stream.

    def _write_orders(self, process: Process) -> None:
        try:
            while (data := self._orders.get()) is not None:
                self._is_writing = True
                for begin in range(0, len(data), PIECE_BYTES):
                    process.stdin.write(data[begin : begin + PIECE_BYTES])
                    process.stdin.flush()
                    self._pieces += 1
                self._is_writing = False
        except (OSError, ValueError):
            pass  # the thread that reads events reports its end, with the reason
        finally:
            _quietly(process.stdin.close)
            self._is_closed.set()

    def _read_events(self, process: Process) -> None:
        reason = None
        try:
            for event in read_messages(process.stdout):
                self.pulse.hear()
                if isinstance(event, Alive):
                    self.memory_bytes = event.memory_bytes
                else:
                    self._events.put((self._rank, event))  # type: ignore[arg-type]
        except MoectlError as error:
            reason = error.message
        except (OSError, ValueError) as error:
            reason = f"the connection broke: {error}"
        self._events.put((self._rank, Ended(reason)))

    def _read_log(self, process: Process) -> None:
        try:
            for raw in process.stderr:
                line = raw.decode("utf-8", "replace").rstrip()
                self.log.append(line)
                with contextlib.suppress(OSError):  # the terminal may be gone; the worker must not block on that
                    self._on_log(self._host.name, line)
        except (OSError, ValueError):
            pass  # closed under us


def end_all(links: Sequence[WorkerLink]) -> None:
    """Close all links at once, and kill the workers that do not end in time; bounded."""
    held = [link for link in links if link.process is not None]
    now_s = time.monotonic()
    closed_by_s, gone_by_s = now_s + STUCK_S, now_s + EXIT_GRACE_S
    silent = [link for link in held if link.is_silent]
    others = [link for link in held if link not in silent]
    for link in held:
        link.finish()
    killers = [_spawn_killer(link) for link in silent]
    killers += [_spawn_killer(link) for link in others if not link.wait(closed_by_s, gone_by_s)]
    killed_by_s = time.monotonic() + EXIT_GRACE_S
    for thread in killers:
        thread.join(_left(killed_by_s))
    for link in held:
        link.close()


def _spawn_killer(link: WorkerLink) -> threading.Thread:
    thread = threading.Thread(target=link.kill, name="kill", daemon=True)
    thread.start()
    return thread


def _left(until_s: float) -> float:
    return max(0.0, until_s - time.monotonic())


def _quietly(action: Callable[[], object]) -> None:
    with contextlib.suppress(OSError, ValueError, MoectlError):
        action()
