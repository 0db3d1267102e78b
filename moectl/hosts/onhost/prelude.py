"""How every program on a host answers, and how it ends with its stdin.

`remote.read_program` puts this text in front of theirs, so it uses the standard library only and runs from Python 3.9
on.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

ANSWER = b"moectl-node: "


def tell(answer: dict[str, Any]) -> None:
    """Answer with a line of JSON behind ANSWER, which tells it from what a login shell may print."""
    # On a line of its own, because a login shell may have left one without an end.
    sys.stdout.buffer.write(b"\n" + ANSWER + json.dumps(answer).encode() + b"\n")
    sys.stdout.buffer.flush()


def read_line(read: Callable[[], bytes]) -> bytes:
    """Return a line, and what came with it, from unbuffered reads; b"" when it ends before."""
    line = b""
    while not line.endswith(b"\n"):
        block = read()
        if not block:
            return b""
        line += block
    return line


def parse_answer(line: bytes) -> dict[str, Any] | None:
    """Return the answer on a line of output, None for a line that the login shell printed."""
    _, mark, text = line.rpartition(ANSWER)
    try:
        answer = json.loads(text) if mark else None
    except (ValueError, RecursionError):
        return None
    return answer if isinstance(answer, dict) else None


def end_with_stdin(end: Callable[[], object]) -> None:
    """Call `end` from another thread when stdin has ended: then the asker is gone."""

    def wait() -> None:
        while os.read(0, 1 << 12):
            pass
        end()

    threading.Thread(target=wait, daemon=True).start()
