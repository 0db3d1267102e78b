"""The command line: words in, words and an exit code out. Every verb is a few lines over the module that does it.

Imports of the working modules are inside the commands, so that `--help` and Tab load click only.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from moectl import __version__, errors
from moectl.errors import MoectlError

if TYPE_CHECKING:
    from moectl.console import Bar, Progress
    from moectl.hosts import HostList
    from moectl.leash import Done, Token
    from moectl.prepare import Made, Wanted
    from moectl.session import Session

F = TypeVar("F", bound=Callable[..., Any])
DEFAULT_MODEL = "databricks/dbrx-instruct"
INTERRUPTED, TERMINATED = 130, 143

EXIT_STATUS = """\b
Exit status:
  0 done   1 bug   2 usage   3 some hosts failed   4 hosts file or plan impossible
  5 host unreachable, key or login   6 remote command or version   7 damaged bytes
  8 not sharded, deployed or running   130 interrupted   143 terminated"""


class Terminated(BaseException):
    """SIGTERM arrived; unwinds like Ctrl-C does."""


class Common:
    """The values of the flags that every command has."""

    def __init__(self, hosts: str | None, hostfile: str | None, json: bool, quiet: bool, verbose: int) -> None:
        self.hosts = hosts
        self.hostfile = hostfile
        self.json = json
        self.quiet = quiet
        self.verbose = verbose

    def host_list(self, *, required: bool = False) -> HostList | None:
        """Return the hosts in force, or None."""
        from moectl.hosts import find_hosts

        found = find_hosts(self.hosts, self.hostfile)
        if found is None and required:
            raise errors.HostsError("no hosts are given", hint="write hosts.txt, or use --hosts a,b or --hostfile FILE")
        return found

    def print(self, text: str, document: dict[str, Any], quiet_text: str = "") -> None:
        """Print a command's result on stdout in the form that was asked for."""
        shown = json.dumps(document) if self.json else quiet_text if self.quiet else text
        if shown:
            click.echo(shown)

    def say(self, text: str) -> None:
        """Say something to a person, on stderr."""
        if not self.quiet:
            click.echo(text, err=True)


def common(command: F) -> F:
    """Give a command the flags that all commands have, and pass them as one `common` argument."""

    @click.pass_context
    def wrapped(ctx: click.Context, /, *args: Any, **kw: Any) -> Any:
        from moectl.console import colour_wanted

        ctx.color = colour_wanted(kw.pop("color"), sys.stdout)
        flags = Common(kw.pop("hosts"), kw.pop("hostfile"), kw.pop("json"), kw.pop("quiet"), kw.pop("verbose"))
        ctx.obj = flags
        return ctx.invoke(command, *args, common=flags, **kw)

    wrapped.__doc__ = command.__doc__
    wrapped.__name__ = command.__name__
    options = (
        click.option("-H", "--hosts", metavar="LIST", help="Hosts in rank order: a,b,c."),
        click.option(
            "--hostfile", metavar="FILE", envvar="MOECTL_HOSTFILE", help="hosts.txt or MLX's JSON; - is stdin."
        ),
        click.option("--json", is_flag=True, help="Print one JSON document."),
        click.option("-q", "--quiet", is_flag=True, help="Print results only."),
        click.option("-v", "--verbose", count=True, help="Show the workers' logs (twice: debug)."),
        click.option("--color", type=click.Choice(["auto", "always", "never"]), default="auto", show_default=True),
    )
    for option in reversed(options):
        wrapped = option(wrapped)
    return wrapped  # type: ignore[return-value]


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "MOECTL", "max_content_width": 100},
    epilog=f"Start: moectl shard {DEFAULT_MODEL} --nodes 4 && moectl deploy hosts.txt && moectl run\n\n{EXIT_STATUS}",
)
@click.version_option(__version__, "-V", "--version", message="moectl %(version)s")
def cli() -> None:
    """Run a mixture-of-experts model across a cluster of Macs."""


# Prepare


