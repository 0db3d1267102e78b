"""`moectl serve` and `moectl stop`, and the hidden verbs of the processes that moectl starts itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from moectl import errors
from moectl.cli import suggest
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
from moectl.cli.target import advise, choose_target, find_others, run_options
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
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="Port; 0: any free one.")
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
@click.option(
    "--alias",
    multiple=True,
    metavar="NAME[=MODEL]",
    help="Another name of a model (repeatable).",
)
@flag("--any-model", is_flag=True, rare=True, help="Take any name for the model, where there is only one.")
@flag(
    "--keep-alive",
    rare=True,
    type=Duration(for_ever=True),
    metavar="TIME",
    default="-1",
    help="Unload the model when it was idle for so long; the next request loads it (default: never).",
)
@flag(
    "--pin",
    rare=True,
    metavar="MODEL",
    shell_complete=suggest.shard_sets,
    help="Load this model, and keep it: requests for another one are refused.",
)
@restart_options
@target_options
@common
def serve(common: Common, host: str, port: int, detach: bool, **options: Any) -> None:
    """Offer models over HTTP, by OpenAI's and Anthropic's APIs.

    Clients use http://HOST:PORT/v1, a browser http://HOST:PORT/. A request loads its model, where that is deployed on
    the same hosts. Ctrl-C unloads.

    \b
    Examples:
      moectl serve
      moectl serve --local 2 --port 9000 --detach
      moectl serve --host 0.0.0.0 --api-key-file key.txt
    """
    from moectl.server import attach
    from moectl.server.background import bound_log
    from moectl.server.contracts import FOR_EVER, ControllerOptions
    from moectl.server.run import make_menu, run as run_controller

    bound_log()
    keys, origins, names = read_visitors(options)
    keep_alive = options["keep_alive"]
    refuse_both({"--pin": options["pin"]}, {"--keep-alive": keep_alive != FOR_EVER})
    target = choose_target(common, options)
    others = find_others(common, target)
    settings = ControllerOptions(
        attach.place_of(target),
        keep_alive,
        (host, port),
        keys,
        share_cache=options["share_cache"],
        restarts=count_restarts(options),
        origins=origins,
        hosts=names,
        aliases=options["alias"],
        any_model=options["any_model"],
        pin=options["pin"],
    )
    attach.refuse_second(target)
    menu = make_menu([target, *others], settings)
    first = menu.find_flag(options["pin"], "--pin") if options["pin"] else menu.first

    def on_ready(bound: int | None) -> None:
        url = base_url(host, bound)
        ending = "moectl stop ends it" if detach else "Ctrl-C stops serving and unloads; -d would leave it running"
        toy = ", a toy" if first.demo else ""
        document = {
            "schema": "moectl.serve/1",
            "url": url,
            "model": first.name,
            "models": [o.name for o in menu.offers],
        }
        common.print(f"Serving {first.name}{toy}: {url}  ({ending})", document, url)
        if len(menu.offers) > 1 and not options["pin"]:
            rest = ", ".join(offer.name for offer in menu.offers if offer is not first)
            common.say(f"A request for another model loads it: {rest}")

    wanted = run_options(options)
    if detach:
        on_ready(attach.start(target, wanted, settings, others=others, on_log=log_printer(common)))
        return
    common.say(f"Loading {first.name}")
    run_controller(
        [target, *others],
        wanted,
        settings,
        on_ready=lambda sockets: on_ready(sockets[1].getsockname()[1]),
        on_log=log_printer(common),
        say=common.say,
        advise=advise,
    )


def base_url(host: str, port: int | None) -> str:
    """Return where clients find a server that listens at this address."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def read_visitors(options: dict[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Return (API keys, origins, host names) that `serve` lets in, as its flags say. Raises UsageError."""
    from moectl.server.visitors import read_host_names, read_origins

    keys = _api_keys(options["api_key"], options["api_key_file"])
    return keys, read_origins(options["allow_origin"], has_key=bool(keys)), read_host_names(options["allow_host"])


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
