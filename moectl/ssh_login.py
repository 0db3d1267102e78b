"""Which key opens the door: the agent's keys, then those in files, in the order in which ssh tries them.

It never asks for a passphrase or a password. The connection is `ssh_connect`'s.
"""

from __future__ import annotations

import contextlib
import shlex
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import paramiko
from paramiko.agent import AgentSSH

from moectl.errors import AuthFailed
from moectl.ssh_config import SSHSettings


class _Agent(AgentSSH):
    """The agent at a socket of our choice: IdentityAgent may name another than SSH_AUTH_SOCK."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.sock.settimeout(30.0)
            self.sock.connect(path)
            self._connect(self.sock)  # type: ignore[attr-defined]
        except BaseException:
            self.sock.close()
            raise


def log_in(transport: paramiko.Transport, settings: SSHSettings) -> None:
    """Offer the agent's keys, then those in files, in ssh's order. Raises AuthFailed."""
    with contextlib.ExitStack() as opened:
        agent_keys = _list_agent_keys(settings, opened)
        tried: list[str] = []
        locked: list[Path] = []
        for label, key in _list_keys(settings, agent_keys, locked):
            if label not in tried:
                tried.append(label)
            try:
                more = transport.auth_publickey(settings.user, key)
            except paramiko.BadAuthenticationType:
                raise _auth_error(settings, "the host takes no keys, and moectl gives no passwords") from None
            except paramiko.AuthenticationException:
                if not transport.is_active():
                    raise _too_many(settings, tried) from None
                continue
            except (paramiko.SSHException, EOFError, OSError) as error:
                if not transport.is_active():
                    raise _too_many(settings, tried) from None
                raise _auth_error(settings, f"{label} cannot be used: {error or type(error).__name__}") from None
            if more:
                raise _auth_error(settings, f"the host asks for more than a key ({', '.join(more)})")
            return
    raise _no_key_error(settings, tried, locked)


def _list_agent_keys(settings: SSHSettings, opened: contextlib.ExitStack) -> list[paramiko.AgentKey]:
    if settings.agent is None:
        return []
    try:
        agent = _Agent(settings.agent)
    except (OSError, paramiko.SSHException):
        return []
    opened.callback(agent.sock.close)
    return list(agent.get_keys())


def _list_keys(
    settings: SSHSettings, agent_keys: Sequence[paramiko.AgentKey], locked: list[Path]
) -> Iterator[tuple[str, paramiko.PKey]]:
    """Yield (label, key): agent keys that the configuration names, other agent keys, keys in files."""
    public = {blob: path for path in settings.identity_files if (blob := _read_public(path))}
    named = [key for key in agent_keys if key.asbytes() in public]
    others = [] if settings.identities_only else [key for key in agent_keys if key not in named]
    yield from (("agent", key) for key in (*named, *others))
    in_agent = {public[key.asbytes()] for key in named}
    for path in settings.identity_files:
        if path in in_agent or not path.is_file():
            continue
        try:
            yield path.name, paramiko.PKey.from_path(path)
        except (TypeError, paramiko.PasswordRequiredException):
            locked.append(path)
        except Exception:
            # Security keys, foreign formats, unreadable files: ssh skips them too.
            continue


def _read_public(path: Path) -> bytes | None:
    try:
        words = Path(f"{path}.pub").read_text(encoding="utf-8").split()
        return paramiko.pkey.PublicBlob.from_string(" ".join(words[:2])).key_blob
    except (OSError, ValueError, IndexError, UnicodeDecodeError):
        return None


def _auth_error(settings: SSHSettings, reason: str, hint: str | None = None) -> AuthFailed:
    hint = hint or f"this has to work without a question: {settings.command}"
    return AuthFailed(f"cannot log in as {settings.user}: {reason}.", host=settings.name, hint=hint)


def _too_many(settings: SSHSettings, tried: Sequence[str]) -> AuthFailed:
    hint = f"under 'Host {settings.name}' in ~/.ssh/config set IdentityFile and 'IdentitiesOnly yes'"
    return _auth_error(settings, f"the host hung up after too many keys (tried {', '.join(tried)})", hint)


def _no_key_error(settings: SSHSettings, tried: Sequence[str], locked: Sequence[Path]) -> AuthFailed:
    port = f"-p {settings.port} " if settings.port != 22 and settings.name == settings.hostname else ""
    copy = f"ssh-copy-id {port}{settings.user}@{settings.name}"
    if locked:
        names = ", ".join(path.name for path in locked)
        also = f", tried {', '.join(tried)}" if tried else ""
        reason = f"no key was accepted ({names} needs a passphrase and is not in an agent{also})"
        return _auth_error(settings, reason, f"ssh-add {shlex.quote(str(locked[0]))}")
    if not tried:
        return _auth_error(settings, "there is no key to offer", f"ssh-keygen -t ed25519, then {copy}")
    return _auth_error(settings, f"no key was accepted (tried {', '.join(tried)})", copy)
