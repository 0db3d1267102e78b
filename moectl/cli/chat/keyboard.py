"""The keyboard of a chat: editing, history, pasting, and keys that are pressed during an answer.

`is_open` says of a text whether Enter should begin another line.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import termios
import time
from typing import TYPE_CHECKING, TextIO, TypeVar

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import ColorDepth
from prompt_toolkit.output.vt100 import Vt100_Output
from prompt_toolkit.utils import is_dumb_terminal

from moectl.errors import UsageError
from moectl.files import make_private_directory, replace_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from prompt_toolkit.formatted_text import StyleAndTextTuples

T = TypeVar("T")

PROMPT, CONTINUATION = ">>> ", "... "
PLACEHOLDER = "Send a message (/? for help)"
PATIENCE_S = 2.0  # a stopped answer that takes longer to end can be left by another Ctrl-C
HISTORY_BYTES = 1024 * 1024  # beyond it the older half is forgotten


class Keyboard:
    """A terminal to read from; `remembers` says whether what is typed goes into the history file."""

    def __init__(
        self,
        screen: TextIO,
        *,
        history: Path | None,
        is_open: Callable[[str], bool],
        say: Callable[[str], None],
        coloured: bool = True,
    ) -> None:
        if not (sys.stdin.isatty() and screen.isatty()):
            raise UsageError("a chat needs a terminal", hint='moectl run "What is expert parallelism?"')
        self.remembers = True
        self._waiting = False  # an answer is under way, or being stopped
        self._armed = False  # Ctrl-C raises
        self._pressed_s: float | None = None  # when Ctrl-C was first pressed since the last `read`
        dumb = is_dumb_terminal()
        # Without cursor position requests: a reply that comes during an answer would be read as typing.
        term, depth = os.environ.get("TERM"), None if coloured else ColorDepth.DEPTH_1_BIT
        output = None if dumb else Vt100_Output.from_pty(screen, term, default_color_depth=depth)
        if output is not None:
            output.enable_cpr = False
        self._output = output
        self._session: PromptSession[str] = PromptSession(
            PROMPT,
            multiline=True,
            prompt_continuation=_continuation,
            placeholder=_placeholder,
            key_bindings=_bindings(is_open),
            history=self._open_history(history, say),
            output=output,
            reserve_space_for_menu=0,
            enable_suspend=True,
            enable_open_in_editor=True,
        )

    def read(self) -> str:
        """Return one message or command. Raises KeyboardInterrupt at Ctrl-C and EOFError at Ctrl-D."""
        text = self._session.prompt(handle_sigint=False)
        self._pressed_s = None
        # Bytes that are not UTF-8 arrive as lone surrogates, which cannot be sent.
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Wait for an answer: only within the block Ctrl-C may raise KeyboardInterrupt (see `interruptible`).

        What is pasted meanwhile stays one message for the next `read`.
        """
        self._waiting = True
        try:
            if self._output is not None:
                self._output.enable_bracketed_paste()
                self._output.flush()
            yield
        finally:
            self._waiting = False
            if self._output is not None:
                self._output.disable_bracketed_paste()
                self._output.flush()

    def interruptible(self, events: Iterator[T]) -> Iterator[T]:
        """Yield the events; only while it waits for one, Ctrl-C raises KeyboardInterrupt, once."""
        while True:
            self._armed = True
            try:
                if self._pressed_s is not None:
                    raise KeyboardInterrupt
                event = next(events)
            except StopIteration:
                return
            finally:
                self._armed = False
            yield event

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """In the main thread, handle Ctrl-C and keys that nothing reads; restore the terminal afterwards.

        Such keys wait for the next `read` and are not echoed, which would put them into an answer.
        """
        fd = sys.stdin.fileno()
        modes = termios.tcgetattr(fd)
        quiet = [*modes]
        quiet[3] &= ~(termios.ECHO | termios.ICANON)
        before = signal.signal(signal.SIGINT, self._on_interrupt)
        try:
            termios.tcsetattr(fd, termios.TCSANOW, quiet)
            yield
        finally:
            termios.tcsetattr(fd, termios.TCSANOW, modes)
            signal.signal(signal.SIGINT, before)

    def _on_interrupt(self, *_: object) -> None:
        # Further presses must not interrupt the first one, which stops the answer on every host.
        now_s = time.monotonic()
        ignored = self._pressed_s is not None and now_s - self._pressed_s > PATIENCE_S
        wanted = self._armed or (self._waiting and ignored)
        self._armed = False
        if self._pressed_s is None or wanted:
            self._pressed_s = now_s
        if wanted:
            raise KeyboardInterrupt

    def _open_history(self, path: Path | None, say: Callable[[str], None]) -> History:
        if path is None:
            return InMemoryHistory()
        try:
            make_private_directory(path.parent)
            fd = _open_private(path)
            try:
                os.fchmod(fd, 0o600)  # it may be older than this rule
            finally:
                os.close(fd)
            _shorten(path)
        except OSError as error:
            say(f"History is not kept: {path}: {error.strerror}.")
            return InMemoryHistory()
        return _PrivateHistory(path, self)


class _PrivateHistory(FileHistory):
    """prompt_toolkit's format, in a file that only its owner may read."""

    def __init__(self, path: Path, keyboard: Keyboard) -> None:
        super().__init__(path)
        self._path, self._keyboard = path, keyboard

    def store_string(self, string: str) -> None:
        if not self._keyboard.remembers:
            return
        lines = "".join(f"+{line}\n" for line in string.split("\n"))
        # A full disk is no reason to end a chat.
        with contextlib.suppress(OSError), os.fdopen(_open_private(self._path), "ab") as f:
            f.write(f"\n#\n{lines}".encode("utf-8", "replace"))


def _open_private(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)


def _shorten(path: Path) -> None:
    if path.stat().st_size <= HISTORY_BYTES:
        return
    kept = path.read_bytes()[-HISTORY_BYTES // 2 :]
    kept = kept[max(0, kept.find(b"\n#")) :]  # from the beginning of an entry
    replace_file(path, kept, mode=0o600)


def _placeholder() -> StyleAndTextTuples:
    # Not when Ctrl-C or Ctrl-D leave the line behind.
    return [] if get_app().is_done else [("fg:ansibrightblack", PLACEHOLDER)]


def _continuation(width: int, line_number: int, wrap_count: int) -> str:
    return "" if wrap_count else CONTINUATION


def _bindings(is_open: Callable[[str], bool]) -> KeyBindings:
    bindings = KeyBindings()
    here = has_focus(DEFAULT_BUFFER)  # not while searching the history

    @bindings.add("enter", filter=here)
    def enter(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if is_open(buffer.text):
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter", filter=here)
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return bindings
