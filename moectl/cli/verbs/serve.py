"""`moectl serve` and `moectl stop`, and the hidden verbs of the processes that moectl starts itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from moectl import errors
from moectl.cli.options import (
    FILE,
    Common,
    Duration,
    common,
    count_restarts,
    refuse_both,
    restart_options,
    target_options,
)
from moectl.cli.target import advise, choose_target, run_options
from moectl.cli.terminal import log_printer
from moectl.cli.verb import flag, verb

if TYPE_CHECKING:
    from pathlib import Path


@verb(hidden=True)
def worker() -> None:
    """Run one rank, driven over stdin and stdout; started by moectl itself."""
    from moectl.engine import worker as process

    process.main()


@verb("Use")
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen at; beyond this machine needs a key.",
)
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="Port to listen at; 0: any free one."
)
@flag("--api-key", rare=True, metavar="KEY", help="Key that clients have to send as their bearer token.")
@click.option("--api-key-file", type=FILE, metavar="FILE", help="Read the keys from this file, one per line.")
@flag("--share-cache", rare=True, is_flag=True, help="Let all keys share one prompt cache; else each has its own.")
@click.option(
    "--allow-origin",
    "--allowed-origins",
    "allow_origin",
    multiple=True,
    metavar="ORIGIN",
    help="Let in web pages of this origin only (CORS; repeatable); '*', all, needs a key. Without it: pages of this "
    "machine.",
)
@flag(
    "--allow-host",
    rare=True,
    multiple=True,
    metavar="NAME",
    help="Another name of this server that clients may use without a key, such as host.docker.internal (repeatable).",
)
@click.option("-d", "--detach", is_flag=True, help="Run in the background.")
@restart_options
@target_options
@common
def serve(common: Common, host: str, port: int, detach: bool, **options: Any) -> None:
    """Offer the model over HTTP, by OpenAI's and Anthropic's APIs.

    Clients find it under http://HOST:PORT/v1. A browser finds a page with a chat under http://HOST:PORT/. Ctrl-C stops
    serving and unloads the model.

    \b
    Examples:
      moectl serve
      moectl serve --local 2 --port 9000 --detach
      moectl serve --host 0.0.0.0 --api-key-file key.txt
    """
    from moectl.server import attach
    from moectl.server.contracts import FOR_EVER, ControllerOptions
    from moectl.server.run import run as run_controller
    from moectl.server.visitors import read_host_names, read_origins

    keys = _api_keys(options["api_key"], options["api_key_file"])
    origins = read_origins(options["allow_origin"], has_key=bool(keys))
    names = read_host_names(options["allow_host"])
    target = choose_target(common, options)
    settings = ControllerOptions(
        attach.place_of(target),
        FOR_EVER,
        (host, port),
        keys,
        share_cache=options["share_cache"],
        restarts=count_restarts(options),
        origins=origins,
        hosts=names,
    )
    attach.refuse_second(target)

    def on_ready(bound: int | None) -> None:
        url = f"http://{f'[{host}]' if ':' in host else host}:{bound}/v1"
        ending = "moectl stop ends it" if detach else "Ctrl-C stops serving and unloads; -d would leave it running"
        common.print(f"Serving {url}  ({ending})", {"schema": "moectl.serve/1", "url": url, "model": target.name}, url)

    wanted = run_options(options)
    if detach:
        on_ready(attach.start(target, wanted, settings, on_log=log_printer(common)))
        return
    common.say(f"Loading {target.name}")
    run_controller(
        target,
        wanted,
        settings,
        on_ready=lambda sockets: on_ready(sockets[1].getsockname()[1]),
        on_log=log_printer(common),
        say=common.say,
        advise=advise,
    )


def _api_keys(key: str | None, file: Path | None) -> tuple[str, ...]:
    refuse_both({"--api-key": key is not None}, {"--api-key-file": file is not None})
    keys = [] if key is None else [key]
    if file is not None:
        try:
            lines = [line.strip() for line in file.read_text(encoding="utf-8").split("\n")]
        except (OSError, UnicodeDecodeError) as error:
            raise errors.UsageError(f"{file} cannot be read: {error}") from None
        keys = list(dict.fromkeys(filter(None, lines))) or [""]
    if not all(key.isascii() and key.isprintable() and key.strip() for key in keys):
        raise errors.UsageError("the API key should be printable ASCII, and not empty")
    return tuple(keys)


@verb("Observe", old={"-t": "--timeout"})
@click.option(
    "--timeout", type=Duration(), default="10s", show_default=True, help="Time for answers in progress to end."
)
@click.option("--now", is_flag=True, help="Do not wait for answers in progress.")
@common
def stop(common: Common, timeout: float, now: bool) -> None:
    """Unload the model from every host.

    \b
    Examples:
      moectl stop
      moectl stop --now
    """
    from moectl.cli.terminal import on_ctrl_t
    from moectl.server import client
    from moectl.text import size_text

    stopped: list[dict[str, Any] | None] = []
    failures: list[errors.MoectlError] = []
    for path in client.find_running():
        try:
            with on_ctrl_t(lambda: "waiting for answers in progress to end", common.say):
                stopped.append(client.Client(path).stop(0.0 if now else timeout))
        except errors.MoectlError as error:
            failures.append(error)
    held = [one["memory_bytes"] for one in stopped if one is not None]
    workers, released = sum(map(len, held)), sum(map(sum, held))
    text = f"Stopped {workers} worker{'s' * (workers != 1)}, {size_text(released)} of memory released."
    if not held:
        text = "Stopped a controller that was not answering."
    document = {"schema": "moectl.stop/1", "workers": workers, "memory_bytes": released}
    if stopped or not failures:
        common.print(text if stopped else "Nothing is running.", document)
    if failures:
        raise failures[0]


@verb(hidden=True)
def controller() -> None:
    """Run a controller in the background; started by moectl itself."""
    from moectl.server import attach

    attach.obey(advise)
