"""Which pages in a browser may use the server: by their origin, and by the name that they have for this machine.

A page of any site can send requests to an address of this machine. Two things keep it out: the browser first asks
whether its origin is allowed (CORS), and a page that made its own name point here (DNS rebinding) sends that name.
Unless a flag names others, pages of this machine are allowed, as ollama allows them.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
from collections.abc import Collection, Sequence
from urllib.parse import urlsplit

from moectl.errors import UsageError

ORIGIN_FLAG, HOST_FLAG, KEY_FLAG = "--allow-origin", "--allow-host", "--api-key-file"
ANY_ORIGIN = "*"
NO_ORIGIN = "null"  # of files, and of pages that hide their origin
THIS_MACHINE = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"  # pages that may ask where no flag names others
_USUAL_PORTS = {"http": 80, "https": 443}  # browsers leave them out
_NAME = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?")


def read_origins(values: Sequence[str], *, has_key: bool) -> tuple[str, ...]:
    """Return the origins that were allowed, as browsers write them; each value may be several, with commas.

    Raises UsageError for an origin that no browser sends, and for all origins at once without a key.
    """
    origins = tuple(dict.fromkeys(_read_origin(one) for one in _split(values, ORIGIN_FLAG)))
    for origin in origins:
        if origin in (ANY_ORIGIN, NO_ORIGIN) and not has_key:
            who = "every page" if origin == ANY_ORIGIN else "every file and every page without an origin"
            raise UsageError(
                f"{ORIGIN_FLAG} {origin!r} needs an API key: {who} in a browser could use the model",
                hint=f"add {KEY_FLAG} FILE, or name the origins",
            )
    return origins


def read_host_names(values: Sequence[str]) -> tuple[str, ...]:
    """Return the names that were allowed; each value may be several, with commas. Raises UsageError."""
    names = []
    for value in _split(values, HOST_FLAG):
        name = value.lower().rstrip(".")
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"{HOST_FLAG} should be a name without scheme, port or pattern, it is {value!r}",
                hint=f"as {HOST_FLAG} host.docker.internal; with {KEY_FLAG} any name is accepted",
            )
        names.append(name)
    return tuple(dict.fromkeys(names))


def _split(values: Sequence[str], flag: str) -> list[str]:
    parts = [part.strip() for value in values for part in value.split(",")]
    if not all(parts):
        raise UsageError(f"{flag} should not be empty")
    return parts


def _read_origin(value: str) -> str:
    if value in (ANY_ORIGIN, NO_ORIGIN):
        return value
    with contextlib.suppress(ValueError):
        parts = urlsplit(value.lower())
        is_bare = parts.path in ("", "/") and not (parts.query or parts.fragment or parts.username)
        if parts.scheme and parts.hostname and is_bare and not re.search(r"[\s*]", value):
            host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
            usual = parts.port is None or parts.port == _USUAL_PORTS.get(parts.scheme)
            return f"{parts.scheme}://{host}" + ("" if usual else f":{parts.port}")
    raise UsageError(
        f"{ORIGIN_FLAG} should be scheme://host[:port], it is {value!r}",
        hint=f"as {ORIGIN_FLAG} http://localhost:3000; * alone means all origins",
    )


def is_same_origin(origin: str, host: str) -> bool:
    """Whether a page has come from the server that it asks; a proxy in front may have added TLS."""
    scheme, _, name = origin.lower().partition("://")
    return scheme in _USUAL_PORTS and name == host.strip().lower()


def host_name(header: str) -> str:
    """Return the name in a Host header, without its port."""
    name = header.strip().lower()
    if name.count(":") > 1 and not name.startswith("["):
        return name  # an IPv6 address without its brackets
    return name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0].rstrip(".")


def names_this_machine(name: str, allowed: Collection[str]) -> bool:
    """Whether only this machine's owner can have made this name point here."""
    if name == "localhost" or name.endswith(".localhost") or name in allowed:
        return True
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(name)
        return True
    return False
