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
from moectl.server.menu import PIN_FLAG, Menu, Offered, make_offers
from moectl.server.models import ServedModels
from moectl.server.restarts import Restarts
from moectl.server.sockets import beating, listen_tcp, listen_unix
from moectl.session.session import Session
from moectl.session.target import Target, open_session, target_key

OnMade = Callable[[Session], None]


def run(
    targets: Sequence[Target],
    options: RunOptions,
    settings: ControllerOptions,
    *,
    on_ready: Callable[[Sequence[socket]], None],
    on_log: Callable[[str, str], None],
    say: Callable[[str], None],
    advise: Callable[[Target, MoectlError], str | None],
) -> None:
    """Run one of the targets behind its sockets until it is over; a request for another one loads that instead.

    The first is loaded, or the one that is pinned. `on_ready` gets the sockets then, `on_log` a host's name and a line
    of its worker's log, `say` what happens while a failed session restarts. `advise` returns a hint for a failure that
    no restart mends.

    Raises what starting raises, the session's failure, and KeyboardInterrupt after SIGINT.
    """
    menu = make_menu(targets, settings)
    pin = menu.find_flag(settings.pin, PIN_FLAG) if settings.pin is not None else None
    first = pin or menu.first

    def open_(target: Target, on_made: OnMade, kv_tokens: int | None) -> AbstractContextManager[Session]:
        return open_session(target, options, on_log=on_log, on_made=on_made, kv_tokens=kv_tokens)

    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(listen_unix(settings.socket_path))]
        if settings.tcp is not None:
            sockets.append(held.enter_context(listen_tcp(*settings.tcp, has_key=bool(settings.api_keys))))
        opened = held.enter_context(contextlib.ExitStack())
        with beating(settings.socket_path, SILENCE_S):
            session = opened.enter_context(open_session(first.target, options, on_log=on_log))

        def make_models(keep_alive: KeepAlive) -> ServedModels:
            def make_controller(offer: Offered, session: Session) -> Controller:
                return Controller(
                    session,
                    offer.name,
                    ranks=len(offer.target.addresses),
                    keep_alive=keep_alive,
                    open_=open_like(session, functools.partial(open_session, offer.target, options, on_log=on_log)),
                    restarts=Restarts(settings.restarts),
                    advise=lambda failure: advise(offer.target, failure),
                    say=say,
                )

            # A server for others stays when its model was idle, and unloads it.
            stays = settings.tcp is not None
            models = ServedModels(menu, open_, make_controller, keep_alive=keep_alive, stays=stays, pin=pin, say=say)
            models.take(first, session, opened)
            return models

        # Not asyncio.run: its handler for SIGINT would cancel what ends by itself.
        with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            runner.run(_run(make_models, options, settings, sockets, on_ready))


def make_menu(targets: Sequence[Target], settings: ControllerOptions) -> Menu:
    """Return the models that a controller offers, by their names. Raises UsageError for a wrong alias."""
    return Menu(make_offers(targets), aliases=settings.aliases, any_model=settings.any_model)


async def _run(
    make_models: Callable[[KeepAlive], ServedModels],
    options: RunOptions,
    settings: ControllerOptions,
    sockets: list[socket],
    on_ready: Callable[[Sequence[socket]], None],
) -> None:
    keep_alive = KeepAlive(settings.keep_alive_s)
    models = make_models(keep_alive)
    # A server for others stays when one client asks for another time to keep it alive.
    control = Control(models, lambda: describe_run(models, options), keep_alive, stays=settings.tcp is not None)
    app = make_app(
        models,
        api_keys=settings.api_keys,
        share_cache=settings.share_cache,
        origins=settings.origins,
        hosts=settings.hosts,
        owner_routes=control.routes(),
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, control.on_signal, number)
    over = asyncio.create_task(models.wait_until_over())
    over.add_done_callback(lambda _: control.leave())
    on_ready(sockets)
    try:
        await serve_http(app, sockets, stopping=control.stopping, grace=control.grace)
    finally:
        over.cancel()
        failure = models.failure  # before closing makes one
        await models.end()
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


def describe_run(models: ServedModels, options: RunOptions) -> dict[str, Any]:
    """Return what a controller runs, as JSON; `attach` compares it with what is wanted.

    No host runs anything while no model is loaded.
    """
    target = models.shown.offer.target
    hosts = list(target.addresses) if models.loaded_name else []
    return {
        "name": target.name,
        "hosts": hosts,
        "shards": target.shards,
        "options": options.shared(),
        "sampling": models.shown.model.sampling,
        "offers": [target_key(offer.target) for offer in models.menu.offers],
        "samplings": {one.set_name: one.model.sampling for one in models.listed()},
    }