@cli.command(epilog=EXIT_STATUS)
@click.argument("model", default=DEFAULT_MODEL)
@click.option("-o", "--output", type=click.Path(path_type=Path, file_okay=False), help="Directory of the shard set.")
@click.option("-n", "--nodes", type=click.IntRange(1), help="Number of ranks (default: the hosts in force).")
@click.option("--split", type=click.Choice(["hidden", "experts"]), default="hidden", show_default=True)
@click.option("--shares", metavar="A,B,…", help="Uneven parts: experts, or units of the hidden dimension, per rank.")
@click.option("--q-bits", type=click.Choice(["2", "3", "4", "6", "8", "16"]), help="Bits per weight; 16 copies.")
@click.option("--q-group-size", type=int, help="Weights per scale (default: MLX's).")
@click.option("--q-mode", type=click.Choice(["affine", "mxfp4", "mxfp8", "nvfp4"]), default="affine", show_default=True)
@click.option("--revision", help="Branch, tag or commit on the Hub.")
@click.option("-j", "--jobs", type=click.IntRange(1), help="Streams at once (default: all cores but one, at most 4).")
@click.option("--keep-source", is_flag=True, help="Keep downloaded files in the Hugging Face cache.")
@click.option("--dry-run", is_flag=True, help="Show what would be made.")
@click.option("--force", is_flag=True, help="Make a shard set anew over another one.")
@click.option(
    "--verify", type=click.Path(path_type=Path), metavar="DIR", help="Hash every file of a shard set instead."
)
@common
def shard(common: Common, model: str, verify: Path | None, dry_run: bool, **options: Any) -> None:
    """Cut a checkpoint into one shard per node.

    MODEL is a directory or a Hugging Face repository. Running the same command again resumes it.

    \b
    Examples:
      moectl shard databricks/dbrx-instruct --nodes 4 --q-bits 4
      moectl shard ./my-dbrx --nodes 3 --split experts --shares 8,4,4
      moectl shard --verify ~/.local/share/moectl/shards/dbrx-instruct-q4-hidden-4
    """
    if verify:
        _verify(common, verify)
        return
    from moectl import report
    from moectl.prepare import Wanted

    nodes = options.pop("nodes")
    shares = _shares(options.pop("shares"))
    if nodes is None and shares is None:
        hosts = common.host_list()
        if hosts is None:
            raise errors.UsageError("how many nodes? There is no hosts file", hint="use --nodes N or --hostfile FILE")
        nodes = len(hosts.hosts)
    wanted = Wanted(
        split=options.pop("split"),
        nodes=nodes or len(shares or ()),
        shares=shares,
        bits=int(bits) if (bits := options.pop("q_bits")) else None,
        group_size=options.pop("q_group_size"),
        mode=options.pop("q_mode"),
    )
    options["directory"] = options.pop("output")
    made = _shard(common, model, wanted, dry_run=dry_run, **options)
    common.print(
        report.shard_text(made, dry_run=dry_run), report.shard_json(made, dry_run=dry_run), str(made.directory)
    )


def _shard(common: Common, model: str, wanted: Wanted, *, dry_run: bool = False, **options: Any) -> Made:
    from moectl import prepare
    from moectl.console import progress

    with progress(quiet=common.quiet) as bars:
        cutting: list[Bar] = []

        def on_plan(directory: Path, output_bytes: int) -> bool:
            cutting.append(bars.bar(directory.name, output_bytes))
            return not dry_run

        return prepare.shard(
            model,
            wanted,
            quantise=_quantise,
            on_plan=on_plan,
            on_download=_download_bars(bars),
            on_bytes=lambda n: cutting[0].advance(n),
            **options,
        )


def _download_bars(bars: Progress) -> Callable[[str, int, int], None]:
    downloads: dict[str, tuple[Bar, int]] = {}

    def on_download(file: str, done: int, total: int) -> None:
        bar, before = downloads.get(file) or (bars.bar(file, total), 0)
        bar.advance(done - before)
        downloads[file] = (bar, done)

    return on_download


def _quantise(memory_bytes: int) -> Any:
    from moectl.quantize import quantizer

    return quantizer(memory_bytes)


