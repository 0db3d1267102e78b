"""The deployments: which hosts hold which shard set, and where.

`deploy` writes the current one to `$XDG_STATE_HOME/moectl/deployment.json`, the other verbs read it. The earlier ones,
of other sets or on other hosts, are in `deployments/` beside it: what they brought is still on the hosts. All this
records what was done; only the hosts know whether it is still true.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from moectl.errors import HostsError, NotDeployed, StateError
from moectl.files import make_private_directory, replace_file
from moectl.hosts.hostfile import NAMES_ONLY, Host, HostList, check_envs, check_host
from moectl.paths import state_dir
from moectl.records import build

SCHEMA = "moectl.deployment/1"
HINT = "moectl deploy hosts.txt"


@dataclass(frozen=True, slots=True)
class DeployedRank:
    """Where one rank is: absolute paths on its host, empty while it has not been deployed."""

    host: Host
    python: str = ""
    root: str = ""
    directory: str = ""  # the shard set


@dataclass(frozen=True, slots=True)
class Deployment:
    """One shard set on its hosts, in rank order."""

    name: str
    shards: str  # the operator's copy
    ranks: tuple[DeployedRank, ...]
    backend: str = ""
    envs: tuple[str, ...] = ()

    @property
    def addresses(self) -> tuple[str, ...]:
        """The host of each rank."""
        return tuple(rank.host.address for rank in self.ranks)

    @property
    def missing(self) -> tuple[str, ...]:
        """Addresses of the hosts that have not been deployed to yet."""
        return tuple(r.host.address for r in self.ranks if not r.python)


def deployment_path() -> Path:
    """Return where the current deployment is recorded."""
    return state_dir() / "deployment.json"


def check_writable() -> None:
    """Raise StateError where a deployment could not be recorded, before any work is done for one."""
    directory = deployment_path().parent
    try:
        make_private_directory(directory)
        if not os.access(directory, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "no permission, or a read-only disk")
    except OSError as error:
        raise _unwritable(error) from None


def _unwritable(error: OSError) -> StateError:
    return StateError(f"cannot write {deployment_path()}: {error.strerror}", hint="is XDG_STATE_HOME writable?")


def write_deployment(deployment: Deployment) -> None:
    """Make a deployment the current one, and keep the one before: directory 0700, files 0600. Raises StateError."""
    before = None
    with contextlib.suppress(StateError):  # a damaged record is replaced
        before = find_deployment()
    if before is not None and _earlier_path(before) != _earlier_path(deployment):
        _write(before, _earlier_path(before))
    _write(deployment, deployment_path())
    _remove(_earlier_path(deployment))


def _earlier_path(deployment: Deployment) -> Path:
    """Return where a deployment is kept that is not the current one: a set's name has one place on its hosts."""
    key = hashlib.sha256("\n".join((deployment.name, *deployment.addresses)).encode()).hexdigest()[:16]
    return state_dir() / "deployments" / f"{key}.json"


def _write(deployment: Deployment, path: Path) -> None:
    try:
        make_private_directory(path.parent)
        path.parent.chmod(0o700)
        replace_file(path, encode_deployment(deployment).encode(), mode=0o600)
    except OSError as error:
        raise _unwritable(error) from None


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise StateError(f"cannot remove {path}: {error.strerror}") from None


def find_deployment() -> Deployment | None:
    """Return the current deployment, complete or not, or None. Raises StateError when it is damaged."""
    try:
        return _read(deployment_path())
    except FileNotFoundError:
        return None


def find_deployments() -> list[Deployment]:
    """Return all deployments, the current one first, then the earlier ones, newest first. Raises StateError."""
    return [deployment for deployment, _ in _find_all()]


def find_beside(deployment: Deployment) -> list[Deployment]:
    """Return the deployments of other sets on the same hosts, newest first. Raises StateError."""
    return [one for one in find_deployments() if one.addresses == deployment.addresses and one.name != deployment.name]


def _find_all() -> list[tuple[Deployment, Path]]:
    """Return all deployments with the files that record them."""
    earlier = [(path.stat().st_mtime_ns, path) for path in (state_dir() / "deployments").glob("*.json")]
    paths = [deployment_path(), *(path for _, path in sorted(earlier, reverse=True))]
    return [(_read(path), path) for path in paths if path.exists()]


def _read(path: Path) -> Deployment:
    """Return the deployment in a file. Raises FileNotFoundError where there is none, StateError when it is damaged."""
    try:
        return decode_deployment(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StateError(f"cannot read {path}: {error.strerror}", hint=HINT) from None
    except (ValueError, HostsError) as error:
        raise StateError(f"{path} is damaged: {error}", hint=HINT) from None


def encode_deployment(deployment: Deployment) -> str:
    """Return a deployment as the text of its file."""
    return json.dumps({"schema": SCHEMA, **asdict(deployment)}, indent=1) + "\n"


def decode_deployment(text: str) -> Deployment:
    """Return the deployment in JSON. Raises ValueError or HostsError when it is none."""
    try:
        raw = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(raw, dict) or raw.pop("schema", None) != SCHEMA:
        raise ValueError("another schema")
    found = build(Deployment, raw)
    for rank in found.ranks:
        check_host(rank.host)
    check_envs(found.envs)
    return found


def read_deployment() -> Deployment:
    """Return the current deployment. Raises NotDeployed when there is none or a rank is missing."""
    deployment = find_deployment()
    if deployment is None:
        raise NotDeployed("no model is deployed.", hint=HINT)
    if deployment.missing:
        names = ", ".join(deployment.missing)
        raise NotDeployed(f"{deployment.name} is not deployed on {names} yet.", hint=HINT)
    return deployment


def recall_hosts(names: HostList) -> HostList:
    """Return hosts that are only names (--hosts) with what the current deployment knows of them.

    That is the directory, the interpreter, and the addresses and devices between the listed hosts.
    """
    deployment = None
    with contextlib.suppress(StateError):  # a damaged record knows nothing
        deployment = find_deployment()
    if names.source != NAMES_ONLY or deployment is None:
        return names
    places = {rank.host.address: place for place, rank in enumerate(deployment.ranks)}
    found = [places.get(host.address) for host in names.hosts]
    hosts = tuple(
        host if place is None else _among(deployment.ranks[place].host, found)
        for host, place in zip(names.hosts, found, strict=True)
    )
    return replace(names, hosts=hosts, envs=names.envs if None in found else deployment.envs)


def _among(host: Host, places: Sequence[int | None]) -> Host:
    """Return a host among those that had these places in the list; None is a new one."""
    row = tuple(None if place is None or place >= len(host.rdma) else host.rdma[place] for place in places)
    return replace(host, rdma=row if any(row) and None not in places else ())


def forget_hosts(roots: Mapping[str, str]) -> None:
    """Record that nothing is deployed under these roots any more: address of the host → its root. Raises StateError."""
    for deployment, path in _find_all():
        ranks = tuple(
            DeployedRank(rank.host) if rank.root and roots.get(rank.host.address) == rank.root else rank
            for rank in deployment.ranks
        )
        if ranks == deployment.ranks:
            continue
        if any(rank.python for rank in ranks):
            _write(replace(deployment, ranks=ranks), path)
        else:
            _remove(path)
