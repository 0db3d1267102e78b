"""Progress in bytes on stderr: live bars on a terminal, a line per 10 % elsewhere. tqdm is loaded only for a bar."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from moectl.text import size_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from moectl.shards.prepare import Bars

QUIET_S = 1.0  # what is done by then needs no progress
_BAR = "{desc} {percentage:3.0f}% {bar:24} {n_fmt}/{total_fmt}B  {rate_fmt}  eta {remaining}"


@contextlib.contextmanager
def progress(*, quiet: bool = False) -> Iterator[Bars]:
    """Show bars while the block runs, and leave them on the screen.

    The block gets a function that begins a bar, given its label and its total; that returns what counts more bytes.
    """
    lock = threading.Lock()
    drawn: list[Any] = []

    def bar(label: str, total_bytes: int) -> Callable[[int], None]:
        if quiet:
            return lambda n_bytes: None
        if not sys.stderr.isatty():
            return _Lines(label, total_bytes, lock).advance
        from tqdm import tqdm

        drawn.append(
            tqdm(
                total=total_bytes,
                desc=label,
                unit="B",
                unit_scale=True,
                bar_format=_BAR,
                position=len(drawn),
                dynamic_ncols=True,
                delay=QUIET_S,
                file=sys.stderr,
            )
        )
        advance: Callable[[int], None] = drawn[-1].update
        return advance

    try:
        yield bar
    finally:
        for one in drawn:
            one.close()


class _Lines:
    """One line per 10 %, for logs and pipes."""

    def __init__(self, label: str, total_bytes: int, lock: threading.Lock) -> None:
        self._label, self._total, self._done, self._said = label, total_bytes, 0, 0
        self._lock = lock
        self._begin_s = time.monotonic()

    def advance(self, n_bytes: int) -> None:
        """Count n more bytes; negative takes back."""
        with self._lock:
            self._done += n_bytes
            total = max(self._total, self._done)  # small files of a set that is being made are not counted before
            tenth = 10 * self._done // total if total else 10
            if tenth > self._said and time.monotonic() - self._begin_s > QUIET_S:
                self._said = tenth
                sys.stderr.write(f"{self._label}  {tenth * 10}%  {size_text(self._done)} of {size_text(total)}\n")
