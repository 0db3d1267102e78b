"""A chat with an echo, for test_chat: `python -m tests.chat_script HISTORY|- RECORD`; what is asked goes to RECORD."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moectl.chat import chat
from moectl.errors import PeerLost, UsageError
from moectl.leash import Done, Token
from moectl.request import Stats

RECORD = Path(sys.argv[2])


def record(what: dict[str, Any]) -> None:
    """Append a line."""
    with RECORD.open("a") as f:
        f.write(json.dumps(what) + "\n")


def answer(fields: dict[str, Any]) -> Iterator[Token | Done]:
    """Say the question again; words in it say what goes wrong."""
    record({"asked": fields})
    text = fields["messages"][-1]["content"]
    if "refuse" in text:
        raise UsageError("the prompt is too long", hint="shorten it")
    try:
        yield Token(0, -1, "You said: ")
        if "endless" in text:
            while True:
                yield Token(0, -1, "on and ")
                time.sleep(0.01)
        if "break" in text:
            raise PeerLost("rank 1 was lost", host="mac2")
        if "escape" in text:
            yield Token(0, -1, "\x1b[31mred\x07\x9b1m\r")
        yield Token(0, -1, text)
        yield Done(0, "stop", Stats(7, 3, 0.1, 0.2, 0.1, 1000))
    finally:
        record({"closed": True})


if __name__ == "__main__":
    history = None if sys.argv[1] == "-" else Path(sys.argv[1])
    chat(answer, "Echo on 2 hosts.", {"max_tokens": 256}, history=history)
    record({"left": True})
