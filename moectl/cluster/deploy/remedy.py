"""What helps when a host stays away: a shard set with which the other hosts could go on.

It looks at the sets on this machine and asks the remaining hosts what they have; it changes nothing.
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator
from pathlib import Path

from moectl.cluster.deploy import deploy
from moectl.errors import MoectlError, PlanError
from moectl.hosts.hostfile import Host
from moectl.model.manifest import NAME as MANIFEST_NAME, Manifest, read_manifest
from moectl.paths import data_dir
from moectl.planner.questions import check_hosts
from moectl.session.deployment import Deployment
from moectl.text import format_gb


def find_remedy(target: Deployment, lost: str) -> str | None:
    """Return in one line how the other hosts could answer without `lost`, a host's name; None when they could not.

    They are asked over SSH what is on their disks, which takes some seconds.
    """
    rest = [rank.host for rank in target.ranks if rank.host.name != lost]
    if not rest or len(rest) == len(target.ranks):
        return None
    with contextlib.suppress(MoectlError):
        source = read_manifest(Path(target.shards)).source
        found = [(_missing_bytes(rest, *one), one[0]) for one in _sets_for(source, rest)]
        ready = sorted((missing, directory) for missing, directory in found if missing is not None)
        names = ",".join(host.address for host in rest)
        if ready:
            missing, directory = ready[0]
            held = "which they hold on their disks" if missing == 0 else f"{format_gb(missing)} to copy"
            command = shlex.join(["moectl", "deploy", "--hosts", names, "--shards", str(directory)])
            return f"if {lost} stays away, the others can go on with {directory.name}, {held}: {command}"
        cut = shlex.join(["moectl", "shard", source, "--hosts", names])
        return f"if {lost} stays away, cut the model for the others: {cut} && moectl deploy --hosts {names}"
    return None


def _sets_for(source: str, hosts: list[Host]) -> Iterator[tuple[Path, Manifest]]:
    """Yield the sets of this source for this many hosts, unless one of them is known to have too little memory."""
    for path in sorted((data_dir() / "shards").glob(f"*/{MANIFEST_NAME}")):
        with contextlib.suppress(MoectlError):
            manifest = read_manifest(path.parent)
            if manifest.source == source and manifest.world_size == len(hosts):
                with contextlib.suppress(PlanError):
                    check_hosts(hosts, manifest, force=False, warn=lambda text: None)
                    yield path.parent, manifest


def _missing_bytes(hosts: list[Host], directory: Path, manifest: Manifest) -> int | None:
    """Return how many bytes of a set the hosts do not have; None when one of them cannot be asked."""
    result = deploy.deploy(hosts, directory, manifest, dry_run=True)
    return None if result.failed else sum(host.copied_bytes for host in result.succeeded)
