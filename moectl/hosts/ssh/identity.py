"""The keys and certificates to offer to a host, of an agent and in files, in the order in which ssh offers them.

It asks for no passphrase and sends nothing to the host. For a key that cannot be offered it keeps the reason.
"""

from __future__ import annotations

import base64
import contextlib
import io
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import paramiko
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
    load_ssh_private_key,
)
from paramiko.agent import AgentSSH

from moectl.hosts.ssh.certificates import is_user_certificate, key_words, read_certificate
from moectl.hosts.ssh.config import SSHSettings

AGENT_S = 30.0


@dataclass(frozen=True, slots=True)
class Offer:
    label: str  # "agent", or the name of the file
    key: paramiko.PKey


@dataclass(frozen=True, slots=True)
class Left:
    """A key that could not be offered: why, and the command that helps."""

    reason: str
    hint: str | None = None


@dataclass(slots=True)
class Identities:
    """The keys for one host. `left` is complete when all `offers` were taken."""

    settings: SSHSettings
    agent_keys: list[AgentKey] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)

    def offers(self) -> Iterator[Offer]:
        """Yield ssh's order: CertificateFile, the agent's configured keys, its other keys, keys in files."""
        return (offer for offer in self._all() if self._is_allowed(offer))

    def _all(self) -> Iterator[Offer]:
        files = {path: read_public(path) for path in self.settings.identity_files}
        certificates = [(path, blob) for path in self.settings.certificate_files if (blob := self._read_cert(path))]
        # Certificates beside the keys count where none is configured.
        beside = {} if self.settings.certificate_files else {path: _read_text(Path(f"{path}-cert")) for path in files}
        blobs = {*files.values(), *beside.values()}
        named = [key for key in self.agent_keys if key.blob in blobs]
        others = [] if self.settings.identities_only else [key for key in self.agent_keys if key.blob not in blobs]
        for path, blob in certificates:
            yield from self._certified(path.name, blob, named + others, files)
        yield from (Offer("agent", key) for key in (*named, *others))
        held = {key.blob for key in named}
        for path, public in files.items():
            if public is None or public not in held:
                yield from self._from_file(path, public)
            certificate = beside.get(path)
            if certificate and certificate not in held and is_user_certificate(certificate):
                yield from self._certified(path.name, certificate, named + others, {path: public})

    def _is_allowed(self, offer: Offer) -> bool:
        """Return whether PubkeyAcceptedAlgorithms and RequiredRSASize allow a key."""
        values = self.settings.values
        name = "pubkeyacceptedalgorithms" if "pubkeyacceptedalgorithms" in values else "pubkeyacceptedkeytypes"
        allowed = self.settings.list_values(name)
        blob = getattr(offer.key, "public_blob", None)
        kind = blob.key_type if blob else offer.key.get_name()
        kinds = {kind.replace("ssh-rsa", new) for new in ("rsa-sha2-512", "rsa-sha2-256")}
        if allowed and not kinds & set(allowed):
            keyword = "PubkeyAcceptedAlgorithms"
            self.left.append(Left(f"{offer.label}: {keyword} leaves out {kind}", f"add {min(kinds)} to {keyword}"))
            return False
        least = int(values.get("requiredrsasize", "0"))
        if kind.startswith("ssh-rsa") and offer.key.get_bits() < least:
            self.left.append(Left(f"{offer.label} is shorter than RequiredRSASize {least}", "ssh-keygen -t ed25519"))
            return False
        return True

    def _certified(
        self, label: str, certificate: bytes, agent_keys: list[AgentKey], files: dict[Path, bytes | None]
    ) -> Iterator[Offer]:
        """Offer a certificate with its private key, of an agent or in a file."""
        plain = base64.b64decode(key_words(read_certificate(certificate).public_key())[1])
        key: paramiko.PKey | None = None
        if held := [one for one in agent_keys if one.blob == plain]:
            key = AgentKey(held[0].agent, plain, held[0].comment)  # a copy, because it gets the certificate
        else:
            for path, public in files.items():
                found = self._load(path) if public in (plain, None) else None
                if found and found.asbytes() == plain:
                    key = found
        if key is None:
            self.left.append(Left(f"{label} is a certificate without its key"))
            return
        key.public_blob = paramiko.pkey.PublicBlob(paramiko.Message(certificate).get_text(), certificate)
        yield Offer(label, key)

    def _read_cert(self, path: Path) -> bytes | None:
        blob = _read_text(path)
        if blob is None or not is_user_certificate(blob):
            self.left.append(Left(f"CertificateFile {path} is not a certificate for a user"))
            return None
        return blob

    def _from_file(self, path: Path, public: bytes | None) -> Iterator[Offer]:
        if not path.is_file():
            if public is not None:
                self.left.append(Left(f"{path.name}.pub is in no agent, and {path.name} is not here"))
            return
        key = self._load(path)
        if key is not None:
            yield Offer(path.name, key)

    def _load(self, path: Path) -> paramiko.PKey | None:
        """Read a private key; where it cannot be used, keep the reason."""
        try:
            status, data = path.stat(), path.read_bytes()
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                self._leave(f"{path.name} cannot be read: {error.strerror}")
            return None
        if status.st_uid == os.getuid() and status.st_mode & 0o077 and b"PRIVATE KEY" in data:
            # ssh does not use such a key either.
            self._leave(f"others may read {path.name}", f"chmod 600 {shlex.quote(str(path))}")
            return None
        try:
            return load_private(data)
        except TypeError:
            self._leave(f"{path.name} needs a passphrase and is not in an agent", add_key(path))
        except Exception:  # a reader of a format raises any error
            self._leave(*_describe(path, data))
        return None

    def note_refusal(self, offer: Offer) -> None:
        """Keep that the agent did not sign with an offered key."""
        if isinstance(offer.key, AgentKey) and offer.key.refused:
            name = offer.key.comment or offer.key.get_name()
            self._leave(
                f"the agent did not sign with {name}",
                "ssh-add -T KEY.pub has to sign: is the agent locked, or did it ask for permission?",
            )

    def _leave(self, reason: str, hint: str | None = None) -> None:
        if (left := Left(reason, hint)) not in self.left:
            self.left.append(left)


