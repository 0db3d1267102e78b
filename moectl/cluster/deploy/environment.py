"""A host's own environment: made, mended, and checked, from moectl's wheel and what pip fetches or a wheelhouse has."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moectl.cluster.deploy.push import record
from moectl.cluster.deploy.task import FileSurvey, HostTask, OnEvent, Working
from moectl.errors import CommandFailed, MoectlError, VersionMismatch
from moectl.hosts.programs import OLDEST_PYTHON, ask
from moectl.hosts.refusals import Failure, put_error, read_failure
from moectl.hosts.remote import Remote

STAMP = "env/moectl-env.json"
PIP_S = 3600.0
REASON_LETTERS = 400
GLIBC_MINOR = 35  # mlx's wheels for Linux, x86_64 and aarch64, CPU and CUDA, are manylinux_2_35
CHECK = """
import json, sys
from importlib.metadata import version
wanted = json.loads(sys.argv[1])
found = {name: version(name) for name in wanted}
sys.exit(0 if found == wanted else f"pip installed {found}")
"""


def prepare_python(remote: Remote, task: HostTask, found: FileSurvey, on_event: OnEvent) -> str:
    """Make or mend the host's own environment and return its interpreter. Raises CommandFailed, VersionMismatch."""
    versions = ", ".join(f"{name} {version}" for name, version in task.versions.items())
    on_event(Working(task.rank, task.host.address, f"installing {versions}"))
    _push_wheels(remote, task, found)
    root = found.root
    steps = _list_steps(task, found)
    request = {"lock": f"{root}/env.lock", "stamp": [f"{root}/{STAMP}", task.stamp], "steps": list(steps.values())}
    answer = ask(remote, (remote.python,), "deploy", request, command="install", timeout_s=PIP_S, oldest=OLDEST_PYTHON)
    if answer.get("error") == "step":
        failure = read_failure(answer, remote.name)
        raise _step_error(remote, task, dict(enumerate(steps)).get(failure.step, ""), failure)
    if answer.get("error") == "busy":
        hint = "wait for the other deploy to end; two hosts on one machine need a dir= each"
        raise CommandFailed(f"another deploy is installing in {root}/env", host=remote.name, hint=hint)
    refuse_error(remote, answer)
    remote.python = f"{root}/env/bin/python"
    return remote.python


def refuse_error(remote: Remote, answer: Mapping[str, Any]) -> None:
    """Raise the error that a host's answer tells of, if any."""
    if "error" in answer:
        raise put_error(answer, Path(), str(answer.get("path", "a file")), "", remote.name)


def refuse_glibc(version: str) -> str | None:
    """Return why mlx has no wheel for a Linux system; None where it has one, or this is not known."""
    match = re.match(r"2\.(\d{1,3})", version)
    if match is None or int(match[1]) >= GLIBC_MINOR:
        return None
    return f"its C library is glibc {version}, and mlx's wheels need 2.{GLIBC_MINOR} or newer"


def _push_wheels(remote: Remote, task: HostTask, found: FileSurvey) -> None:
    directory = f"{found.root}/wheels"
    pushed = {}
    try:
        for wheel, entry in task.wheels.items():
            if wheel.name in found.wheels:
                remote.put(wheel, f"{directory}/{wheel.name}", sha256=entry.sha256)
                pushed[wheel.name] = entry.sha256
    finally:
        record(remote, directory, pushed)


def _list_steps(task: HostTask, found: FileSurvey) -> dict[str, list[str]]:
    """Return the commands that make or mend the environment, by what they do."""
    root = found.root
    python, wheels = f"{root}/env/bin/python", f"{root}/wheels"
    ours = f"{wheels}/{next(iter(task.wheels)).name}"
    pip = [python, "-m", "pip", "install", "--no-input", "--disable-pip-version-check", "--quiet"]
    packages = [ours, *(f"{name}=={version}" for name, version in task.versions.items() if name != "moectl")]
    if len(task.wheels) > 1:  # from a wheelhouse: these bytes or none
        listed = f"{wheels}/{list(task.wheels)[-1].name}"
        packages = ["--no-index", "--find-links", wheels, "--require-hashes", "-r", listed]
    steps = {
        # pip takes an equal version for an equal wheel: put ours in by force, then what it needs.
        "moectl": [*pip, "--force-reinstall", "--no-deps", ours],
        "packages": [*pip, *packages],
        "check": [python, "-c", CHECK, json.dumps(task.versions)],
    }
    if found.env and found.stamp and not found.has_older_mlx:
        return steps
    # None yet, one of another python, what an interrupted install left, or an mlx that pip takes for the right one.
    return {"venv": [found.python, "-m", "venv", "--clear", f"{root}/env"], **steps}


def _step_error(remote: Remote, task: HostTask, step: str, failure: Failure) -> MoectlError:
    said = reason_of(failure.said) or f"exit code {failure.code}"
    match step:
        case "venv":
            hint = "its python needs venv and pip (Debian, Ubuntu: apt install python3-venv)"
            return CommandFailed(f"cannot make an environment: {said}", host=remote.name, hint=hint)
        case "check":
            return VersionMismatch(f"{said}, wanted {task.versions}", host=remote.name)
    hint = "no internet there? 'moectl deploy --wheelhouse wheels' fetches what it needs here, and brings it along"
    if len(task.wheels) > 1:
        hint = "add --wheelhouse-build: it fetches what the wheelhouse lacks"
    if "No space left" in said or "Disk quota exceeded" in said:
        hint = f"free space on {remote.name}, then run it again"
    return CommandFailed(f"pip: {said}", host=remote.name, hint=hint)


def reason_of(said: str) -> str:
    """Return why pip or venv failed: its error lines, else its last line; pip's notices come after them."""
    if debian := re.search("The virtual environment was not created successfully because [^.]*", said):
        return " ".join(debian[0].split())[:REASON_LETTERS]
    lines = [line.strip() for line in said.split("\n") if line.strip() and not line.startswith("[notice]")]
    errors = [line[len("error:") :].strip() for line in lines if line.lower().startswith("error:")]
    return "; ".join(errors or lines[-1:])[:REASON_LETTERS]
