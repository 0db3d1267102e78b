"""Bring one host what its rank needs: an interpreter with the operator's versions, and its files, verified.

The order is look, compare, install, push, record; what is right already is left alone, so running it again
resumes it. It knows one host: doing this on N hosts is `cluster`'s, running workers is `session`'s.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moectl import manifest as manifest_file
from moectl.errors import CommandFailed, MoectlError, VersionMismatch
from moectl.hosts import Host
from moectl.manifest import FileEntry
from moectl.node import parse_answer
from moectl.remote import LocalRemote, Remote, node_text, put_error, room_text
from moectl.wheel import download_command

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
CHECK = """
import json, sys
from importlib.metadata import version
wanted = json.loads(sys.argv[1])
found = {name: version(name) for name in wanted}
sys.exit(0 if found == wanted else f"pip installed {found}")
"""
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
    code: str  # hash of the operator's moectl
    wheels: dict[Path, FileEntry]  # moectl's own first, then those of a wheelhouse
    dry_run: bool
    verify: bool

    @property
    def stamp(self) -> str:
        """What the environment's stamp says when there is nothing to install."""
        ours = next(iter(self.wheels.values()))
        return json.dumps({"versions": self.versions, "wheel": ours.sha256}, sort_keys=True)


def make_remote(host: Host) -> Remote:
    """Return the way to a host; it connects when first used."""
    if host.is_local:
        return LocalRemote(host.name, python=host.python)
    from moectl.ssh import SSHRemote

    return SSHRemote(host)


def inspect_host(task: Task) -> HostResult:
    """Look at a host and tell what a deployment would do there.

    At most the record of verified files is written, in a dry run not even that. Nothing to do: `copied_bytes` is 0 and
    `python` is set. Raises what `deploy_host` would raise so far.
    """
    remote = make_remote(task.host)
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
    python = _find_python(task, found)
    needed = sum(task.files[name].bytes - there for name, there in missing.items())
    if not python:
        needed += sum(f.bytes - found["wheels"].get(w.name, f.bytes) for w, f in task.wheels.items())
    _check_room(task, found, needed)
    return HostResult(
        rank=task.rank,
        host=task.host,
        python=python,
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
        "wheels": {wheel.name: [f.bytes, f.sha256] for wheel, f in task.wheels.items()},
    }
    done = remote.run(
        ["sh", "-c", FIND_PYTHON, "moectl", node_text(), *candidates],
        stdin=json.dumps(request).encode() + b"\n",
        timeout_s=SURVEY_S,
        check=False,
        leash=True,
    )
    if done.code == NO_PYTHON:
        seen = done.stderr.decode("utf-8", "replace").strip().split("\n")[-1].strip()
        raise VersionMismatch(
            f"no python {'.'.join(map(str, OLDEST_PYTHON))} or newer was found{f' ({seen})' if seen else ''}",
            host=remote.name,
            hint="install one there, or name it in the hosts file: python=/path/to/python3",
        )
    answer = _read_answer(remote, done.stdout, done.stderr, done.code)
    _refuse_error(remote, answer)
    return answer


def _read_answer(remote: Remote, stdout: bytes, stderr: bytes, code: int) -> dict[str, Any]:
    for line in stdout.split(b"\n"):
        answer = parse_answer(line)
        if answer is not None:
            return answer
    said = stderr.decode("utf-8", "replace").strip().split("\n")[-1]
    raise CommandFailed(f"its python gave no answer: {said or f'exit code {code}'}", host=remote.name)


def _refuse_error(remote: Remote, answer: Mapping[str, Any]) -> None:
    if "error" in answer:
        raise put_error(answer, Path(), answer.get("path", "a file"), "", remote.name)


def _record(remote: Remote, directory: str, files: Mapping[str, str]) -> None:
    """Let the host remember files that were just verified."""
    request = json.dumps({"directory": directory, "files": files}).encode()
    # Unrecorded files cost a re-hash next time, nothing else: do not hide the error that got us here.
    with contextlib.suppress(MoectlError):
        remote.run([remote.python, "-c", node_text(), "record"], stdin=request, check=False)


def _check_room(task: Task, found: Mapping[str, Any], needed: int) -> None:
    if task.host.is_local and found["device"] == task.shards.stat().st_dev:
        return  # hard links take no room
    if needed > found["free"]:
        name = task.host.name
        raise CommandFailed(room_text(found["free"], needed), host=name, hint=f"free space on {name}")
    if needed and not found["writable"]:
        raise CommandFailed(
            f"cannot write to {found['root']}: no permission, or a read-only disk",
            host=task.host.name,
            hint="name another place in the hosts file: dir=/path",
        )


