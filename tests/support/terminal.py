"""A program in a pseudo-terminal, and what its screen shows: pexpect for the keys, pyte for the picture."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import pexpect
import pyte

TIMEOUT_S = 60.0
PASTE_BEGIN, PASTE_END = "\x1b[200~", "\x1b[201~"


class Terminal:
    """A screen of 24 lines of 80 letters with a program in it, run in a directory; use as a context manager."""

    def __init__(self, argv: Sequence[str], directory: Path, *, term: str = "xterm-256color") -> None:
        self.screen = pyte.HistoryScreen(80, 24, history=1000, ratio=0.5)
        self._stream = pyte.ByteStream(self.screen)
        self.sent = b""  # all that the program wrote
        self.echoes: bool | None = None
        environment = {
            **{name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")},
            "TERM": term,
            "LC_ALL": "C.UTF-8",
            "PYTHONPATH": str(Path(__file__).parent.parent.parent),
            "PYTHONWARNINGS": "error",
        }
        self._child: Any = pexpect.spawn(
            argv[0], list(argv[1:]), dimensions=(24, 80), env=environment, cwd=str(directory)
        )
        self._child.delaybeforesend = None

    def __enter__(self) -> Self:
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
        with contextlib.suppress(pexpect.EOF):
            while not seen():
                if time.monotonic() > deadline:
                    break
                self._read()
        picture = "\n".join(self.lines)
        assert seen(), f"after {TIMEOUT_S:g} s, or at the program's end, the screen shows:\n{picture}"

    def wait_for(self, text: str) -> None:
        """Wait until a text is on the screen."""
        self.wait(lambda: any(text in line for line in self.lines))

    def end(self) -> int:
        """Wait for the program's end; return its exit code, minus the signal's number if one killed it."""
        deadline = time.monotonic() + TIMEOUT_S
        with contextlib.suppress(pexpect.EOF):
            while time.monotonic() < deadline:
                self._read()
        # Whether the terminal shows what is typed, as a shell expects to find it.
        self.echoes = bool(self._child.getecho())
        self._child.close()
        code = self._child.exitstatus
        return int(code) if code is not None else -int(self._child.signalstatus)

    @property
    def fd(self) -> int:
        """Where keys go in, for bytes that are no text."""
        return int(self._child.child_fd)

    def kill(self, number: int) -> None:
        """Send the program a signal."""
        self._child.kill(number)

    def _read(self) -> None:
        with contextlib.suppress(pexpect.TIMEOUT):  # what is waited for may be seen elsewhere, in a file
            data = self._child.read_nonblocking(65536, timeout=0.1)
            self.sent += data
            self._stream.feed(data)
