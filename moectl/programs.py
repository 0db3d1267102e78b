"""Run one of moectl's own small programs on hosts: find a python there, hand it the text, read what it answers.

The programs (`node_workers`, `node_logs`, `node_clear`) need nothing installed. What they do is theirs, what follows
from it their askers'.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any, TypeVar

from moectl.errors import CommandFailed, MoectlError, Unreachable, VersionMismatch
from moectl.hosts import Host
from moectl.node import parse_answer
from moectl.provision import CANDIDATES, NO_PYTHON
from moectl.remote import Process, Remote

FIND = f"""
text=$1 oldest=$2; shift 2
check='import sys; sys.exit(sys.version_info < tuple(map(int, sys.argv[1].split("."))))'
for p in "$@"; do
  case $p in "~/"*) p=$HOME/${{p#"~/"}};; esac
  "$p" -c "$check" "$oldest" </dev/null >/dev/null 2>&1 && exec "$p" -c "$text"
done
exit {NO_PYTHON}
"""

CLOSE_S = 0.5
OLDEST = (3, 9)  # what the programs are written for

_R = TypeVar("_R")


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


def close_all(remotes: Sequence[Remote]) -> None:
    """Close connections; one that is still being made, to a host that may be silent, is left to the process's end."""

    def close(remote: Remote) -> None:
        with contextlib.suppress(MoectlError, OSError):
            remote.close()

    threads = [threading.Thread(target=close, args=(remote,), daemon=True) for remote in remotes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(CLOSE_S)


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


def on_each(
    hosts: Sequence[Host], work: Callable[[int, Host], _R], *, limit_s: float | None = None
) -> list[_R | MoectlError]:
    """Return work(index, host) of every host, done at once, or the error that it met.

    A host that has not answered after `limit_s` is Unreachable; its thread is left behind.
    """
    results: list[_R | MoectlError] = [
        Unreachable(f"no answer within {limit_s or 0:g} s", host=host.address) for host in hosts
    ]

    def run(index: int) -> None:
        try:
            results[index] = work(index, hosts[index])
        except MoectlError as error:
            results[index] = error
        except Exception as error:  # a bug met on one host must not hide what became of the others
            if os.environ.get("MOECTL_DEBUG"):
                traceback.print_exception(error)
            message = f"unexpected {type(error).__name__}: {error} (a bug in moectl)"
            results[index] = MoectlError(message, host=hosts[index].address)

    # Daemons: Ctrl-C has to leave at once, although a silent host may take minutes to give up.
    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(hosts))]
    for thread in threads:
        thread.start()
    deadline = None if limit_s is None else time.monotonic() + limit_s
    for thread in threads:
        thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
    return list(results)


def _command(program: str, pythons: Sequence[str], oldest: tuple[int, int]) -> list[str]:
    return ["sh", "-c", FIND, "moectl", read_program(program), ".".join(map(str, oldest)), *pythons]


def read_program(name: str) -> str:
    """Return the text of one of moectl's modules that run on hosts."""
    return resources.files("moectl").joinpath(f"{name}.py").read_text(encoding="utf-8")
