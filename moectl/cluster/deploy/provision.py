"""Bring one host what its rank needs: an interpreter with the operator's versions, and its files, verified.

The order is look, compare, install, push. What is right already is left alone: to run it again is to resume it.
`environment` installs, `push` sends the files, `fleet` does this on all hosts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from moectl.cluster.deploy.environment import STAMP, prepare_python, refuse_error, refuse_glibc
from moectl.cluster.deploy.push import Found, PeerLink, Push
from moectl.cluster.deploy.relay import More, Up
from moectl.cluster.deploy.task import Advanced, FileSurvey, HostResult, HostTask, OnEvent
from moectl.errors import CommandFailed, VersionMismatch
from moectl.hosts.connect import ROOT, make_remote
from moectl.hosts.hostfile import Host
from moectl.hosts.macos import RDMA_MACOS, refuse_mac, wheel_version
from moectl.hosts.programs import OLDEST_PYTHON, ask, list_bases
from moectl.hosts.refusals import room_text
from moectl.hosts.remote import Remote
from moectl.model import manifest as manifest_file
from moectl.records import build

MANIFEST = manifest_file.NAME
PACKAGES = ("moectl", "mlx", "mlx-lm")  # what has to be equal on every rank, or the ranks disagree
SURVEY_S = 3600.0  # --verify reads every byte


@dataclass(frozen=True, slots=True)
class Look:
    """What a deployment would do on a host, and how many bytes of shared files it lacks."""

    result: HostResult
    lacks_bytes: int
    found: FileSurvey | None = None


class EventPipe(Protocol):
    """A host's way to the process that runs all hosts."""

    def tell(self, message: Up) -> None:
        """Send a message up."""
        ...

    def connect(self, push: Push) -> None:
        """Pass the messages that come down on to the push, also those that have come already."""
        ...


def inspect_host(task: HostTask, remote: Remote) -> Look:
    """Look at a host and tell what a deployment would do there.

    Where there is nothing to do, `copied_bytes` is 0 and `python` is set. At most the record of verified files is
    written, in a dry run not even that. Raises HostError, RemoteError.
    """
    found = _survey(remote, task)
    lacks = _missing_bytes(task, found)
    shared = sum(size for name, size in lacks.items() if manifest_file.is_shared(name) and name != MANIFEST)
    return Look(_plan(task, found), shared, found)


def survey_environment(remote: Remote, host: Host) -> FileSurvey:
    """Return what a host tells of its interpreter, packages and disk; it writes nothing.

    Raises VersionMismatch without a python that is new enough, CommandFailed, HostError.
    """
    return _survey(remote, HostTask(0, host, Path(), "", {}, {}, "", {}, dry_run=True, verify=False))


def renew_environment(
    task: HostTask, remote: Remote, on_event: OnEvent, before: Callable[[FileSurvey], None]
) -> tuple[FileSurvey, str, bool]:
    """Bring a host's environment, and nothing else, to the wanted versions.

    Returns what was there, the python ("" where a dry run would make it), and whether anything had to be installed.
    `before` is called before that, and may raise. Raises HostError, RemoteError.
    """
    found = _survey(remote, task)
    remote.python = found.python
    python = _plan(task, found).python
    if python or task.dry_run:
        return found, python, not python
    before(found)
    return found, prepare_python(remote, task, found, on_event), True


@contextlib.contextmanager
def deployed_host(task: HostTask, on_event: OnEvent, line: EventPipe) -> Iterator[HostResult]:
    """Install and copy what a host lacks; inside the block, other hosts can take files from it.

    Raises HostError, RemoteError and IntegrityError of any kind.
    """
    remote = make_remote(task.host)
    push = None
    try:
        found = task.found or _survey(remote, task)
        plan = _plan(task, found)
        remote.python = found.python
        python = remote.python = plan.python or prepare_python(remote, task, found, on_event)
        push = _make_push(remote, task, found, on_event, line)
        if not task.growing:
            push.add(More({name: entry for name, entry in task.files.items() if name in found.missing}, True))
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


