"""The list of hosts: hosts.txt, `--hosts a,b` and MLX's JSON hostfiles, in and out. It opens no connection."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Host:
    """One host as its owner wrote it; position in the list is its rank."""

    name: str  # what errors and tables call it: the ssh alias, DNS name or address as written
    user: str | None = None
    port: int | None = None
    ips: tuple[str, ...] = ()  # addresses for tensor traffic; empty = resolve the name
    rdma: tuple[str | None, ...] = ()  # RDMA device towards each rank, None towards itself
    memory_bytes: int | None = None
    chip: str | None = None
    price: float | None = None
    python: str | None = None
    dir: str | None = None  # root on the host; None = ~/.moectl

    @property
    def is_local(self) -> bool:
        return self.name in ("localhost", "127.0.0.1", "::1") and self.user is None and self.port is None
