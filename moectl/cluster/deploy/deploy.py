"""Deploy a shard set to all hosts, and record the deployment. One host's failure never hides another's.

`fleet` works on all hosts at once, `provision` on one of them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath

import moectl
from moectl.cluster.deploy.fleet import Feed, run_tasks
from moectl.cluster.deploy.provision import PACKAGES
from moectl.cluster.deploy.task import HostResult, HostTask, OnEvent
from moectl.cluster.deploy.wheel import download_command, hash_code, is_ours, pack_wheel
from moectl.errors import (
    IntegrityError,
    MoectlError,
    PlanError,
    UsageError,
    VersionMismatch,
)
from moectl.hosts.connect import open_remotes, raise_failures
from moectl.hosts.hostfile import Host
from moectl.hosts.onhost.files import hash_file
from moectl.hosts.remote import Remote
from moectl.model import manifest as manifest_file
from moectl.model.manifest import FileEntry, Manifest
from moectl.session.deployment import DeployedRank, Deployment, check_writable, find_deployment, write_deployment


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


@dataclass(frozen=True, slots=True)
class Growing:
    """A shard set that is being made: its name, its number of hosts, and the bytes of each weight file."""

    name: str
    world_size: int
    planned: Mapping[str, int]
    feed: Feed  # tells each file when it is whole, the manifest with the last ones


def deploy(
    hosts: Sequence[Host],
    shard_dir: Path,
    manifest: Manifest | Growing,
    *,
    remotes: Sequence[Remote] | None = None,
    wheelhouse: Path | None = None,
    jobs: int | None = None,
    only: Sequence[str] = (),
    dry_run: bool = False,
    verify: bool = False,
    relay: bool = True,
    on_event: OnEvent = lambda event: None,
    backend: str = "",
    envs: Sequence[str] = (),
) -> DeployResult:
    """Bring every host its interpreter and its rank's files, and record the deployment.

    `remotes` are the ways to all hosts where the caller has them. `only` names the hosts to deploy to, by name or
    address (all when empty), `jobs` bounds how many work at once,
    `verify` hashes again what is recorded as right, `wheelhouse` is a directory of wheels for hosts without internet.
    With `relay`, hosts pass on to each other what all of them need. A set that is still `Growing` is pushed as it
    grows. A host that fails is in the result; only what concerns all is raised: PlanError (number of hosts),
    UsageError, VersionMismatch, IntegrityError, StateError (the deployment cannot be recorded here), and FeedCancelled.
    """
    _check_request(hosts, manifest.name, manifest.world_size, only, wheelhouse)
    growing = manifest if isinstance(manifest, Growing) else None
    chosen = [r for r, host in enumerate(hosts) if not only or host.name in only or host.address in only]
    if growing is None:
        manifest_file.refuse_links_outside(shard_dir)
    if not dry_run:
        check_writable()
    with ExitStack() as held, tempfile.TemporaryDirectory(prefix="moectl-") as scratch:
        versions, code = wanted_versions(), hash_code()
        wheels = list_wheels(pack_wheel(Path(scratch)), wheelhouse, Path(scratch))
        tasks = [
            HostTask(
                rank=rank,
                host=hosts[rank],
                shards=shard_dir.resolve(),
                name=manifest.name,
                files=_files_of(manifest, shard_dir, rank),
                versions=versions,
                code=code,
                wheels=wheels,
                dry_run=dry_run,
                verify=verify,
                # This machine itself has all files.
                relay=relay and not hosts[rank].is_local and sum(not hosts[r].is_local for r in chosen) > 1,
                growing=growing is not None,
                planned=_planned_of(growing, rank),
            )
            for rank in chosen
        ]
        ways = remotes or held.enter_context(open_remotes(hosts))
        feed = growing.feed if growing else None
        result = DeployResult(run_tasks(tasks, [ways[r] for r in chosen], jobs or len(tasks), on_event, feed))
    if not dry_run and result.succeeded:
        _record(result, hosts, shard_dir.resolve(), manifest.name, backend, tuple(envs))
    return result


def _files_of(manifest: Manifest | Growing, shard_dir: Path, rank: int) -> dict[str, FileEntry]:
    if isinstance(manifest, Growing):
        return {}
    return {**manifest.files_of(rank), manifest_file.NAME: manifest_entry(shard_dir)}


def _planned_of(growing: Growing | None, rank: int) -> dict[str, int]:
    planned = growing.planned if growing else {}
    return {name: size for name, size in planned.items() if manifest_file.is_for(name, rank)}


def wanted_versions() -> dict[str, str]:
    """Return the operator's versions of what has to be equal everywhere. Raises VersionMismatch."""
    versions = {"moectl": moectl.__version__}
    for name in PACKAGES[1:]:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            raise VersionMismatch(f"{name} is not installed here", hint=f"pip install {name}") from None
    return versions


def _check_request(
    hosts: Sequence[Host], set_name: str, world_size: int, only: Sequence[str], wheelhouse: Path | None
) -> None:
    if len(hosts) != world_size:
        raise PlanError(
            f"{set_name} is cut for {world_size} hosts, {len(hosts)} are listed",
            hint=f"moectl shard --nodes {len(hosts)}, or list {world_size} hosts",
        )
    for name in only:
        if not any(name in (host.name, host.address) for host in hosts):
            raise UsageError(f"{name} is not among the hosts ({', '.join(host.address for host in hosts)})")
    if set_name in ("", ".", "..") or PurePosixPath(set_name).name != set_name:
        raise IntegrityError(f"{set_name!r} cannot be the name of a shard set's directory")
    if wheelhouse is not None and not any(wheelhouse.glob("*.whl")):
        raise UsageError(
            f"there are no wheels in {wheelhouse}", hint=download_command(str(wheelhouse), wanted_versions())
        )


def manifest_entry(shard_dir: Path) -> FileEntry:
    """Return the size and hash of a shard set's manifest itself. Raises IntegrityError."""
    path = shard_dir / manifest_file.NAME
    try:
        return _hash_entry(path)
    except OSError as error:
        raise IntegrityError(f"{path} cannot be read: {error.strerror}", hint="moectl shard MODEL") from None


def list_wheels(ours: Path, wheelhouse: Path | None, scratch: Path) -> dict[Path, FileEntry]:
    """Return moectl's own wheel first, then those of a wheelhouse, which are checked, and the list that pins them."""
    wheels = [ours]
    if wheelhouse:
        from moectl.cluster.deploy import wheelhouse as houses  # with it comes `packaging`

        houses.check(wheelhouse)
        wheels += [wheel.resolve() for wheel in sorted(wheelhouse.glob("*.whl")) if not is_ours(wheel)]
        (scratch / houses.LIST).write_text(houses.make_list(wheels))
        wheels.append(scratch / houses.LIST)
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
    with suppress(MoectlError):
        earlier = find_deployment()
        if earlier and earlier.name == name and earlier.shards == str(shards):
            ranks |= {i: r for i, r in enumerate(earlier.ranks) if i in ranks and r.host == ranks[i].host}
    # A host that fails now may still hold what an earlier deploy brought it: its entry stays.
    for r in result.succeeded:
        ranks[r.rank] = DeployedRank(r.host, r.python, r.root, r.directory)
    write_deployment(Deployment(name, str(shards), tuple(ranks.values()), backend, envs))
