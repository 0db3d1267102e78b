"""The algorithms of a connection: those of paramiko that ssh's configuration allows, and what to set where none fits.

It reads no known keys; `ssh.trust` says which types of host keys to prefer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import paramiko
from paramiko.kex_curve25519 import KexCurve25519

from moectl.errors import HostError, Unreachable
from moectl.hosts.ssh.certificates import CERT_SUFFIX
from moectl.hosts.ssh.config import SSHSettings
from moectl.hosts.ssh.trust import KnownKeys

FAST_CIPHERS = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com")  # 3.6 times the default's speed in paramiko
ANY_MAC = "hmac-sha2-256"

# What both sides agree on: keyword of ssh_config(5), paramiko's name of its list, names of the host's lists.
_LISTS = (
    ("KexAlgorithms", "kex", ("kex_algo_list",)),
    ("HostKeyAlgorithms", "keys", ("server_key_algo_list",)),
    ("Ciphers", "ciphers", ("client_encrypt_algo_list", "server_encrypt_algo_list")),
    ("MACs", "macs", ("client_mac_algo_list", "server_mac_algo_list")),
)


class Transport(paramiko.Transport):
    """paramiko's Transport, with the RFC's name of its key exchange, and with host certificates."""

    _kex_info: ClassVar[dict[str, Any]] = {
        "curve25519-sha256": KexCurve25519,  # RFC 8731's name of what paramiko calls …@libssh.org
        **paramiko.Transport._kex_info,  # type: ignore[attr-defined]
    }
    offered: Mapping[str, Sequence[str]] | None = None  # by the host

    @property
    def preferred_keys(self) -> tuple[str, ...]:
        # paramiko puts certificates last: a host that has both would never show one.
        return tuple(self._preferred_keys)  # type: ignore[attr-defined]

    def _really_parse_kex_init(self, m: paramiko.Message, ignore_first_byte: bool = False) -> dict[str, Any]:
        parsed: dict[str, Any] = super()._really_parse_kex_init(m, ignore_first_byte)  # type: ignore[misc]
        if not self.server_mode:
            self.offered = {key: tuple(value) for key, value in parsed.items() if isinstance(value, list)}
            for ciphers, macs in zip(_LISTS[2][2], _LISTS[3][2], strict=True):
                agreed = next((c for c in self.preferred_ciphers if c in parsed[ciphers]), "")
                if agreed in FAST_CIPHERS and ANY_MAC not in parsed[macs]:
                    # These ciphers need no MAC (RFC 5647), and OpenSSH agrees on none, but paramiko needs one.
                    parsed[macs] = [*parsed[macs], ANY_MAC]
        return parsed


def restrict(transport: Transport, known: KnownKeys, settings: SSHSettings) -> None:
    """Allow what ssh's configuration allows. Raises HostError where paramiko has none of it."""
    wanted = {keyword: settings.list_values(keyword.lower()) for keyword, _, _ in _LISTS}
    if any(name.startswith("sntrup761") for name in wanted["KexAlgorithms"]):
        # An older exchange against quantum computers, which paramiko lacks: it has the newer one.
        wanted["KexAlgorithms"] = ("mlkem768x25519-sha256", *wanted["KexAlgorithms"])
    wanted["Ciphers"] = tuple(sorted(wanted["Ciphers"], key=lambda name: name not in FAST_CIPHERS))
    wanted["HostKeyAlgorithms"] = _order_key_types(wanted["HostKeyAlgorithms"], known)
    wanted["MACs"] = (*wanted["MACs"], ANY_MAC) if set(wanted["Ciphers"]) <= {*FAST_CIPHERS} else wanted["MACs"]
    for keyword, kind, _ in _LISTS:
        able = _abilities(kind)
        left = tuple(dict.fromkeys(name for name in wanted[keyword] if name in able))
        if wanted[keyword] and not left:
            raise HostError(
                f"{keyword} {','.join(wanted[keyword])} is set for it, and moectl has none of these",
                host=settings.name,
                hint=f"add {_example(kind)} to {keyword} in ~/.ssh/config; moectl has {', '.join(able)}",
            )
        if left:
            setattr(transport, f"_preferred_{kind}", left)
    keys = settings.list_values("pubkeyacceptedalgorithms") or settings.list_values("pubkeyacceptedkeytypes")
    if keys:
        able = paramiko.Transport._preferred_pubkeys  # type: ignore[attr-defined]
        transport._preferred_pubkeys = tuple(  # type: ignore[attr-defined]
            name for name in able if name in keys or f"{name}{CERT_SUFFIX}" in keys
        )


def _abilities(kind: str) -> tuple[str, ...]:
    """Return paramiko's algorithms of a kind, in its order of preference."""
    if kind == "keys":
        plain = tuple(paramiko.Transport._preferred_keys)  # type: ignore[attr-defined]
        return (*plain, *(f"{name}{CERT_SUFFIX}" for name in plain))
    own = tuple(getattr(paramiko.Transport, f"_preferred_{kind}"))
    return ("curve25519-sha256", *own) if kind == "kex" else own


def _example(kind: str) -> str:
    return {"ciphers": FAST_CIPHERS[0], "kex": "curve25519-sha256", "macs": ANY_MAC, "keys": "ssh-ed25519"}[kind]


def _order_key_types(names: Collection[str], known: KnownKeys) -> tuple[str, ...]:
    """Put the types of known keys first: otherwise a host with several keys could show one that is not known."""
    types = {kind for kind, _ in known.accepted or known.fallback}
    if "ssh-rsa" in types:
        types |= {"rsa-sha2-512", "rsa-sha2-256"}
    certificates = 0 if known.authorities else 3  # without a known authority, a plain key is better
    ranks = {name: certificates if name.endswith(CERT_SUFFIX) else 1 if name in types else 2 for name in names}
    return tuple(sorted(names, key=ranks.__getitem__))


def nothing_in_common(transport: Transport, settings: SSHSettings) -> Unreachable | None:
    """Say which algorithms the host offers, which moectl has, and what to set; None where they agree on all kinds."""
    offered = transport.offered
    if offered is None:
        return None
    for keyword, kind, lists in _LISTS:
        ours = tuple(getattr(transport, f"_preferred_{kind}"))
        theirs = [offered[name] for name in lists]
        if all(set(ours) & set(one) for one in theirs):
            continue
        shown = [name for name in theirs[0] if not name.startswith(("ext-info-", "kex-strict-"))]
        hint = f"on the host, in /etc/ssh/sshd_config, set '{keyword} {','.join([*shown, _example(kind)])}'"
        if able := [name for name in _abilities(kind) if all(name in one for one in theirs)]:
            hint = f"add {able[0]} to {keyword} in ~/.ssh/config"
        elif kind == "keys":
            hint = (
                "on the host, run 'ssh-keygen -A', and let sshd use the ed25519 key (HostKey in /etc/ssh/sshd_config)"
            )
        return Unreachable(
            f"no {keyword} in common: the host offers {', '.join(shown)}; this side has {', '.join(ours)}",
            host=settings.name,
            hint=hint,
        )
    return None