def _find_python(task: Task, found: Mapping[str, Any]) -> str:
    """Return an interpreter with exactly the wanted versions: the one named, or the one made before; else ""."""
    ours = found["packages"] == task.versions and found["code"] == task.code
    if (task.host.python or task.host.is_local) and ours:
        return str(found["python"])
    if found["stamp"] == task.stamp and found["env"]:
        return f"{found['root']}/env/bin/python"
    return ""


def _prepare_python(remote: Remote, task: Task, found: Mapping[str, Any], on_event: OnEvent) -> str:
    """Make or mend the host's own environment and return its interpreter. Raises CommandFailed, VersionMismatch."""
    versions = ", ".join(f"{name} {version}" for name, version in task.versions.items())
    on_event(Working(task.rank, task.host.address, f"installing {versions}"))
    _push_wheels(remote, task, found)
    root = found["root"]
    steps = _list_steps(task, found)
    request = {"lock": f"{root}/env.lock", "stamp": [f"{root}/{STAMP}", task.stamp], "steps": list(steps.values())}
    argv = [remote.python, "-c", node_text(), "install"]
    stdin = json.dumps(request).encode() + b"\n"
    done = remote.run(argv, stdin=stdin, timeout_s=PIP_S, check=False, leash=True)
    answer = _read_answer(remote, done.stdout, done.stderr, done.code)
    if answer.get("error") == "step":
        raise _step_error(remote, task, list(steps)[answer["step"]], answer)
    if answer.get("error") == "busy":
        hint = "wait for the other deploy to end; two hosts on one machine need a dir= each"
        raise CommandFailed(f"another deploy is installing in {root}/env", host=remote.name, hint=hint)
    _refuse_error(remote, answer)
    remote.python = f"{root}/env/bin/python"
    return remote.python


def _push_wheels(remote: Remote, task: Task, found: Mapping[str, Any]) -> None:
    directory = f"{found['root']}/wheels"
    pushed = {}
    try:
        for wheel, entry in task.wheels.items():
            if wheel.name in found["wheels"]:
                remote.put(wheel, f"{directory}/{wheel.name}", sha256=entry.sha256)
                pushed[wheel.name] = entry.sha256
    finally:
        if pushed:
            _record(remote, directory, pushed)


def _list_steps(task: Task, found: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the commands that make or mend the environment, by what they do."""
    root = found["root"]
    python, wheels = f"{root}/env/bin/python", f"{root}/wheels"
    ours = f"{wheels}/{next(iter(task.wheels)).name}"
    pip = [python, "-m", "pip", "install", "--no-input", "--disable-pip-version-check", "--quiet"]
    offline = ["--no-index", "--find-links", wheels] if len(task.wheels) > 1 else []
    others = [f"{name}=={version}" for name, version in task.versions.items() if name != "moectl"]
    steps = {
        # pip takes an equal version for an equal wheel: put ours in by force, then what it needs.
        "moectl": [*pip, "--force-reinstall", "--no-deps", ours],
        "packages": [*pip, *offline, ours, *others],
        "check": [python, "-c", CHECK, json.dumps(task.versions)],
    }
    if found["env"] and found["stamp"]:
        return steps
    # None yet, one of another python, or what an interrupted install left.
    return {"venv": [found["python"], "-m", "venv", "--clear", f"{root}/env"], **steps}


def _step_error(remote: Remote, task: Task, step: str, answer: Mapping[str, Any]) -> MoectlError:
    said = str(answer["said"]).strip().split("\n")[-1] or f"exit code {answer['code']}"
    match step:
        case "venv":
            hint = "its python needs venv and pip (Debian, Ubuntu: apt install python3-venv)"
            return CommandFailed(f"cannot make an environment: {said}", host=remote.name, hint=hint)
        case "check":
            return VersionMismatch(f"{said}, wanted {task.versions}", host=remote.name)
    hint = (
        f"no internet there? Here: {download_command('wheels', task.versions)}; then moectl deploy --wheelhouse wheels"
    )
    return CommandFailed(f"pip: {said}", host=remote.name, hint=hint)


def _push_files(remote: Remote, task: Task, found: Mapping[str, Any], on_event: OnEvent) -> None:
    missing = [name for name in task.files if name in found["missing"]]
    if not missing:
        return
    directory = found["directory"]
    if manifest_file.NAME in found["corrupt"]:
        # Until the last file is there, no manifest may promise a complete set.
        remote.run(["rm", "-f", "--", f"{directory}/{manifest_file.NAME}"])

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
            _record(remote, directory, pushed)