def _make_push(remote: Remote, task: HostTask, found: FileSurvey, on_event: OnEvent, line: EventPipe) -> Push:
    there = Found(
        directory=found.directory,
        kept={name: task.files[name] for name in found.kept if name != MANIFEST},
        known=found.known if task.growing else {},
        may_lie=task.growing or MANIFEST in found.corrupt,
    )
    link = PeerLink(task.rank, task.host.ips, line.tell, task.floor_bytes_s) if task.relay else None

    def on_bytes(count: int) -> None:
        on_event(Advanced(task.rank, task.host.address, count))

    return Push(remote, task.shards, there, on_bytes, link)


def _missing_bytes(task: HostTask, found: FileSurvey) -> dict[str, int]:
    missing = {name: task.files[name].bytes - there for name, there in found.missing.items()}
    return missing | {name: size - found.begun[name] for name, size in task.planned.items()}


def _plan(task: HostTask, found: FileSurvey) -> HostResult:
    """Compare what was found with what is wanted. Raises CommandFailed when it cannot fit or be written."""
    python = _find_python(task, found)
    needed = sum(_missing_bytes(task, found).values())
    if not python:
        if refused := refuse_mac(found.macos) or refuse_glibc(found.glibc):
            raise VersionMismatch(refused, host=task.host.name)
        needed += sum(f.bytes - found.wheels.get(w.name, f.bytes) for w, f in task.wheels.items())
    _check_room(task, found, needed)
    # Files that are still being made and that an earlier push brought will most likely be the same.
    likely = sum(size for name, size in task.planned.items() if name in found.known and found.begun[name] == size)
    return HostResult(
        rank=task.rank,
        host=task.host,
        python=python,
        root=found.root,
        directory=found.directory,
        copied_bytes=sum(task.files[name].bytes for name in found.missing) + sum(task.planned.values()) - likely,
        kept_bytes=sum(task.files[name].bytes for name in found.kept) + likely,
        free_after_bytes=found.free - needed,
    )


def _survey(remote: Remote, task: HostTask) -> FileSurvey:
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
    bases = list_bases(task.host)
    answer = ask(remote, bases, "deploy", request, command="survey", timeout_s=SURVEY_S, oldest=OLDEST_PYTHON)
    refuse_error(remote, answer)
    try:
        found = build(FileSurvey, answer)
    except ValueError as error:
        raise CommandFailed(f"its python gave an answer that makes no sense: {error}", host=remote.name) from None
    sizes = [found.free, *found.wheels.values(), *found.missing.values()]
    named = {*found.missing, *found.kept, *found.corrupt}
    if min(sizes) < 0 or not named <= task.files.keys() or {*found.missing} & {*found.kept}:
        raise CommandFailed("its python gave an answer that makes no sense", host=remote.name)
    return found


def _check_room(task: HostTask, found: FileSurvey, needed: int) -> None:
    # The set itself may not exist yet.
    made = next(place for place in (task.shards, *task.shards.parents) if place.exists())
    if task.host.is_local and found.device == made.stat().st_dev:
        return  # hard links take no room
    if needed > found.free:
        name = task.host.name
        raise CommandFailed(room_text(found.free, needed), host=name, hint=f"free space on {name}")
    if needed and not found.writable:
        raise CommandFailed(
            f"cannot write to {found.root}: no permission, or a read-only disk",
            host=task.host.name,
            hint="name another place in the hosts file: dir=/path",
        )


def _find_python(task: HostTask, found: FileSurvey) -> str:
    """Return an interpreter with exactly the wanted versions: the one named, or the one made before; else ""."""
    if found.has_older_mlx and _has_newer_mlx(task):
        return ""
    ours = found.packages == task.versions and found.code == task.code
    if (task.host.python or task.host.is_local) and ours:
        return found.python
    if found.stamp == task.stamp and found.env:
        return f"{found.root}/env/bin/python"
    return ""


def _has_newer_mlx(task: HostTask) -> bool:
    """Whether an installation could bring mlx's wheel for macOS 26: pip fetches it, or the wheelhouse has it."""
    names = [wheel.stem for wheel in task.wheels if wheel.name.startswith("mlx_metal-")]
    return len(task.wheels) == 1 or any(
        (wheel_version(name.rpartition("-")[2]) or (0, 0))[0] >= RDMA_MACOS[0] for name in names
    )
