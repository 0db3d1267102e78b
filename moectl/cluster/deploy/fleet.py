"""One process per host, as one Python process cannot fill several fast links: start them, pass on their messages.

`provision` is what a host's process does; `relay.Chain` decides which host takes files from which.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing import connection
from typing import Any

from moectl.cluster.deploy.provision import Look, deployed_host, inspect_host
from moectl.cluster.deploy.push import Push
from moectl.cluster.deploy.relay import Admit, Chain, Down, Joined, More, Opened, TakeFrom, Up, Wants
from moectl.cluster.deploy.task import Advanced, Event, HostResult, HostTask, OnEvent, Planned, Working
from moectl.errors import MoectlError
from moectl.hosts.connect import as_ours
from moectl.hosts.remote import Remote
from moectl.model import manifest as manifest_file
from moectl.model.manifest import FileEntry

EVENT_INTERVAL_S = 0.1
END_GRACE_S = 5.0
DECIDE_S = 0.5

Pipe = connection.Connection


class FeedCancelled(Exception):
    """The files that are still missing will not come: the cut has failed."""


@dataclass(frozen=True, slots=True)
class _Cancel:
    pass


class Feed:
    """Files that become ready while hosts are being deployed to; any thread may add them."""

    def __init__(self) -> None:
        self.pipe, self._inlet = multiprocessing.Pipe(duplex=False)
        self._lock = threading.Lock()

    def add(self, files: Mapping[str, FileEntry], *, last: bool = False) -> None:
        """Add files that are whole; after the last ones, none may come."""
        self._send(More(files, last))

    def cancel(self) -> None:
        """End the deployment with FeedCancelled: the rest will not come."""
        self._send(_Cancel())

    def close(self) -> None:
        self._inlet.close()
        self.pipe.close()

    def _send(self, message: More | _Cancel) -> None:
        with self._lock, contextlib.suppress(OSError):  # the deployment has ended
            self._inlet.send(message)


def run_tasks(
    tasks: Sequence[HostTask], remotes: Sequence[Remote], jobs: int, on_event: OnEvent, feed: Feed | None = None
) -> tuple[HostResult, ...]:
    """Look at all hosts in threads; each that lacks something then gets a process, `jobs` at once.

    Most deployments find little to do, and a process costs more than looking. No host waits for another to be looked
    at. Leaving early, by Ctrl-C too, ends all processes. Raises FeedCancelled.
    """
    fleet = _Fleet(tasks, max(1, jobs), on_event, feed)
    try:
        fleet.run(remotes)
    finally:
        fleet.end()
    return tuple(fleet.results[rank] for rank in sorted(fleet.results))


class _Fleet:
    def __init__(self, tasks: Sequence[HostTask], jobs: int, on_event: OnEvent, feed: Feed | None) -> None:
        self.results: dict[int, HostResult] = {}
        self._tasks = {task.rank: task for task in tasks}
        self._jobs = jobs
        self._on_event = on_event
        self._feed = feed
        self._looking: dict[Pipe, HostTask] = {}
        self._waiting: list[HostTask] = []
        self._processes: dict[Pipe, tuple[Any, HostTask]] = {}
        self._pipes: dict[int, Pipe] = {}  # of those processes, by rank
        self._files: dict[str, FileEntry] = {}  # that the feed has told
        self._last = False
        self._chain = Chain()
        self._tokens: dict[tuple[int, int], str] = {}  # (source, taker) → what will let the taker in

    def run(self, remotes: Sequence[Remote]) -> None:
        """Work until every host has a result; `remotes` are the tasks' hosts'."""
        self._looking = {_start_look(*each): each[0] for each in zip(self._tasks.values(), remotes, strict=True)}
        while len(self.results) < len(self._tasks):
            while self._waiting and self._busy < self._jobs:
                self._start(self._waiting.pop(0))
            feeds = [self._feed.pipe] if self._feed and not self._last else []
            timeout_s = DECIDE_S if self._chain.is_waiting else None
            for ready in connection.wait([*feeds, *self._looking, *self._processes], timeout_s):
                assert isinstance(ready, Pipe)
                self._take(ready)
            self._decide()

    def end(self) -> None:
        """End all processes: those that have done their part leave by themselves."""
        for pipe, (process, task) in self._processes.items():
            if task.rank in self.results:
                pipe.close()
            else:
                process.terminate()
        deadline = time.monotonic() + END_GRACE_S  # of all together: hosts that hang may be many
        for pipe, (process, _) in self._processes.items():
            _end_process(pipe, process, max(0.0, deadline - time.monotonic()))
        for pipe in self._looking:
            pipe.close()

    @property
    def _busy(self) -> int:
        return sum(task.rank not in self.results for _, task in self._processes.values())

    def _take(self, ready: Pipe) -> None:
        if ready in self._looking:
            self._take_look(ready, self._looking.pop(ready))
        elif ready in self._processes:
            self._take_message(ready)
        elif self._feed and ready is self._feed.pipe:
            self._take_feed(ready.recv())

    def _take_look(self, pipe: Pipe, task: HostTask) -> None:
        look: Look = pipe.recv()
        pipe.close()
        seen = look.result
        if self._jobs >= len(self._tasks):  # its process need not ask again, unless it will wait for others
            self._tasks[task.rank] = replace(task, found=look.found)
        self._on_event(Planned(task.rank, task.host.address, seen.copied_bytes, seen.kept_bytes))
        done = task.dry_run or seen.error or (seen.python and not seen.copied_bytes and not task.growing)
        if task.relay and not task.dry_run and not seen.error:
            self._chain.expect(task.rank, look.lacks_bytes, whole=bool(done))
        if done:
            self._finish(seen)
        else:
            self._waiting.append(self._tasks[task.rank])

    def _take_feed(self, message: More | _Cancel) -> None:
        if not isinstance(message, More):
            raise FeedCancelled
        self._files |= message.files
        self._last = message.last
        for rank in self._pipes:
            self._send(rank, _part(message, rank))

    def _take_message(self, pipe: Pipe) -> None:
        _, task = self._processes[pipe]
        try:
            message = pipe.recv()
        except (EOFError, OSError):
            error = MoectlError("its deploy process exited unexpectedly", host=task.host.address)
            message = HostResult(task.rank, task.host, error)
        if isinstance(message, Up):
            self._take_request(message)
            return
        if isinstance(message, HostResult):
            self._take_result(pipe, message)
            return
        if isinstance(message, Working):
            self._chain.delay(task.rank)
        self._on_event(message)

    def _take_result(self, pipe: Pipe, result: HostResult) -> None:
        if result.error is None and self._tasks[result.rank].relay:
            self._chain.finish(result.rank)  # its process stays: others may take from it
        else:
            process, _ = self._processes.pop(pipe)
            del self._pipes[result.rank]
            _end_process(pipe, process)
            self._forget(result.rank)
        if result.rank not in self.results:
            self._finish(result)

    def _finish(self, result: HostResult) -> None:
        self.results[result.rank] = result
        self._on_event(result)

    def _start(self, task: HostTask) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve_task, args=(theirs, task), daemon=True)
        process.start()
        theirs.close()
        self._processes[ours] = process, task
        self._pipes[task.rank] = ours
        if task.growing:
            self._send(task.rank, _part(More(self._files, self._last), task.rank))

    def _send(self, rank: int, message: Down) -> None:
        with contextlib.suppress(OSError):  # it has ended: its pipe will say so
            self._pipes[rank].send(message)

    # Which host takes from which.

    def _take_request(self, message: Up) -> None:
        match message:
            case Joined(rank=rank):
                self._chain.join(rank)
            case Wants(rank=rank, failed=failed, why=why):
                if failed is not None:
                    said = f"cannot take files from {self._tasks[failed].host.address}: {why}"
                    self._on_event(Working(rank, self._tasks[rank].host.address, said))
                self._chain.want(rank, time.monotonic(), failed)
            case Opened(rank=rank, taker=taker, at=at):
                token = self._tokens.pop((rank, taker), "")
                if at:
                    self._send_if_there(taker, TakeFrom(rank, at, token))
                elif taker in self._pipes:
                    self._chain.want(taker, time.monotonic(), rank)

    def _send_if_there(self, rank: int, message: Down) -> None:
        if rank in self._pipes:
            self._send(rank, message)

    def _decide(self) -> None:
        for rank, source in self._chain.decide(time.monotonic()):
            if source is None:
                self._send_if_there(rank, TakeFrom(None))
                continue
            if source not in self._pipes:
                self._start(self._tasks[source])  # it is whole already, and had no process
            token = self._tokens[source, rank] = secrets.token_hex(32)
            self._send(source, Admit(rank, token))

    def _forget(self, rank: int) -> None:
        """Find other sources for the hosts that were about to take from one that has failed."""
        self._chain.drop(rank)
        for source, taker in [pair for pair in self._tokens if rank in pair]:
            del self._tokens[source, taker]
            if source == rank:
                self._chain.want(taker, time.monotonic(), source)


def _part(more: More, rank: int) -> More:
    return More({n: e for n, e in more.files.items() if manifest_file.is_for(n, rank)}, more.last)


def _start_look(task: HostTask, remote: Remote) -> Pipe:
    ours, theirs = multiprocessing.Pipe(duplex=False)

    def look() -> None:
        started = time.monotonic()
        try:
            seen = inspect_host(task, remote)
        except Exception as error:
            seen = Look(HostResult(task.rank, task.host, as_ours(error, task.host)), 0)
        result = replace(seen.result, duration_s=time.monotonic() - started)
        with contextlib.suppress(OSError):  # the fleet has ended
            theirs.send(replace(seen, result=result))
        theirs.close()

    # A daemon: Ctrl-C has to leave at once, although a host may be hashing for minutes.
    threading.Thread(target=look, daemon=True).start()
    return ours


def _end_process(pipe: Pipe, process: Any, grace_s: float = END_GRACE_S) -> None:
    pipe.close()
    process.join(grace_s)
    process.kill()
    process.join()
    process.close()


# In a host's process.


def _serve_task(pipe: Pipe, task: HostTask) -> None:
    """Deploy to one host and send what happens up the pipe; the entry point of a host's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends us
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # on the way out, commands under way are ended too
    started = time.monotonic()
    with contextlib.suppress(BrokenPipeError):  # the parent is gone
        send = _Throttle(task, pipe)
        line = _Line(pipe, send)
        result: HostResult | None = None
        try:
            with deployed_host(task, send, line) as result:
                send(replace(result, duration_s=time.monotonic() - started))
                line.linger()
        except BrokenPipeError:
            raise
        except Exception as error:
            if result is None:
                failed = HostResult(task.rank, task.host, as_ours(error, task.host))
                send(replace(failed, duration_s=time.monotonic() - started))


