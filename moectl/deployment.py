"""The current deployment: which hosts hold which shard set, and where.

`deploy` writes it to `$XDG_STATE_HOME/moectl/deployment.json`, the other verbs read it. It is a note
about what was done; whether it still holds is for the hosts to say.
"""

from __future__ import annotations

import errno
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moectl.disk import make_directory, sync_directory
from moectl.errors import NotDeployed, StateError
from moectl.hosts import Host
from moectl.paths import state_dir

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
    def missing(self) -> tuple[str, ...]:
        """Addresses of the hosts that have not been deployed to yet."""
        return tuple(r.host.address for r in self.ranks if not r.python)


def deployment_path() -> Path:
    """Return where the current deployment is recorded."""
    return state_dir() / "deployment.json"


def check_writable() -> None:
    """Raise StateError where a deployment could not be recorded, before anybody works for one."""
    directory = deployment_path().parent
    try:
        make_directory(directory, mode=0o700)
        if not os.access(directory, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "no permission, or a read-only disk")
    except OSError as error:
        raise _unwritable(error) from None


def _unwritable(error: OSError) -> StateError:
    return StateError(f"cannot write {deployment_path()}: {error.strerror}", hint="is XDG_STATE_HOME writable?")


def write_deployment(deployment: Deployment) -> None:
    """Make a deployment the current one: directory 0700, file 0600, atomically. Raises StateError."""
    path = deployment_path()
    temporary = path.with_name(f".{path.name}.partial")
    text = encode_deployment(deployment)
    try:
        make_directory(path.parent, mode=0o700)
        path.parent.chmod(0o700)
        temporary.unlink(missing_ok=True)
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        raise _unwritable(error) from None


def find_deployment() -> Deployment | None:
    """Return the current deployment, complete or not, or None. Raises StateError when it is damaged."""
    path = deployment_path()
    try:
        return decode_deployment(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StateError(f"cannot read {path}: {error.strerror}", hint=HINT) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StateError(f"{path} is damaged: {error}", hint=HINT) from None


def encode_deployment(deployment: Deployment) -> str:
    """Return a deployment as JSON."""
    return json.dumps({"schema": SCHEMA, **asdict(deployment)}, indent=1) + "\n"


def decode_deployment(text: str) -> Deployment:
    """Return the deployment in JSON. Raises ValueError, KeyError, TypeError or AttributeError when it is none."""
    raw = json.loads(text)
    if raw.pop("schema") != SCHEMA:
        raise ValueError("another schema")
    ranks = tuple(_read_rank(r) for r in raw.pop("ranks"))
    return Deployment(ranks=ranks, envs=tuple(raw.pop("envs")), **raw)


def read_deployment() -> Deployment:
    """Return the current deployment. Raises NotDeployed when there is none or a rank lacks."""
    deployment = find_deployment()
    if deployment is None:
        raise NotDeployed("no model is deployed.", hint=HINT)
    if deployment.missing:
        names = ", ".join(deployment.missing)
        raise NotDeployed(f"{deployment.name} is not deployed on {names} yet.", hint=HINT)
    return deployment


def _read_rank(raw: dict[str, Any]) -> DeployedRank:
    host = raw.pop("host")
    host["ips"], host["rdma"] = tuple(host["ips"]), tuple(host["rdma"])
    return DeployedRank(host=Host(**host), **raw)
