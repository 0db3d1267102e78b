"""From a target, a local shard set or a deployment, to a running session: one RankSpec per rank.

It decides nothing about the model.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moectl.engine.environment import keep_awake
from moectl.engine.protocol import RunOptions
from moectl.errors import HostsError, NotDeployed
from moectl.hosts.connect import ask_addresses, connect
from moectl.hosts.hostfile import NAMES_ONLY, Host, HostList
from moectl.hosts.remote import LocalRemote, Remote
from moectl.model.manifest import NAME as MANIFEST_NAME, Manifest, read_manifest
from moectl.paths import state_dir
from moectl.session.backend import choose_backend
from moectl.session.deployment import (
    Deployment,
    decode_deployment,
    encode_deployment,
    find_deployment as find_recorded,
    read_deployment,
)
from moectl.session.session import RankSpec, Session

LOOPBACK = "127.0.0.1"
WORKER = ("-m", "moectl", "worker")


@dataclass(frozen=True, slots=True)
class Local:
    """A shard set on this machine, all ranks here."""

    directory: Path
    manifest: Manifest

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def shards(self) -> str:
        return str(self.directory)

    @property
    def addresses(self) -> tuple[str, ...]:
        """The host of each rank."""
        return ("localhost",) * self.manifest.world_size


Target = Local | Deployment


def encode_target(target: Target) -> str:
    """Return a target as text that another process of this machine can read."""
    return f"local {target.directory.resolve()}" if isinstance(target, Local) else encode_deployment(target)


def decode_target(text: str) -> Target:
    """Return the target of `encode_target`. Raises NotSharded when its directory has gone."""
    kind, _, directory = text.partition(" ")
    if kind != "local":
        return decode_deployment(text)
    return Local(Path(directory), read_manifest(Path(directory)))


def target_key(target: Target) -> str:
    """Return a short name that is the same for the same ranks on the same hosts."""
    where = [str(target.directory.resolve())] if isinstance(target, Local) else [target.name]
    if isinstance(target, Deployment):
        where += [f"{rank.host.address} {rank.directory}" for rank in target.ranks]
    with contextlib.suppress(OSError):  # a set that was cut again in its place is another one
        where.append(hashlib.sha256((Path(target.shards) / MANIFEST_NAME).read_bytes()).hexdigest())
    return hashlib.sha256("\n".join(where).encode()).hexdigest()[:12]


def find_deployment(hosts: HostList | None) -> Deployment | None:
    """Return the current deployment; None when there is none and no hosts are given.

    Raises NotDeployed when hosts are in force and the current deployment is not on exactly these.
    """
    recorded = find_recorded()
    if hosts is None:
        return None if recorded is None else read_deployment()
    names = tuple(host.address for host in hosts.hosts)
    hint = f"moectl deploy {hosts.source}" if hosts.source.endswith(".txt") else "moectl deploy"
    if recorded is None:
        raise NotDeployed(f"no model is deployed on {', '.join(names)}.", hint=hint)
    if recorded.addresses != names:
        raise NotDeployed(
            f"{recorded.name} is deployed on {', '.join(recorded.addresses)}, not on {', '.join(names)}.", hint=hint
        )
    complete = read_deployment()
    for rank, host in zip(complete.ranks, hosts.hosts, strict=True):
        if hosts.source != NAMES_ONLY and rank.host.dir != host.dir:
            where = host.dir or "its home"
            raise NotDeployed(f"{complete.name} is deployed in {rank.root}, not in {where}.", host=host.name, hint=hint)
        if hosts.source != NAMES_ONLY and rank.host.python != host.python:
            wanted = f"python={host.python}" if host.python else "the python that moectl finds"
            raise NotDeployed(
                f"{complete.name} is deployed for {rank.python}, not for {wanted}.", host=host.name, hint=hint
            )
    if hosts.source == NAMES_ONLY:
        return complete
    # The hosts file counts as it is now (addresses, devices), not as it was at the deploy.
    ranks = tuple(replace(rank, host=host) for rank, host in zip(complete.ranks, hosts.hosts, strict=True))
    return replace(complete, ranks=ranks, backend=hosts.backend, envs=hosts.envs)


@contextlib.contextmanager
def open_session(
    target: Target,
    options: RunOptions,
    *,
    remotes: Sequence[Remote] | None = None,
    on_made: Callable[[Session], None] = lambda session: None,
    **of_session: Any,
) -> Iterator[Session]:
    """Start the target's workers and yield their session. Everything ends with the block.

    `remotes` are the connections to a deployment's hosts where the caller has them. `on_made` gets the session before
    it starts: closing it ends the start. `of_session` are further arguments of Session.
    """
    keep_awake()  # the workers end when they hear nothing of this machine
    with contextlib.ExitStack() as held:
        ranks = list_ranks(target, held, remotes)
        wanted = options.backend
        if isinstance(target, Deployment) and wanted == "auto":
            wanted = target.backend
        choose_backend(wanted, [spec.host for spec in ranks])  # what cannot work is refused before anything starts
        session = Session(ranks, options, backend=wanted, **of_session)
        on_made(session)
        yield held.enter_context(session)


def list_ranks(target: Target, held: contextlib.ExitStack, remotes: Sequence[Remote] | None = None) -> list[RankSpec]:
    """Return how each rank of a target is started; connections that are made for it end with `held`."""
    return _local_ranks(target) if isinstance(target, Local) else _deployed_ranks(target, held, remotes)


def _local_ranks(target: Local) -> list[RankSpec]:
    remote = LocalRemote()
    argv = (sys.executable, *WORKER)
    directory = target.directory.resolve()
    spec = RankSpec(
        Host("localhost"), remote, argv, str(directory), (LOOPBACK,), share_cores(target.manifest.world_size)
    )
    logs = [state_dir() / "logs" / f"{directory.name}-rank-{rank}.log" for rank in range(target.manifest.world_size)]
    return [replace(spec, log=str(log)) for log in logs]


def share_cores(ranks: int) -> dict[str, str]:
    """Return the variable that divides this machine's cores among the BLAS threads of its ranks."""
    if ranks == 1 or "OPENBLAS_NUM_THREADS" in os.environ:
        return {}
    return {"OPENBLAS_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks))}


def _deployed_ranks(target: Deployment, held: contextlib.ExitStack, remotes: Sequence[Remote] | None) -> list[RankSpec]:
    hosts = [rank.host for rank in target.ranks]
    if remotes is None:
        remotes = held.enter_context(connect(hosts))
    env = split_envs(target.envs)
    addresses = find_addresses(hosts, remotes)
    return [
        RankSpec(
            rank.host,
            remote,
            (rank.python, *WORKER),
            rank.directory,
            address,
            env,
            log=f"{rank.root}/logs/{target.name}-rank-{number}.log",
        )
        for number, (rank, remote, address) in enumerate(zip(target.ranks, remotes, addresses, strict=True))
    ]


def split_envs(envs: Sequence[str]) -> dict[str, str]:
    """Return an MLX hostfile's NAME=VALUE strings as variables; a bare NAME is an empty one, as for mlx.launch."""
    return {name: value for name, _, value in (e.partition("=") for e in envs)}


def find_addresses(hosts: Sequence[Host], remotes: Sequence[Remote]) -> list[tuple[str, ...]]:
    """Return each host's IPv4 addresses for tensor traffic: `ip=`, else the one that SSH reached it by.

    sshd gives both ends of the connection in SSH_CONNECTION. So aliases and jump hosts work, and this machine
    (`localhost`) learns the address that the others see. Raises HostsError where there is no IPv4 address.
    """
    # A localhost among remote hosts needs the address that they see, even where they all have ip=.
    need_ours = any(h.is_local and not h.ips for h in hosts) and not all(h.is_local for h in hosts)
    seen = {
        h.address: ask_addresses(r)
        for h, r in zip(hosts, remotes, strict=True)
        if not h.is_local and (need_ours or not h.ips)
    }
    ours = next(iter(seen.values()))[0] if need_ours else LOOPBACK
    found = [h.ips or ((ours,) if h.is_local else (seen[h.address][1],)) for h in hosts]
    for host, addresses in zip(hosts, found, strict=True):
        for address in addresses:
            if not address or ipaddress.ip_address(address).version != 4:
                raise HostsError(
                    f"the ring needs an IPv4 address, and {address or 'none'} is known",
                    host=host.name,
                    hint=f"write '{host.name} ip=10.0.0.1' with its own address in the hosts file",
                )
    return found
