"""What people see: tables and hints in words, progress on stderr, colour where it is wanted. It decides nothing.

stdout carries the answer or the table, stderr everything else. tqdm is loaded only while a bar is drawn.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TextIO

QUIET_S = 1.0  # what is done by then needs no progress
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
_BAR = "{desc} {percentage:3.0f}% {bar:24} {n_fmt}/{total_fmt}B  {rate_fmt}  eta {remaining}"
# What a model or another machine says is not trusted with the terminal: escape sequences could retitle it, move its
# cursor over what was said, or make it type answers of its own. ESC and CSI (U+009B) begin them: C0, DEL and C1 are
# shown as signs.
_SIGNS: dict[int, int | None] = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
_SIGNS |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
_SIGNS[ord("\r")] = None  # of a Windows line end; alone it would overwrite the line


def printable(text: str) -> str:
    """Return a text that does nothing to a terminal but appear on it."""
    return text.translate(_SIGNS)


def size_text(size_bytes: float) -> str:
    """Return a size in powers of 1000 with one decimal: "72.9 GB", "12 B"."""
    value, unit = float(size_bytes), 0
    while value >= 999.95 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.0f} B" if unit == 0 else f"{value:.1f} {_UNITS[unit]}"


def time_text(seconds: float) -> str:
    """Return a duration as "0.4 s", "41.0 s" or "10m51s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds // 60)}m{int(seconds % 60):02d}s"


def colour_wanted(choice: str, stream: TextIO) -> bool:
    """Return whether to colour a stream: --color, then NO_COLOR, then FORCE_COLOR, then whether it is a terminal."""
    if choice != "auto":
        return choice == "always"
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or stream.isatty()


def columns() -> int:
    """Return how many letters a line may have: the terminal's width, 100 where there is none."""
    return shutil.get_terminal_size((100, 24)).columns


def table_text(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, right: str = "", width: int | None = None
) -> str:
    """Return an aligned table; columns named in `right` (by their letter, a = first) are right-aligned.

    Columns that do not fit the width are dropped from the right; nothing wraps.
    """
    width = width or columns()
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    shown, used = 0, -2
    for column in widths:
        if used + 2 + column > width and shown:
            break
        used, shown = used + 2 + column, shown + 1
    lines = []
    for row in (header, *rows):
        cells = [
            cell.rjust(widths[i]) if chr(ord("a") + i) in right else cell.ljust(widths[i])
            for i, cell in enumerate(row[:shown])
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


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