class _Line:
    """The way to the parent: messages up as they are, messages down to the push once there is one."""

    def __init__(self, pipe: Pipe, send: _Throttle) -> None:
        self.tell = send.tell
        self._pipe = pipe
        self._early: queue.SimpleQueue[Down | None] = queue.SimpleQueue()
        self._finished = False
        self._ended = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def connect(self, push: Push) -> None:
        threading.Thread(target=self._pass_on, args=(push,), daemon=True).start()

    def linger(self) -> None:
        """Stay until the parent does not need this process any more."""
        self._finished = True
        self._ended.wait()

    def _listen(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                self._early.put(self._pipe.recv())
        self._early.put(None)
        self._ended.set()
        if not self._finished:
            os.kill(os.getpid(), signal.SIGTERM)  # the parent is gone: end as if it had ended us

    def _pass_on(self, push: Push) -> None:
        while (message := self._early.get()) is not None:
            if isinstance(message, More):
                push.add(message)
            elif isinstance(message, TakeFrom):
                push.take_from(message)
            else:
                push.admit(message)


class _Throttle:
    """Sends events up: progress added up, ten times a second, everything else at once."""

    def __init__(self, task: HostTask, pipe: Pipe) -> None:
        self._task = task
        self._pipe = pipe
        self._lock = threading.Lock()  # a push has several threads
        self._pending = 0
        self._sent_s = time.monotonic()

    def __call__(self, event: Event) -> None:
        with self._lock:
            if isinstance(event, Advanced):
                self._pending += event.bytes
                if time.monotonic() - self._sent_s < EVENT_INTERVAL_S:
                    return
            for ready in self._flush(event):
                self._pipe.send(ready)

    def tell(self, message: Up) -> None:
        """Send a message that is not an event."""
        with self._lock, contextlib.suppress(OSError):  # the parent is gone, as the main thread will see
            self._pipe.send(message)

    def _flush(self, event: Event) -> Iterator[Event]:
        if self._pending:
            yield Advanced(self._task.rank, self._task.host.address, self._pending)
            self._pending, self._sent_s = 0, time.monotonic()
        if not isinstance(event, Advanced):
            yield event
