"""The same verb on N hosts: connect to all, deploy to all. One host's failure never hides another's.

`deploy` gives each host a process of its own, since one Python process cannot fill several fast links; what
happens on one host is `provision`'s. It prints nothing: events tell what happens, results what came of it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from multiprocessing import connection
from pathlib import Path, PurePosixPath
from typing import Any

import moectl
from moectl import manifest as manifest_file
from moectl.deployment import DeployedRank, Deployment, check_writable, find_deployment, write_deployment
from moectl.errors import (
    IntegrityError,
    MoectlError,
    PartialFailure,
    PlanError,
    UsageError,
    VersionMismatch,
)
from moectl.hosts import Host
from moectl.manifest import FileEntry, Manifest
from moectl.node import hash_file
from moectl.provision import (
    PACKAGES,
    Advanced,
    Event,
    HostResult,
    OnEvent,
    Planned,
    Task,
    deploy_host,
    inspect_host,
    make_remote,
)
from moectl.remote import Remote
from moectl.wheel import download_command, hash_code, pack_wheel

EVENT_INTERVAL_S = 0.1
END_GRACE_S = 5.0


@dataclass(frozen=True, slots=True)
class DeployResult:
    """The results of all hosts asked for, in rank order."""

    results: tuple[HostResult, ...]

    @property
    def succeeded(self) -> tuple[HostResult, ...]:
        return tuple(r for r in self.results if r.error is None)

    @property
    def failed(self) -> tuple[HostResult, ...]:
        return tuple(r for r in self.results if r.error is not None)

    def raise_failures(self) -> None:
        """Raise PartialFailure naming the failed hosts; the error itself when all failed alike."""
        raise_failures({r.host.address: r.error for r in self.results})


def raise_failures(errors: Mapping[str, MoectlError | None]) -> None:
    """Raise for hosts that failed: their own error when all failed alike, PartialFailure otherwise."""
    failed = {name: error for name, error in errors.items() if error is not None}
    if not failed:
        return
    first = next(iter(failed.values()))
    if len(failed) == len(errors) and len({type(e) for e in failed.values()}) == 1:
        if len(failed) == 1:
            raise first
        raise type(first)(f"all {len(failed)} hosts failed; first {first}", hint=first.hint)
    names = ", ".join(failed)
    raise PartialFailure(
        f"{len(failed)} of {len(errors)} hosts failed: {names}.",
        hint=f"{first.hint or f'mend {names}'}; then run it again: the other hosts will be skipped.",
    )


def connect(hosts: Sequence[Host]) -> list[Remote]:
    """Connect to all hosts at once, for work that needs every one; raise the first host's error when any fails."""
    remotes = [make_remote(host) for host in hosts]

    found: list[MoectlError | None] = [None] * len(remotes)

    def probe(rank: int, remote: Remote) -> None:
        try:
            remote.run(["true"])
        except Exception as error:
            found[rank] = _as_ours(error, hosts[rank])

    # Daemons, not a pool: Ctrl-C has to leave at once, although a silent host may take minutes to give up.
    threads = [threading.Thread(target=probe, args=a, daemon=True) for a in enumerate(remotes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    failed = [error for error in found if error is not None]
    if not failed:
        return remotes
    for remote in remotes:
        remote.close()
    if len(failed) > 1:
        others = ", ".join(str(error.host) for error in failed[1:])
        failed[0].message += f" (and {others} cannot be used either)"
    raise failed[0]


def deploy(
    hosts: Sequence[Host],
    shard_dir: Path,
    manifest: Manifest,
    *,
    wheelhouse: Path | None = None,
    jobs: int | None = None,
    only: Sequence[str] = (),
    dry_run: bool = False,
    verify: bool = False,
    on_event: OnEvent = lambda event: None,
    backend: str = "",
    envs: Sequence[str] = (),
) -> DeployResult:
    """Bring every host its interpreter and its rank's files, and record the deployment.

    `only` names the hosts to deploy to, by name or address (all when empty), `jobs` bounds how many work at once,
    `verify` hashes again what is recorded as right, `wheelhouse` is a directory of wheels for hosts without internet.
    A host that fails is in the result; only what concerns all is raised: PlanError (number of hosts),
    UsageError, VersionMismatch, IntegrityError, StateError (the deployment cannot be recorded here).
    """
    _check_request(hosts, manifest, only, wheelhouse)
    if not dry_run:
        check_writable()
    with tempfile.TemporaryDirectory(prefix="moectl-") as scratch:
        versions = wanted_versions()
        wheels = _list_wheels(pack_wheel(Path(scratch)), wheelhouse)
        tasks = [
            Task(
                rank=rank,
                host=host,
                shards=shard_dir.resolve(),
                name=manifest.name,
                files={**manifest.files_of(rank), manifest_file.NAME: _manifest_entry(shard_dir)},
                versions=versions,
                code=hash_code(),
                wheels=wheels,
                dry_run=dry_run,
                verify=verify,
            )
            for rank, host in enumerate(hosts)
            if not only or host.name in only or host.address in only
        ]
        result = DeployResult(_run_tasks(tasks, jobs or len(tasks), on_event))
    if not dry_run and result.succeeded:
        _record(result, hosts, shard_dir.resolve(), manifest.name, backend, tuple(envs))
    return result


def wanted_versions() -> dict[str, str]:
    """Return the operator's versions of what has to be equal everywhere. Raises VersionMismatch."""
    versions = {"moectl": moectl.__version__}
    for name in PACKAGES[1:]:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            raise VersionMismatch(f"{name} is not installed here", hint=f"pip install {name}") from None
    return versions


def _check_request(hosts: Sequence[Host], manifest: Manifest, only: Sequence[str], wheelhouse: Path | None) -> None:
    if len(hosts) != manifest.world_size:
        raise PlanError(
            f"{manifest.name} is cut for {manifest.world_size} hosts, {len(hosts)} are listed",
            hint=f"moectl shard --nodes {len(hosts)}, or list {manifest.world_size} hosts",
        )
    for name in only:
        if not any(name in (host.name, host.address) for host in hosts):
            raise UsageError(f"{name} is not among the hosts ({', '.join(host.address for host in hosts)})")
    if manifest.name in ("", ".", "..") or PurePosixPath(manifest.name).name != manifest.name:
        raise IntegrityError(f"{manifest.name!r} cannot be the name of a shard set's directory")
    if wheelhouse is not None and not any(wheelhouse.glob("*.whl")):
        raise UsageError(
            f"there are no wheels in {wheelhouse}", hint=download_command(str(wheelhouse), wanted_versions())
        )


def _manifest_entry(shard_dir: Path) -> FileEntry:
    path = shard_dir / manifest_file.NAME
    try:
        return _hash_entry(path)
    except OSError as error:
        raise IntegrityError(f"{path} cannot be read: {error.strerror}", hint="moectl shard MODEL") from None


def _list_wheels(ours: Path, wheelhouse: Path | None) -> dict[Path, FileEntry]:
    house = sorted(wheelhouse.glob("*.whl")) if wheelhouse else []
    wheels = [ours, *(wheel.resolve() for wheel in house if wheel.name != ours.name)]
    try:
        return {wheel: _hash_entry(wheel) for wheel in wheels}
    except OSError as error:
        raise UsageError(f"{error.filename} cannot be read: {error.strerror}") from None


def _hash_entry(path: Path) -> FileEntry:
    return FileEntry(path.stat().st_size, hash_file(str(path)))


def _record(
    result: DeployResult, hosts: Sequence[Host], shards: Path, name: str, backend: str, envs: tuple[str, ...]
) -> None:
    """Make this the current deployment; hosts that were left out keep the entry they had for the same set."""
    ranks = {rank: DeployedRank(host) for rank, host in enumerate(hosts)}
    with contextlib.suppress(MoectlError):
        earlier = find_deployment()
        if earlier and earlier.name == name and earlier.shards == str(shards):
            ranks |= {i: r for i, r in enumerate(earlier.ranks) if i in ranks and r.host == ranks[i].host}
    # A host that fails now may still hold what an earlier deploy brought it: its entry stays.
    for r in result.succeeded:
        ranks[r.rank] = DeployedRank(r.host, r.python, r.root, r.directory)
    write_deployment(Deployment(name, str(shards), tuple(ranks.values()), backend, envs))


# One process per host.


def _run_tasks(tasks: Sequence[Task], jobs: int, on_event: OnEvent) -> tuple[HostResult, ...]:
    """Look at all hosts in threads; each that lacks something then gets a process, `jobs` at once.

    Most deployments find little to do, and a process costs more than looking. A host goes on as soon as it was looked
    at, whatever the others do. Leaving early, by Ctrl-C too, ends all processes.
    """
    looking = {_start_look(task): task for task in tasks}
    waiting: list[Task] = []
    running: dict[connection.Connection, tuple[Any, Task]] = {}
    results: dict[int, HostResult] = {}
    try:
        while looking or waiting or running:
            while waiting and len(running) < max(1, jobs):
                task = waiting.pop(0)
                ours, process = _start_process(task)
                running[ours] = process, task
            for ready in connection.wait([*looking, *running]):
                assert isinstance(ready, connection.Connection)
                if ready in looking:
                    task = looking.pop(ready)
                    result = _take_look(ready, task, on_event)
                    if result is None:
                        waiting.append(task)
                else:
                    process, task = running[ready]
                    result = _take_event(ready, task, on_event)
                    if result is not None:
                        del running[ready]
                        _end_process(ready, process)
                if result is not None:
                    results[result.rank] = result
    finally:
        for ours, (process, _) in running.items():
            process.terminate()
            _end_process(ours, process)
        for ours in looking:
            ours.close()
    return tuple(results[rank] for rank in sorted(results))


def _start_look(task: Task) -> connection.Connection:
    ours, theirs = multiprocessing.Pipe(duplex=False)

    def look() -> None:
        started = time.monotonic()
        result = _catch(task, lambda: inspect_host(task))
        with contextlib.suppress(OSError):  # nobody waits any more
            theirs.send(replace(result, duration_s=time.monotonic() - started))
        theirs.close()

    # A daemon: Ctrl-C has to leave at once, although a host may be hashing for minutes.
    threading.Thread(target=look, daemon=True).start()
    return ours


def _take_look(ours: connection.Connection, task: Task, on_event: OnEvent) -> HostResult | None:
    """Tell what was seen on a host; return it when there is nothing more to do there."""
    seen: HostResult = ours.recv()
    ours.close()
    on_event(Planned(task.rank, task.host.address, seen.copied_bytes, seen.kept_bytes))
    if task.dry_run or seen.error or (seen.python and not seen.copied_bytes):
        on_event(seen)
        return seen
    return None


def _start_process(task: Task) -> tuple[connection.Connection, Any]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_serve_task, args=(theirs, task), daemon=True)
    process.start()
    theirs.close()
    return ours, process


def _end_process(ours: connection.Connection, process: Any) -> None:
    process.join(END_GRACE_S)
    process.kill()
    process.join()
    process.close()
    ours.close()


def _catch(task: Task, work: Callable[[], HostResult]) -> HostResult:
    """Return the result of `work`, or its error as a result."""
    try:
        return work()
    except Exception as error:
        return HostResult(task.rank, task.host, _as_ours(error, task.host))


def _as_ours(error: Exception, host: Host) -> MoectlError:
    """Return the error as one of ours; a bug met on one host must not hide what became of the others."""
    if isinstance(error, MoectlError):
        return error
    if os.environ.get("MOECTL_DEBUG"):
        traceback.print_exception(error)
    return MoectlError(f"unexpected {type(error).__name__}: {error} (a bug in moectl)", host=host.address)


def _take_event(ours: connection.Connection, task: Task, on_event: OnEvent) -> HostResult | None:
    try:
        event = ours.recv()
    except EOFError:
        error = MoectlError("its deploy process ended without a word", host=task.host.address)
        event = HostResult(task.rank, task.host, error)
    on_event(event)
    return event if isinstance(event, HostResult) else None


def _serve_task(pipe: connection.Connection, task: Task) -> None:
    """Deploy to one host and send what happens up the pipe; the entry point of a host's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends us
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # on the way out, commands under way are ended too
    started = time.monotonic()
    with contextlib.suppress(BrokenPipeError):  # the parent is gone
        send = _throttle(task, pipe.send)
        result = _catch(task, lambda: deploy_host(task, send))
        send(replace(result, duration_s=time.monotonic() - started))


def _throttle(task: Task, send: OnEvent) -> OnEvent:
    """Add up progress and send it ten times a second; everything else goes at once, after it."""
    pending, sent = 0, time.monotonic()

    def on_event(event: Event) -> None:
        nonlocal pending, sent
        if isinstance(event, Advanced):
            pending += event.bytes
            if time.monotonic() - sent < EVENT_INTERVAL_S:
                return
        if pending:
            send(Advanced(task.rank, task.host.address, pending))
            pending, sent = 0, time.monotonic()
        if not isinstance(event, Advanced):
            send(event)

    return on_event
