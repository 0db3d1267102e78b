"""What OpenSSH knows about a host: its configuration (`ssh -G`) and its known keys (`ssh-keygen -F`).

Asking OpenSSH's own programs means Include, Match, tokens, hashed names and system-wide files all
count, just as they do for `ssh HOST`. It reads no private key and opens no connection.
"""

from __future__ import annotations

import getpass
import os
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moectl.errors import HostError

TIMEOUT_S = 10.0
SSH_PORT = 22


@dataclass(frozen=True, slots=True)
class SSHSettings:
    """How to reach one host and whom to trust there."""

    name: str  # as written in the hosts file or in ProxyJump
    hostname: str
    port: int
    user: str
    identity_files: tuple[Path, ...]
    identities_only: bool
    agent: str | None  # path of the agent's socket
    known_hosts: tuple[Path, ...]
    host_key_name: str  # the name under which known_hosts files the key
    proxy_jump: tuple[str, ...]
    proxy_command: str | None
    connect_timeout_s: float
    command: str  # what a person types to reach the host: `ssh -p 2222 ada@mac3`


@dataclass(frozen=True, slots=True)
class KnownKeys:
    """Keys of one host in the known_hosts files, each as (type, base64)."""

    accepted: frozenset[tuple[str, str]]
    revoked: frozenset[tuple[str, str]]
    files: tuple[Path, ...]  # where the accepted ones are


def read_ssh_settings(
    name: str, *, user: str | None = None, port: int | None = None, config: str | None = None
) -> SSHSettings:
    """Return what `ssh -G` says of a host; `config` (or $MOECTL_SSH_CONFIG) replaces ~/.ssh/config.

    Raises HostError when OpenSSH is not installed or refuses its configuration.
    """
    config = config or os.environ.get("MOECTL_SSH_CONFIG") or None
    options = ["-F", config] if config else []
    options += ["-p", str(port)] if port else []
    options += ["-l", user] if user else []
    done = _run_openssh(["ssh", "-G", *options, "--", name], name)
    if done.returncode != 0:
        said = done.stderr.strip().split("\n")[-1]
        raise HostError(f"ssh refuses its configuration: {said}", host=name, hint="mend ~/.ssh/config")
    target = ["-F", config] if config else []
    target += ["-p", str(port)] if port else []
    command = shlex.join(["ssh", *target, f"{user}@{name}" if user else name])
    return _parse(done.stdout, name, command)


def find_known_keys(settings: SSHSettings) -> KnownKeys:
    """Return the keys on file for a host; like ssh, fall back from [name]:port to the plain name.

    Raises HostError when OpenSSH is not installed.
    """
    found = _find_keys(settings.host_key_name, settings)
    if not found.accepted and settings.host_key_name.startswith("["):
        plain = _find_keys(settings.hostname, settings)
        found = KnownKeys(plain.accepted, found.revoked | plain.revoked, plain.files)
    return found


def _find_keys(name: str, settings: SSHSettings) -> KnownKeys:
    accepted, revoked, files = set(), set(), []
    for path in settings.known_hosts:
        if not path.is_file():
            continue
        done = _run_openssh(["ssh-keygen", "-F", name, "-f", str(path)], settings.name)
        for line in done.stdout.splitlines():
            words = line.split()
            if len(words) >= 4 and words[0] == "@revoked":
                revoked.add((words[2], words[3]))
            elif len(words) >= 3 and not words[0].startswith(("#", "@")):
                accepted.add((words[1], words[2]))
                files.append(path)
    return KnownKeys(frozenset(accepted), frozenset(revoked), tuple(dict.fromkeys(files)))


def _run_openssh(argv: Sequence[str], host: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            errors="replace",
        )
    except FileNotFoundError:
        raise HostError(f"{argv[0]} is not installed here", host=host, hint="install OpenSSH's client") from None
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:  # a NUL is in no argument
        raise HostError(f"{argv[0]} did not answer: {error}", host=host) from None


def _parse(text: str, name: str, command: str) -> SSHSettings:
    values: dict[str, list[str]] = {}
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        values.setdefault(key, []).append(value)
    one = {key: found[0] for key, found in values.items()}
    hostname, port, user = one.get("hostname", name), int(one.get("port", SSH_PORT)), one["user"]
    tokens = {"%": "%", "h": hostname, "n": name, "p": str(port), "r": user, "u": getpass.getuser()}
    tokens |= {"d": str(Path("~").expanduser()), "i": str(os.getuid())}
    plain = hostname if port == SSH_PORT else f"[{hostname}]:{port}"
    known = f"{one.get('userknownhostsfile', '')} {one.get('globalknownhostsfile', '')}".split()
    timeout = one.get("connecttimeout", "none")
    proxy = one.get("proxycommand", "none")
    return SSHSettings(
        name=name,
        hostname=hostname,
        port=port,
        user=user,
        identity_files=tuple(Path(_expand(f, tokens)) for f in values.get("identityfile", []) if f != "none"),
        identities_only=one.get("identitiesonly") == "yes",
        agent=_find_agent(one.get("identityagent", "SSH_AUTH_SOCK"), tokens),
        known_hosts=tuple(Path(_expand(f, tokens)) for f in known if f != "none"),
        host_key_name=one.get("hostkeyalias", plain).lower(),
        proxy_jump=_parse_jumps(one.get("proxyjump", "none")),
        proxy_command=None if proxy == "none" else _expand(proxy, tokens, paths=False),
        connect_timeout_s=float(timeout) if timeout.isdigit() and int(timeout) else TIMEOUT_S,
        command=command,
    )


def _parse_jumps(text: str) -> tuple[str, ...]:
    return () if text == "none" else tuple(text.split(","))


def _find_agent(text: str, tokens: Mapping[str, str]) -> str | None:
    if text == "none":
        return None
    if text == "SSH_AUTH_SOCK":
        return os.environ.get("SSH_AUTH_SOCK") or None
    if text.startswith("$"):
        return os.environ.get(text[1:].strip("{}")) or None
    return _expand(text, tokens)


def _expand(text: str, tokens: Mapping[str, str], *, paths: bool = True) -> str:
    """Fill in %-tokens; in a path also a leading ~ and ${VARIABLES}, which `ssh -G` leaves as written."""
    text = re.sub(r"%(.)", lambda m: tokens.get(m[1], m[0]), text)
    if not paths:
        return text
    text = re.sub(r"\$\{(\w+)\}", lambda m: os.environ.get(m[1], m[0]), text)
    return str(Path(text).expanduser()) if text.startswith("~") else text
