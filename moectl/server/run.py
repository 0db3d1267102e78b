"""The controller as a process: it starts a session, serves it on its sockets, and ends with it or by a signal."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import signal
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from socket import socket
from typing import Any

from moectl.engine.protocol import RunOptions
from moectl.errors import MoectlError
from moectl.server.contracts import SILENCE_S, ControllerOptions
from moectl.server.control import Control
from moectl.server.controller import Controller, KeepAlive, Open
from moectl.server.http import make_app, serve as serve_http
from moectl.server.restarts import Restarts
from moectl.server.sockets import beating, listen_tcp, listen_unix
from moectl.session.session import Session
from moectl.session.target import Target, open_session


def run(
    target: Target,
    options: RunOptions,
    settings: ControllerOptions,
    *,
    on_ready: Callable[[Sequence[socket]], None],
    on_log: Callable[[str, str], None],
    say: Callable[[str], None],
    advise: Callable[[Target, MoectlError], str | None],
) -> None:
    """Run a session behind its sockets until it is over.

    `on_ready` gets the sockets once the model is loaded, `on_log` a host's name and a line of its worker's log, `say`
    what happens while a failed session restarts. `advise` returns a hint for a failure that no restart mends.

    Raises what starting raises, the session's failure, and KeyboardInterrupt after SIGINT.
    """
    open_ = functools.partial(open_session, target, options, on_log=on_log)
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(listen_unix(settings.socket_path))]
        if settings.tcp is not None:
            sockets.append(held.enter_context(listen_tcp(*settings.tcp, has_key=bool(settings.api_keys))))
        with beating(settings.socket_path, SILENCE_S):
            session = held.enter_context(open_())

        def make_controller(keep_alive: KeepAlive) -> Controller:
            return Controller(
                session,
                target.name,
                ranks=len(target.addresses),
                keep_alive=keep_alive,
                open_=open_like(session, open_),
                restarts=Restarts(settings.restarts),
                advise=lambda failure: advise(target, failure),
                say=say,
            )

        # Not asyncio.run: its handler for SIGINT would cancel what ends by itself.
        with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            runner.run(_run(make_controller, describe_run(target, options), settings, sockets, on_ready))


async def _run(
    make_controller: Callable[[KeepAlive], Controller],
    description: dict[str, Any],
    settings: ControllerOptions,
    sockets: list[socket],
    on_ready: Callable[[Sequence[socket]], None],
) -> None:
    keep_alive = KeepAlive(settings.keep_alive_s)
    controller = make_controller(keep_alive)
    # A server for others stays when one client asks for another time to keep it alive.
    control = Control(controller, description, keep_alive, stays=settings.tcp is not None)
    app = make_app(
        controller,
        api_keys=settings.api_keys,
        share_cache=settings.share_cache,
        origins=settings.origins,
        hosts=settings.hosts,
        owner_routes=control.routes(),
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, control.on_signal, number)
    over = asyncio.create_task(controller.wait_until_over())
    over.add_done_callback(lambda _: control.leave())
    on_ready(sockets)
    try:
        await serve_http(app, sockets, stopping=control.stopping, grace=control.grace)
    finally:
        over.cancel()
        failure = controller.failure  # before closing makes one
        # Here, because a thread that is stuck in sending to a frozen worker would keep the loop from ending.
        await asyncio.to_thread(controller.end_session)
    if failure is not None:
        raise failure
    if control.signal == signal.SIGINT:
        raise KeyboardInterrupt
    if control.signal == signal.SIGTERM:
        raise SystemExit(128 + signal.SIGTERM)


def open_like(first: Session, open_: Callable[..., AbstractContextManager[Session]]) -> Open:
    """Return how to open another session that takes over from the first one.

    It has the same room for answers. Right after a worker was killed its memory may not be free yet; a smaller room
    would cut off or refuse an answer that fitted before.
    """
    return lambda patience, on_made: open_(on_made=on_made, patience=patience, kv_tokens=first.kv_tokens)


def describe_run(target: Target, options: RunOptions) -> dict[str, Any]:
    """Return what a controller runs, as JSON; `attach` compares it with what is wanted."""
    hosts = list(target.addresses)
    return {"name": target.name, "hosts": hosts, "shards": target.shards, "options": options.shared()}
