"""The verbs that use a model: run, serve, stop, bench; and the controller that the first two start."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moectl import errors
from moectl.cli_target import advise, choose_target, session_options, target_options
from moectl.flags import FILE, Common, Duration, common
from moectl.verb import verb

if TYPE_CHECKING:
    from moectl.engine.protocol import Done, Token
    from moectl.server.attach import Attached
    from moectl.server.client import Client
    from moectl.server.contracts import Notice
    from moectl.session.bench import Predicted
    from moectl.session.target import Target

_END_S = 15.0  # for a controller that nobody needs any more


def restart_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the flags that say how often a failed cluster may start again; `count_restarts` reads them."""
    command = click.option(
        "--max-restarts",
        type=click.IntRange(0),
        default=5,
        show_default=True,
        metavar="N",
        help="When a worker fails, start all again and go on with the answers, so often within ten minutes.",
    )(command)
    return click.option("--no-restart", is_flag=True, help="When a worker fails, end with its error.")(command)


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
    from moectl.server.contracts import Settings

    chats = not (prompt or common.json or options["raw"]) and common.hostfile != "-" and _at_terminal()
    text = "" if chats else _prompt_text(prompt, common)
    target = choose_target(common, options)
    wanted = session_options(common, options)

    def connect() -> attach.Attached:
        settings = Settings(attach.place_of(target), keep_alive, restarts=count_restarts(options))
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


def count_restarts(options: dict[str, Any]) -> int:
    """Return how often a failed cluster may be started again."""
    most: int = options["max_restarts"]
    return 0 if options["no_restart"] else most


def _ask(
    client: Client, text: str, options: dict[str, Any], fields: dict[str, Any]
) -> Generator[Token | Done | Notice, None, None]:
    if options["raw"]:
        return client.complete({**fields, "prompt": text})
    system = [{"role": "system", "content": options["system"]}] if options["system"] is not None else []
    return client.chat({**fields, "messages": [*system, {"role": "user", "content": text}]})


def _chat(common: Common, options: dict[str, Any], connect: Callable[[], Attached], title: str, stats: bool) -> None:
    from moectl.answerer import ControllerAnswerer
    from moectl.chat import chat
    from moectl.paths import state_dir
    from moectl.settings import ChatSettings

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


def _log_printer(common: Common) -> Callable[[str, str], None]:
    if not common.verbose:
        return lambda host, line: None
    from moectl.text import printable

    return lambda host, line: click.echo(f"[{host}] {printable(line)}", err=True)


def _answer(common: Common, events: Generator[Token | Done | Notice, None, None], stats: bool) -> None:
    """Print an answer as it comes; Ctrl-C cancels it."""
    from moectl import report
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
                    pieces.append(event.text)
                    _write("" if common.json else event.text)
        except KeyboardInterrupt:
            if not common.json:
                _write("\n")
            raise
    if done is None:
        raise errors.RemoteError("the answer ended before it was done")
    whole = "".join(pieces)
    if common.json:
        click.echo(json.dumps(report.run_json(whole, done)))
    elif not whole.endswith("\n"):
        _write("\n")
    if stats:
        click.echo(report.stats_text(done.stats), err=True)


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
        raise errors.MoectlError(f"cannot write the answer: {error.strerror}") from None


