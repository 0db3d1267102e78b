"""A program in a pseudo-terminal, and what its screen shows: pexpect for the keys, pyte for the picture."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pexpect
import pyte

TIMEOUT_S = 20.0
PASTE_BEGIN, PASTE_END = "\x1b[200~", "\x1b[201~"


class Terminal:
    """A screen of 24 lines of 80 letters with a program in it; use as a context manager."""

    def __init__(self, argv: Sequence[str], env: dict[str, str] | None = None) -> None:
        self.screen = pyte.HistoryScreen(80, 24, history=1000, ratio=0.5)
        self._stream = pyte.ByteStream(self.screen)
        self.sent = b""  # all that the program wrote
        environment = {**os.environ, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8", "PYTHONWARNINGS": "error"}
        environment.pop("NO_COLOR", None)
        self._child: Any = pexpect.spawn(
            argv[0],
            list(argv[1:]),
            dimensions=(24, 80),
            env={**environment, **(env or {})},
            cwd=Path(__file__).parent.parent,
        )
        self._child.delaybeforesend = None

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.close(force=True)

    def type(self, text: str) -> None:
        """Press keys; "\\r" is Enter, "\\x03" Ctrl-C."""
        self._child.send(text)

    def paste(self, text: str) -> None:
        """Paste as a terminal does whose program asked for bracketed paste; others get the text as typing."""
        bracketed = self.sent.rfind(b"\x1b[?2004h") > self.sent.rfind(b"\x1b[?2004l")
        text = text.replace("\n", "\r")
        self.type(f"{PASTE_BEGIN}{text}{PASTE_END}" if bracketed else text)

    @property
    def lines(self) -> list[str]:
        """The screen's lines down to the cursor's, without trailing space."""
        return [line.rstrip() for line in self.screen.display[: self.screen.cursor.y + 1]]

    def wait(self, seen: Callable[[], bool]) -> None:
        """Read until the screen is as wished; fail with the picture after TIMEOUT_S."""
        deadline = time.monotonic() + TIMEOUT_S
        while not seen():
            try:
                data = self._child.read_nonblocking(65536, timeout=max(0.0, deadline - time.monotonic()))
            except (pexpect.TIMEOUT, pexpect.EOF) as error:
                picture = "\n".join(self.lines)
                raise AssertionError(f"{type(error).__name__}, and the screen shows:\n{picture}") from None
            self.sent += data
            self._stream.feed(data)

    def wait_for(self, text: str) -> None:
        """Wait until a text is on the screen."""
        self.wait(lambda: any(text in line for line in self.lines))

    def end(self) -> int:
        """Wait for the program's end; return its exit code, minus the signal's number if one killed it."""
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            try:
                data = self._child.read_nonblocking(65536, timeout=max(0.0, deadline - time.monotonic()))
            except pexpect.EOF:
                break
            self.sent += data
            self._stream.feed(data)
        self._child.close()
        code = self._child.exitstatus
        return int(code) if code is not None else -int(self._child.signalstatus)

    def kill(self, number: int) -> None:
        """Send the program a signal."""
        self._child.kill(number)

    def echoes(self) -> bool:
        """Return whether the terminal shows what is typed, as a shell expects to find it."""
        return bool(self._child.getecho())
