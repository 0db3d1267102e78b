"""What the owner of a running controller may do to it, over its Unix socket only: see it, keep it, stop it."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from moectl.errors import RemoteError
from moectl.server.controller import GRACE_S, READING_S, KeepAlive
from moectl.server.doors import CONTROL, write_json
from moectl.server.http import Grace
from moectl.server.models import ServedModels


class Control:
    """The end of a controller: `stopping` is set when it has to end, by its owner, a signal, or itself.

    `describe` returns what it runs, as JSON. With `stays` it does not end for being idle.
    """

    def __init__(
        self, models: ServedModels, describe: Callable[[], dict[str, Any]], keep_alive: KeepAlive, *, stays: bool
    ) -> None:
        self.stopping = asyncio.Event()
        self.grace = Grace(GRACE_S)
        self.signal: int | None = None
        self._models = models
        self._describe_run = describe
        self._keep_alive = keep_alive
        self._stays = stays

    def routes(self) -> list[Route]:
        """Return the owner's paths."""
        return [
            Route(CONTROL, self._show),
            Route(CONTROL + "/keep-alive", self._renew, methods=["POST"]),
            Route(CONTROL + "/stop", self._stop, methods=["POST"]),
        ]

    async def _show(self, http: Request) -> Response:
        return write_json(self._describe())

    async def _renew(self, http: Request) -> Response:
        self.keep_alive(float(http.query_params["seconds"]), asks=http.query_params["asks"] == "1")
        return write_json({})

    async def _stop(self, http: Request) -> Response:
        described = self._describe()
        self.stop(float(http.query_params["grace_s"]))
        return write_json(described)

    def _describe(self) -> dict[str, Any]:
        health, throughput, now_s = self._models.health(), self._models.throughput, time.monotonic()
        return {
            "schema": "moectl.controller/1",
            **self._describe_run(),
            "pid": os.getpid(),
            "running": health.running,
            "queued": health.queued,
            "memory_bytes": list(health.memory_bytes),
            "ranks_answered": health.ranks_answered,
            "healthy": health.healthy,
            "restarts": health.restarts,
            "up_s": now_s - throughput.began_s,
            "tokens": throughput.tokens,
            "tok_s": throughput.rate(now_s),
        }

    def keep_alive(self, seconds: float, *, asks: bool) -> None:
        """Stay for this long when idle, below 0 for ever; `asks`: wait first for a question that is about to come.

        Raises RemoteError when the controller is leaving already.
        """
        if self._models.is_closed:
            raise RemoteError("the controller is leaving", hint="run the command again: it starts a new one")
        if not self._stays:
            self._keep_alive.renew(seconds, asks=asks)

    def stop(self, grace_s: float) -> None:
        """End soon; answers in progress have this many seconds."""
        self._models.close()
        self.grace.change(grace_s)
        self.stopping.set()

    def leave(self) -> None:
        """End because it was idle for long enough, or has failed; clients may read their answers to the end."""
        if not self.stopping.is_set():
            self.stop(GRACE_S if self._models.failure is not None else READING_S)

    def on_signal(self, number: int) -> None:
        # A second signal does not wait for answers any more.
        self.stop(0.0 if self.stopping.is_set() else GRACE_S)
        self.signal = number
