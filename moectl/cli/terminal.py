"""A text that is drawn again and again in the same place of a terminal, and a word on Ctrl-T. It decides no content.

The terminal's second screen is used, so that whatever was on the first one is there again afterwards.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Protocol, TextIO

import click

from moectl.text import size_text, time_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from moectl.cli.options import Common
    from moectl.engine.request import Stats

QUIET_S = 1.0  # what is done by then needs no progress
_BAR = "{desc} {percentage:3.0f}% {bar:24} {n_fmt}/{total_fmt}B  {rate_fmt}  eta {remaining}"


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
    """Return a line of at most this many letters; colours take no room."""
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


def stats_text(stats: Stats) -> str:
    """Return the line of `run --stats`; the first token's time belongs to the prompt."""
    prompt_speed = (stats.prompt_tokens - stats.cached_tokens) / stats.prompt_s if stats.prompt_s else 0.0
    decoded = max(stats.completion_tokens - 1, 0)
    speed = decoded / stats.decode_s if stats.decode_s else 0.0
    cached = f" ({stats.cached_tokens} cached)" if stats.cached_tokens else ""
    guessed = ""
    if stats.drafted_tokens:
        share = stats.accepted_tokens / stats.drafted_tokens
        guessed = f" ({stats.accepted_tokens} of {stats.drafted_tokens} guesses right, {share:.0%})"
    return (
        f"{stats.prompt_tokens} prompt tokens{cached} at {prompt_speed:.1f} tok/s · "
        f"{stats.completion_tokens} tokens{guessed} at {speed:.1f} tok/s · "
        f"first token {time_text(stats.ttft_s)} · peak {size_text(stats.peak_memory_bytes)}"
    )


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


def log_printer(common: Common) -> Callable[[str, str], None]:
    if not common.verbose:
        return lambda host, line: None
    from moectl.text import printable

    return lambda host, line: click.echo(f"[{host}] {printable(line)}", err=True)


def download_bars(bars: Progress) -> Callable[[str, int, int], None]:
    """Return what draws a bar per file that comes from the Hub."""
    downloads: dict[str, tuple[Bar, int]] = {}

    def on_download(file: str, done: int, total: int) -> None:
        bar, before = downloads.get(file) or (bars.bar(file, total), 0)
        bar.advance(done - before)
        downloads[file] = (bar, done)

    return on_download
