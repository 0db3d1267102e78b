"""Whether to trust a host's key: by the known keys of that host, revoked keys and certificate authorities.

It follows ssh, but never accepts a key that is not known yet. It opens no connection.
"""

from __future__ import annotations

import base64
import contextlib
import ipaddress
import os
import shlex
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import paramiko
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import SSHCertificateType

from moectl.errors import HostKeyError
from moectl.hosts.ssh.certificates import CERT_SUFFIX, key_words, read_certificate, signature_algorithm
from moectl.hosts.ssh.config import NO_FILES, SSH_PORT, SSHSettings, expand_path, run_openssh, split_paths
from moectl.hosts.ssh.keywords import KeywordVerdict, find_set
from moectl.text import last_line

COMMAND_S = 30.0

Key = tuple[str, str]  # type, base64


@dataclass(frozen=True, slots=True)
class KnownKeys:
    """The keys of one name in the known_hosts files and in the output of KnownHostsCommand."""

    accepted: frozenset[Key] = frozenset()
    authorities: frozenset[Key] = frozenset()  # of @cert-authority lines
    revoked: frozenset[Key] = frozenset()
    files: tuple[Path, ...] = ()  # that hold the accepted ones
    fallback: frozenset[Key] = frozenset()  # accepted under the name without the port


@dataclass(frozen=True, slots=True)
class Shown:
    """The key that a host showed, and the certificate that it came with."""

    key: paramiko.PKey
    certificate: bytes | None = None

    @property
    def plain(self) -> Key:
        return self.key.get_name(), self.key.get_base64()

    @property
    def line(self) -> str:
        """The key or certificate as a line of a .pub file."""
        if self.certificate is None:
            return " ".join(self.plain)
        kind = paramiko.Message(self.certificate).get_text()
        return f"{kind} {base64.b64encode(self.certificate).decode()}"


def find_known_keys(settings: SSHSettings, shown: Shown | None = None) -> KnownKeys:
    """Return the known keys of a host; as ssh does, look for the name without the port too.

    Before the host has shown its key, KnownHostsCommand is asked which keys to prefer (ORDER). Raises HostKeyError.
    """
    name = settings.host_key_name
    found = _look_up(name, settings, shown, "HOSTNAME" if shown else "ORDER")
    if name.startswith("[") and "hostkeyalias" not in settings.values:
        plain = _look_up(settings.hostname, settings)
        found = replace(
            found,
            authorities=found.authorities | plain.authorities,
            revoked=found.revoked | plain.revoked,
            fallback=plain.accepted,
        )
    return found


def check_host_key(shown: Shown, known: KnownKeys, settings: SSHSettings, peer: str | None) -> None:
    """Raise HostKeyError where the host's key cannot be trusted. `peer` is its address."""
    if _has_command(settings):
        known = find_known_keys(settings, shown)
    _check_size(shown, settings)
    _check_revoked(shown, known, settings)
    uncertified = _why_uncertified(shown, known, settings) if shown.certificate else None
    if shown.certificate and uncertified is None:
        return
    if shown.plain in known.accepted or (not known.accepted and shown.plain in known.fallback):
        _check_address(shown, settings, peer)
        return
    if known.accepted:
        raise _changed_error(known, settings)
    raise _unknown_error(shown, settings, uncertified)


def _has_command(settings: SSHSettings) -> bool:
    return settings.values.get("knownhostscommand", "none") != "none"


def _look_up(name: str, settings: SSHSettings, shown: Shown | None = None, reason: str | None = None) -> KnownKeys:
    accepted: set[Key] = set()
    authorities: set[Key] = set()
    revoked: set[Key] = set()
    files: list[Path] = []
    with contextlib.ExitStack() as opened:
        sources = [path for path in settings.known_hosts if path.is_file()]
        if reason and _has_command(settings):
            said = opened.enter_context(tempfile.NamedTemporaryFile())
            said.write(_run_command(name, settings, shown, reason))
            said.flush()
            sources.append(Path(said.name))
        for path in sources:
            done = run_openssh(["ssh-keygen", "-F", name, "-f", str(path)], settings.name)
            for line in done.stdout.splitlines():
                words = line.split()
                if len(words) >= 4 and words[0] == "@revoked":
                    revoked.add((words[2], words[3]))
                elif len(words) >= 4 and words[0] == "@cert-authority":
                    authorities.add((words[2], words[3]))
                elif len(words) >= 3 and not words[0].startswith(("#", "@")):
                    accepted.add((words[1], words[2]))
                    files += [path] if path in settings.known_hosts else []
    return KnownKeys(frozenset(accepted), frozenset(authorities), frozenset(revoked), tuple(dict.fromkeys(files)))