def _verify(common: Common, directory: Path) -> None:
    from moectl import shards
    from moectl.console import progress, size_text
    from moectl.manifest import read_manifest

    total = sum(f.bytes for f in read_manifest(directory).files.values())
    with progress(quiet=common.quiet) as bars:
        manifest = shards.verify(directory, on_bytes=bars.bar(directory.name, total).advance)
    count = len(manifest.files)
    document = {"schema": "moectl.verify/1", "files": count, "bytes": total}
    common.print(f"{count} files, {size_text(total)}: every hash is right.", document)


@cli.command(epilog=EXIT_STATUS)
@click.argument("model", default=DEFAULT_MODEL)
@click.option("--revision", help="Branch, tag or commit on the Hub.")
@common
def pull(common: Common, model: str, revision: str | None) -> None:
    """Download a checkpoint into the Hugging Face cache, without cutting it.

    `moectl shard` downloads by itself, file by file; this keeps everything.

    \b
    Example:
      moectl pull mlx-community/dbrx-instruct-4bit
    """
    from moectl import checkpoint
    from moectl.console import progress

    with progress(quiet=common.quiet) as bars:
        directory = checkpoint.pull(model, revision=revision, on_bytes=_download_bars(bars))
    common.print(str(directory), {"schema": "moectl.pull/1", "directory": str(directory)}, str(directory))


@cli.command(epilog=EXIT_STATUS)
@click.argument("hostfile_", metavar="[HOSTFILE]", required=False)
@click.option("--shards", metavar="DIR", help="The shard set (default: the newest that fits the hosts).")
@click.option("-n", "--dry-run", is_flag=True, help="Show what would be copied.")
@click.option("-j", "--jobs", type=click.IntRange(1), help="Hosts at once (default: all).")
@click.option("--only", multiple=True, metavar="HOST", help="Deploy to this host only (repeatable).")
@click.option("--verify", is_flag=True, help="Hash again what is there already.")
@click.option(
    "--wheelhouse",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Wheels for hosts without internet.",
)
@common
def deploy(common: Common, hostfile_: str | None, shards: str | None, **options: Any) -> None:
    """Bring every host its software and its shard, and verify them.

    Hosts get a virtual environment with this machine's versions of moectl, mlx and mlx-lm, and the files of their rank.
    Running the same command again resumes it; what is there already is not sent.

    \b
    Examples:
      moectl deploy hosts.txt --dry-run
      moectl deploy hosts.txt
      moectl deploy --only mac2 --verify
    """
    from moectl import cluster, prepare, report

    if hostfile_:
        common.hostfile = hostfile_
    listed = common.host_list(required=True)
    assert listed is not None
    found = prepare.find_shards(shards) if shards else prepare.newest_shards(len(listed.hosts))
    directory, manifest = found
    with _deploy_progress(common) as on_event:
        result = cluster.deploy(
            listed.hosts, directory, manifest, on_event=on_event, backend=listed.backend, envs=listed.envs, **options
        )
    dry_run = options["dry_run"]
    common.print(
        report.deploy_text(result, dry_run=dry_run), report.deploy_json(result, manifest.name, dry_run=dry_run)
    )
    result.raise_failures()


@contextlib.contextmanager
def _deploy_progress(common: Common) -> Iterator[Callable[[Any], None]]:
    """Yield what draws a bar per host; how each ended is told afterwards."""
    from moectl.console import progress
    from moectl.provision import Advanced, Planned, Working

    with progress(quiet=common.quiet) as bars:
        drawn: dict[str, Bar] = {}

        def on_event(event: Any) -> None:
            match event:
                case Planned(host=host, copy_bytes=size) if size:
                    drawn[host] = bars.bar(host, size)
                case Advanced(host=host, bytes=n) if host in drawn:
                    drawn[host].advance(n)
                case Working(host=host, what=what) if common.verbose:
                    common.say(f"[{host}] {what}")

        yield on_event


