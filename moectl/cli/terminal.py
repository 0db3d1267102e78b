"""What people see beside results: a text redrawn in its place, a message at Ctrl-T, speeds, the workers' logs."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import sys
from typing import TYPE_CHECKING, TextIO

import click

from moectl.cli.options import unwritable
from moectl.text import colour_wanted, printable, size_text, time_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from moectl.cli.options import Common
    from moectl.engine.request import Stats
    from moectl.server.contracts import Thinking

_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l\x1b[H\x1b[2J", "\x1b[?25h\x1b[?1049l"
# A terminal that knows mode 2026 shows a picture when it is complete; others ignore it.
_BEGIN, _END = "\x1b[?2026h\x1b[H", "\x1b[J\x1b[?2026l"
_DIM, _BRIGHT = "\x1b[2m", "\x1b[22m"
_STYLE = re.compile(r"\x1b\[[0-9;]*m")


def can_redraw(stream: TextIO) -> bool:
    """Whether a stream is a terminal that moves its cursor."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


class LiveView:
    """A text that is redrawn in the same place of a terminal; use as a context manager.

    It stands on the terminal's second screen: afterwards the first one is there again as it was.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __enter__(self) -> LiveView:
        self._write(_ENTER)
        return self

    def __exit__(self, *_: object) -> None:
        self._write(_LEAVE)

    def draw(self, text: str) -> None:
        """Show a text in the place of the one before; cut off what does not fit into the window."""
        width, height = shutil.get_terminal_size()
        lines = [cut_line(line, width) + "\x1b[K" for line in text.split("\n")[:height]]
        # Overwritten line by line and never cleared first: that would flicker. The last line gets no newline.
        self._write(_BEGIN + "\r\n".join(lines) + _END)

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def cut_line(line: str, width: int) -> str:
    """Return a line of at most `width` letters; colours take no room."""
    shown, room, position = "", width, 0
    for match in _STYLE.finditer(line):
        text = line[position : match.start()]
        shown += text[:room] + match[0]
        room, position = max(0, room - len(text)), match.end()
    return shown + line[position:][:room]


@contextlib.contextmanager
def on_ctrl_t(describe: Callable[[], str], say: Callable[[str], None]) -> Iterator[None]:
    """While the block runs, say what `describe` returns whenever Ctrl-T is pressed (SIGINFO: macOS and BSD)."""
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


def write_answer(text: str, begin: str = "", end: str = "") -> None:
    """Write a part of an answer to standard output, between codes for a terminal. Raises StateError.

    A terminal gets no control characters of the text.
    """
    try:
        sys.stdout.write(begin + (printable(text) if sys.stdout.isatty() else text) + end)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise unwritable(error) from None


class AnswerWriter:
    """Writes an answer to standard output as it comes, its thinking before it: as ollama does, on a terminal dimmed.

    Raises StateError.
    """

    def __init__(self, *, hides_thinking: bool = False, color: str = "auto") -> None:
        self.hides_thinking = hides_thinking
        # Nothing but a terminal gets codes, not even with --color always: an answer may be read by a program.
        self._dims = sys.stdout.isatty() and colour_wanted(color, sys.stdout)
        self._thought = ""  # the last piece of the thinking, while it goes on

    def write(self, piece: str | Thinking) -> None:
        """Write a piece of the answer, or of the thinking."""
        if isinstance(piece, str):
            if self._thought:
                self._dim("\n" * (not self._thought.endswith("\n")) + "...done thinking.\n\n")
                self._thought = ""
            write_answer(piece)
        elif not self.hides_thinking:
            self._dim(piece.text if self._thought else "Thinking...\n" + piece.text)
            self._thought = piece.text

    def end_thinking(self) -> bool:
        """Forget thinking that was not followed by an answer; return whether its last line is not complete."""
        thought, self._thought = self._thought, ""
        return bool(thought) and not thought.endswith("\n")

    def _dim(self, text: str) -> None:
        # Each piece for itself: other messages come between them.
        begin, end = (_DIM, _BRIGHT) if self._dims else ("", "")
        write_answer(text, begin, end)


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


def log_printer(common: Common) -> Callable[[str, str], None]:
    """Return what shows a line of a worker's log, given its host; nothing without --verbose."""
    if not common.verbose:
        return lambda host, line: None
    return lambda host, line: click.echo(f"[{host}] {printable(line)}", err=True)
