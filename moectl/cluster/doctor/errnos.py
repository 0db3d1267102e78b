"""What the error numbers of sockets and of RDMA mean for a cluster of Macs, and what mends them.

Numbers differ between systems, so errors have their names of errno(2). What macOS means by them was collected from
reports of people who run MLX on Macs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from moectl.hosts.macos import LOCAL_NETWORK, LOCAL_NETWORK_FIX

_MACOS = {16: "EBUSY", 22: "EINVAL", 49: "EADDRNOTAVAIL", 51: "ENETUNREACH"}
_MACOS |= {54: "ECONNRESET", 60: "ETIMEDOUT", 61: "ECONNREFUSED", 65: "EHOSTUNREACH", 96: "ENODATA"}
_LINUX = {16: "EBUSY", 22: "EINVAL", 99: "EADDRNOTAVAIL", 101: "ENETUNREACH"}
_LINUX |= {104: "ECONNRESET", 110: "ETIMEDOUT", 111: "ECONNREFUSED", 113: "EHOSTUNREACH"}
_NUMBER = re.compile(r"(?:errno\s*[ =:]\s*|\(error: |\[Errno |failed with '[^']*\()(\d{1,3})", re.IGNORECASE)
_FIREWALL = "allow its python in the firewall, or check ip= and any VPN"


@dataclass(frozen=True, slots=True)
class Meaning:
    """Why it happens and what mends it."""

    why: str
    fix: str


def explain(name: str, *, macos: bool, local: bool = False) -> Meaning | None:
    """Return what an error means; `local`: the program was started here, not by sshd. None where nothing is known."""
    if name == "EHOSTUNREACH" and macos and local:
        return Meaning(
            f"{LOCAL_NETWORK} (programs that sshd starts are exempt)",
            LOCAL_NETWORK_FIX,
        )
    return _MEANINGS.get(name)


def find_error(text: str, *, macos: bool) -> str | None:
    """Return the name of the error whose number a message has; None where it has none.

    The backends write "errno 22", "(error: 60)" and "'Resource busy (16)'".
    """
    match = _NUMBER.search(text)
    return (_MACOS if macos else _LINUX).get(int(match[1])) if match else None


_MEANINGS = {
    "ETIMEDOUT": Meaning("nothing answers: a firewall, a VPN or a wrong address", _FIREWALL),
    "ECONNREFUSED": Meaning("the other end is not up, or a firewall refuses it", _FIREWALL),
    "ECONNRESET": Meaning("something between the hosts closed the connection", _FIREWALL),
    "EHOSTUNREACH": Meaning(
        "it cannot be reached: the cable, sleep, or a wrong address", "check the cable and ip= of both hosts"
    ),
    "ENETUNREACH": Meaning("it has no interface in that network", "check ip= of both hosts and their addresses"),
    "EADDRNOTAVAIL": Meaning("the address is not its own", "give the host's own address with ip="),
    "EINVAL": Meaning(
        "the Thunderbolt port is in bridge0, has no IPv4 address, or hangs since an earlier run",
        "moectl setup shows the commands that mend it; if that changes nothing, restart that Mac",
    ),
    "ENODATA": Meaning("the Thunderbolt port has no address for RDMA", "moectl setup shows the commands that mend it"),
    "EBUSY": Meaning("all queue pairs are in use, or an earlier run still holds them", "restart that Mac"),
}
