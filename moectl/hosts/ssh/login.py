"""Which key opens the door: what `ssh_identity` offers, in its order, and what to say when none does.

It never asks for a passphrase or a password. The connection is `ssh_connect`'s.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import paramiko

from moectl.errors import AuthFailed
from moectl.hosts.ssh.config import SSHSettings
from moectl.hosts.ssh.identity import Left, open_identities
from moectl.hosts.ssh.keywords import KeywordVerdict, find_set


def log_in(transport: paramiko.Transport, settings: SSHSettings) -> None:
    """Offer the agent's keys, then those in files, in ssh's order. Raises AuthFailed."""
    with contextlib.ExitStack() as opened:
        identities = open_identities(settings, opened)
        tried: list[str] = []
        for offer in identities.offers():
            if offer.label not in tried:
                tried.append(offer.label)
            try:
                more = transport.auth_publickey(settings.user, offer.key)
            except paramiko.BadAuthenticationType as error:
                reason = "the host takes no keys, and moectl gives no passwords"
                raise _auth_error(settings, reason, methods=error.allowed_types) from None
            except paramiko.AuthenticationException:
                if not transport.is_active():
                    raise _too_many(settings, tried) from None
                continue
            except (paramiko.SSHException, EOFError, OSError) as error:
                if not transport.is_active():
                    raise _too_many(settings, tried) from None
                reason = f"{offer.label} cannot be used: {error or type(error).__name__}"
                raise _auth_error(settings, reason) from None
            if more:
                raise _auth_error(settings, f"the host asks for more than a key ({', '.join(more)})")
            return
        methods = _ask_methods(transport, settings)
        if transport.is_authenticated():  # a host that lets everyone in, as ssh would have noticed first
            return
    raise _no_key_error(settings, tried, identities.left, methods)


def _ask_methods(transport: paramiko.Transport, settings: SSHSettings) -> Sequence[str]:
    """Return by which methods the host lets one in, as far as it says so."""
    try:
        transport.auth_none(settings.user)
    except paramiko.BadAuthenticationType as error:
        return tuple(error.allowed_types)
    except (paramiko.SSHException, EOFError, OSError):
        pass
    return ()


def _list_unused(settings: SSHSettings, methods: Sequence[str]) -> list[str]:
    """Name what ssh might have got in with. What comes with many systems counts only where it could have helped."""
    needs = {"GSSAPIAuthentication": "gssapi-with-mic", "HostbasedAuthentication": "hostbased"}
    return [
        f"{row.name} is set, but {row.words}"
        for row, value in find_set(KeywordVerdict.LOGIN, settings.values)
        if not (methods and needs.get(row.name, methods[0]) not in methods)
        and not (row.name == "ControlPath" and not Path(value).is_socket())
    ]


def _auth_error(settings: SSHSettings, reason: str, hint: str | None = None, methods: Sequence[str] = ()) -> AuthFailed:
    hint = hint or f"this has to work without a question: {settings.command}"
    message = f"cannot log in as {settings.user}: {'; '.join([reason, *_list_unused(settings, methods)])}."
    return AuthFailed(message, host=settings.name, hint=hint)


def _too_many(settings: SSHSettings, tried: Sequence[str]) -> AuthFailed:
    hint = f"under 'Host {settings.name}' in ~/.ssh/config set IdentityFile and 'IdentitiesOnly yes'"
    return _auth_error(settings, f"the host hung up after too many keys (tried {', '.join(tried)})", hint)


def _no_key_error(
    settings: SSHSettings, tried: Sequence[str], left: Sequence[Left], methods: Sequence[str]
) -> AuthFailed:
    port = f"-p {settings.port} " if settings.port != 22 and settings.name == settings.hostname else ""
    copy = f"ssh-copy-id {port}{settings.user}@{settings.name}"
    if left:
        also = [f"tried {', '.join(tried)}"] if tried else []
        reason = f"no key was accepted ({', '.join([*(one.reason for one in left), *also])})"
        return _auth_error(
            settings, reason, next((one.hint for one in left if one.hint), copy if tried else None), methods
        )
    if not tried:
        return _auth_error(settings, "there is no key to offer", f"ssh-keygen -t ed25519, then {copy}", methods)
    return _auth_error(settings, f"no key was accepted (tried {', '.join(tried)})", copy, methods)
