"""The login: the keys of `ssh.identity` one after the other, and an error that explains why none was accepted.

It never asks for a passphrase or a password. `ssh.connect` makes the connection.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

import paramiko

from moectl.errors import AuthFailed
from moectl.hosts.ssh.config import SSHSettings
from moectl.hosts.ssh.identity import Left, Offer, open_identities
from moectl.hosts.ssh.keywords import KeywordVerdict, find_set


def log_in(transport: paramiko.Transport, settings: SSHSettings) -> None:
    """Offer the agent's keys, then those in files, in ssh's order. Raises AuthFailed."""
    with _quote_banner(transport) as heard, contextlib.ExitStack() as opened:
        identities = open_identities(settings, opened)
        tried: list[str] = []
        accepted: list[str] = []
        for offer in identities.offers():
            if offer.label not in tried:
                tried.append(offer.label)
            more = _try_key(transport, settings, offer, tried)
            heard.add(transport.get_banner())  # the host sends it at one of the attempts
            if more is None:
                identities.note_refusal(offer)
            elif not more:
                return
            elif "publickey" not in more:
                raise _auth_error(settings, f"the host asks for more than a key ({', '.join(more)})")
            else:
                accepted.append(offer.label)  # and the host asks for another one
        methods = _ask_methods(transport, settings)
        if accepted:
            raise _auth_error(settings, f"the host asks for a further key beside {', '.join(accepted)}")
        if transport.is_authenticated():  # this host needs no key at all
            return
        raise _no_key_error(settings, tried, identities.left, methods)


@contextlib.contextmanager
def _quote_banner(transport: paramiko.Transport) -> Iterator[set[bytes | None]]:
    """Add the host's banner to an error: it may say why the login failed."""
    heard: set[bytes | None] = set()
    try:
        yield heard
    except AuthFailed as error:
        heard.add(transport.get_banner())
        said = " ".join(b" ".join(filter(None, heard)).decode("utf-8", "replace").split())
        if not said:
            raise
        raise AuthFailed(f"{error.message} The host says: {said[:200]}", host=error.host, hint=error.hint) from None


def _try_key(
    transport: paramiko.Transport, settings: SSHSettings, offer: Offer, tried: Sequence[str]
) -> list[str] | None:
    """Return the methods that the host still asks for, none after the login; None when it refused this key."""
    try:
        return transport.auth_publickey(settings.user, offer.key)
    except paramiko.BadAuthenticationType as error:
        reason = "the host takes no keys, and moectl gives no passwords"
        raise _auth_error(settings, reason, methods=error.allowed_types) from None
    except paramiko.AuthenticationException:
        if not transport.is_active():
            raise _too_many(settings, tried) from None
        return None
    except (paramiko.SSHException, EOFError, OSError) as error:
        if not transport.is_active():
            raise _too_many(settings, tried) from None
        reason = f"{offer.label} cannot be used: {error or type(error).__name__}"
        raise _auth_error(settings, reason) from None


def _ask_methods(transport: paramiko.Transport, settings: SSHSettings) -> Sequence[str]:
    """Return the host's methods of login, as far as it names them."""
    try:
        transport.auth_none(settings.user)
    except paramiko.BadAuthenticationType as error:
        return tuple(error.allowed_types)
    except (paramiko.SSHException, EOFError, OSError):
        pass
    return ()


def _list_unused(settings: SSHSettings, methods: Sequence[str]) -> list[str]:
    """Name the settings by which ssh might log in. Those that many systems set count only where they could help."""
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
    if not left and not tried:
        return _auth_error(settings, "there is no key to offer", _make_command(settings), methods)
    reasons = [one.reason for one in left] + ([f"tried {', '.join(tried)}"] if tried else [])
    hint = next((one.hint for one in left if one.hint), None)
    if hint is None and tried:
        hint = _copy_tried(settings, tried)
    return _auth_error(settings, f"no key was accepted ({', '.join(reasons)})", hint, methods)


def _copy_tried(settings: SSHSettings, tried: Sequence[str]) -> str:
    """Return the command that gives the tried key to the host: alone, ssh-copy-id takes an agent's key or id_*."""
    key = next((path for path in settings.identity_files if path.name in tried), None)
    if key is None or key in _usual_keys():
        return _copy_command(settings)
    if Path(f"{key}.pub").exists():
        return _copy_command(settings, key)
    return f"ssh-keygen -y -f {shlex.quote(str(key))} > {shlex.quote(f'{key}.pub')} && {_copy_command(settings, key)}"


def _make_command(settings: SSHSettings) -> str:
    """Return the command that makes the key to offer."""
    if not settings.identity_files:
        return "remove 'IdentityFile none' for this host (~/.ssh/config)"
    if _usual_keys()[0] in settings.identity_files:
        return f"ssh-keygen -t ed25519, then {_copy_command(settings)}"
    key = settings.identity_files[0]
    return f"ssh-keygen -t ed25519 -f {shlex.quote(str(key))}, then {_copy_command(settings, key)}"


def _copy_command(settings: SSHSettings, key: Path | None = None) -> str:
    words = shlex.split(settings.command)
    port = words[words.index("-p") :][:2] if "-p" in words else []
    return shlex.join(["ssh-copy-id", *(["-i", str(key)] if key else []), *port, f"{settings.user}@{settings.name}"])


def _usual_keys() -> list[Path]:
    """Return the files that ssh tries without IdentityFile, ssh-keygen's own default first."""
    home = Path(pwd.getpwuid(os.getuid()).pw_dir) / ".ssh"
    return [home / f"id_{kind}" for kind in ("ed25519", "ecdsa", "rsa")]