def _run_command(name: str, settings: SSHSettings, shown: Shown | None, reason: str) -> bytes:
    """Return what KnownHostsCommand prints. Raises HostKeyError where it fails, as ssh stops too."""
    text = settings.values["knownhostscommand"]
    tokens: Mapping[str, str] = {
        **settings.tokens,
        "H": name,
        "I": reason,
        "t": shown.line.split()[0] if shown else "NONE",
        "f": shown.key.fingerprint if shown else "NONE",
        "K": shown.line.split()[1] if shown else "NONE",
    }
    try:
        program, *arguments = shlex.split(text)
        argv = [program, *(expand_path(word, tokens, settings.name, "KnownHostsCommand") for word in arguments)]
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=COMMAND_S)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise _command_error(text, str(error), settings) from None
    if done.returncode != 0 or not program.startswith("/"):
        reason = f"exit code {done.returncode}" if done.returncode else "its path has to be absolute"
        raise _command_error(text, ": ".join(filter(None, (reason, last_line(done.stderr)))), settings)
    return done.stdout


def _command_error(command: str, reason: str, settings: SSHSettings) -> HostKeyError:
    hint = "correct KnownHostsCommand in ~/.ssh/config, or what it runs"
    return HostKeyError(f"its KnownHostsCommand ({command}) failed: {reason}", host=settings.name, hint=hint)


def _check_size(shown: Shown, settings: SSHSettings) -> None:
    least = settings.values.get("requiredrsasize", "1024")
    if shown.plain[0] == "ssh-rsa" and least.isdigit() and shown.key.get_bits() < int(least):
        raise HostKeyError(
            f"its RSA key has {shown.key.get_bits()} bits, and RequiredRSASize is {least}.",
            host=settings.name,
            hint="give the host a larger key or an ed25519 one: on it, run 'ssh-keygen -A'",
        )


def _check_revoked(shown: Shown, known: KnownKeys, settings: SSHSettings) -> None:
    keys = {shown.plain}
    if shown.certificate:
        with contextlib.suppress(ValueError, UnsupportedAlgorithm):
            keys.add(key_words(read_certificate(shown.certificate).signature_key()))
    revoked_in = "known_hosts" if keys & known.revoked else None
    reason = f"was revoked in {revoked_in}{_not_followed(settings)}" if revoked_in else None
    for path in split_paths(settings.values.get("revokedhostkeys")):
        if found := _find_revoked(shown, keys, path, settings):
            reason, revoked_in = f"{found} (RevokedHostKeys)", str(path)
    if reason:
        hint = f"give the host a new key; if this one is right, correct {revoked_in}"
        raise HostKeyError(f"its host key {reason}.", host=settings.name, hint=hint)


def _find_revoked(shown: Shown, keys: set[Key], path: Path, settings: SSHSettings) -> str | None:
    """Say why a file of RevokedHostKeys forbids a key; a file that cannot be read forbids every key, as in ssh."""
    try:
        data = path.read_bytes()
    except OSError as error:
        return f"cannot be checked: {path}: {error.strerror}"
    if data.startswith(b"SSHKRL\n\0"):
        with tempfile.NamedTemporaryFile("w", suffix=".pub") as f:
            f.write(shown.line + "\n")
            f.flush()
            done = run_openssh(["ssh-keygen", "-Q", "-f", str(path), f.name], settings.name)
        if done.returncode == 0:
            return None
        said = (done.stderr.strip() or done.stdout.strip()).split("\n")[-1]
        return f"was revoked in {path}" if "REVOKED" in done.stdout else f"cannot be checked: {said}"
    for line in data.decode("utf-8", "replace").splitlines():
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        try:
            paramiko.pkey.PublicBlob.from_string(" ".join(words[:2]))
        except Exception:  # paramiko raises what its parts raise
            return f"cannot be checked: {path} holds a line that is not a public key"
        if (words[0].removesuffix(CERT_SUFFIX), words[1]) in keys or " ".join(words[:2]) == shown.line:
            return f"was revoked in {path}"
    return None


