"""What mlx.distributed needs to start on each rank: variables and files, equal to those that mlx.launch makes.

Pure functions on addresses and devices; nothing is started here. Source: mlx/_distributed_utils/launch.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from moectl.engine.protocol import Connect, Listening
from moectl.errors import HostsError, UsageError
from moectl.hosts.hostfile import Host
from moectl.hosts.macos import explain_missing_rdma, parse_version, refuse_rdma
from moectl.hosts.mlx_hostfile import to_mlx_devices

# Splits in which one rank sends to another. JACCL gives wrong data, or hangs, when two such messages differ in size.
RING_ONLY = ("layers",)
BACKENDS = ("auto", "ring", "jaccl", "jaccl-ring")


def choose_backend(wanted: str, hosts: Sequence[Host], *, split: str = "") -> str:
    """Return the backend to use: `auto` is JACCL where every host names its RDMA devices, else the TCP ring.

    A full mesh of devices gives `jaccl`; neighbours only give `jaccl-ring`. A hostfile's `any`, and none, mean `auto`.
    `split` is how the model is divided, where that is known: `layers` goes over the ring. Raises HostsError when the
    wanted backend cannot work with these hosts, UsageError when it cannot with this split.
    """
    wanted = "auto" if wanted in ("", "any") else wanted
    if wanted not in BACKENDS:
        raise HostsError(f"unknown backend {wanted!r}; it is one of {', '.join(BACKENDS)}")
    if wanted == "ring" or (wanted == "auto" and split in RING_ONLY):
        return "ring"
    if split in RING_ONLY:
        raise UsageError(
            f"--backend {wanted} cannot run --split {split}: JACCL mixes up numbers that one rank sends to another, "
            "where their count changes (mlx#3149)",
            hint="use --backend ring, or cut the model with another --split",
        )
    if wanted == "auto":
        if len(hosts) < 2 or not all(len(host.rdma) == len(hosts) for host in hosts):
            return "ring"
        wanted = "jaccl" if not _missing(hosts, ring=False) else "jaccl-ring"
    _check_devices(hosts, ring=wanted == "jaccl-ring")
    return wanted


def check_rdma(hosts: Sequence[Host], listening: Sequence[Listening]) -> None:
    """Check by what each worker said of its system and its mlx that JACCL can work between them.

    Raises VersionMismatch: JACCL itself would hang, give wrong numbers, or end with an error that names no reason.
    """
    versions = {host.name: parse_version(event.macos) for host, event in zip(hosts, listening, strict=True)}
    if refused := refuse_rdma(versions):
        raise refused
    for host, event in zip(hosts, listening, strict=True):
        if event.jaccl is False:
            raise explain_missing_rdma(event.wheel, versions[host.name], host.name)


def make_connect(
    backend: str,
    hosts: Sequence[Host],
    endpoints: Sequence[Sequence[str]],
    rank: int,
    nonce: int,
) -> Connect:
    """Return the order that makes one rank join the group.

    `endpoints` are each rank's "ip:port" strings. The ring takes all of them; JACCL's coordinator is rank 0's first.
    `nonce` is a number that only the ranks of this launch know.
    """
    env = {"MLX_RANK": str(rank)}
    if backend == "ring":
        return Connect("ring", env, {"MLX_HOSTFILE": json.dumps([list(e) for e in endpoints])}, nonce)
    env["MLX_JACCL_COORDINATOR"] = endpoints[0][0]
    if backend == "jaccl-ring":
        env["MLX_JACCL_RING"] = "1"
    devices = json.dumps([[to_mlx_devices(entry) for entry in host.rdma] for host in hosts])
    return Connect("jaccl", env, {"MLX_IBV_DEVICES": devices}, nonce)


def _missing(hosts: Sequence[Host], *, ring: bool) -> list[tuple[int, int]]:
    n = len(hosts)
    return [
        (i, j)
        for i, host in enumerate(hosts)
        for j in (sorted({(i - 1) % n, (i + 1) % n}) if ring else range(n))
        if i != j and host.rdma[j] is None
    ]


def _check_devices(hosts: Sequence[Host], *, ring: bool) -> None:
    for rank, host in enumerate(hosts):
        if len(host.rdma) != len(hosts):
            raise HostsError(
                f"{host.name}: rdma= names {len(host.rdma)} devices, expected one per host ({len(hosts)})",
                hint="list one device per host in rank order and '-' for the host itself, or use --backend ring",
            )
        if host.rdma[rank] is not None:
            raise HostsError(f"{host.name}: rdma= entry {rank} is the host itself and should be '-'")
    if missing := _missing(hosts, ring=ring):
        i, j = missing[0]
        raise HostsError(
            f"no RDMA device is listed for {hosts[i].name} to {hosts[j].name}",
            hint="add it to rdma=, or use --backend ring" if ring else "use --backend jaccl-ring or ring",
        )
