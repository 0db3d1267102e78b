"""The processes that a test has started, wherever they hang in the tree, told from those of other tests beside it."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path

from moectl.paths import runtime_dir


def workers() -> list[int]:
    """Return the pids of this test's workers on this machine."""
    return processes("moectl worker")


def processes(words: str) -> list[int]:
    """Return the pids of this test's processes on this machine whose command line has these words."""
    mine = f"XDG_RUNTIME_DIR={runtime_dir().parent}\0"
    found = []
    for process in (p for p in Path("/proc").iterdir() if p.name.isdigit()):
        with contextlib.suppress(OSError):
            line = (process / "cmdline").read_text().replace("\0", " ")
            state = (process / "stat").read_text().rpartition(")")[2].split()[0]
            if words in line and mine in (process / "environ").read_text() and state != "Z":
                found.append(int(process.name))
    return found


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def make_python(prefix: Path) -> Path:
    """Make another name for this python, under which no worker of another test runs."""
    (prefix / "bin").mkdir(parents=True)
    python = prefix / "bin" / "python"
    python.symlink_to(sys.executable)
    config = Path(sys.prefix) / "pyvenv.cfg"
    if config.exists():
        (prefix / "pyvenv.cfg").write_text(config.read_text())
        (prefix / "lib").symlink_to(Path(sys.prefix) / "lib")
    return python
