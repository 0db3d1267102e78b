"""The checks of every request over TCP, before an endpoint: its page (CORS), this server's name, the key.

The form of HTTP's own refusals is here, too. It knows no endpoint.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Collection, Sequence
from typing import Any

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from moectl.server import messages, replies
from moectl.server.fields import Fields
from moectl.server.page import PAGE
from moectl.server.visitors import (
    HOST_FLAG,
    KEY_FLAG,
    NO_ORIGIN,
    ORIGIN_FLAG,
    THIS_MACHINE,
    host_name,
    is_same_origin,
    names_this_machine,
)

KEY_NUMBER = "moectl.key"  # in a request's scope: which of the keys it has, from 1; not there without one
CONTROL = "/moectl"  # the owner's paths, over the Unix socket only
_METHODS = ("GET", "HEAD", "POST")
_AUTHENTICATE = {"www-authenticate": "Bearer"}
_WHICH_KEY = "it is the one that 'moectl serve' was started with: --api-key or --api-key-file"


def refuse(
    status: int,
    message: str,
    *,
    code: str | None = None,
    hint: str | None = None,
    param: str | None = None,
    headers: dict[str, str] | None = None,
) -> Response:
    """Return a refusal."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return ErrorResponse(status, replies.error_body(message, kind, param=param, code=code, hint=hint), headers)


class ErrorResponse(Response):
    """A reply of an error, given in OpenAI's form and sent in that of the path's protocol."""

    def __init__(self, status: int, body: Fields, headers: dict[str, str] | None = None) -> None:
        super().__init__(status_code=status, headers=headers)
        self._given = body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_message = scope["path"].startswith(messages.PATH)
        body = messages.describe_error(self.status_code, self._given) if is_message else self._given
        headers = {name: value for name, value in self.headers.items() if name != "content-length"}
        await write_json(body, self.status_code, headers)(scope, receive, send)


def write_json(value: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a reply of JSON."""
    return Response(replies.encode_json(value), status, headers, "application/json")


class Doors:
    """The application behind the checks; CORS is outermost, so that pages can read every reply, also errors."""

    def __init__(
        self, app: ASGIApp, *, api_keys: Sequence[str] = (), origins: Collection[str] = (), hosts: Collection[str] = ()
    ) -> None:
        self._app = app
        self._keys = [key.encode() for key in api_keys]
        self._hosts = hosts
        self._cors = _Pages(
            self._check,
            allow_origins=origins,
            allow_origin_regex=None if origins else THIS_MACHINE,
            allow_methods=_METHODS,
            allow_headers=("*",),  # all that are asked for: SDKs send a dozen of their own
            allow_private_network=True,
            expose_headers=("retry-after",),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["path"] = re.sub("/{2,}", "/", scope["path"]).rstrip("/") or "/"
        await (self._check if _is_unix(scope) else self._cors)(scope, receive, send)

    async def _check(self, scope: Scope, receive: Receive, send: Send) -> None:
        await (self._refuse(scope) or self._app)(scope, receive, send)

    def _refuse(self, scope: Scope) -> Response | None:
        path = scope["path"]
        if _is_unix(scope) or path == "/health" or (path == PAGE and self._keys):
            return None
        if path.startswith(CONTROL):
            return no_such_path(path)
        headers = Headers(scope=scope)
        if not self._keys:
            name = host_name(headers.get("host", ""))
            if not names_this_machine(name, self._hosts):
                return _strange_host(name)
            return None if self._lets_in(headers) else _strange_page(headers["origin"])
        given = _given_key(headers)
        if given is None:
            return refuse(
                401,
                "this server wants an API key: Authorization: Bearer KEY",
                code="invalid_api_key",
                hint=_WHICH_KEY,
                headers=_AUTHENTICATE,
            )
        same = [hmac.compare_digest(given.encode("latin-1"), key) for key in self._keys]  # all, whichever it is
        if not any(same):
            return refuse(
                401, "this is not the server's API key", code="invalid_api_key", hint=_WHICH_KEY, headers=_AUTHENTICATE
            )
        scope[KEY_NUMBER] = 1 + same.index(True)
        return None

    def _lets_in(self, headers: Headers) -> bool:
        """Whether a request is of no page, of this server's own, or of one that was allowed.

        A browser has asked before, and was refused; this holds for what it sends without asking. With a key this is not
        looked at: no page has the key unless its user gave it.
        """
        origin = headers.get("origin")
        return origin is None or self._cors.is_allowed_origin(origin) or is_same_origin(origin, headers["host"])


class _Pages(CORSMiddleware):
    """starlette's CORS, with refusals in JSON that name the flag to allow a page."""

    def preflight_response(self, request_headers: Headers) -> Response:
        origin, method = request_headers["origin"], request_headers["access-control-request-method"]
        if not self.is_allowed_origin(origin):
            return _strange_page(origin)
        allowed = super().preflight_response(request_headers)
        if allowed.status_code == 200:
            return allowed
        headers = {name: value for name, value in allowed.headers.items() if name.startswith(("access-", "vary"))}
        hint = f"it has {', '.join(_METHODS)}"
        return refuse(405, f"{method[:20]} is not allowed here", hint=hint, headers=headers)


def _is_unix(scope: Scope) -> bool:
    server = scope.get("server")
    return server is None or server[1] is None  # no port


def _given_key(headers: Headers) -> str | None:
    """Return a request's key, sent as OpenAI's clients do or as Anthropic's."""
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and bearer.strip():
        return bearer.strip()
    return headers.get("x-api-key", "").strip() or None


def no_such_path(path: str) -> Response:
    """Return the refusal of a path that is none."""
    return refuse(
        404,
        f"there is no {path[:200]} here",
        code="unknown_url",
        hint="the base URL ends in /v1, for Anthropic's clients before it; "
        "below it are chat/completions, completions, responses, messages and models",
    )


def _strange_page(origin: str) -> Response:
    flags = f"{ORIGIN_FLAG} {origin[:200]}" + f" {KEY_FLAG} FILE" * (origin == NO_ORIGIN)
    return refuse(
        403,
        f"pages of {origin[:200]} should be allowed before they use this server",
        code="forbidden_origin",
        hint=f"start it with: moectl serve {flags}",
        headers={"vary": "Origin"},
    )


def _strange_host(name: str) -> Response:
    shown = repr(name[:200]) if name else "a request without a name"
    return refuse(
        403,
        f"without an API key, only localhost or an IP address is taken as this server's name, not {shown}",
        code="forbidden_host",
        hint=f"start it with: moectl serve {HOST_FLAG} {name[:200] or 'NAME'}, or with a key: {KEY_FLAG} FILE",
    )
