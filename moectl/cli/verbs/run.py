"""The verbs that use a model: run, serve, stop, bench; and the controller that the first two start."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from moectl import errors
from moectl.cli.options import Common, Duration, common, count_restarts, restart_options, target_options, unwritable
from moectl.cli.target import choose_target, run_options
from moectl.cli.terminal import _log_printer
from moectl.cli.verb import verb

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from moectl.engine.protocol import Done
    from moectl.server.attach import Attached
    from moectl.server.client import Client
    from moectl.server.contracts import Notice

_END_S = 15.0  # for a controller that nobody needs any more


@verb("Use")
@click.argument("prompt", nargs=-1)
@click.option("-s", "--system", help="System prompt.")
@click.option("-m", "--max-tokens", type=click.IntRange(1), default=256, show_default=True, help="Of the answer.")
@click.option("-t", "--temp", type=click.FloatRange(0, 2), default=0.0, show_default=True, help="0 is greedy.")
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1),
    default=1.0,
    show_default=True,
    help="Sample from the likeliest tokens with so much probability together.",
)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="Make sampling repeatable.")
@click.option("--raw", is_flag=True, help="Send the prompt as it is, without the chat template.")
@click.option("--stats", is_flag=True, help="Print speeds on stderr afterwards (-v implies it).")
@click.option(
    "--keep-alive",
    type=Duration(),
    metavar="TIME",
    default="5m",
    show_default=True,
    help="Keep the model loaded for so long after the last answer; 0: unload at once, -1: for ever.",
)
@click.option("--no-history", is_flag=True, help="Forget what is typed in a chat.")
@restart_options
@target_options
@common
def run(common: Common, prompt: tuple[str, ...], stats: bool, keep_alive: float, **options: Any) -> None:
    """Generate text; without PROMPT at a terminal, chat.

    Standard input, when it is not a terminal, comes before PROMPT. With neither hosts nor a deployment, the bundled
    demo model answers on two local ranks. The model stays loaded for a while; 'moectl stop' unloads it.

    \b
    Examples:
      moectl run "What is expert parallelism?"
      git diff | moectl run "Write a commit message for this diff."
      moectl run --local 2 --model ./my-dbrx "Hello"
    """
    from moectl.server import attach
    from moectl.server.contracts import ControllerOptions

    chats = not (prompt or common.json or options["raw"]) and common.hostfile != "-" and _at_terminal()
    text = "" if chats else _prompt_text(prompt, common)
    target = choose_target(common, options)
    wanted = run_options(options)

    def connect() -> attach.Attached:
        settings = ControllerOptions(attach.place_of(target), keep_alive, restarts=count_restarts(options))
        return attach.attach(target, wanted, settings, say=common.say, on_log=_log_printer(common))

    found = connect()
    fields = {"max_tokens": options["max_tokens"], "temperature": options["temp"], "top_p": options["top_p"]}
    if options["seed"] is not None:
        fields["seed"] = options["seed"]
    try:
        if chats:
            _chat(common, options, connect, attach.describe_place(target), stats or bool(common.verbose))
        else:
            _answer(common, _ask(found.client, text, options, fields), stats or bool(common.verbose))
    finally:
        if keep_alive == 0:
            with contextlib.suppress(errors.MoectlError):  # it may have left already
                found.client.keep_alive(0, asks=False)
            if found.started:
                found.client.wait_until_gone(_END_S)


def _ask(
    client: Client, text: str, options: dict[str, Any], fields: dict[str, Any]
) -> Generator[str | Done | Notice, None, None]:
    if options["raw"]:
        return client.complete({**fields, "prompt": text})
    system = [{"role": "system", "content": options["system"]}] if options["system"] is not None else []
    return client.chat({**fields, "messages": [*system, {"role": "user", "content": text}]})


def _chat(common: Common, options: dict[str, Any], connect: Callable[[], Attached], title: str, stats: bool) -> None:
    from moectl.cli.chat.answerer import ControllerAnswerer
    from moectl.cli.chat.chat import chat
    from moectl.cli.chat.settings import ChatSettings
    from moectl.paths import state_dir

    settings = ChatSettings(
        temperature=options["temp"], **{k: options[k] for k in ("max_tokens", "system", "top_p", "seed")}
    )
    history = None if options["no_history"] else state_dir() / "history"
    answerer = ControllerAnswerer(title, lambda: connect().client, say=common.say)
    chat(answerer, settings, history=history, stats=stats, color=common.color)


def _at_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _prompt_text(words: tuple[str, ...], common: Common) -> str:
    # What `--hostfile -` reads from standard input is not the prompt.
    typed = sys.stdin is None or sys.stdin.isatty() or common.hostfile == "-"
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
    from moectl.cli import terminal
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
                    _write("" if common.json else event)
        except KeyboardInterrupt:
            if not common.json:
                _write("\n")
            raise
    if done is None:
        raise errors.RemoteError("the answer ended before it was done")
    whole = "".join(pieces)
    if common.json:
        click.echo(json.dumps(run_json(whole, done)))
    elif not whole.endswith("\n"):
        _write("\n")
    if stats:
        click.echo(terminal.stats_text(done.stats), err=True)


def _say_between(common: Common, text: str, pieces: list[str]) -> None:
    # On a terminal the answer so far ends in the middle of a line.
    begun = bool(pieces) and not "".join(pieces[-1:]).endswith("\n") and not common.json
    common.say("\n" * (begun and sys.stdout.isatty()) + text)


def _write(text: str) -> None:
    from moectl.text import printable

    try:
        sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise unwritable(error) from None


def run_json(text: str, done: Done) -> dict[str, Any]:
    """Return the document of `run --json`."""
    return {"schema": "moectl.run/1", "text": text, "finish_reason": done.finish_reason, "stats": asdict(done.stats)}
