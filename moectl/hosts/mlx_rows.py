"""MLX's JSON files of hosts, read as one row per rank, every value of the right type. It knows nothing of `Host`.

A hostfile holds objects. MLX_HOSTFILE, as MLX's launcher writes it for the ring, lists each rank's addresses with
ports: moectl reads the addresses and chooses its own ports. MLX_IBV_DEVICES lists only RDMA devices: it is refused.
"""

from __future__ import annotations

import ipaddress
import json
import re
from typing import Any

from moectl.errors import HostsError

BACKENDS = ("", "any", "ring", "jaccl", "jaccl-ring", "mpi", "nccl")
_DEVICE = re.compile(r"[^\s,#+-][^\s,#+]*")
_WANTED = 'write each host as {"ssh": "mac1", "ips": ["10.0.0.1"]}'


def read_mlx(text: str, source: str) -> tuple[str, tuple[str, ...], list[dict[str, Any]]]:
    """Return backend, variables and rows: ssh, ips, rdma, memory, python, dir. Raises HostsError."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise HostsError(f"{source} is not valid JSON: {error}") from None
    if isinstance(data, list):
        is_ring = any(isinstance(row, list) for row in data)
        ranks = [_read_rank(row, f"{source}: rank {rank}") for rank, row in enumerate(data)] if is_ring else data
        data = {"hosts": ranks}
    rows = data.get("hosts") if isinstance(data, dict) else None
    if not isinstance(rows, list):
        raise HostsError(
            f"{source}: an MLX hostfile needs a list 'hosts'", hint='{"hosts": [{"ssh": "mac1", "ips": []}]}'
        )
    backend = data.get("backend") or ""
    if backend not in BACKENDS:
        raise HostsError(f"{source}: unknown backend {backend!r}", hint=f"MLX knows {', '.join(BACKENDS[2:])}")
    envs = _strings(data.get("envs"), f"{source}: envs")
    return backend, envs, [_read_row(row, f"{source}: hosts[{number}]") for number, row in enumerate(rows)]


def _read_row(row: object, where: str) -> dict[str, Any]:
    if not isinstance(row, dict) or not isinstance(row.get("ssh"), str):
        raise HostsError(f"{where}: needs a string 'ssh'", hint='write each host as {"ssh": "mac1", "ips": []}')
    rdma, memory = row.get("rdma") or [], row.get("memory")
    if not isinstance(rdma, list):
        raise HostsError(f"{where}: rdma has to be a list with one entry per host")
    if memory is not None and (isinstance(memory, bool) or not isinstance(memory, int | str)):
        raise HostsError(f"{where}: memory has to be bytes or a size such as '120GB'")
    return {
        "ssh": row["ssh"],
        "ips": _strings(row.get("ips"), f"{where}: ips"),
        "rdma": tuple(_read_devices(entry, where) for entry in rdma),
        "memory": None if memory is None else str(memory),
        "python": row.get("python"),
        "dir": row.get("dir"),
    }


def _read_devices(entry: object, where: str) -> str | None:
    """Return one entry of MLX's rdma rows: null, a device, or a list of devices where several cables lead to a host."""
    if entry is None or entry == []:
        return None
    given = entry if isinstance(entry, list) else [entry]
    names = [name for name in given if isinstance(name, str) and name != "null" and _DEVICE.fullmatch(name)]
    if len(names) != len(given):
        raise HostsError(f"{where}: rdma has to be a list of device names, or null, per host")
    return "+".join(names)


def _strings(value: object, where: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise HostsError(f"{where} has to be a list of strings")
    return tuple(value)


def _read_rank(row: object, where: str) -> dict[str, Any]:
    if not isinstance(row, list) or not row:
        raise HostsError(f"{where}: needs a list of addresses, as every rank of MLX's ring file", hint=_WANTED)
    if any(not isinstance(entry, str) or ":" not in entry for entry in row):
        raise HostsError(
            f"{where}: these are RDMA devices (MLX_IBV_DEVICES), not hosts"
            if all(entry is None or isinstance(entry, str | list) for entry in row)
            else f"{where}: {row!r} has no addresses with ports, as MLX's ring file has",
            hint=_WANTED,
        )
    names = list(dict.fromkeys(_read_name(entry, where) for entry in row))
    return {"ssh": names[0], "ips": [name for name in names if _is_ip(name)]}


def _read_name(entry: str, where: str) -> str:
    name, _, port = entry.rpartition(":")
    if not re.fullmatch("[0-9]{1,5}", port, re.ASCII) or not 0 < int(port) < 65536:
        raise HostsError(f"{where}: {entry!r} is not address:port", hint='write for example "10.0.0.1:5000"')
    return name[1:-1] if name.startswith("[") and name.endswith("]") else name


def _is_ip(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
