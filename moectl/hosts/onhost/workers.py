# ruff: noqa: PTH111,PTH112,PTH113,PTH116,PTH118,PTH123,PTH207,PTH208
"""The program that lists the workers on a host, and says whether a shard set is still there. It changes nothing.

Its text is sent to the host's own python (`python -c`), so it uses the standard library only and runs from Python 3.9
on. Linux is read in /proc, other systems by ps; a worker's lock says under which root it works.

    python -c TEXT        {"root", "directory"} on stdin; answers {"system", "deployed", "workers": [{"pid",
                          "memory_bytes", "up_s", "python", "logs", "own"}]}, a line of JSON behind `ANSWER`
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Container
from typing import Any

from moectl.hosts.onhost.prelude import tell

WORDS = ["-m", "moectl", "worker"]  # the end of every worker's command line
LOCK = ".lock"  # ending of the file that a worker locks, after its log's name
PS = ["ps", "-axww", "-o", "pid=,rss=,etime=,command="]


def mark_running(log: str) -> None:
    """Lock a file beside a worker's log, with this process's number in it, until the process ends.

    The lock tells that a worker runs and under which root, whatever ps shows of it: the python of a framework, as
    Homebrew's is, runs another program than the environment's. Several workers may hold it.
    """
    with contextlib.suppress(OSError):  # a file system without locks: ps is left
        fd = os.open(log + LOCK, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_CLOEXEC", 0), 0o600)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(fd, 0)  # those in it have ended
        fcntl.flock(fd, fcntl.LOCK_SH)
        os.write(fd, b"%d\n" % os.getpid())


def read_marks(root: str) -> dict[int, list[str]]:
    """Return the workers whose locks are held under a root: process → its logs."""
    found: dict[int, list[str]] = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(root), "logs", "*-rank-*.log" + LOCK))):
        with contextlib.suppress(OSError, ValueError), open(path, "rb") as f:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                for pid in map(int, f.read().split()):
                    found.setdefault(pid, []).append(path[: -len(LOCK)])
    return found


def find_workers(root: str) -> list[dict[str, Any]]:
    """Return the workers of all users on this host, as far as this user may see them; logs of those under the root."""
    marked = read_marks(root)
    found = _find_in_proc(marked) if os.path.isdir("/proc/self") else parse_ps(_run(PS), marked)
    return [{**worker, "logs": marked.get(worker["pid"], [])} for worker in found]


def parse_ps(text: str, marked: Container[int] = ()) -> list[dict[str, Any]]:
    """Return the workers among the lines of `PS` (pid, KiB of memory, elapsed time, command), and those marked."""
    found: list[dict[str, Any]] = []
    ending = " " + " ".join(WORDS)
    for line in text.split("\n"):
        match = re.match(r"\s*(\d+)\s+(\d+)\s+([\d:-]+)\s+(.*)", line.rstrip())
        if match and (match[4].endswith(ending) or int(match[1]) in marked):
            worker = {"pid": int(match[1]), "memory_bytes": 1024 * int(match[2]), "up_s": parse_elapsed(match[3])}
            found.append({**worker, "python": match[4].partition(ending)[0]})
    return found


def parse_elapsed(text: str) -> float:
    """Return seconds of ps's [[days-]hours:]minutes:seconds."""
    days, _, clock = text.rpartition("-")
    seconds = 0
    for part in clock.split(":"):
        seconds = 60 * seconds + int(part)
    return float(86400 * int(days or 0) + seconds)


def _is_own(pid: int) -> bool:
    """Whether a process is this user's: the open files of others cannot be seen."""
    try:
        return os.stat(f"/proc/{pid}").st_uid == os.getuid()
    except OSError:
        said = _run(["ps", "-o", "uid=", "-p", str(pid)]).strip()
        return said in ("", str(os.getuid()))


def _find_in_proc(marked: Container[int]) -> list[dict[str, Any]]:
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            argv = _read(f"/proc/{pid}/cmdline").split("\0")[:-1]
            if argv[-3:] == WORDS or (argv and int(pid) in marked):
                found.append({"pid": int(pid), **_measure(pid), "python": argv[0]})
        except OSError:
            pass  # it has just ended
    return found


def _measure(pid: str) -> dict[str, Any]:
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()  # from the third field on, see proc(5)
    began_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    memory_bytes = int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
    return {"memory_bytes": memory_bytes, "up_s": max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - began_s)}


def _read(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as f:
        return f.read()


def _run(argv: list[str]) -> str:
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode("utf-8", "replace")


def _main() -> None:
    request = json.loads(sys.stdin.buffer.readline())
    directory, root = request["directory"], os.path.realpath(os.path.expanduser(request["root"]))
    workers = [{**worker, "own": _is_own(worker["pid"])} for worker in find_workers(root)]
    tell(
        {
            "system": sys.platform,
            "deployed": bool(directory) and os.path.isfile(os.path.join(os.path.expanduser(directory), "moectl.json")),
            "root": root,
            "workers": workers,
        }
    )


if __name__ == "__main__":
    _main()