def _why_uncertified(shown: Shown, known: KnownKeys, settings: SSHSettings) -> str | None:
    """Say why a host's certificate does not count; None when it does."""
    blob = shown.certificate
    assert blob is not None
    try:
        certificate = read_certificate(blob)
        authority = key_words(certificate.signature_key())
        certificate.verify_cert_signature()
    except InvalidSignature:
        return "its signature is wrong"
    except (ValueError, UnsupportedAlgorithm, AssertionError):
        return "moectl cannot read it"
    names = [principal.decode("utf-8", "replace") for principal in certificate.valid_principals]
    name = settings.values.get("hostkeyalias", settings.hostname)
    allowed = settings.list_values("casignaturealgorithms") or [signature_algorithm(blob)]
    now = time.time()
    reasons = (
        (authority not in known.authorities, "no @cert-authority line for this host has the key that signed it"),
        (certificate.type is not SSHCertificateType.HOST, "it is for a user"),
        (now < certificate.valid_after, "it is not valid yet"),
        (now >= certificate.valid_before, "it has expired"),
        (name not in names, f"it is for {', '.join(names) or 'no name'}, not for {name}"),
        (bool(certificate.critical_options), "it has critical options"),
        (signature_algorithm(blob) not in allowed, "CASignatureAlgorithms does not allow its signature"),
    )
    return next((reason for failed, reason in reasons if failed), None)


def _check_address(shown: Shown, settings: SSHSettings, peer: str | None) -> None:
    """With CheckHostIP: refuse a key where another key is known for the address `peer`, as ssh does."""
    if settings.values.get("checkhostip") != "yes" or peer is None:
        return
    name = peer if settings.port == SSH_PORT else f"[{peer}]:{settings.port}"
    if name == settings.hostname or ipaddress.ip_address(peer.partition("%")[0]).is_loopback:
        return
    known = _look_up(name, settings, shown, "ADDRESS")
    if shown.plain in known.revoked:
        raise HostKeyError(f"its host key was revoked in known_hosts for {peer}.", host=settings.name)
    if known.accepted and shown.plain not in known.accepted:
        remove = " && ".join(_removals(name, known.files)) or "correct KnownHostsCommand"
        raise HostKeyError(
            f"another host key is known for its address {peer} (CheckHostIP).",
            host=settings.name,
            hint=f"if that address belonged to another host before, run '{remove}'.",
        )


def _changed_error(known: KnownKeys, settings: SSHSettings) -> HostKeyError:
    commands = " && ".join(_removals(settings.host_key_name, known.files))
    hint = "correct what KnownHostsCommand prints for this host"
    if commands:
        place, command = _accept(settings)
        hint = (
            f"if you reinstalled {settings.name}, {place}run '{commands}', then '{command}' once to accept the new key."
        )
    message = f"host key changed since you last connected{_not_followed(settings)}."
    return HostKeyError(message, host=settings.name, hint=hint)


def _removals(name: str, files: Sequence[Path]) -> list[str]:
    if tuple(files) == (Path("~/.ssh/known_hosts").expanduser(),):
        return [shlex.join(["ssh-keygen", "-R", name])]
    sudo = {path: [] if os.access(path.parent, os.W_OK) else ["sudo"] for path in files}
    return [shlex.join([*sudo[path], "ssh-keygen", "-R", name, "-f", str(path)]) for path in files]


def _unknown_error(shown: Shown, settings: SSHSettings, uncertified: str | None) -> HostKeyError:
    also = f", and its certificate does not count: {uncertified}" if uncertified else ""
    place, command = _accept(settings)
    return HostKeyError(
        f"its host key is not known here ({shown.key.fingerprint}){also}{_not_followed(settings)}.",
        host=settings.name,
        hint=f"{place}run '{command}' once, compare the fingerprint and accept the key.",
    )


def _accept(settings: SSHSettings) -> tuple[str, str]:
    """Return what to do first, and the command with which ssh asks about a key and keeps the answer."""
    options = []
    if settings.values.get("stricthostkeychecking") not in (None, "ask"):
        options += ["-o", "StrictHostKeyChecking=ask"]
    if settings.values.get("batchmode") == "yes":
        options += ["-o", "BatchMode=no"]
    if settings.values.get("nohostauthenticationforlocalhost") == "yes":
        options += ["-o", "NoHostAuthenticationForLocalhost=no"]
    words = shlex.split(settings.command)
    place = ""
    if settings.values.get("userknownhostsfile", "").split(" ")[0] in NO_FILES:
        place = "give it a UserKnownHostsFile in ~/.ssh/config (now ssh keeps no key of it), then "
    return place, shlex.join([words[0], *options, *words[1:]])


def _not_followed(settings: SSHSettings) -> str:
    """Name the settings that let ssh accept a key that is not known."""
    found = [f"{row.name} {value}" for row, value in find_set(KeywordVerdict.TRUST, settings.values)]
    return f"; moectl does not follow {', '.join(found)}" if found else ""
