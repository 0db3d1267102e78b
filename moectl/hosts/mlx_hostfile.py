"""MLX's hostfile, written from a list of hosts; addresses that the list does not give are looked up here."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from typing import Any

from moectl.errors import HostsError
from moectl.hosts.hostfile import HostList, split_devices


def to_mlx_devices(entry: str | None) -> str | list[str] | None:
    """Return one entry of `Host.rdma` as MLX writes it: null, a name, or a list of names."""
    devices = split_devices(entry)
    return list(devices) if len(devices) > 1 else entry


def resolve_address(name: str) -> str:
    """Return the first IP address of a name, IPv4 before IPv6. Raises HostsError."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise HostsError(f"its address is not known: {reason}", host=name, hint=f"write '{name} ip=…'") from None
    found.sort(key=lambda entry: entry[0] != socket.AF_INET)
    return str(found[0][4][0])


def find_own_address(other: str) -> str:
    """Return this machine's address on the way to another one; nothing is sent. Raises HostsError."""
    try:
        kind, _, _, _, target = socket.getaddrinfo(other, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(kind, socket.SOCK_DGRAM) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0])
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise HostsError(
            f"the address by which {other} reaches this machine is not known: {reason}",
            host="localhost",
            hint="write 'localhost ip=10.0.0.1' with that address in the hosts file",
        ) from None


def to_mlx_json(
    hosts: HostList,
    *,
    resolve: Callable[[str], str] = resolve_address,
    find_own: Callable[[str], str] = find_own_address,
) -> str:
    """Return the list as an MLX hostfile (`mlx.launch --hostfile`); `resolve(name)` gives addresses that are missing.

    `find_own(address)` gives this machine's address on the way to another host. Raises HostsError for a host with a
    port (MLX passes the name to ssh as it is) and for a name without an address.
    """
    others = [host for host in hosts.hosts if not host.is_local]
    rows: list[dict[str, Any]] = []
    for host in hosts.hosts:
        if host.port is not None:
            raise HostsError(
                "MLX hostfiles cannot hold a port",
                host=host.address,
                hint=f"put 'Port {host.port}' under a 'Host' alias in ~/.ssh/config and name the alias",
            )
        ssh = "127.0.0.1" if host.is_local else f"{host.user}@{host.name}" if host.user else host.name
        ips = list(host.ips)
        if not ips and host.is_local and others:  # 127.0.0.1 would not reach this machine from there
            ips = [find_own(others[0].ips[0] if others[0].ips else resolve(others[0].name))]
        ips = ips or [resolve("127.0.0.1" if host.is_local else host.name)]
        row: dict[str, Any] = {"ssh": ssh, "ips": ips, "rdma": [to_mlx_devices(entry) for entry in host.rdma]}
        extra = {"memory": host.memory_bytes, "python": host.python, "dir": host.dir}
        rows.append(row | {k: v for k, v in extra.items() if v is not None})
    return json.dumps({"backend": hosts.backend, "envs": list(hosts.envs), "hosts": rows}, indent=2) + "\n"
