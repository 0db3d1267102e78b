# ruff: noqa: PTH111,PTH112,PTH113,PTH115,PTH116,PTH118,PTH208
"""The program that lists the workers on a host, and says whether a shard set is still there. It changes nothing.

Its text is sent to the host's own python (`python -c`), so it uses the standard library only and runs from Python 3.9
on. Linux is read in /proc, other systems by ps and lsof.

    python -c TEXT        {"root", "directory"} on stdin; answers {"system", "deployed", "workers": [{"pid",
                          "memory_bytes", "up_s", "python", "logs", "own"}]}, a line of JSON behind `ANSWER`
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from typing import Any

from moectl.hosts.onhost.prelude import tell

WORDS = ["-m", "moectl", "worker"]  # the end of every worker's command line
PS = ["ps", "-axww", "-o", "pid=,rss=,etime=,command="]


def find_workers() -> list[dict[str, Any]]:
    """Return the workers of all users on this host, as far as this user may see them."""
    if os.path.isdir("/proc/self"):
        return _find_in_proc()
    found = parse_ps(_run(PS))
    for worker in found:
        names = _run(["lsof", "-nP", "-a", "-p", str(worker["pid"]), "-F", "n"]).split("\n")
        worker["logs"] = pick_logs(name[1:] for name in names if name.startswith("n"))
    return found


def parse_ps(text: str) -> list[dict[str, Any]]:
    """Return the workers among the lines of `PS`: pid, KiB of memory, elapsed time, command."""
    found: list[dict[str, Any]] = []
    for line in text.split("\n"):
        match = re.match(r"\s*(\d+)\s+(\d+)\s+([\d:-]+)\s+(.*)", line)
        if match and match[4].rstrip().endswith(" " + " ".join(WORDS)):
            python = match[4].rstrip()[: -len(" ".join(WORDS)) - 1]
            worker = {"pid": int(match[1]), "memory_bytes": 1024 * int(match[2]), "up_s": parse_elapsed(match[3])}
            found.append({**worker, "python": python, "logs": []})
    return found


def parse_elapsed(text: str) -> float:
    """Return seconds of ps's [[days-]hours:]minutes:seconds."""
    days, _, clock = text.rpartition("-")
    seconds = 0
    for part in clock.split(":"):
        seconds = 60 * seconds + int(part)
    return float(86400 * int(days or 0) + seconds)


def pick_logs(names: Any) -> list[str]:
    """Return the log files among names of open files, also those that were deleted."""
    plain = (name.removesuffix(" (deleted)") for name in names)  # as /proc marks them
    return sorted({name for name in plain if re.search(r"-rank-\d+\.log$", name)})


def _is_own(pid: int) -> bool:
    """Whether a process is this user's: the open files of others cannot be seen."""
    try:
        return os.stat(f"/proc/{pid}").st_uid == os.getuid()
    except OSError:
        said = _run(["ps", "-o", "uid=", "-p", str(pid)]).strip()
        return said in ("", str(os.getuid()))


def _find_in_proc() -> list[dict[str, Any]]:
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            argv = _read(f"/proc/{pid}/cmdline").split("\0")[:-1]
            if argv[-3:] == WORDS:
                found.append({"pid": int(pid), **_measure(pid), "python": argv[0], "logs": _open_logs(pid)})
        except OSError:
            pass  # it has just ended
    return found


def _measure(pid: str) -> dict[str, Any]:
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()  # from the third field on, see proc(5)
    began_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    memory_bytes = int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
    return {"memory_bytes": memory_bytes, "up_s": max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - began_s)}


def _open_logs(pid: str) -> list[str]:
    names = []
    try:
        for fd in os.listdir(f"/proc/{pid}/fd"):
            names.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
    except OSError:
        pass  # another user's, or a file that was just closed
    return pick_logs(names)


def _read(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as f:  # noqa: PTH123
        return f.read()


def _run(argv: list[str]) -> str:
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode("utf-8", "replace")


def _main() -> None:
    request = json.loads(sys.stdin.buffer.readline())
    directory = request["directory"]
    workers = [{**worker, "own": _is_own(worker["pid"])} for worker in find_workers()]
    tell(
        {
            "system": sys.platform,
            "deployed": bool(directory) and os.path.isfile(os.path.join(os.path.expanduser(directory), "moectl.json")),
            "root": os.path.realpath(os.path.expanduser(request["root"])),
            "workers": workers,
        }
    )


if __name__ == "__main__":
    _main()
