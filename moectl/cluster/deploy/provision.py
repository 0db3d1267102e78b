"""Bring one host what its rank needs: an interpreter with the operator's versions, and its files, verified.

The order is look, compare, install, push; what is right already is left alone, so running it again resumes it. How the
files get there is `push`'s. It knows one host: doing this on N hosts is `cluster`'s, running workers is `session`'s.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from moectl.cluster.deploy.push import Found, PeerLink, Push, record
from moectl.cluster.deploy.relay import FLOOR_BYTES_S, More, Up
from moectl.errors import CommandFailed, MoectlError, VersionMismatch
from moectl.hosts.connect import ROOT, make_remote
from moectl.hosts.hostfile import Host
from moectl.hosts.programs import OLDEST_PYTHON, ask, list_bases
from moectl.hosts.remote import Failure, Remote, put_error, read_failure, room_text
from moectl.model import manifest as manifest_file
from moectl.model.manifest import FileEntry
from moectl.records import build

MANIFEST = manifest_file.NAME
PACKAGES = ("moectl", "mlx", "mlx-lm")  # what has to be equal on every rank, or the ranks disagree
STAMP = "env/moectl-env.json"
PIP_S = 3600.0
REASON_LETTERS = 400
SURVEY_S = 3600.0  # --verify reads every byte
CHECK = """
import json, sys
from importlib.metadata import version
wanted = json.loads(sys.argv[1])
found = {name: version(name) for name in wanted}
sys.exit(0 if found == wanted else f"pip installed {found}")
"""


@dataclass(frozen=True, slots=True)
class Planned:
    """A host was looked at: this many bytes will be copied, this many are there and right."""

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
    """This many more bytes are in place on a host; negative takes back."""

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
    relayed_bytes: int = 0  # of those copied, that came from another host

    @property
    def ok(self) -> bool:
        return self.error is None


Event = Planned | Working | Advanced | HostResult
OnEvent = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class FileSurvey:
    """What `node.survey` answers."""

    python: str
    version: str
    root: str
    directory: str
    free: int
    device: int
    env: bool
    writable: bool
    packages: dict[str, str]
    code: str
    stamp: str
    wheels: dict[str, int]  # missing ones → bytes that are there of them
    missing: dict[str, int]
    kept: list[str]
    corrupt: list[str]
    known: dict[str, str]  # hashes that an earlier push recorded
    begun: dict[str, int]  # of the planned files, the bytes that are there


@dataclass(frozen=True, slots=True)
class HostTask:
    """Everything that one host's process has to know."""

    rank: int
    host: Host
    shards: Path
    name: str
    files: dict[str, FileEntry]  # moectl.json last
    versions: dict[str, str]
    code: str  # hash of the operator's moectl
    wheels: dict[Path, FileEntry]  # moectl's own first, then those of a wheelhouse, and in the end their list
    dry_run: bool
    verify: bool
    relay: bool = False  # whether this host may take files from others, and give them
    growing: bool = False  # `files` is empty: they are told as they are made
    planned: dict[str, int] = field(default_factory=dict)  # sizes of those that are being made
    floor_bytes_s: float = FLOOR_BYTES_S
    found: Mapping[str, Any] | None = None  # what the host told already

    @property
    def stamp(self) -> str:
        """What the environment's stamp says when there is nothing to install."""
        ours = next(iter(self.wheels.values()))
        return json.dumps({"versions": self.versions, "wheel": ours.sha256}, sort_keys=True)


@dataclass(frozen=True, slots=True)
class Look:
    """What a deployment would do on a host, and how many bytes of shared files it lacks."""

    result: HostResult
    lacks_bytes: int
    found: Mapping[str, Any] | None = None  # what the host told


class EventPipe(Protocol):
    """A host's way to the process that runs all hosts."""

    def tell(self, message: Up) -> None:
        """Send a message up."""
        ...

    def connect(self, push: Push) -> None:
        """Let the messages that come down reach the push, those that have come already too."""
        ...


