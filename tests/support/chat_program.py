"""A chat whose answers follow rules; test_chat runs it in a pseudo-terminal.

Usage: python -m tests.support.chat_program LOG HISTORY|- [JSON settings [PATIENCE_S]]. What it is
asked, and which answers were stopped, goes to LOG as JSON lines.
"""

from __future__ import annotations

import itertools
import json
import signal
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moectl.__main__ import TERMINATED, Terminated
from moectl.cli.chat import keyboard
from moectl.cli.chat.chat import chat
from moectl.cli.chat.settings import ChatSettings
from moectl.cli.chat.transcript import Message
from moectl.engine.protocol import Done
from moectl.engine.request import Stats
from moectl.errors import MoectlError, PeerLost, UsageError
from moectl.server.contracts import Thinking

HOSTILE = "a\x1b]0;owned\x07b\x1b[2Jc\x9b2Jd\re\x08\x7ff\tg\nh"


class Ruled:
    """Answers by the question's first word."""

    def __init__(self, log: Path) -> None:
        self._log = log

    def chat(self, messages: Sequence[Message], settings: ChatSettings) -> Generator[str | Thinking | Done, None, None]:
        """Return an answer and hold on to it, so that it ends when it is closed and not when it is forgotten."""
        self._held = self._stream(messages, settings)
        return self._held

    def _stream(
        self, messages: Sequence[Message], settings: ChatSettings
    ) -> Generator[str | Thinking | Done, None, None]:
        word, *rest = messages[-1].content.split()
        ended = False
        try:
            self._note(asked=[[m.role, m.content] for m in messages], settings=asdict(settings))
            self._note(thoughts=[m.thinking for m in messages])
            pieces = 0
            for piece in self._answer(word, rest):
                pieces += 1
                yield piece
            ended = True
            if word == "cut":  # the answer never says that it is over
                return
            reason = "length" if word == "long" else "stop"
            tokens = 256 if word == "long" else pieces
            yield Done(1, reason, Stats(20, tokens, 0.5, 2.0, 0.5, 74_300_000_000))
        finally:
            if not ended:
                self._stop(word, rest)
                self._note(stopped=messages[-1].content)

    def _answer(self, word: str, rest: list[str]) -> Iterator[str | Thinking]:
        match word:
            case "ponder":
                return iter((Thinking("I "), Thinking("add."), "4"))
            case "wonder":
                return itertools.chain((Thinking("Why"),), self._hang())
            case "forever" | "reluctant":
                return itertools.chain(("The ", "router ", "is"), self._hang())
            case "think":  # no word yet
                return self._hang()
            case "flood":
                return itertools.repeat("word ")
            case "until":
                return self._wait(Path(rest[0]))
            case "hostile":
                return iter(HOSTILE)
            case "refuse" | "break":
                return self._fail(word)
            case _:
                return iter(("You ", "said: ", " ".join((word, *rest))))

    def _stop(self, word: str, rest: list[str]) -> None:
        if word == "reluctant":  # stops when a file appears
            self._note(stopping=word)
            for _ in self._wait(Path(rest[0])):
                pass

    def _hang(self) -> Iterator[str]:
        while True:
            signal.pause()
        yield

    def _wait(self, path: Path) -> Iterator[str]:
        yield "begun "
        while not path.exists():
            time.sleep(0.01)
        yield "ended"

    def _fail(self, word: str) -> Iterator[str]:
        if word == "refuse":
            raise UsageError("the context is full\x1b[2J", hint="use /clear")
        yield "Half"
        raise PeerLost("rank 2: connection reset", host="mac3", hint="moectl logs mac3")

    def _note(self, **what: Any) -> None:
        with self._log.open("a") as f:
            f.write(json.dumps(what) + "\n")


def on_sigterm(*_: object) -> None:
    raise Terminated  # as the command line does


def main() -> int:
    """Chat; return the exit code that the command line would give."""
    log, history, *rest = sys.argv[1:]
    signal.signal(signal.SIGTERM, on_sigterm)
    if rest[1:]:
        keyboard.PATIENCE_S = float(rest[1])
    settings = ChatSettings(**{"max_tokens": 256, **json.loads(rest[0] if rest else "{}")})
    try:
        path = None if history == "-" else Path(history)
        chat("DBRX on 4 hosts", Ruled(Path(log)).chat, settings, history=path, color="never")
    except MoectlError as error:
        sys.stderr.write(f"Over: {error}\n")
        return error.exit_code
    except Terminated:
        return TERMINATED
    return 0


if __name__ == "__main__":
    sys.exit(main())