class AgentKey(paramiko.AgentKey):
    """A key in an agent; it signs under the agent's name of it, for a certificate too."""

    refused = False  # the agent may ask its user first, who says no

    def asbytes(self) -> bytes:
        blob: bytes = self.blob
        return blob

    def sign_ssh_data(self, data: Any, algorithm: str | None = None) -> Any:
        try:
            return super().sign_ssh_data(data, algorithm)
        except (paramiko.SSHException, OSError):
            # An exception would end the connection. The host refuses an empty signature, and the next key is tried.
            self.refused = True
            empty = paramiko.Message()
            empty.add_string(algorithm or self.name)
            empty.add_string(b"")
            return empty.asbytes()


class _Agent(AgentSSH):
    """The agent at any socket: IdentityAgent may name another one than SSH_AUTH_SOCK."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.sock.settimeout(AGENT_S)
            self.sock.connect(path)
            self._connect(self.sock)  # type: ignore[attr-defined]
        except BaseException:
            self.sock.close()
            raise


def open_identities(settings: SSHSettings, opened: contextlib.ExitStack) -> Identities:
    """Ask the agent, where there is one, for its keys; `opened` closes the connection to it."""
    found = Identities(settings)
    if settings.agent is None:
        return found
    try:
        agent = _Agent(settings.agent)
    except (OSError, paramiko.SSHException):
        found.left.append(Left(f"no agent answers at {settings.agent}"))
        return found
    opened.callback(agent.sock.close)
    found.agent_keys = [AgentKey(agent, key.blob, key.comment) for key in agent.get_keys()]
    return found


def read_public(path: Path) -> bytes | None:
    """Return the public key of an IdentityFile as ssh finds it: within the private key, in the file itself, in .pub."""
    try:
        data = path.read_bytes()
    except OSError:
        data = b""
    if b"BEGIN OPENSSH PRIVATE KEY" in data:
        with contextlib.suppress(ValueError, IndexError):
            body = data.split(b"-----")[2]
            message = paramiko.Message(base64.b64decode(body).removeprefix(b"openssh-key-v1\0"))
            for _ in range(3):  # the cipher, the key derivation, its options
                message.get_binary()
            if message.get_int() == 1:
                return message.get_binary()
    return _read_text(path)


def _read_text(path: Path) -> bytes | None:
    """Return the blob of a public key or certificate in a file, or in the file of that name with .pub."""
    for place in (path, Path(f"{path}.pub")):
        with contextlib.suppress(OSError, UnicodeDecodeError, ValueError, IndexError, paramiko.SSHException):
            words = place.read_text(encoding="utf-8").split()
            return bytes(paramiko.pkey.PublicBlob.from_string(" ".join(words[:2])).key_blob)
    return None


def load_private(data: bytes) -> paramiko.PKey:
    """Read a private key: OpenSSH's format, PEM, PKCS#8. Raises TypeError where it needs a passphrase."""
    key: object
    try:
        key = load_ssh_private_key(data, None)
    except ValueError:
        key = load_pem_private_key(data, None)
    kinds = (
        (rsa.RSAPrivateKey, paramiko.RSAKey),
        (ec.EllipticCurvePrivateKey, paramiko.ECDSAKey),
        (ed25519.Ed25519PrivateKey, paramiko.Ed25519Key),
    )
    for kind, made in kinds:
        if isinstance(key, kind):
            # paramiko reads only this format for all three kinds.
            text = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
            return made.from_private_key(io.StringIO(text.decode()))
    raise ValueError("a kind of key that paramiko does not have")


def add_key(path: Path) -> str:
    """Return the command that puts a key into the agent; a Mac keeps its passphrase in the keychain."""
    keychain = "--apple-use-keychain " if sys.platform == "darwin" else ""
    return f"ssh-add {keychain}{shlex.quote(str(path))}"


def _describe(path: Path, data: bytes) -> tuple[str, str | None]:
    """Say what a file is that holds no private key, and what to do."""
    quoted = shlex.quote(str(path))
    public = read_public(path)
    if b"PRIVATE KEY" not in data and public is not None:
        private = path.with_suffix("") if path.suffix == ".pub" else None
        add = f"ssh-add {shlex.quote(str(private))}" if private and private.is_file() else None
        return f"{path.name} is a public key, whose private key is in no agent", add
    if public is not None and paramiko.Message(public).get_text().startswith("sk-"):
        return f"{path.name} is a security key, which moectl uses from an agent only", f"ssh-add {quoted}"
    if data.startswith(b"PuTTY-"):
        made = shlex.quote(f"{path}.openssh")
        return (
            f"{path.name} is a key of PuTTY",
            f"puttygen {quoted} -O private-openssh -o {made}, and name {made} as IdentityFile",
        )
    read = subprocess.run(
        ["ssh-keygen", "-y", "-P", "", "-f", str(path)], stdin=subprocess.DEVNULL, capture_output=True
    )
    if b"passphrase" in read.stderr:
        return f"{path.name} needs a passphrase and is not in an agent", add_key(path)
    return f"{path.name} holds no private key that can be used", None
