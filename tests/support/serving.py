"""A server over two ranks of this machine, started as a user starts it."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.support.ring import process_env


@contextlib.contextmanager
def serve(model: Path, *flags: str) -> Iterator[str]:
    """Serve a checkpoint on a free port while the block runs; yield the URL of its API."""
    command = [sys.executable, "-m", "moectl", "serve", "--local", "2", "--model", str(model), "--port", "0", "--json"]
    with subprocess.Popen(
        [*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=process_env()
    ) as one:
        assert one.stdout is not None
        try:
            line = one.stdout.readline()
            assert line, one.communicate()[1]
            yield json.loads(line)["url"]
        finally:
            one.send_signal(signal.SIGINT)
            one.communicate(timeout=30)