def _shares(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise errors.UsageError(f"--shares should be whole numbers like 8,4,4, it is {text!r}") from None


# Use


@cli.command(epilog=EXIT_STATUS)
@click.argument("prompt", nargs=-1)
@click.option("-s", "--system", help="System prompt.")
@click.option("-m", "--max-tokens", type=click.IntRange(1), default=256, show_default=True)
@click.option("-t", "--temp", type=click.FloatRange(0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True)
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), help="Make sampling repeatable.")
@click.option("--raw", is_flag=True, help="Send the prompt as it is, without the chat template.")
@click.option("--stats", is_flag=True, help="Print speeds on stderr afterwards (-v implies it).")
@click.option("--local", type=click.IntRange(1), metavar="N", help="Run N ranks on this machine.")
@click.option("--shards", metavar="DIR", help="Use this shard set on this machine.")
@click.option("--model", metavar="DIR|REPO", help="Use this model on this machine; sharded first when needed.")
@click.option(
    "--split", type=click.Choice(["hidden", "experts"]), default="hidden", show_default=True, help="For --model."
)
@click.option("--shares", metavar="A,B,…", help="For --model: uneven parts.")
@click.option("--q-bits", type=click.Choice(["2", "3", "4", "6", "8", "16"]), help="For --model: bits per weight.")
@click.option(
    "--backend", type=click.Choice(["auto", "ring", "jaccl", "jaccl-ring"]), default="auto", show_default=True
)
@click.option("--start-timeout", type=click.FloatRange(1), default=30.0, show_default=True, metavar="SECONDS")
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Arithmetic (default: the device's)."
)
@common
def run(common: Common, prompt: tuple[str, ...], stats: bool, **options: Any) -> None:
    """Generate text.

    Standard input, when it is not a terminal, comes before PROMPT. With neither hosts nor a deployment, the bundled
    demo model answers on two local ranks.

    \b
    Examples:
      moectl run "What is expert parallelism?"
      git diff | moectl run "Write a commit message for this diff."
      moectl run --local 2 --model ./my-dbrx "Hello"
    """
    from moectl import launch
    from moectl.request import Request

    text = _prompt_text(prompt)
    target = _target(common, options)
    parameters = {k: options[k] for k in ("max_tokens", "system", "raw", "top_p", "seed")}
    request = Request(1, text, temperature=options["temp"], **parameters)
    with launch.open_session(
        target,
        backend=options["backend"],
        start_timeout_s=options["start_timeout"],
        dtype=options["dtype"],
        on_log=_log_printer(common),
    ) as session:
        _answer(common, session, request, stats or bool(common.verbose))


def _prompt_text(words: tuple[str, ...]) -> str:
    try:
        piped = "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise errors.UsageError(f"standard input is not UTF-8 text: {error.reason} at byte {error.start}") from None
    text = " ".join(part for part in (piped, *words) if part)
    if not text.strip() and not words:
        raise errors.UsageError("no prompt is given", hint='moectl run "What is expert parallelism?"')
    return text


def _target(common: Common, options: dict[str, Any]) -> Any:
    """Return what to run: a shard set on this machine, or a deployment on hosts."""
    from moectl import launch
    from moectl.prepare import Wanted, find_shards

    local, shards, model = options["local"], options["shards"], options["model"]
    if shards and model:
        raise errors.UsageError("--shards and --model exclude each other")
    if shards:
        directory, manifest = find_shards(shards)
        if local not in (None, manifest.world_size):
            raise errors.UsageError(
                f"{directory.name} is cut for {manifest.world_size} ranks, not {local}",
                hint=f"use --local {manifest.world_size}",
            )
        return launch.Local(directory, manifest)
    if not (local or model):
        deployment = launch.find_deployment(common.host_list())
        if deployment is not None:
            return deployment
        common.say("No hosts and nothing deployed: the bundled demo model answers on 2 local ranks.")
    shares = _shares(options["shares"])
    bits = int(options["q_bits"]) if options["q_bits"] else None
    nodes = local or (len(shares) if shares else 2)
    wanted = Wanted(options["split"], nodes, shares, bits)
    # The cache is ours: what is there of another state of the model is replaced.
    return launch.prepare_local(
        model, wanted, shard=lambda model, wanted: _shard(common, model, wanted, replace=True).directory
    )