def inspect_host(task: HostTask, remote: Remote) -> Look:
    """Look at a host and tell what a deployment would do there.

    At most the record of verified files is written, in a dry run not even that. Nothing to do: `copied_bytes` is 0 and
    `python` is set. Raises what `deployed_host` would raise so far.
    """
    found = _survey(remote, task)
    lacks = _missing_bytes(task, found)
    shared = sum(size for name, size in lacks.items() if manifest_file.is_shared(name) and name != MANIFEST)
    return Look(_plan(task, found), shared, found)


def survey_environment(remote: Remote, host: Host) -> dict[str, Any]:
    """Return what a host tells of its interpreter, packages and disk (see `node.survey`); it writes nothing.

    Raises VersionMismatch without a python that is new enough, CommandFailed, HostError.
    """
    nothing: dict[str, str] = {}
    return _survey(remote, HostTask(0, host, Path(), "", {}, nothing, "", {}, dry_run=True, verify=False))


@contextlib.contextmanager
def deployed_host(task: HostTask, on_event: OnEvent, line: EventPipe) -> Iterator[HostResult]:
    """Install and copy what a host lacks; inside the block, other hosts can take from it what it has.

    Raises HostError, RemoteError and IntegrityError of any kind.
    """
    remote = make_remote(task.host)
    push = None
    try:
        found = task.found or _survey(remote, task)
        plan = _plan(task, found)
        remote.python = found["python"]
        python = remote.python = plan.python or _prepare_python(remote, task, found, on_event)
        push = _make_push(remote, task, found, on_event, line)
        if not task.growing:
            push.add(More({name: entry for name, entry in task.files.items() if name in found["missing"]}, True))
        line.connect(push)
        arrived = push.run()
        plan = replace(plan, python=python, relayed_bytes=arrived.relayed_bytes)
        if task.growing:
            plan = replace(plan, copied_bytes=arrived.copied_bytes, kept_bytes=arrived.kept_bytes)
        yield plan
    finally:
        if push is not None:
            push.close()
        remote.close()


def _make_push(remote: Remote, task: HostTask, found: Mapping[str, Any], on_event: OnEvent, line: EventPipe) -> Push:
    there = Found(
        directory=found["directory"],
        kept={name: task.files[name] for name in found["kept"] if name != MANIFEST},
        known=found["known"] if task.growing else {},
        may_lie=task.growing or MANIFEST in found["corrupt"],
    )
    link = PeerLink(task.rank, task.host.ips, line.tell, task.floor_bytes_s) if task.relay else None

    def on_bytes(count: int) -> None:
        on_event(Advanced(task.rank, task.host.address, count))

    return Push(remote, task.shards, there, on_bytes, link)


def _missing_bytes(task: HostTask, found: Mapping[str, Any]) -> dict[str, int]:
    """Return file → bytes that have to come."""
    missing = {name: task.files[name].bytes - there for name, there in found["missing"].items()}
    return missing | {name: size - found["begun"][name] for name, size in task.planned.items()}


def _plan(task: HostTask, found: Mapping[str, Any]) -> HostResult:
    """Compare what was found with what is wanted. Raises CommandFailed when it cannot fit or be written."""
    python = _find_python(task, found)
    needed = sum(_missing_bytes(task, found).values())
    if not python:
        needed += sum(f.bytes - found["wheels"].get(w.name, f.bytes) for w, f in task.wheels.items())
    _check_room(task, found, needed)
    # Of files that are being made, those that an earlier push brought will most likely be right.
    likely = sum(size for name, size in task.planned.items() if name in found["known"] and found["begun"][name] == size)
    return HostResult(
        rank=task.rank,
        host=task.host,
        python=python,
        root=found["root"],
        directory=found["directory"],
        copied_bytes=sum(task.files[name].bytes for name in found["missing"]) + sum(task.planned.values()) - likely,
        kept_bytes=sum(task.files[name].bytes for name in found["kept"]) + likely,
        free_after_bytes=found["free"] - needed,
    )


def _survey(remote: Remote, task: HostTask) -> dict[str, Any]:
    """Find a python on the host and ask it what is there. Raises VersionMismatch, CommandFailed."""
    request = {
        "root": task.host.dir or ROOT,
        "directory": f"shards/{task.name}",
        "files": {name: [f.bytes, f.sha256] for name, f in task.files.items()},
        "planned": task.planned,
        "verify": task.verify,
        "remember": not task.dry_run,
        "packages": PACKAGES,
        "stamp": STAMP,
        "wheels": {wheel.name: [f.bytes, f.sha256] for wheel, f in task.wheels.items()},
    }
    answer = _ask(remote, list_bases(task.host), "survey", request, SURVEY_S)
    _refuse_error(remote, answer)
    _check_survey(remote, task, answer)
    return answer


