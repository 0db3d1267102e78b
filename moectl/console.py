"""New: moectl.text"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, Protocol

from moectl.text import size_text

QUIET_S = 1.0  # what is done by then needs no progress
_BAR = "{desc} {percentage:3.0f}% {bar:24} {n_fmt}/{total_fmt}B  {rate_fmt}  eta {remaining}"


class Bar(Protocol):
    """Progress of one thing in bytes."""

    def advance(self, n_bytes: int) -> None:
        """Count n more bytes; negative takes back."""
        ...


class _Silent:
    def advance(self, n_bytes: int) -> None:
        pass


class _Lines:
    """One line per 10 %, for logs and pipes."""

    def __init__(self, label: str, total_bytes: int, lock: threading.Lock) -> None:
        self._label, self._total, self._done, self._said = label, total_bytes, 0, 0
        self._lock = lock
        self._begin_s = time.monotonic()

    def advance(self, n_bytes: int) -> None:
        with self._lock:
            self._done += n_bytes
            total = max(self._total, self._done)  # small files of a set that is being made are not counted before
            tenth = 10 * self._done // total if total else 10
            if tenth > self._said and time.monotonic() - self._begin_s > QUIET_S:
                self._said = tenth
                line = f"{self._label}  {tenth * 10}%  {size_text(self._done)} of {size_text(total)}\n"
                sys.stderr.write(line)


class _Tqdm:
    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def advance(self, n_bytes: int) -> None:
        self._bar.update(n_bytes)


class Progress:
    """A group of bars, one line each; made by `progress`."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._tty = sys.stderr.isatty()
        self._bars: list[Any] = []
        self._lock = threading.Lock()

    def bar(self, label: str, total_bytes: int) -> Bar:
        """Return a new bar; a silent one when nobody wants to see it."""
        if self._quiet:
            return _Silent()
        if not self._tty:
            return _Lines(label, total_bytes, self._lock)
        from tqdm import tqdm

        bar = tqdm(
            total=total_bytes,
            desc=label,
            unit="B",
            unit_scale=True,
            bar_format=_BAR,
            position=len(self._bars),
            dynamic_ncols=True,
            delay=QUIET_S,
            file=sys.stderr,
        )
        self._bars.append(bar)
        return _Tqdm(bar)

    def close(self) -> None:
        """End all bars, leaving them on the screen."""
        for bar in self._bars:
            bar.close()


@contextlib.contextmanager
def progress(*, quiet: bool = False) -> Iterator[Progress]:
    """Draw bars on stderr while the block runs: live on a terminal, a line per 10 % elsewhere."""
    group = Progress(quiet=quiet)
    try:
        yield group
    finally:
        group.close()
