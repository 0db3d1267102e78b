"""All ranks of a model in this one process: threads that exchange arrays by hand, one of them running at a time."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from functools import cache
from typing import Any, TypeVar

import mlx.core as mx
import pytest

from moectl.engine.network import exchange

T = TypeVar("T")
_PATIENCE_S = 60.0  # of a rank that waits for others


class _Ring:
    """What ranks have for each other. Its condition is the baton: only who holds it runs."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.baton = threading.Condition()
        self.rounds: dict[int, dict[int, mx.array]] = defaultdict(dict)
        self.letters: dict[tuple[int, int], deque[mx.array]] = defaultdict(deque)
        self.failed = False

    def wait_for(self, ready: Callable[[], bool]) -> None:
        self.baton.notify_all()
        if not self.baton.wait_for(lambda: ready() or self.failed, _PATIENCE_S) or self.failed:
            raise RuntimeError("another rank failed, or does not take part")


class FakeGroup:
    """One rank's view; counts its sums."""

    def __init__(self, ring: _Ring, rank: int) -> None:
        self.ring, self._rank, self.sums = ring, rank, 0

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self.ring.size

    def gather(self, x: mx.array) -> mx.array:
        found = self.ring.rounds[self.sums]
        self.sums += 1
        found[self._rank] = x
        self.ring.wait_for(lambda: len(found) == self.size())
        shapes = {(array.shape, array.dtype) for array in found.values()}
        assert len(shapes) == 1, f"ranks sum different things: {shapes}"
        return mx.concatenate([found[rank] for rank in range(self.size())])

    def send(self, x: mx.array, to: int) -> mx.array:
        self.ring.letters[self._rank, to].append(x)
        self.ring.baton.notify_all()
        return x

    def receive(self, shape: Any, dtype: mx.Dtype, source: int) -> mx.array:
        letters = self.ring.letters[source, self._rank]
        self.ring.wait_for(lambda: bool(letters))
        x = letters.popleft()
        assert (x.shape, x.dtype) == (tuple(shape), dtype)
        return x


@contextmanager
def _patched() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx.distributed, "all_gather", lambda x, *, group: group.gather(x))
        patch.setattr(exchange, "_backend_sum", lambda x, *, group: group.gather(x[None]).sum(axis=0))
        patch.setattr(mx.distributed, "send", lambda x, to, *, group: group.send(x, to))
        patch.setattr(mx.distributed, "recv", lambda s, d, source, *, group: group.receive(s, d, source))
        with exchange.seam():
            yield


@cache
def _stream() -> mx.Stream:
    return mx.new_thread_unsafe_stream(mx.default_device())  # each holds an OS thread that nothing ends


def run_ranks(size: int, run: Callable[[int, Any], T]) -> list[T]:
    """Call `run(rank, group)` for all ranks at the same time; return what each returned. The first error is raised."""
    ring, stream = _Ring(size), _stream()
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        with ring.baton, mx.stream(stream):
            try:
                results[rank] = run(rank, FakeGroup(ring, rank))
            except BaseException as error:
                ring.failed = True
                ring.baton.notify_all()
                errors.append(error)

    with _patched():
        threads = [threading.Thread(target=copy_context().run, args=(work, rank)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(size)]
