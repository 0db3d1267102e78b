"""Run one of moectl's own small programs on a host: find a python there, give it the text, read its answer.

The programs are in `onhost`; they need nothing installed.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from moectl.errors import CommandFailed, MoectlError, VersionMismatch
from moectl.hosts.connect import ROOT
from moectl.hosts.hostfile import Host
from moectl.hosts.onhost.prelude import parse_answer
from moectl.hosts.remote import Process, Remote, read_program
from moectl.text import last_line

OLDEST_PYTHON = (3, 11)
_MINORS = range(15, 10, -1)
PYENV = "~/.pyenv/versions/*/bin/python3"  # the one name that stands for several
# A shell that sshd starts has a short PATH, on a Mac without Homebrew's: these are the usual places of python.
CANDIDATES = (
    "python3",
    *(f"python3.{minor}" for minor in _MINORS),
    "/opt/homebrew/bin/python3",
    *(f"/opt/homebrew/bin/python3.{minor}" for minor in _MINORS),
    *(f"/Library/Frameworks/Python.framework/Versions/3.{minor}/bin/python3" for minor in _MINORS),
    *(f"~/.local/bin/python3.{minor}" for minor in _MINORS),  # uv
    *(f"/opt/local/bin/python3.{minor}" for minor in _MINORS),  # MacPorts
    PYENV,
    "~/miniforge3/bin/python3",
    "/opt/homebrew/Caskroom/miniforge/base/bin/python3",
    "/usr/local/bin/python3",  # of Homebrew for Intel, where it is still there
)
NO_PYTHON = 9
# Says whether a python is new enough and, on a Mac, of its own processor: mlx has no wheel for Rosetta.
FITS = """import os, sys
v, intel = sys.version_info, sys.platform == "darwin" and os.uname().machine != "arm64"
fits = v >= tuple(map(int, sys.argv[1].split("."))) and not intel
print("fits" if fits else "%d.%d.%d" % v[:3] + " for Intel" * intel)"""
# Runs the first interpreter that fits; if there is none, its last line names the others. Without Apple's command line
# tools, /usr/bin/python3 is a program that opens a window. macOS tells a python that was built with an older SDK that
# it is 16, unless this variable is 0; pip would take the wheels for 15.
FIND = f"""
text=$1 command=$2 oldest=$3; shift 3
export SYSTEM_VERSION_COMPAT=0
check='{FITS}'
asks_to_install() {{
  [ "$(command -v "$1")" = /usr/bin/python3 ] && [ "$(uname)" = Darwin ] && ! xcode-select -p >/dev/null 2>&1
}}
try() {{
  asks_to_install "$1" && return
  v=$("$1" -c "$check" "$oldest" </dev/null 2>/dev/null) || return
  [ "$v" = fits ] && exec "$1" -c "$text" $command
  seen="$seen $1 is $v,"
}}
for p in "$@"; do
  case $p in
    "{PYENV}") for p in "$HOME"/.pyenv/versions/*/bin/python3; do try "$p"; done;;
    "~/"*) try "$HOME/${{p#"~/"}}";;
    *) try "$p";;
  esac
done
echo "${{seen%,}}" >&2
exit {NO_PYTHON}
"""
OLDEST = (3, 9)  # what the programs are written for


def list_pythons(host: Host, *deployed: str) -> tuple[str, ...]:
    """Return the interpreters to try on a host, first those that moectl used there; empty names are left out."""
    if host.is_local:
        return (sys.executable,)
    return tuple(python for python in (*deployed, host.python or "", *CANDIDATES) if python)


def list_bases(host: Host) -> tuple[str, ...]:
    """Return the interpreters to make a host's environment with: only the one that is named, where there is one."""
    if host.python or host.is_local:
        return (host.python or sys.executable,)
    return (f"{host.dir or ROOT}/env/bin/python", *CANDIDATES)


def ask(
    remote: Remote,
    pythons: Sequence[str],
    program: str,
    request: Mapping[str, Any],
    *,
    command: str = "",
    timeout_s: float,
    oldest: tuple[int, int] = OLDEST,
) -> dict[str, Any]:
    """Return a program's one answer. Raises HostError, CommandFailed, VersionMismatch (no python)."""
    stdin = json.dumps(request).encode() + b"\n"
    done = remote.run(
        _command(program, command, pythons, oldest), stdin=stdin, timeout_s=timeout_s, check=False, hold_stdin=True
    )
    for line in done.stdout.split(b"\n"):
        answer = parse_answer(line)
        if answer is not None:
            return answer
    raise explain_silence(remote.name, done.code, done.stderr, oldest)


def find_python(remote: Remote, pythons: Sequence[str]) -> str:
    """Return the first of these interpreters that can run moectl's programs there; empty when none can.

    Raises HostError, CommandFailed.
    """
    words = ["import sys; print(sys.executable)", "", ".".join(map(str, OLDEST)), *pythons]
    done = remote.run(["sh", "-c", FIND, "moectl", *words], check=False)
    return last_line(done.stdout) if done.code == 0 else ""


def start(remote: Remote, pythons: Sequence[str], program: str, request: Mapping[str, Any]) -> Process:
    """Start a program that runs until its stdin ends, and send the request. Raises HostError, CommandFailed."""
    process = remote.start(_command(program, "", pythons, OLDEST))
    with contextlib.suppress(OSError):  # its exit code and its output say why
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
    return process


def end_process(process: Process, wait_s: float) -> None:
    """End a program by its stdin: killing it would drop the connection."""
    for close in (process.stdin.close, lambda: process.wait(wait_s), process.close):
        with contextlib.suppress(OSError, ValueError, TimeoutError, MoectlError):
            close()


def explain_silence(host: str, code: int, stderr: bytes, oldest: tuple[int, int] = OLDEST) -> MoectlError:
    """Return why a program ended without an answer."""
    said = last_line(stderr)
    if code == NO_PYTHON:
        wanted = ".".join(map(str, oldest))
        if "for Intel" in said:
            return VersionMismatch(
                f"mlx runs on Apple silicon only, and there is no python {wanted} or newer for it ({said}: it runs in"
                " Rosetta, or the Mac has an Intel processor)",
                host=host,
                hint="install a python for Apple silicon there (brew in /opt/homebrew, uv or python.org), or name it"
                " in the hosts file: python=/path/to/python3",
            )
        return VersionMismatch(
            f"no python {wanted} or newer was found{f' ({said})' if said else ''}",
            host=host,
            hint="install one there, or name it in the hosts file: python=/path/to/python3",
        )
    return CommandFailed(f"its python gave no answer: {said or f'exit code {code}'}", host=host)


def _command(program: str, command: str, pythons: Sequence[str], oldest: tuple[int, int]) -> list[str]:
    return ["sh", "-c", FIND, "moectl", read_program(program), command, ".".join(map(str, oldest)), *pythons]
