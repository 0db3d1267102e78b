"""The HTTP server: its routes and its end, over `contracts.Models`.

It knows HTTP and nothing of sessions or models; `openai` and `replies` know the JSON, `answering` is one reply. It logs
no prompt and no answer. uvicorn is imported here only.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import math
import time
import uuid
import weakref
from collections.abc import Collection, Iterator, Sequence
from socket import socket
from typing import Protocol

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moectl.engine.isolation import trace
from moectl.engine.protocol import Done, Ready
from moectl.engine.request import TOO_LONG
from moectl.errors import MoectlError, QueueFull, StateError
from moectl.server import messages, openai, replies, responses
from moectl.server.answering import REPORT, Answering, AnyReply
from moectl.server.contracts import SILENCE_S, AnswerEvents, Cluster, Models
from moectl.server.doors import KEY_NUMBER, Doors, ErrorResponse, no_such_path, refuse, write_json
from moectl.server.fields import read_typed
from moectl.server.metrics import CONTENT_TYPE, Metrics
from moectl.server.page import PAGE, Page

CHAT = "/v1/chat/completions"
_PROMPTS = {CHAT: "messages", messages.PATH: "messages", responses.PATH: "input"}  # the prompt's field, else "prompt"
MAX_BODY_BYTES = 16 * 1024 * 1024
BODY_S = 60.0  # for a body to arrive
_IDLE_CONNECTION_S = 75
_LAST_WORDS_S = 2  # for replies to end by themselves once they have to
_CLIENT_CLOSED = 499  # nginx' number; only counted, since the client has gone
_log = logging.getLogger("moectl.server")
logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # it would quote requests; `App` logs bugs


def make_app(
    models: Models,
    *,
    api_keys: Sequence[str] = (),
    share_cache: bool = False,
    origins: Collection[str] = (),
    hosts: Collection[str] = (),
    silence_s: float = SILENCE_S,
    owner_routes: Sequence[Route] = (),
) -> App:
    """Return the ASGI application that serves models.

    With keys, everything but /health and the page needs one as a bearer token, except over the Unix socket, which only
    its user can open; each key has a prompt cache of its own, or all share one. Pages of `origins` may ask; where there
    are none, those of this machine. Without a key, `hosts` are names of this server beside localhost and addresses.
    `owner_routes` are reached over the Unix socket alone.
    """
    metrics = Metrics(models.health)
    service = _Service(models, metrics, silence_s, share_cache)
    routes = [
        Route(PAGE, Page().show),
        Route(CHAT, service.chat, methods=["POST"]),
        Route("/v1/completions", service.complete, methods=["POST"]),
        Route(messages.PATH, service.message, methods=["POST"]),
        Route(f"{messages.PATH}/count_tokens", service.count_tokens, methods=["POST"]),
        Route(responses.PATH, service.respond, methods=["POST"]),
        Route("/v1/models", service.list_models),
        Route("/v1/models/{name:path}", service.show_model),
        Route("/health", service.show_health),
        Route("/metrics", service.show_metrics),
        *owner_routes,
    ]
    handlers = {HTTPException: _answer_http_error, MoectlError: _answer_error, Exception: _answer_bug}
    app = Starlette(routes=routes, exception_handlers=handlers)  # type: ignore[arg-type]
    app.router.redirect_slashes = False
    doors = Doors(app, api_keys=api_keys, origins=origins, hosts=hosts)
    return App(doors, service, metrics, {route.path for route in routes})


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: the controller has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Grace:
    """How long answers in progress may go on once the server is stopping; it may be changed at any time."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.changed = asyncio.Event()

    def change(self, seconds: float) -> None:
        """Set another time, counted from the beginning of the stop."""
        self.seconds = seconds
        self.changed.set()

    async def wait(self, task: asyncio.Task[None]) -> None:
        """Return when a task is done or the time is over."""
        begin = time.monotonic()
        while not task.done() and (left_s := begin + self.seconds - time.monotonic()) > 0:
            self.changed.clear()
            change = asyncio.create_task(self.changed.wait())
            await asyncio.wait({task, change}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            change.cancel()


async def serve(app: App, sockets: Sequence[socket], *, stopping: asyncio.Event, grace: Grace) -> None:
    """Serve an application on listening sockets until `stopping` is set; closes the sockets.

    Then it accepts no new connections, and answers in progress have their grace before they end with an error.
    """
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=_IDLE_CONNECTION_S,
        timeout_graceful_shutdown=_LAST_WORDS_S,
    )
    server = _Server(config)
    serving = asyncio.create_task(server.serve(sockets=list(sockets)))
    wish = asyncio.create_task(stopping.wait())
    try:
        await asyncio.wait({serving, wish}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        wish.cancel()
        # Longer than the grace, which may get shorter: the answers are ended below, and connections with them.
        config.timeout_graceful_shutdown = math.ceil(grace.seconds) + _LAST_WORDS_S
        server.should_exit = True
        await grace.wait(serving)
        app.end_answers(StateError("moectl is stopping", hint="moectl serve"))
        await serving


# Errors that are HTTP's own, in OpenAI's shape.


async def _answer_http_error(http: HttpRequest, error: HTTPException) -> Response:
    if error.status_code == 404:
        return no_such_path(http.url.path)
    headers = dict(error.headers) if error.headers else None
    if error.status_code == 405:
        hint = f"send {(headers or {}).get('Allow', 'another')}"
        return refuse(405, f"{http.method} is not allowed for {http.url.path}", hint=hint, headers=headers)
    return refuse(error.status_code, str(error.detail), headers=headers)


async def _answer_bug(http: HttpRequest, error: Exception) -> Response:
    return refuse(500, f"unexpected {type(error).__name__} (a bug in moectl)", hint=REPORT)


async def _answer_error(http: HttpRequest, error: MoectlError) -> Response:
    status, body = replies.describe_error(error)
    if body["error"]["code"] == TOO_LONG:  # found on the workers, who do not know the protocol
        body["error"]["param"] = _PROMPTS.get(http.url.path, "prompt")
    headers = {"retry-after": str(max(1, math.ceil(error.retry_after_s)))} if isinstance(error, QueueFull) else None
    return ErrorResponse(status, body, headers)


class App:
    """The outermost application: it counts every request's status and logs bugs; `Doors` checks who may ask."""

    def __init__(self, app: Doors, service: _Service, metrics: Metrics, paths: set[str]) -> None:
        self._app = app
        self._service = service
        self._metrics = metrics
        self._paths = paths

    def end_answers(self, error: MoectlError) -> None:
        for answering in self._service.answering:
            answering.end(error)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        status, complete = _CLIENT_CLOSED, False

        async def note(message: Message) -> None:
            nonlocal status, complete
            status = message.get("status", status)
            complete = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        try:
            await self._app(scope, receive, note)
        except Exception as error:
            _log.error("%s fails by a bug:\n%s", self._name(scope), trace(error))
            if not complete:
                raise  # too late for a status: the connection breaks
        finally:
            self._metrics.count_http(self._name(scope), status)

    def _name(self, scope: Scope) -> str:
        """Return a path for a log: what is no endpoint may be any text."""
        return scope["path"] if scope["path"] in self._paths else "other"


class MakeReply(Protocol):
    """A protocol's way to write replies."""

    def __call__(
        self, asked: openai.ApiRequest, *, reply_id: str, created: int, name: str, model: Ready
    ) -> AnyReply: ...


class _Service:
    """The endpoints."""

    def __init__(self, models: Models, metrics: Metrics, silence_s: float, share_cache: bool) -> None:
        self._models = models
        self._metrics = metrics
        self._silence_s = silence_s
        self._share_cache = share_cache
        self.answering: weakref.WeakSet[Answering] = weakref.WeakSet()

    async def chat(self, http: HttpRequest) -> ASGIApp:
        return await self._answer(http, openai.read_chat, replies.Reply)

    async def complete(self, http: HttpRequest) -> ASGIApp:
        return await self._answer(http, openai.read_completion, replies.Reply)

    async def respond(self, http: HttpRequest) -> ASGIApp:
        return await self._answer(http, responses.read_responses, responses.ResponseReply)

    async def message(self, http: HttpRequest) -> ASGIApp:
        return await self._answer(http, messages.read_messages, messages.MessageReply)

    async def count_tokens(self, http: HttpRequest) -> ASGIApp:
        found = await self._read(http, messages.read_messages)
        if isinstance(found, Response):
            return found
        cluster, asked = found
        [request] = asked.requests
        async for event in await cluster.submit(dataclasses.replace(request, max_tokens=0)):
            if isinstance(event, Done):
                return write_json({"input_tokens": event.stats.prompt_tokens})
        raise MoectlError("the count ended before it was done (a bug in moectl)", hint=REPORT)

    async def list_models(self, http: HttpRequest) -> Response:
        return write_json({"object": "list", "data": [replies.describe_model(one) for one in self._models.listed()]})

    async def show_model(self, http: HttpRequest) -> Response:
        name = self._models.find(http.path_params["name"]).name
        return write_json(next(replies.describe_model(one) for one in self._models.listed() if one.name == name))

    async def show_health(self, http: HttpRequest) -> Response:
        health = self._models.health()
        body = {
            "status": "ok" if health.healthy else "unhealthy",
            "model": self._models.loaded_name,
            **dataclasses.asdict(health),
        }
        return write_json(body, 200 if health.healthy else 503)

    async def show_metrics(self, http: HttpRequest) -> Response:
        return Response(self._metrics.write(), headers={"content-type": CONTENT_TYPE})

    async def _read(self, http: HttpRequest, read: openai.Reader) -> tuple[Cluster, openai.ApiRequest] | Response:
        refusal = _check_headers(http)
        if refusal is not None:
            return refusal
        body = await _read_body(http)
        if isinstance(body, Response):
            return body
        fields = openai.parse_body(body)
        cluster = self._models.find(read_typed(fields, "model", str))
        # A request that is wrong is refused here, before a model is loaded for it.
        asked = read({**fields, "model": cluster.name}, cluster.name, cluster.model)
        if not self._share_cache and (space := http.scope.get(KEY_NUMBER)) is not None:
            requests = tuple(dataclasses.replace(request, space=space) for request in asked.requests)
            asked = dataclasses.replace(asked, requests=requests)
        return cluster, asked

    async def _answer(self, http: HttpRequest, read: openai.Reader, make_reply: MakeReply) -> ASGIApp:
        found = await self._read(http, read)
        if isinstance(found, Response):
            return found
        cluster, asked = found
        name, model = cluster.name, cluster.model
        reply = make_reply(asked, reply_id=uuid.uuid4().hex, created=int(time.time()), name=name, model=model)
        answering = Answering(asked, reply, await self._submit(cluster, asked), self._metrics, self._silence_s)
        self.answering.add(answering)
        return answering

    async def _submit(self, cluster: Cluster, asked: openai.ApiRequest) -> list[AnswerEvents]:
        answers: list[AnswerEvents] = []
        try:
            for request in asked.requests:
                answers.append(await cluster.submit(request))
        except BaseException as error:
            for answer in answers:
                answer.cancel()
                self._metrics.count_end("cancelled")
            self._metrics.count_end("rejected" if isinstance(error, QueueFull) else "failed")
            raise
        return answers


def _check_headers(http: HttpRequest) -> Response | None:
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    # curl -d sends a form's type by default. From a page it is refused: browsers send forms without asking first.
    is_page = "origin" in http.headers or "sec-fetch-site" in http.headers
    is_lax = kind in ("", "application/x-www-form-urlencoded") and not is_page
    if kind != "application/json" and not is_lax:
        shown = kind[:100] or "not given"
        hint = "send the header Content-Type: application/json"
        return refuse(415, f"the content type should be application/json, it is {shown}", hint=hint)
    if (coding := http.headers.get("content-encoding", "identity").strip().lower()) != "identity":
        return refuse(415, f"the content coding {coding[:100]} is not supported", hint="send the body uncompressed")
    return None


async def _read_body(http: HttpRequest) -> bytes | Response:
    body = bytearray()
    length = http.headers.get("content-length", "")
    is_too_large = length.isdigit() and (len(length) > 18 or int(length) > MAX_BODY_BYTES)
    if is_too_large and "expect" in http.headers:  # the client waits for permission before it sends
        return _too_large(http)
    try:
        async with asyncio.timeout(BODY_S):
            async for chunk in http.stream():
                body += chunk
                is_too_large = is_too_large or len(body) > MAX_BODY_BYTES
                if is_too_large:  # read on: a client that is still sending would lose the reply
                    body.clear()
    except TimeoutError:
        return refuse(
            408, f"the body did not arrive within {BODY_S:g} s", hint="send it again", headers={"connection": "close"}
        )
    except ClientDisconnect:
        return refuse(_CLIENT_CLOSED, "the client closed the connection")
    return _too_large(http) if is_too_large else bytes(body)


def _too_large(http: HttpRequest) -> Response:
    return refuse(
        413,
        f"the body should have at most {MAX_BODY_BYTES} bytes: no context holds more",
        code=TOO_LONG,
        param=_PROMPTS.get(http.url.path, "prompt"),
        hint="shorten the prompt",
        headers={"connection": "close"},
    )