def _log_printer(common: Common) -> Callable[[str, str], None]:
    if not common.verbose:
        return lambda host, line: None
    return lambda host, line: click.echo(f"[{host}] {line}", err=True)


def _answer(common: Common, session: Session, request: Any, stats: bool) -> None:
    from moectl import report

    pieces: list[str] = []
    done: Done | None = None
    for event in _until_interrupted(session, request):
        if (text := getattr(event, "text", None)) is None:
            done = event  # type: ignore[assignment]
            continue
        pieces.append(text)
        if not common.json:
            sys.stdout.write(text)
            sys.stdout.flush()
    assert done is not None
    whole = "".join(pieces)
    if common.json:
        click.echo(json.dumps(report.run_json(whole, done)))
    elif not whole.endswith("\n"):
        sys.stdout.write("\n")
        sys.stdout.flush()
    if stats:
        click.echo(report.stats_text(done.stats), err=True)
    if done.finish_reason == "cancelled":
        raise KeyboardInterrupt


def _until_interrupted(session: Session, request: Any) -> Iterator[Token | Done]:
    """Yield the answer; the first Ctrl-C asks for its end and goes on to it, the second ends at once."""
    events = session.generate(request)
    asked = False
    while True:
        try:
            yield next(events)
        except StopIteration:
            return
        except KeyboardInterrupt:
            if asked:
                raise
            asked = True
            session.cancel(request.id)
            events = session.answer(request.id)


@cli.command(epilog=EXIT_STATUS)
@click.option("--mlx", is_flag=True, help="Write an MLX JSON hostfile, for mlx.launch.")
@common
def hosts(common: Common, mlx: bool) -> None:
    """Print the host list in rank order.

    \b
    Example:
      moectl hosts --mlx > hosts.json && mlx.launch --hostfile hosts.json script.py
    """
    found = common.host_list(required=True)
    assert found is not None
    if mlx or common.json:
        from moectl.hosts import to_mlx_json

        click.echo(to_mlx_json(found))
        return
    for host in found.hosts:
        click.echo(host.name)


@cli.command(hidden=True)
def worker() -> None:
    """Serve one rank on a leash (stdin and stdout); started by moectl itself."""
    from moectl import worker as process

    process.main()


# From an exception to text and an exit code.


def main() -> NoReturn:
    """Run the command line and end the process with its exit code."""
    if sys.argv[1:2] != ["worker"]:
        signal.signal(signal.SIGTERM, _on_sigterm)
    sys.exit(_run())


def _on_sigterm(*_: object) -> None:
    raise Terminated


def _run() -> int:
    as_json = "--json" in sys.argv[1:]
    try:
        from moectl.config import read_config

        defaults = read_config({n: {p.name for p in c.params if p.name} for n, c in cli.commands.items()})
        result = cli.main(prog_name="moectl", standalone_mode=False, default_map=defaults)
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        if as_json:
            _print_error(errors.UsageError(error.format_message()), as_json=True)
        else:
            error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("Interrupted.", err=True)
        return INTERRUPTED
    except Terminated:
        click.echo("Terminated.", err=True)
        return TERMINATED
    except BrokenPipeError:
        # Whoever read stdout has left; keep the interpreter from saying so at exit.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except Exception as error:
        if os.environ.get("MOECTL_DEBUG") == "1":
            raise
        return _print_error(error, as_json=as_json)


def _print_error(error: Exception, *, as_json: bool) -> int:
    if isinstance(error, MoectlError):
        code, text, hint, host = error.exit_code, str(error), error.hint, error.host
        message = error.message
    else:
        code, host, hint = 1, None, "run again with MOECTL_DEBUG=1 and report it"
        text = message = f"unexpected {type(error).__name__}: {error} (a bug in moectl)"
    if as_json:
        kind = type(error).__name__
        details = {"code": code, "kind": kind, "host": host, "message": message, "hint": hint}
        click.echo(json.dumps({"error": details}), err=True)
        return code
    click.echo(f"{click.style('Error:', fg='red', bold=True)} {text}", err=True)
    if hint:
        click.echo(f"Hint: {hint}", err=True)
    return code