@verb("Use")
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Interface; another than this machine needs a key."
)
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0: any free one.")
@click.option("--api-key", metavar="KEY", help="What clients have to send as their bearer token.")
@click.option("--api-key-file", type=FILE, metavar="FILE", help="The same, from the first line of a file.")
@click.option(
    "--allow-origin",
    "--allowed-origins",
    "allow_origin",
    multiple=True,
    metavar="ORIGIN",
    help="Let pages of this origin in, as http://localhost:3000 (CORS; repeatable); '*', all of them, needs a key.",
)
@click.option(
    "--allow-host",
    multiple=True,
    metavar="NAME",
    help="Another name of this server that clients may use without a key, as host.docker.internal (repeatable).",
)
@click.option("-d", "--detach", is_flag=True, help="Leave it running in the background.")
@restart_options
@target_options
@common
def serve(common: Common, host: str, port: int, detach: bool, **options: Any) -> None:
    """Offer an OpenAI-compatible API.

    Clients find it under http://HOST:PORT/v1. Ctrl-C stops serving and unloads the model.

    \b
    Examples:
      moectl serve
      moectl serve --local 2 --port 9000 --detach
      moectl serve --host 0.0.0.0 --api-key-file key.txt
      moectl serve --allow-origin http://localhost:3000 --allow-host host.docker.internal
    """
    from moectl.server import attach
    from moectl.server.contracts import FOR_EVER, Settings
    from moectl.server.run import run as run_controller
    from moectl.server.visitors import read_host_names, read_origins

    key = _api_key(options["api_key"], options["api_key_file"])
    origins = read_origins(options["allow_origin"], has_key=key is not None)
    names = read_host_names(options["allow_host"])
    target = choose_target(common, options)
    settings = Settings(
        attach.place_of(target), FOR_EVER, (host, port), key, count_restarts(options), origins=origins, hosts=names
    )
    attach.refuse_second(target)

    def on_ready(bound: int | None) -> None:
        url = f"http://{f'[{host}]' if ':' in host else host}:{bound}/v1"
        ending = "moectl stop ends it" if detach else "Ctrl-C stops serving and unloads; -d would leave it running"
        common.print(f"Serving {url}  ({ending})", {"schema": "moectl.serve/1", "url": url, "model": target.name}, url)

    wanted = session_options(common, options)
    if detach:
        on_ready(attach.start(target, settings, wanted, on_log=_log_printer(common)))
        return
    common.say(f"Loading {target.name}")
    run_controller(
        target,
        settings,
        on_ready=lambda sockets: on_ready(sockets[1].getsockname()[1]),
        say=common.say,
        advise=advise,
        on_log=_log_printer(common),
        **wanted,
    )


def _api_key(key: str | None, file: Path | None) -> str | None:
    if key is not None and file is not None:
        raise errors.UsageError("--api-key and --api-key-file exclude each other")
    if file is not None:
        try:
            key = file.read_text(encoding="utf-8").split("\n", 1)[0].strip()
        except (OSError, UnicodeDecodeError) as error:
            raise errors.UsageError(f"{file} cannot be read: {error}") from None
    if key is not None and not (key.isascii() and key.isprintable() and key.strip()):
        raise errors.UsageError("the API key should be printable ASCII, and not empty")
    return key


@verb("Observe")
@click.option("-t", "--timeout", type=Duration(), default="10s", show_default=True, help="For answers in progress.")
@click.option("--now", is_flag=True, help="Do not wait for answers in progress.")
@common
def stop(common: Common, timeout: float, now: bool) -> None:
    """Unload the model from every host.

    \b
    Examples:
      moectl stop
      moectl stop --now
    """
    from moectl.live import on_ctrl_t
    from moectl.server import client
    from moectl.text import size_text

    stopped: list[dict[str, Any] | None] = []
    failures: list[errors.MoectlError] = []
    for path in client.find_running():
        try:
            with on_ctrl_t(lambda: "waiting for answers in progress to end", common.say):
                stopped.append(client.Client(path).stop(0.0 if now else max(0.0, timeout)))
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


