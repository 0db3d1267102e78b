"""Run one of moectl's own small programs on hosts: find a python there, hand it the text, read what it answers.

The programs (`node_workers`, `node_logs`, `node_clear`) need nothing installed. What they do is theirs, what follows
from it their askers'.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from moectl.errors import CommandFailed, MoectlError, VersionMismatch
from moectl.hosts.hostfile import Host
from moectl.hosts.onhost.files import parse_answer
from moectl.hosts.remote import Process, Remote

OLDEST_PYTHON = (3, 11)
# A shell that sshd starts has a short PATH, on a Mac without Homebrew: look where python usually is.
CANDIDATES = (
    "python3",
    *(f"python3.{minor}" for minor in range(14, 10, -1)),
    "/opt/homebrew/bin/python3",
    "/usr/local/bin/python3",
    *(f"/Library/Frameworks/Python.framework/Versions/3.{minor}/bin/python3" for minor in range(14, 10, -1)),
)
NO_PYTHON = 9


FIND = f"""
text=$1 oldest=$2; shift 2
check='import sys; sys.exit(sys.version_info < tuple(map(int, sys.argv[1].split("."))))'
for p in "$@"; do
  case $p in "~/"*) p=$HOME/${{p#"~/"}};; esac
  "$p" -c "$check" "$oldest" </dev/null >/dev/null 2>&1 && exec "$p" -c "$text"
done
exit {NO_PYTHON}
"""
OLDEST = (3, 9)  # what the programs are written for


def list_pythons(host: Host, *deployed: str) -> tuple[str, ...]:
    """Return the interpreters to try on a host: those that moectl used there first, empty ones left out."""
    if host.is_local:
        return (sys.executable,)
    return tuple(python for python in (*deployed, host.python or "", *CANDIDATES) if python)


def ask(
    remote: Remote,
    pythons: Sequence[str],
    program: str,
    request: Mapping[str, Any],
    *,
    timeout_s: float,
    oldest: tuple[int, int] = OLDEST,
) -> dict[str, Any]:
    """Return a program's one answer. Raises HostError, CommandFailed, VersionMismatch (no python)."""
    stdin = json.dumps(request).encode() + b"\n"
    done = remote.run(_command(program, pythons, oldest), stdin=stdin, timeout_s=timeout_s, check=False, leash=True)
    for line in done.stdout.split(b"\n"):
        answer = parse_answer(line)
        if answer is not None:
            return answer
    raise explain_silence(remote.name, done.code, done.stderr, oldest)


def start(remote: Remote, pythons: Sequence[str], program: str, request: Mapping[str, Any]) -> Process:
    """Start a program that goes on until its stdin ends; the request has been sent. Raises HostError, CommandFailed."""
    process = remote.start(_command(program, pythons, OLDEST))
    try:
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
    except OSError:
        pass  # its end says why
    return process


def explain_silence(host: str, code: int, stderr: bytes, oldest: tuple[int, int] = OLDEST) -> MoectlError:
    """Return why a program ended without an answer."""
    if code == NO_PYTHON:
        wanted = ".".join(map(str, oldest))
        return VersionMismatch(
            f"no python {wanted} or newer was found",
            host=host,
            hint="install one there, or name it in the hosts file: python=/path/to/python3",
        )
    said = stderr.decode("utf-8", "replace").strip().split("\n")[-1]
    return CommandFailed(f"its python gave no answer: {said or f'exit code {code}'}", host=host)


def _command(program: str, pythons: Sequence[str], oldest: tuple[int, int]) -> list[str]:
    return ["sh", "-c", FIND, "moectl", read_program(program), ".".join(map(str, oldest)), *pythons]


def read_program(name: str) -> str:
    """Return the text of one of moectl's modules that run on hosts."""
    return resources.files("moectl.hosts.onhost").joinpath(f"{name}.py").read_text(encoding="utf-8")
