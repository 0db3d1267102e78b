"""Bring one host what its rank needs: an interpreter with the operator's versions, and its files, verified.

The order is look, compare, install, push, record; what is right already is left alone, so running it again
resumes it. It knows one host: doing this on N hosts is `cluster`'s, running workers is `session`'s.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moectl import manifest as manifest_file
from moectl.errors import CommandFailed, MoectlError, VersionMismatch
from moectl.hosts import Host
from moectl.manifest import FileEntry
from moectl.node import hash_file, parse_answer
from moectl.remote import DryRunRemote, LocalRemote, Remote, node_text, put_error, room_text

ROOT = "~/.moectl"
PACKAGES = ("moectl", "mlx", "mlx-lm")  # what has to be equal on every rank, or the ranks disagree
OLDEST_PYTHON = (3, 11)
STAMP = "env/moectl-env.json"
PIP_S = 3600.0
SURVEY_S = 3600.0  # --verify reads every byte

# A shell that sshd starts has a short PATH, on a Mac without Homebrew: look where python usually is.
CANDIDATES = (
    "python3",
    *(f"python3.{minor}" for minor in range(14, 10, -1)),
    "/opt/homebrew/bin/python3",
    "/usr/local/bin/python3",
    *(f"/Library/Frameworks/Python.framework/Versions/3.{minor}/bin/python3" for minor in range(14, 10, -1)),
)
NO_PYTHON = 9
FIND_PYTHON = f"""
text=$1; shift
for p in "$@"; do
  case $p in "~/"*) p=$HOME/${{p#"~/"}};; esac
  v=$("$p" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' </dev/null 2>/dev/null) || continue
  case $v in
    3.[0-9].*|3.10.*|2.*) seen="$seen $p is $v,";;
    *) exec "$p" -c "$text" survey;;
  esac
done
echo "${{seen%,}}" >&2
exit {NO_PYTHON}
"""


@dataclass(frozen=True, slots=True)
class Planned:
    """A host was looked at: so many bytes will be copied, so many are there and right."""

    rank: int
    host: str
    copy_bytes: int
    keep_bytes: int


@dataclass(frozen=True, slots=True)
class Working:
    """A host is busy with something that has no progress in bytes."""

    rank: int
    host: str
    what: str


@dataclass(frozen=True, slots=True)
class Advanced:
    """So many more bytes are in place on a host; negative takes back."""

    rank: int
    host: str
    bytes: int


@dataclass(frozen=True, slots=True)
class HostResult:
    """What came of one host. Paths are absolute there; `python` is empty when a dry run would make it."""

    rank: int
    host: Host
    error: MoectlError | None = None
    python: str = ""
    root: str = ""
    directory: str = ""
    copied_bytes: int = 0  # in a dry run: that would be copied
    kept_bytes: int = 0
    free_after_bytes: int = 0
    duration_s: float = 0.0

    @property
    def ok(self) -> bool:
        return self.error is None


Event = Planned | Working | Advanced | HostResult
OnEvent = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class Task:
    """Everything that one host's process has to know."""

    rank: int
    host: Host
    shards: Path
    name: str
    files: dict[str, FileEntry]  # moectl.json last
    versions: dict[str, str]
    wheel: Path
    wheelhouse: Path | None
    dry_run: bool
    verify: bool

    @property
    def stamp(self) -> str:
        """What the environment's stamp says when there is nothing to install."""
        return json.dumps({"versions": self.versions, "wheel": hash_file(str(self.wheel))}, sort_keys=True)


def make_remote(host: Host) -> Remote:
    """Return the way to a host; it connects when first used."""
    if host.is_local:
        return LocalRemote(host.name, python=host.python)
    from moectl.ssh import SSHRemote

    return SSHRemote(host)


def inspect_host(task: Task) -> HostResult:
    """Look at a host and tell what a deployment would do there; nothing is changed.

    Nothing to do: `copied_bytes` is 0 and `python` is set. Raises what `deploy_host` would raise so far.
    """
    remote: Remote = DryRunRemote(make_remote(task.host))
    try:
        return _plan(task, _survey(remote, task))
    finally:
        remote.close()


def deploy_host(task: Task, on_event: OnEvent) -> HostResult:
    """Install and copy what a host lacks. Raises HostError, RemoteError and IntegrityError of any kind."""
    remote = make_remote(task.host)
    try:
        found = _survey(remote, task)
        plan = _plan(task, found)
        remote.python = found["python"]
        python = plan.python or _prepare_python(remote, task, found, on_event)
        _push_files(remote, task, found, on_event)
        return replace(plan, python=python)
    finally:
        remote.close()


def _plan(task: Task, found: Mapping[str, Any]) -> HostResult:
    """Compare what was found with what is wanted. Raises CommandFailed when it cannot fit or be written."""
    missing = found["missing"]
    needed = sum(task.files[name].bytes - there for name, there in missing.items())
    _check_room(task, found, needed)
    return HostResult(
        rank=task.rank,
        host=task.host,
        python=_find_python(task, found),
        root=found["root"],
        directory=found["directory"],
        copied_bytes=sum(task.files[name].bytes for name in missing),
        kept_bytes=sum(task.files[name].bytes for name in found["kept"]),
        free_after_bytes=found["free"] - needed,
    )


def _survey(remote: Remote, task: Task) -> dict[str, Any]:
    """Find a python on the host and ask it what is there. Raises VersionMismatch, CommandFailed."""
    root = task.host.dir or ROOT
    if task.host.python:
        candidates: tuple[str, ...] = (task.host.python,)
    elif task.host.is_local:
        candidates = (sys.executable,)
    else:
        candidates = (f"{root}/env/bin/python", *CANDIDATES)
    request = {
        "root": root,
        "directory": f"shards/{task.name}",
        "files": {name: [f.bytes, f.sha256] for name, f in task.files.items()},
        "verify": task.verify,
        "remember": not task.dry_run,
        "packages": PACKAGES,
        "stamp": STAMP,
    }
    done = remote.run(
        ["sh", "-c", FIND_PYTHON, "moectl", node_text(), *candidates],
        stdin=json.dumps(request).encode(),
        timeout_s=SURVEY_S,
        check=False,
    )
    if done.code == NO_PYTHON:
        seen = done.stderr.decode("utf-8", "replace").strip().split("\n")[-1].strip()
        raise VersionMismatch(
            f"no python {'.'.join(map(str, OLDEST_PYTHON))} or newer was found{f' ({seen})' if seen else ''}",
            host=remote.name,
            hint="install one there, or name it in the hosts file: python=/path/to/python3",
        )
    return _read_answer(remote, done.stdout, done.stderr, done.code)


def _read_answer(remote: Remote, stdout: bytes, stderr: bytes, code: int) -> dict[str, Any]:
    for line in stdout.split(b"\n"):
        answer = parse_answer(line)
        if answer is not None:
            if "error" in answer:
                raise put_error(answer, Path(), answer.get("path", "a file"), "", remote.name)
            return answer
    said = stderr.decode("utf-8", "replace").strip().split("\n")[-1]
    raise CommandFailed(f"its python gave no answer: {said or f'exit code {code}'}", host=remote.name)


def _ask(remote: Remote, command: str, arguments: Sequence[str], stdin: bytes) -> dict[str, Any]:
    """Run one of `node`'s commands on the host and return its answer."""
    argv = [remote.python, "-c", node_text(), command, *arguments]
    done = remote.run(argv, stdin=stdin, check=False)
    return _read_answer(remote, done.stdout, done.stderr, done.code)


def _check_room(task: Task, found: Mapping[str, Any], needed: int) -> None:
    if task.host.is_local and found["device"] == task.shards.stat().st_dev:
        return  # hard links take no room
    if needed > found["free"]:
        name = task.host.name
        raise CommandFailed(room_text(found["free"], needed), host=name, hint=f"free space on {name}")
    if needed and not found["writable"]:
        raise CommandFailed(f"cannot write to {found['root']}: permission denied", host=task.host.name)


def _find_python(task: Task, found: Mapping[str, Any]) -> str:
    """Return an interpreter with exactly the wanted versions: the one named, or the one made before; else ""."""
    if (task.host.python or task.host.is_local) and found["packages"] == task.versions:
        return str(found["python"])
    if found["stamp"] == task.stamp and found["env"]:
        return f"{found['root']}/env/bin/python"
    return ""


def _prepare_python(remote: Remote, task: Task, found: Mapping[str, Any], on_event: OnEvent) -> str:
    """Make or mend the host's own environment and return its interpreter."""
    env_python = f"{found['root']}/env/bin/python"
    versions = ", ".join(f"{name} {version}" for name, version in task.versions.items())
    on_event(Working(task.rank, task.host.address, f"installing {versions}"))
    if found["python"] != env_python:
        _make_env(remote, found)
    _install(remote, task, found, env_python)
    remote.python = env_python
    _ask(remote, "write", [f"{found['root']}/{STAMP}"], task.stamp.encode())
    return env_python


def _make_env(remote: Remote, found: Mapping[str, Any]) -> None:
    clear = [] if found["env"] else ["--clear"]  # what an interrupted or outdated one left
    try:
        argv = [found["python"], "-m", "venv", *clear, f"{found['root']}/env"]
        remote.run(argv, timeout_s=600.0, mutates=True)
    except CommandFailed as error:
        hint = "its python needs venv and pip (Debian, Ubuntu: apt install python3-venv)"
        raise CommandFailed(error.message, host=remote.name, hint=hint) from None


def _install(remote: Remote, task: Task, found: Mapping[str, Any], env_python: str) -> None:
    """Push the wheel (and the wheelhouse) and run pip on the host. Raises CommandFailed, VersionMismatch."""
    wheels = f"{found['root']}/wheels"
    house = sorted(task.wheelhouse.glob("*.whl")) if task.wheelhouse else []
    for wheel in [task.wheel, *(w for w in house if w.name != task.wheel.name)]:
        remote.put(wheel, f"{wheels}/{wheel.name}", sha256=hash_file(str(wheel)))
    ours = f"{wheels}/{task.wheel.name}"
    pip = [env_python, "-m", "pip", "install", "--no-input", "--disable-pip-version-check", "--quiet"]
    offline = ["--no-index", "--find-links", wheels] if house else []
    others = [f"{name}=={version}" for name, version in task.versions.items() if name != "moectl"]
    try:
        # pip takes an equal version for an equal wheel: put ours in by force, then what it needs.
        remote.run([*pip, "--force-reinstall", "--no-deps", ours], timeout_s=PIP_S, mutates=True)
        remote.run([*pip, *offline, ours, *others], timeout_s=PIP_S, mutates=True)
    except CommandFailed as error:
        hint = "no internet there? Here: pip download mlx-lm -d wheels, then moectl deploy --wheelhouse wheels"
        raise CommandFailed(error.message, host=remote.name, hint=hint) from None
    remote.python = env_python
    request = {"root": found["root"], "directory": "", "files": {}, "verify": False, "remember": False}
    again = _ask(remote, "survey", [], json.dumps({**request, "packages": PACKAGES, "stamp": STAMP}).encode())
    if again["packages"] != task.versions:
        raise VersionMismatch(f"pip installed {again['packages']}, wanted {task.versions}", host=remote.name)


def _push_files(remote: Remote, task: Task, found: Mapping[str, Any], on_event: OnEvent) -> None:
    missing = [name for name in task.files if name in found["missing"]]
    if not missing:
        return
    directory = found["directory"]
    if manifest_file.NAME in found["corrupt"]:
        # Until the last file is there, no manifest may promise a complete set.
        remote.run(["rm", "-f", "--", f"{directory}/{manifest_file.NAME}"], mutates=True)

    def on_bytes(count: int) -> None:
        on_event(Advanced(task.rank, task.host.address, count))

    pushed: dict[str, str] = {}
    try:
        for name in missing:
            entry = task.files[name]
            remote.put(task.shards / name, f"{directory}/{name}", sha256=entry.sha256, on_bytes=on_bytes)
            pushed[name] = entry.sha256
    finally:
        if pushed:
            # Unrecorded files cost a re-hash next time, nothing else: do not hide the error that got us here.
            with contextlib.suppress(MoectlError):
                request = json.dumps({"directory": directory, "files": pushed}).encode()
                _ask(remote, "record", [], request)
