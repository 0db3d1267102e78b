"""OpenSSH's certificates of users and hosts: read, and what is in them. Whether one counts is for others to say."""

from __future__ import annotations

import base64
import contextlib

import paramiko
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    SSHCertificate,
    SSHCertificateType,
    SSHCertPublicKeyTypes,
    load_ssh_public_identity,
)

CERT_SUFFIX = "-cert-v01@openssh.com"


def read_certificate(blob: bytes) -> SSHCertificate:
    """Return the certificate in a blob. Raises ValueError, UnsupportedAlgorithm."""
    kind = paramiko.Message(blob).get_text()
    found = load_ssh_public_identity(f"{kind} {base64.b64encode(blob).decode()}".encode())
    if not isinstance(found, SSHCertificate):
        raise ValueError("it is not a certificate")
    return found


def is_user_certificate(blob: bytes) -> bool:
    """Return whether a public key is a certificate for a user."""
    with contextlib.suppress(ValueError, UnsupportedAlgorithm):
        return read_certificate(blob).type is SSHCertificateType.USER
    return False


def key_words(key: SSHCertPublicKeyTypes) -> tuple[str, str]:
    """Return the type and the base64 text of a public key."""
    kind, text = key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode().split()[:2]
    return kind, text


def signature_algorithm(blob: bytes) -> str:
    """Return with which algorithm a certificate that can be read was signed (PROTOCOL.certkeys)."""
    message = paramiko.Message(blob)
    kind = message.get_text()
    for _ in range(2 if "ed25519" in kind else 3):  # the nonce, then the key: curve and point, or e and n
        message.get_binary()
    message.get_int64(), message.get_int()  # serial, type
    message.get_binary(), message.get_binary()  # key id, names
    message.get_int64(), message.get_int64()  # valid from, to
    for _ in range(4):  # critical options, extensions, reserved, the authority's key
        message.get_binary()
    return paramiko.Message(message.get_binary()).get_text()