def _ask(
    remote: Remote, pythons: Sequence[str], command: str, request: Mapping[str, Any], timeout_s: float
) -> dict[str, Any]:
    return ask(remote, pythons, "files", request, timeout_s=timeout_s, oldest=OLDEST_PYTHON, command=command)


def _check_survey(remote: Remote, task: HostTask, answer: dict[str, Any]) -> None:
    """Raise CommandFailed unless a host's answer is one, and speaks of what it was asked for."""
    try:
        found = build(FileSurvey, answer)
    except ValueError as error:
        raise CommandFailed(f"its python gave an answer that makes no sense: {error}", host=remote.name) from None
    sizes = [found.free, *found.wheels.values(), *found.missing.values()]
    named = {*found.missing, *found.kept, *found.corrupt}
    if min(sizes) < 0 or not named <= task.files.keys() or {*found.missing} & {*found.kept}:
        raise CommandFailed("its python gave an answer that makes no sense", host=remote.name)


def _refuse_error(remote: Remote, answer: Mapping[str, Any]) -> None:
    if "error" in answer:
        raise put_error(answer, Path(), str(answer.get("path", "a file")), "", remote.name)


def _check_room(task: HostTask, found: Mapping[str, Any], needed: int) -> None:
    made = next(place for place in (task.shards, *task.shards.parents) if place.exists())  # it may be about to be
    if task.host.is_local and found["device"] == made.stat().st_dev:
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


def _find_python(task: HostTask, found: Mapping[str, Any]) -> str:
    """Return an interpreter with exactly the wanted versions: the one named, or the one made before; else ""."""
    ours = found["packages"] == task.versions and found["code"] == task.code
    if (task.host.python or task.host.is_local) and ours:
        return str(found["python"])
    if found["stamp"] == task.stamp and found["env"]:
        return f"{found['root']}/env/bin/python"
    return ""


def _prepare_python(remote: Remote, task: HostTask, found: Mapping[str, Any], on_event: OnEvent) -> str:
    """Make or mend the host's own environment and return its interpreter. Raises CommandFailed, VersionMismatch."""
    versions = ", ".join(f"{name} {version}" for name, version in task.versions.items())
    on_event(Working(task.rank, task.host.address, f"installing {versions}"))
    _push_wheels(remote, task, found)
    root = found["root"]
    steps = _list_steps(task, found)
    request = {"lock": f"{root}/env.lock", "stamp": [f"{root}/{STAMP}", task.stamp], "steps": list(steps.values())}
    answer = _ask(remote, (remote.python,), "install", request, PIP_S)
    if answer.get("error") == "step":
        failure = read_failure(answer, remote.name)
        raise _step_error(remote, task, dict(enumerate(steps)).get(failure.step, ""), failure)
    if answer.get("error") == "busy":
        hint = "wait for the other deploy to end; two hosts on one machine need a dir= each"
        raise CommandFailed(f"another deploy is installing in {root}/env", host=remote.name, hint=hint)
    _refuse_error(remote, answer)
    remote.python = f"{root}/env/bin/python"
    return remote.python


def _push_wheels(remote: Remote, task: HostTask, found: Mapping[str, Any]) -> None:
    directory = f"{found['root']}/wheels"
    pushed = {}
    try:
        for wheel, entry in task.wheels.items():
            if wheel.name in found["wheels"]:
                remote.put(wheel, f"{directory}/{wheel.name}", sha256=entry.sha256)
                pushed[wheel.name] = entry.sha256
    finally:
        record(remote, directory, pushed)


def _list_steps(task: HostTask, found: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the commands that make or mend the environment, by what they do."""
    root = found["root"]
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
    if found["env"] and found["stamp"]:
        return steps
    # None yet, one of another python, or what an interrupted install left.
    return {"venv": [found["python"], "-m", "venv", "--clear", f"{root}/env"], **steps}


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
