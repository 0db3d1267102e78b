"""`moectl run`: one answer, or a chat at a terminal."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from moectl import errors
from moectl.cli.options import Common, Duration, F, at_terminal, common, count_restarts, restart_options, target_options
from moectl.cli.target import choose_target, run_options
from moectl.cli.terminal import log_printer, stats_text, write_answer
from moectl.cli.verb import verb
from moectl.model.parameters import PARAMETERS

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from moectl.cli.chat.settings import ChatSettings
    from moectl.cli.chat.transcript import Message
    from moectl.engine.protocol import Done
    from moectl.server.attach import Attached
    from moectl.server.client import Client
    from moectl.server.contracts import Notice

_END_S = 15.0  # for a controller to unload the model


def _sampling(parameter: str, *names: str, help: str, default: float | None = None) -> Callable[[F], F]:
    """Return the flag of a sampling parameter: it takes what requests may have."""
    allowed = PARAMETERS[parameter]
    kind: click.ParamType[Any] = click.FloatRange(allowed.low, allowed.high)
    if allowed.kind is int:
        kind = click.IntRange(int(allowed.low), int(allowed.high))
    return click.option(*names, type=kind, default=default, show_default=default is not None, help=help)


@verb("Use")
@click.argument("prompt", nargs=-1)
@click.option("-s", "--system", help="System prompt.")
@_sampling("max_tokens", "-m", "--max-tokens", default=256, help="Maximum number of tokens of an answer.")
@_sampling("temperature", "-t", "--temp", default=0.0, help="Temperature of sampling; 0 takes the likeliest token.")
@_sampling("top_p", "--top-p", default=1.0, help="Sample from the likeliest tokens that together are this probable.")
@_sampling("seed", "--seed", help="Make sampling repeatable.")
@click.option("--raw", is_flag=True, help="Send the prompt as it is, without the chat template.")
@click.option("--stats", is_flag=True, help="Print speeds on standard error afterwards, as -v does.")
@click.option(
    "--keep-alive",
    type=Duration(for_ever=True),
    metavar="TIME",
    default="5m",
    show_default=True,
    help="Time to keep the model loaded after the last answer; 0: unload at once, -1: for ever.",
)
@click.option("--no-history", is_flag=True, help="Do not remember what is typed in a chat.")
@restart_options
@target_options
@common
def run(
    common: Common, prompt: tuple[str, ...], stats: bool, keep_alive: float, no_history: bool, **options: Any
) -> None:
    """Generate text; without PROMPT at a terminal, chat.

    When standard input is not a terminal, its text comes before PROMPT. Without hosts and without a deployment, the
    bundled demo model answers on two local ranks. The model stays loaded for some time; 'moectl stop' unloads it.

    \b
    Examples:
      moectl run "What is expert parallelism?"
      git diff | moectl run "Write a commit message for this diff."
      moectl run --local 2 --model ./my-dbrx "Hello"
    """
    from moectl.cli.chat.settings import ChatSettings
    from moectl.server import attach
    from moectl.server.contracts import ControllerOptions

    sampling = ChatSettings(
        temperature=options["temp"], **{name: options[name] for name in ("max_tokens", "system", "top_p", "seed")}
    )
    chats = not (prompt or common.json or options["raw"]) and common.hostfile != "-" and at_terminal()
    text = "" if chats else _prompt_text(prompt, common)
    target = choose_target(common, options)
    wanted = run_options(options)

    def connect() -> attach.Attached:
        settings = ControllerOptions(attach.place_of(target), keep_alive, restarts=count_restarts(options))
        return attach.attach(target, wanted, settings, say=common.say, on_log=log_printer(common))

    found = connect()
    stats = stats or bool(common.verbose)
    try:
        if chats:
            _chat(common, sampling, connect, attach.describe_place(target), stats=stats, history=not no_history)
        else:
            _answer(common, _ask(found.client, text, sampling, raw=options["raw"]), stats)
    finally:
        if keep_alive == 0:
            with contextlib.suppress(errors.MoectlError):  # it may have ended already
                found.client.keep_alive(0, asks=False)
            if found.started:
                found.client.wait_until_gone(_END_S)


def _ask(client: Client, text: str, settings: ChatSettings, *, raw: bool) -> Generator[str | Done | Notice, None, None]:
    if raw:
        return client.complete({**settings.api_fields(), "prompt": text})
    system = [{"role": "system", "content": settings.system}] if settings.system is not None else []
    return client.chat({**settings.api_fields(), "messages": [*system, {"role": "user", "content": text}]})


def _chat(
    common: Common, settings: ChatSettings, connect: Callable[[], Attached], title: str, *, stats: bool, history: bool
) -> None:
    from moectl.cli.chat.chat import chat
    from moectl.paths import state_dir
    from moectl.server.contracts import Notice

    def answer(messages: Sequence[Message], settings: ChatSettings) -> Generator[str | Done, None, None]:
        said = [{"role": message.role, "content": message.content} for message in messages]
        # A controller may end in a long pause: each question looks for it again. To close the connection is to cancel.
        with contextlib.closing(connect().client.chat({**settings.api_fields(), "messages": said})) as events:
            for event in events:
                if isinstance(event, Notice):
                    common.say(f"\n[{event.text}]")
                else:
                    yield event

    path = state_dir() / "history" if history else None
    chat(title, answer, settings, history=path, stats=stats, color=common.color)


def _prompt_text(words: tuple[str, ...], common: Common) -> str:
    # With `--hostfile -`, standard input is the hosts file and not the prompt.
    typed = sys.stdin is None or at_terminal() or common.hostfile == "-"
    try:
        piped = "" if typed else sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise errors.UsageError(f"standard input is not UTF-8 text: {error.reason} at byte {error.start}") from None
    text = " ".join(part for part in (piped, *words) if part)
    if not text.strip():
        raise errors.UsageError("no prompt is given", hint='moectl run "What is expert parallelism?"')
    return text


def _answer(common: Common, events: Generator[str | Done | Notice, None, None], stats: bool) -> None:
    """Print an answer as it comes; Ctrl-C cancels it."""
    from moectl.engine.protocol import Done
    from moectl.server.contracts import Notice

    pieces: list[str] = []
    done: Done | None = None
    with contextlib.closing(events):
        try:
            for event in events:
                if isinstance(event, Done):
                    done = event
                elif isinstance(event, Notice):
                    _say_between(common, event.text, pieces)
                else:
                    pieces.append(event)
                    write_answer("" if common.json else event)
        except KeyboardInterrupt:
            if not common.json:
                write_answer("\n")
            raise
    if done is None:
        raise errors.RemoteError("the answer ended before it was done")
    whole = "".join(pieces)
    if common.json:
        document = {"schema": "moectl.run/1", "text": whole, "finish_reason": done.finish_reason}
        click.echo(json.dumps({**document, "stats": asdict(done.stats)}))
    elif not whole.endswith("\n"):
        write_answer("\n")
    if stats:
        click.echo(stats_text(done.stats), err=True)


def _say_between(common: Common, text: str, pieces: list[str]) -> None:
    # On a terminal the answer so far ends in the middle of a line.
    begun = bool(pieces) and not pieces[-1].endswith("\n") and not common.json
    common.say("\n" * (begun and sys.stdout.isatty()) + text)