@verb("Use")
@click.option("-p", "--prompt-tokens", type=click.IntRange(1), default=512, show_default=True, help="To read.")
@click.option("-g", "--generation-tokens", type=click.IntRange(2), default=128, show_default=True, help="To generate.")
@click.option("-n", "--num-trials", type=click.IntRange(1), default=5, show_default=True, help="To average.")
@click.option("--plan", type=FILE, metavar="FILE", help="Put the prediction of `plan --json` beside it.")
@click.option("--plot", type=FILE, metavar="FILE.svg", help="Draw a picture (needs moectl[plot]).")
@click.option("--compare", type=FILE, multiple=True, metavar="FILE", help="For --plot: a result of `bench --json`.")
@click.option("--routing-stats", type=FILE, metavar="FILE", help="Write how often each expert was chosen.")
@target_options
@common
def bench(common: Common, plan: Path | None, plot: Path | None, compare: tuple[Path, ...], **options: Any) -> None:
    """Measure prompt and generation speed, and where the time goes.

    Prompts are random tokens. After the trials every rank takes some decode steps apart: computing, all-reduce (with
    the wait for the slowest rank), and the rest.

    \b
    Examples:
      moectl bench
      moectl bench --local 2 -p 128 -g 32 --json > two.json
      moectl bench --local 4 --plot ranks.svg --compare two.json
    """
    from moectl import files as disk, plot as plotting, report
    from moectl.model import routing
    from moectl.session import bench as benchmark, target as launch

    if options["routing_stats"]:
        disk.check_destination(options["routing_stats"])
    if plot:
        plotting.check_plot(plot)
    elif compare:
        raise errors.UsageError("--compare is for --plot", hint="add --plot FILE.svg")
    earlier = plotting.read_documents(compare)
    target = choose_target(common, options)
    _refuse_beside_controller(target)
    predicted = _predicted(target, plan, options)
    trials = options["num_trials"]

    def on_trial(number: int, trial: benchmark.Trial) -> None:
        speeds = f"prompt {trial.prefill_tok_s:.1f} tok/s, generate {trial.decode_tok_s:.1f} tok/s"
        common.say(f"trial {number} of {trials}: {speeds}")

    with launch.open_session(target, on_log=_log_printer(common), **session_options(common, options)) as session:
        counts = {key: options[key] for key in ("prompt_tokens", "generation_tokens")}
        result = benchmark.bench(session, target.name, trials=trials, predicted=predicted, on_trial=on_trial, **counts)
    document = report.bench_json(result)
    common.print(report.bench_text(result), document)
    if options["routing_stats"]:
        routing.write_routing(options["routing_stats"], result.routing)
    if plot:
        plotting.write_plot(plot, [*earlier, document])


def _predicted(target: Target, plan: Path | None, options: dict[str, Any]) -> Predicted | None:
    """Return what a plan, or the last `plan --probe` of these hosts, expects of these trials, if there is one."""
    from moectl.cluster import probed_plan
    from moectl.model.manifest import read_manifest
    from moectl.session import target as launch
    from moectl.session.bench import Predicted, read_prediction

    manifest = None
    hosts = ["localhost"] * launch.count_ranks(target)
    if isinstance(target, launch.Local):
        manifest = target.manifest
    else:
        hosts = [rank.host.name for rank in target.ranks]
        with contextlib.suppress(errors.MoectlError):  # the operator's copy may be gone
            manifest = read_manifest(Path(target.shards))
    prompt, generated = options["prompt_tokens"], options["generation_tokens"]
    if plan is not None:
        bits = manifest.quantization.bits if manifest and manifest.quantization else None
        return read_prediction(plan, manifest.placement if manifest else None, bits, prompt_tokens=prompt)
    if manifest is None:
        return None
    context = prompt + generated // 2
    found = probed_plan.recall(hosts, manifest.placement, manifest.quantization, context=context, prompt_tokens=prompt)
    if found is None:
        return None
    return Predicted(found.decode_tok_s, found.prefill_tok_s, found.ttft_s, found.communication_share)


def _refuse_beside_controller(target: Target) -> None:
    from moectl.server import attach

    if attach.is_loaded(target):
        raise errors.StateError(
            f"{target.name} is loaded by a controller: measuring beside it would load it twice", hint="moectl stop"
        )


@verb(hidden=True)
def controller() -> None:
    """Run a controller in the background; started by moectl itself."""
    from moectl.server import attach

    attach.obey(advise)
