"""Environment variables with which huggingface_hub and its libraries fail: checked before they are loaded.

They would fail with a ValueError at their import, or with an error that names neither the variable nor the file. Only
variables that are set are checked, and nothing is sent over a network.
"""

from __future__ import annotations

import os
import ssl
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from moectl.errors import UsageError

_NUMBERS = ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT")
HUB_VARIABLES = (*_NUMBERS, "HF_ENDPOINT")  # with a wrong one it cannot be imported
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
_SCHEMES = ("http", "https", "socks5", "socks5h")


def check_numbers() -> None:
    """Raise UsageError for a variable with which huggingface_hub cannot be imported."""
    for name in _NUMBERS:
        value = os.environ.get(name)
        if value is not None and not (value.strip().isascii() and value.strip().isdigit()):
            raise UsageError(f"{name} is {value[:60]!r}, not a whole number of seconds", hint=f"unset {name}")
    _check_endpoint()


def check_environment() -> None:
    """Raise UsageError that names a variable with which no download can work."""
    check_numbers()
    for name in _PROXIES:
        for spelled in (name.lower(), name):
            if value := os.environ.get(spelled):
                _check_proxy(spelled, value)
    _check_certificates()
    token = (os.environ.get("HF_TOKEN") or "").strip().replace("\r", "").replace("\n", "")  # as the library reads it
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise UsageError("HF_TOKEN holds characters that no token has", hint="copy it again, or unset HF_TOKEN")


def explain_certificates(reason: str) -> str | None:
    """Return what to do where a server's certificate was not accepted, None for another reason."""
    if "CERTIFICATE_VERIFY_FAILED" not in reason:
        return None
    named = next((name for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE") if os.environ.get(name)), None)
    if named and not os.environ.get("SSL_CERT_FILE"):
        return f"{named} is not read here: SSL_CERT_FILE is; set it to the same file"
    return "set SSL_CERT_FILE to a file with the certificates that this network uses"


def find_proxy(address: str) -> str | None:
    """Return the variable that names the proxy for an address, None where there is no proxy."""
    parts = urlsplit(address)
    if urllib.request.proxy_bypass(parts.hostname or ""):
        return None
    names = (f"{parts.scheme}_proxy", "all_proxy")
    return next((one for name in names for one in (name, name.upper()) if os.environ.get(one)), None)


def _check_endpoint() -> None:
    value = os.environ.get("HF_ENDPOINT")
    if value is not None and not _is_address(value, ("http", "https")):
        raise UsageError(
            f"HF_ENDPOINT is {value[:100]!r}, not an address such as https://huggingface.co", hint="unset HF_ENDPOINT"
        )


def _check_proxy(name: str, value: str) -> None:
    address = value if "://" in value else f"http://{value}"
    if not _is_address(address, _SCHEMES):
        raise UsageError(f"{name} is not an address such as http://proxy.local:3128", hint=f"correct or unset {name}")
    if address.startswith("socks") and find_spec("socksio") is None:
        raise UsageError(f"{name} names a SOCKS proxy, which needs a package", hint="pip install socksio")


def _is_address(text: str, schemes: tuple[str, ...]) -> bool:
    try:
        parts = urlsplit(text)
        _ = parts.port  # raises ValueError for a port that is not a number
    except ValueError:
        return False
    return parts.scheme in schemes and bool(parts.hostname) and text.isprintable() and " " not in text


def _check_certificates() -> None:
    file, directory = os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")
    if file:
        try:
            ssl.create_default_context(cafile=file)
        except ssl.SSLError:
            raise UsageError(
                f"SSL_CERT_FILE is {file}, which holds no certificates", hint="unset SSL_CERT_FILE"
            ) from None
        except OSError as error:
            reason = error.strerror or str(error)
            raise UsageError(f"SSL_CERT_FILE is {file}: {reason}", hint="unset SSL_CERT_FILE") from None
    elif directory and not any(Path(part).is_dir() for part in directory.split(os.pathsep)):
        raise UsageError(f"SSL_CERT_DIR is {directory}: no such directory", hint="unset SSL_CERT_DIR")
