"""Text for people: sizes, times and tables; safe to print on a terminal, coloured where that is wanted."""

from __future__ import annotations

import datetime
import difflib
import os
import shutil
from collections.abc import Iterable, Sequence
from typing import TextIO

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
# Text of a model or of another machine must not control the terminal: escape sequences could change its title, write
# over earlier lines, or make it send input. They begin with ESC or CSI (U+009B): C0, DEL and C1 are shown as signs.
_SIGNS: dict[int, int | None] = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
_SIGNS |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
_SIGNS[ord("\r")] = None  # of a Windows line end; alone it would overwrite the line


def printable(text: str) -> str:
    """Return a text with a visible sign for each character that would control a terminal."""
    return text.translate(_SIGNS)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a question about the most similar known word, with a blank before it; "" when none is similar."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def last_line(output: bytes) -> str:
    """Return the last line of a program's output, which mostly says why it failed."""
    return output.decode("utf-8", "replace").strip().split("\n")[-1].strip()


def size_text(size_bytes: float) -> str:
    """Return a size in powers of 1000 with one decimal: "72.9 GB", "12 B"."""
    value, unit = float(size_bytes), 0
    while value >= 999.95 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.0f} B" if unit == 0 else f"{value:.1f} {_UNITS[unit]}"


def count_text(count: int, noun: str) -> str:
    """Return "1 host", "2 hosts"."""
    return f"{count} {noun}{'s' * (count != 1)}"


def parameters_text(count: int) -> str:
    """Return a number of parameters as "132B" or "7.6M"."""
    return f"{count / 1e9:.0f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"


def time_text(seconds: float) -> str:
    """Return a duration as "0.4 s", "41.0 s" or "10m51s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds // 60)}m{int(seconds % 60):02d}s"


def colour_wanted(choice: str, stream: TextIO) -> bool:
    """Return whether to colour a stream. These decide, in order: --color, NO_COLOR, FORCE_COLOR, is it a terminal."""
    if choice != "auto":
        return choice == "always"
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or stream.isatty()


def columns() -> int:
    """Return the width of the terminal in letters, 100 where there is no terminal."""
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


def clock_text(time_s: float | None) -> str:
    """Return a time in UTC, to the second; dashes where it is not known."""
    if time_s is None:
        return "-" * 20
    return datetime.datetime.fromtimestamp(time_s, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def format_gb(nbytes: int) -> str:
    """Return bytes as GB, small ones as MB."""
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"
