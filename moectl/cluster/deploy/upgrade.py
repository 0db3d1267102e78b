"""Bring the environments of hosts to the versions of this machine, and nothing else: shards stay as they are.

It reuses what `deploy` does for an environment. A host on which a worker runs is left as it is.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moectl.cluster.deploy.deploy import list_wheels, wanted_versions
from moectl.cluster.deploy.provision import renew_environment
from moectl.cluster.deploy.task import FileSurvey, HostTask, OnEvent
from moectl.cluster.deploy.uninstall import refuse_workers
from moectl.cluster.deploy.wheel import hash_code, pack_wheel
from moectl.errors import MoectlError
from moectl.hosts.connect import on_each
from moectl.hosts.hostfile import Host
from moectl.hosts.remote import Remote
from moectl.session.deployment import find_deployment, write_deployment


@dataclass(frozen=True, slots=True)
class Upgraded:
    """The result for one host; versions are moectl's, "" where there was none or it is not known."""

    host: str
    before: str = ""
    after: str = ""
    changed: bool = False  # in a dry run: that would be
    error: MoectlError | None = None
    root: str = ""
    python: str = ""


def upgrade_hosts(
    hosts: Sequence[Host],
    remotes: Sequence[Remote],
    *,
    dry_run: bool,
    on_event: OnEvent,
    wheelhouse: Path | None = None,
) -> list[Upgraded]:
    """Give every host this machine's moectl, mlx and mlx-lm, or only look; a host's error is in its result.

    Raises VersionMismatch where this moectl cannot be packed, StateError where the deployment cannot be recorded.
    """
    with tempfile.TemporaryDirectory(prefix="moectl-") as scratch:
        versions, code = wanted_versions(), hash_code()
        wheels = list_wheels(pack_wheel(Path(scratch)), wheelhouse, Path(scratch))
        nothing = HostTask(0, hosts[0], Path(scratch), "", {}, versions, code, wheels, dry_run=dry_run, verify=False)

        def work(place: int, host: Host) -> Upgraded:
            task = replace(nothing, rank=place, host=host)
            way = remotes[place]
            found, python, changed = renew_environment(task, way, on_event, _refuse_running(way, host))
            before = found.packages.get("moectl", "")
            return Upgraded(host.address, before, versions["moectl"], changed, None, found.root, python)

        results = [
            Upgraded(host.address, error=one) if isinstance(one, MoectlError) else one
            for host, one in zip(hosts, on_each(hosts, work), strict=True)
        ]
    if not dry_run:
        _record({one.host: one for one in results if one.error is None})
    return results


def _refuse_running(remote: Remote, host: Host) -> Callable[[FileSurvey], None]:
    def refuse(found: FileSurvey) -> None:
        refuse_workers(remote, (found.python,), found.root, host)

    return refuse


def _record(done: dict[str, Upgraded]) -> None:
    """Record the interpreters in the current deployment, as far as it is under these roots. Raises StateError."""
    deployment = find_deployment()
    if deployment is None:
        return
    ranks = tuple(
        replace(rank, python=done[rank.host.address].python)
        if rank.python and rank.host.address in done and done[rank.host.address].root == rank.root
        else rank
        for rank in deployment.ranks
    )
    if ranks != deployment.ranks:
        write_deployment(replace(deployment, ranks=ranks))
