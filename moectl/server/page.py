"""The page at `/`: one static file, and the policy under which a browser runs it.

The file asks this server alone, by the same paths as every client. It holds nothing of the model and no key, so it is
given to anyone who may reach the server.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

PAGE = "/"
_FILE = Path(__file__).with_name("page.html")
_PARTS = {"script": re.compile(rb"<script>(.*?)</script>", re.S), "style": re.compile(rb"<style>(.*?)</style>", re.S)}


class Page:
    """The file, read once, with its headers."""

    def __init__(self) -> None:
        self._body = _FILE.read_bytes()
        self._headers = {
            "content-security-policy": make_policy(self._body),
            "x-frame-options": "DENY",  # as frame-ancestors, for old browsers
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
            "cache-control": "no-cache",
        }

    async def show(self, http: Request) -> Response:
        """Answer with the page."""
        return Response(self._body, headers=self._headers, media_type="text/html")


def make_policy(page: bytes) -> str:
    """Return the Content-Security-Policy of a page: its own script and style by their hashes, and nothing else.

    It may ask its own server only, no other page may frame it, and text can't become HTML (`trusted-types`).
    """
    hashes = {name: " ".join(map(_hash, part.findall(page))) for name, part in _PARTS.items()}
    rules = {
        "default-src": "'none'",
        "script-src": hashes["script"],
        "style-src": hashes["style"],
        "connect-src": "'self'",
        "img-src": "data:",  # the empty icon, without which a browser asks for /favicon.ico
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def _hash(text: bytes) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'"
