"""One host as `setup` sees it: its system, Thunderbolt ports, interfaces, and the settings that setup may change.

Pure: made of what `survey` asked; nothing is asked or changed here.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from moectl.hosts.hostfile import Host
from moectl.hosts.survey import Survey
from moectl.hosts.thunderbolt import Interface, Port, find_generation, parse_ifconfig

_FIRST = ("en0", "en1")  # where mlx.distributed_config looks for a Mac's address, in this order


@dataclass(frozen=True, slots=True)
class Machine:
    """One host; None or empty is what it did not tell."""

    host: Host
    is_mac: bool = True
    ports: tuple[Port, ...] = ()
    interfaces: tuple[Interface, ...] = ()
    addresses: tuple[str, ...] = ()  # all its IPv4 addresses
    reached_at: str | None = None  # the one that SSH came in by
    version: tuple[int, int] | None = None  # of macOS
    memory_bytes: int | None = None
    wired_limit_bytes: int | None = None  # where the owner set one
    sleep_minutes: int | None = None  # on mains power; 0 is never

    @property
    def generation(self) -> int | None:
        """Return its Thunderbolt generation: 5, or 4 for all older ones."""
        return find_generation(self.ports)

    def interface(self, name: str | None) -> Interface | None:
        return next((interface for interface in self.interfaces if interface.name == name), None)

    def find_address(self, not_on: frozenset[str]) -> str | None:
        """Return the address by which other hosts reach it, from an interface that is not among `not_on`.

        A Mac's en0, else its en1, else the address that SSH came in by, else any other.
        """
        own = {
            str(address.ip): interface.name
            for interface in self.interfaces
            for address in interface.ipv4
            if interface.name not in not_on
        }
        first = [next((ip for ip, name in own.items() if name == wanted), None) for wanted in _FIRST]
        known = own if self.interfaces else self.addresses
        reached = self.reached_at if self.reached_at in known else None
        found = (ip for ip in (*first, reached, *known) if ip is not None)
        return next((ip for ip in found if not _is_of_host_alone(ipaddress.ip_address(ip))), None)


def read_machine(host: Host, survey: Survey, reached_at: str | None = None) -> Machine:
    """Return what a survey told; `reached_at` is the host's own address in SSH_CONNECTION."""
    sections, hardware = survey.sections, survey.hardware
    # What setup changes is the setting on mains power; what `pmset -g` tells is a MacBook's on battery, while it is.
    mains = re.search(r"^AC Power:$(.*?)(?:^\S|\Z)", sections.get("pmset_custom", ""), re.MULTILINE | re.DOTALL)
    told = mains[1] if mains else sections.get("pmset", "")
    sleep = re.search(r"^\s*sleep\s+(\d{1,6})\b", told, re.MULTILINE)
    disabled = re.search(r"^\s*SleepDisabled\s+1\b", sections.get("pmset", ""), re.MULTILINE)
    return Machine(
        host=host,
        is_mac=survey.is_mac,
        ports=survey.ports if survey.is_mac else (),
        interfaces=parse_ifconfig(sections.get("ifconfig", "")) if survey.is_mac else (),
        addresses=survey.addresses,
        reached_at=reached_at,
        version=survey.macos_version,
        memory_bytes=hardware.memory_bytes,
        wired_limit_bytes=hardware.wired_limit_bytes,
        sleep_minutes=0 if disabled else int(sleep[1]) if sleep else None,
    )


def _is_of_host_alone(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    return address.is_loopback or address.is_link_local
