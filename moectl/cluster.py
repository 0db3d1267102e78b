"""The same verb on N hosts: connect to all, deploy to all. One host's failure never hides another's.

`deploy` gives each host a process of its own, since one Python process cannot fill several fast links; what
happens on one host is `provision`'s. It prints nothing: events tell what happens, results what came of it.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
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
from moectl.deployment import DeployedRank, Deployment, find_deployment, write_deployment
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
from moectl.wheel import pack_wheel

EVENT_INTERVAL_S = 0.1


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
        raise_failures({r.host.name: r.error for r in self.results})


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

    def probe(remote: Remote) -> MoectlError | None:
        try:
            remote.run(["true"])
        except MoectlError as error:
            return error
        return None

    with concurrent.futures.ThreadPoolExecutor(max_workers=max(1, len(remotes))) as pool:
        failed = [error for error in pool.map(probe, remotes) if error is not None]
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

    `only` names the hosts to deploy to (all when empty), `jobs` bounds how many work at once, `verify`
    hashes again what is recorded as right, `wheelhouse` is a directory of wheels for hosts without internet.
    A host that fails is in the result; only what concerns all is raised: PlanError (number of hosts),
    UsageError, VersionMismatch, IntegrityError.
    """
    _check_request(hosts, manifest, only, wheelhouse)
    with tempfile.TemporaryDirectory(prefix="moectl-") as scratch:
        versions = wanted_versions()
        wheel = pack_wheel(Path(scratch))
        tasks = [
            Task(
                rank=rank,
                host=host,
                shards=shard_dir.resolve(),
                name=manifest.name,
                files={**manifest.files_of(rank), manifest_file.NAME: _manifest_entry(shard_dir)},
                versions=versions,
                wheel=wheel,
                wheelhouse=wheelhouse,
                dry_run=dry_run,
                verify=verify,
            )
            for rank, host in enumerate(hosts)
            if not only or host.name in only
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
    names = [host.name for host in hosts]
    for name in only:
        if name not in names:
            raise UsageError(f"{name} is not among the hosts ({', '.join(names)})")
    if manifest.name in ("", ".", "..") or PurePosixPath(manifest.name).name != manifest.name:
        raise IntegrityError(f"{manifest.name!r} cannot be the name of a shard set's directory")
    if wheelhouse is not None and not any(wheelhouse.glob("*.whl")):
        raise UsageError(f"there are no wheels in {wheelhouse}", hint=f"pip download moectl -d {wheelhouse}")


def _manifest_entry(shard_dir: Path) -> FileEntry:
    path = shard_dir / manifest_file.NAME
    try:
        return FileEntry(path.stat().st_size, hash_file(str(path)))
    except OSError as error:
        raise IntegrityError(f"{path} cannot be read: {error.strerror}", hint="moectl shard MODEL") from None


def _record(
    result: DeployResult, hosts: Sequence[Host], shards: Path, name: str, backend: str, envs: tuple[str, ...]
) -> None:
    """Make this the current deployment; hosts that were left out keep the entry they had for the same set."""
    ranks = {rank: DeployedRank(host) for rank, host in enumerate(hosts)}
    with contextlib.suppress(MoectlError):
        earlier = find_deployment()
        if earlier and earlier.name == name and earlier.shards == str(shards):
            ranks |= {i: r for i, r in enumerate(earlier.ranks) if i in ranks and r.host == ranks[i].host}
    for r in result.results:
        ranks[r.rank] = DeployedRank(r.host, r.python, r.root, r.directory) if r.ok else DeployedRank(r.host)
    write_deployment(Deployment(name, str(shards), tuple(ranks.values()), backend, envs))


# One process per host.


def _run_tasks(tasks: Sequence[Task], jobs: int, on_event: OnEvent) -> tuple[HostResult, ...]:
    """Look at all hosts in threads, then give each that lacks something a process, `jobs` at once.

    Most deployments find little to do, and a process costs more than looking. Leaving early, by Ctrl-C too, ends
    all processes.
    """
    context = multiprocessing.get_context("spawn")
    waiting: list[Task] = []
    running: dict[connection.Connection, tuple[Any, Task]] = {}
    results: dict[int, HostResult] = {}
    for task, seen in zip(tasks, _inspect_all(tasks), strict=True):
        on_event(Planned(task.rank, task.host.name, seen.copied_bytes, seen.kept_bytes))
        if task.dry_run or seen.error or (seen.python and not seen.copied_bytes):
            results[task.rank] = seen
            on_event(seen)
        else:
            waiting.append(task)
    try:
        while waiting or running:
            while waiting and len(running) < max(1, jobs):
                task = waiting.pop(0)
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_serve_task, args=(theirs, task), daemon=True)
                process.start()
                theirs.close()
                running[ours] = process, task
            for ready in connection.wait(list(running)):
                assert isinstance(ready, connection.Connection)
                result = _take_event(ready, running[ready][1], on_event)
                if result is not None:
                    process, _ = running.pop(ready)
                    results[result.rank] = result
                    process.join()
                    process.close()
                    ready.close()
    finally:
        for ours, (process, _) in running.items():
            process.terminate()
            process.join()
            process.close()
            ours.close()
    return tuple(results[rank] for rank in sorted(results))


def _inspect_all(tasks: Sequence[Task]) -> list[HostResult]:
    results: list[HostResult | None] = [None] * len(tasks)

    def inspect(index: int, task: Task) -> None:
        started = time.monotonic()
        result = _catch(task, lambda: inspect_host(task))
        results[index] = replace(result, duration_s=time.monotonic() - started)

    # Daemons, not a pool: Ctrl-C has to leave at once, although a host may be hashing for minutes.
    threads = [threading.Thread(target=inspect, args=a, daemon=True) for a in enumerate(tasks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [result for result in results if result is not None]


def _catch(task: Task, work: Callable[[], HostResult]) -> HostResult:
    """Return the result of `work`, or its error as a result; a bug on one host must not hide the others."""
    try:
        return work()
    except MoectlError as error:
        return HostResult(task.rank, task.host, error)
    except Exception as error:
        if os.environ.get("MOECTL_DEBUG"):
            traceback.print_exc()
        reason = f"unexpected {type(error).__name__}: {error} (a bug in moectl)"
        return HostResult(task.rank, task.host, MoectlError(reason, host=task.host.name))


def _take_event(ours: connection.Connection, task: Task, on_event: OnEvent) -> HostResult | None:
    try:
        event = ours.recv()
    except EOFError:
        error = MoectlError("its deploy process ended without a word", host=task.host.name)
        event = HostResult(task.rank, task.host, error)
    on_event(event)
    return event if isinstance(event, HostResult) else None


def _serve_task(pipe: connection.Connection, task: Task) -> None:
    """Deploy to one host and send what happens up the pipe; the entry point of a host's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends us
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
            send(Advanced(task.rank, task.host.name, pending))
            pending, sent = 0, time.monotonic()
        if not isinstance(event, Advanced):
            send(event)

    return on_event
