"""`moectl run`: one answer, or a chat at a terminal."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moectl import errors
from moectl.cli.options import (
    Common,
    Duration,
    F,
    at_terminal,
    common,
    count_restarts,
    refuse_both,
    restart_options,
    target_options,
)
from moectl.cli.target import choose_target, run_options, take_model
from moectl.cli.terminal import AnswerWriter, log_printer, stats_text, write_answer
from moectl.cli.verb import flag, verb
from moectl.model.parameters import EFFORTS, PARAMETERS

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from moectl.cli.chat.settings import ChatSettings
    from moectl.cli.chat.transcript import Message
    from moectl.engine.protocol import Done
    from moectl.server.attach import Attached
    from moectl.server.client import Client, Events
    from moectl.server.contracts import Thinking
    from moectl.session.target import Target

_END_S = 15.0  # for a controller to unload the model


_ELSE = "(default: the model's, else"


def _sampling(parameter: str, *names: str, help: str, rare: bool = False) -> Callable[[F], F]:
    """Return the flag of a sampling parameter: it takes what requests may have."""
    allowed = PARAMETERS[parameter]
    kind: click.ParamType[Any] = click.FloatRange(allowed.low, allowed.high)
    if allowed.kind is int:
        kind = click.IntRange(int(allowed.low), int(allowed.high))
    return flag(*names, type=kind, help=help, rare=rare)


@verb("Use", old={"-m": "--max-tokens"})
@click.argument("prompt", nargs=-1)
@click.option("-s", "--system", help="System prompt.")
@_sampling("max_tokens", "--max-tokens", help="Most tokens of an answer (default: what the context leaves).")
@_sampling("temperature", "-t", "--temp", help=f"Temperature; 0 takes the likeliest token {_ELSE} 0).")
@_sampling(
    "top_p", "--top-p", help=f"Sample from the likeliest tokens that together are this probable {_ELSE} 1).", rare=True
)
@_sampling("top_k", "--top-k", help=f"Sample from this many of the likeliest tokens; 0 is all {_ELSE} 0).", rare=True)
@_sampling(
    "min_p", "--min-p", help=f"Sample from tokens this probable, relative to the likeliest {_ELSE} 0).", rare=True
)
@_sampling(
    "repetition_penalty",
    "--repetition-penalty",
    help=f"Make tokens of the text so far less likely {_ELSE} 1).",
    rare=True,
)
@_sampling("seed", "--seed", help="Make sampling repeatable.")
@flag(
    "--think/--no-think",
    default=None,
    help="Let the model think first, or not (default: the model's).",
)
@flag(
    "--reasoning-effort",
    rare=True,
    type=click.Choice(EFFORTS[1:]),
    help="How much to think; a model without such levels ignores it.",
)
@flag("--hide-thinking", is_flag=True, rare=True, help="Show the answer only.")
@flag(
    "--schema",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    rare=True,
    help="Hold the answer to the JSON schema in this file; say in the prompt that it should be JSON.",
)
@flag("--raw", is_flag=True, rare=True, help="Send the prompt as it is, without the chat template.")
@click.option("--stats", is_flag=True, help="Print speeds on standard error at the end.")
@click.option(
    "--keep-alive",
    type=Duration(for_ever=True),
    metavar="TIME",
    default="5m",
    show_default=True,
    help="Time until it unloads; -1: never.",
)
@flag("--no-history", is_flag=True, rare=True, help="Do not remember what is typed in a chat.")
@restart_options
@target_options
@common
def run(
    common: Common,
    prompt: tuple[str, ...],
    stats: bool,
    keep_alive: float,
    no_history: bool,
    hide_thinking: bool,
    schema: Path | None,
    **options: Any,
) -> None:
    """Generate text; without PROMPT at a terminal, chat.

    PROMPT may begin with a model: a shard set's name, a directory or a repository. When standard input is not a
    terminal, its text comes before PROMPT. Without a model, hosts and a deployment, the demo answers: a toy. The model
    stays loaded: 'moectl stop' unloads it.

    \b
    Examples:
      moectl run "What is expert parallelism?"
      git diff | moectl run "Write a commit message for this diff."
      moectl run --local 2 --model ./my-dbrx "Hello"
    """
    from moectl.cli.chat.settings import ChatSettings, sampling_text
    from moectl.server import attach
    from moectl.server.contracts import ControllerOptions

    thinking = {"--think/--no-think": options["think"] is not None, "--reasoning-effort": options["reasoning_effort"]}
    refuse_both({"--raw": options["raw"]}, thinking)
    options["temperature"] = options.pop("temp")
    prompt = take_model(common, prompt, options)
    given = {field.name: options[field.name] for field in fields(ChatSettings) if options.get(field.name) is not None}
    chats = not (prompt or common.json or options["raw"]) and common.hostfile != "-" and at_terminal()
    if chats and schema is not None:
        raise errors.UsageError("--schema needs a prompt: a chat has no schema")
    form = {} if schema is None else _read_form(schema)
    text = "" if chats else _prompt_text(prompt, common)
    ChatSettings(**given)  # a wrong number is refused before a model is loaded
    target = choose_target(common, options)
    wanted = run_options(options)

    def connect() -> attach.Attached:
        settings = ControllerOptions(attach.place_of(target), keep_alive, restarts=count_restarts(options))
        return attach.attach(target, wanted, settings, say=common.say, on_log=log_printer(common))

    found = connect()
    looks = {"stats": stats or bool(common.verbose), "hides_thinking": hide_thinking}
    try:
        # A server may have loaded another model by now: the question names its own.
        settings = ChatSettings(**{**found.client.describe().get("samplings", {}).get(target.name, {}), **given})
        if common.verbose:
            common.say(f"Sampling: {sampling_text(settings)}.")
        if chats:
            _chat(common, settings, connect, target, history=not no_history, **looks)
        else:
            asked = _ask(found.client, text, settings, {**form, "model": target.name}, raw=options["raw"])
            _answer(common, asked, settings.max_tokens, **looks)
    finally:
        if keep_alive == 0:
            with contextlib.suppress(errors.MoectlError):  # it may have ended already
                found.client.keep_alive(0, asks=False)
            if found.started:
                found.client.wait_until_gone(_END_S)


def _read_form(path: Path) -> dict[str, Any]:
    """Return the fields of a request whose answer is held to the schema in a file."""
    try:
        schema = json.loads(path.read_bytes())
    except OSError as error:
        raise errors.UsageError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise errors.UsageError(f"{path} is not JSON: {error}") from None
    if not isinstance(schema, dict):
        raise errors.UsageError(f"{path} is not a JSON schema: it should be an object")
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}}


def _ask(client: Client, text: str, settings: ChatSettings, more: dict[str, Any], *, raw: bool) -> Events:
    fields = {**settings.api_fields(), **more}
    if raw:
        return client.complete({**fields, "prompt": text})
    system = [{"role": "system", "content": settings.system}] if settings.system is not None else []
    return client.chat({**fields, "messages": [*system, {"role": "user", "content": text}]})


def _chat(
    common: Common,
    settings: ChatSettings,
    connect: Callable[[], Attached],
    target: Target,
    *,
    history: bool,
    stats: bool,
    hides_thinking: bool,
) -> None:
    from moectl.cli.chat.chat import chat
    from moectl.paths import state_dir
    from moectl.server.attach import describe_place
    from moectl.server.contracts import Notice

    def answer(messages: Sequence[Message], settings: ChatSettings) -> Generator[str | Thinking | Done, None, None]:
        said = [message.api_fields() for message in messages]
        fields = {**settings.api_fields(), "model": target.name, "messages": said}
        # A controller may end in a long pause: each question looks for it again. To close the connection is to cancel.
        with contextlib.closing(connect().client.chat(fields)) as events:
            for event in events:
                if isinstance(event, Notice):
                    common.say(f"\n[{event.text}]")
                else:
                    yield event

    path = state_dir() / "history" if history else None
    chat(
        describe_place(target),
        answer,
        settings,
        history=path,
        stats=stats,
        hides_thinking=hides_thinking,
        color=common.color,
    )


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


def _answer(common: Common, events: Events, max_tokens: int | None, *, stats: bool, hides_thinking: bool) -> None:
    """Print an answer as it comes; Ctrl-C cancels it."""
    writer = AnswerWriter(hides_thinking=hides_thinking, color=common.color)
    pieces: list[str] = []
    thoughts: list[str] = []
    done = _stream(common, events, writer, pieces, thoughts)
    whole, thinking = "".join(pieces), "".join(thoughts)
    if common.json:
        shown = None if hides_thinking else thinking or None
        document = {"schema": "moectl.run/1", "text": whole, "thinking": shown, "finish_reason": done.finish_reason}
        click.echo(json.dumps({**document, "stats": asdict(done.stats)}))
    elif not whole.endswith("\n"):
        write_answer("\n")
    if done.finish_reason == "length":
        common.say(cut_text(done.stats.completion_tokens, max_tokens, thinks=bool(thinking and not whole)))
    if stats:
        click.echo(stats_text(done.stats), err=True)


def cut_text(tokens: int, limit: int | None, *, thinks: bool) -> str:
    """Return what to say of an answer that ended at its limit, or at the end of the context."""
    where = ", before the answer" if thinks else ""
    if limit is None or tokens < limit:
        return f"[cut after {tokens} tokens{where}: the context is full. Ask for less, or with a shorter prompt]"
    return f"[cut after {tokens} tokens{where}: --max-tokens {4 * limit} allows more; without it, the context decides]"


def _stream(common: Common, events: Events, writer: AnswerWriter, pieces: list[str], thoughts: list[str]) -> Done:
    """Write an answer, and what comes between its pieces; keep the pieces of the answer and of the thinking."""
    from moectl.engine.protocol import Done
    from moectl.server.contracts import Notice, Thinking

    with contextlib.closing(events):
        try:
            for event in events:
                if isinstance(event, Done):
                    return event
                if isinstance(event, Notice):
                    _say_between(common, event.text, pieces or ([] if writer.hides_thinking else thoughts))
                    continue
                text, kept = (event.text, thoughts) if isinstance(event, Thinking) else (event, pieces)
                kept.append(text)
                writer.write("" if common.json else event)
        except KeyboardInterrupt:
            if not common.json:
                write_answer("\n")
            raise
    raise errors.RemoteError("the answer ended before it was done")


def _say_between(common: Common, text: str, pieces: list[str]) -> None:
    # On a terminal the answer so far ends in the middle of a line.
    begun = bool(pieces) and not pieces[-1].endswith("\n") and not common.json
    common.say("\n" * (begun and sys.stdout.isatty()) + text)
