"""A text that is drawn again and again in the same place of a terminal, and a word on Ctrl-T. It decides no content.

The terminal's second screen is used, so that whatever was on the first one is there again afterwards.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from typing import TextIO

_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l\x1b[H\x1b[2J", "\x1b[?25h\x1b[?1049l"
# A terminal that knows mode 2026 shows a picture when it is complete; others ignore it.
_BEGIN, _END = "\x1b[?2026h\x1b[H", "\x1b[J\x1b[?2026l"
_STYLE = re.compile(r"\x1b\[[0-9;]*m")


def can_redraw(stream: TextIO) -> bool:
    """Whether a stream is a terminal that moves its cursor."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


class LiveView:
    """A picture on a terminal; use as a context manager."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __enter__(self) -> LiveView:
        self._write(_ENTER)
        return self

    def __exit__(self, *_: object) -> None:
        self._write(_LEAVE)

    def draw(self, text: str) -> None:
        """Show a text in the place of the one before; what the window has no room for is cut off."""
        width, height = shutil.get_terminal_size()
        lines = [cut_line(line, width) + "\x1b[K" for line in text.split("\n")[:height]]
        # Overwritten line by line and never cleared first: that would flicker. The last line gets no newline.
        self._write(_BEGIN + "\r\n".join(lines) + _END)

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def cut_line(line: str, width: int) -> str:
    """Return a line of at most so many letters; colours take no room."""
    shown, room, position = "", width, 0
    for match in _STYLE.finditer(line):
        text = line[position : match.start()]
        shown += text[:room] + match[0]
        room, position = max(0, room - len(text)), match.end()
    return shown + line[position:][:room]


@contextlib.contextmanager
def on_ctrl_t(describe: Callable[[], str], say: Callable[[str], None]) -> Iterator[None]:
    """Say how things stand whenever Ctrl-T is pressed (SIGINFO: macOS and BSD) while the block runs."""
    number = getattr(signal, "SIGINFO", None)
    if number is None:
        yield
        return

    def tell(*_: object) -> None:
        with contextlib.suppress(RuntimeError):  # the program was just writing to the same stream: press it again
            say(describe())

    before = signal.signal(number, tell)
    try:
        yield
    finally:
        signal.signal(number, before)
