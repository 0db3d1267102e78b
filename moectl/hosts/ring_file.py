"""MLX's other files of hosts: lists of lists without names for ssh, as its launcher hands them to the backends.

MLX_HOSTFILE of the ring lists each rank's addresses with ports; they are read, and moectl chooses ports of its own.
MLX_IBV_DEVICES lists RDMA devices only: that is told from a list of hosts. It knows nothing of `Host`.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from typing import Any

from moectl.errors import HostsError

_WANTED = 'write each host as {"ssh": "mac1", "ips": ["10.0.0.1"]}'


def is_ring(rows: Sequence[object]) -> bool:
    """Whether JSON's list is of lists: MLX's hostfiles hold objects."""
    return any(isinstance(row, list) for row in rows)


def read_ring(rows: Sequence[object], source: str) -> list[dict[str, Any]]:
    """Return a ring file's ranks as rows of an MLX hostfile: ssh gets the first address. Raises HostsError."""
    return [_read_rank(row, f"{source}: rank {number}") for number, row in enumerate(rows)]


def _read_rank(row: object, where: str) -> dict[str, Any]:
    if not isinstance(row, list) or not row:
        raise HostsError(f"{where}: needs a list of addresses, as every rank of MLX's ring file", hint=_WANTED)
    if any(not isinstance(entry, str) or ":" not in entry for entry in row):
        raise HostsError(
            f"{where}: these are RDMA devices (MLX_IBV_DEVICES), not hosts"
            if _are_devices(row)
            else f"{where}: {row!r} has no addresses with ports, as MLX's ring file has",
            hint=_WANTED,
        )
    names = list(dict.fromkeys(_read_name(entry, where) for entry in row))
    return {"ssh": names[0], "ips": [name for name in names if _is_ip(name)]}


def _are_devices(row: Sequence[object]) -> bool:
    return all(entry is None or isinstance(entry, str | list) for entry in row)


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
