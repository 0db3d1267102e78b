"""The command line's verbs: each is a few lines over the module that does it. Exit codes are `__main__`'s.

Imports of the working modules are inside the commands, so that `--help` and Tab load click only.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from moectl import __version__, errors
from moectl.flags import EXIT_STATUS, Common, common

if TYPE_CHECKING:
    from moectl.console import Bar, Progress
    from moectl.hosts import HostList
    from moectl.planning import Asked
    from moectl.prepare import Made, Wanted
    from moectl.session import Session

DEFAULT_MODEL = "databricks/dbrx-instruct"
MAX_START_S = 86400.0
SPLIT = click.Choice(["auto", "experts", "hidden", "tensor", "layers"])
Q_BITS = click.Choice(["2", "3", "4", "6", "8", "16"])
Q_MODE = click.Choice(["affine", "mxfp4", "mxfp8", "nvfp4"])
FILE = click.Path(path_type=Path, dir_okay=False)


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "MOECTL", "max_content_width": 100},
    epilog=f"Start: moectl shard {DEFAULT_MODEL} -n 4 && moectl deploy hosts.txt && moectl run PROMPT\n\n{EXIT_STATUS}",
)
@click.version_option(__version__, "-V", "--version", message="moectl %(version)s")
def cli() -> None:
    """Run a mixture-of-experts model across a cluster of Macs."""


# Prepare


@cli.command(epilog=EXIT_STATUS)
@click.argument("model", default=DEFAULT_MODEL)
@click.option("--ctx", type=click.IntRange(1), help="Tokens of context to keep (default: 4096, or the model's own).")
@click.option("--concurrency", type=click.IntRange(1), default=1, show_default=True)
@click.option("-p", "--prompt-tokens", type=click.IntRange(1), default=512, show_default=True, help="For TTFT.")
@click.option("--q-bits", type=Q_BITS, help="Bits per weight; 16 is bf16 (default: as the model is).")
@click.option("--q-group-size", type=int, help="Weights per scale (default: MLX's).")
@click.option("--q-mode", type=Q_MODE, default="affine", show_default=True)
@click.option("--split", type=SPLIT, default="auto", show_default=True)
@click.option("--shares", metavar="A,B,…", help="Uneven parts instead of those that the plan would choose.")
@click.option("--replicas", type=click.IntRange(1), default=1, show_default=True, help="Copies of each whole expert.")
@click.option("--routing-stats", type=FILE, metavar="FILE", help="Place whole experts by what 'moectl bench' counted.")
@click.option("--chip", metavar="NAME", help="Chip of hosts without chip=, such as m2-ultra.")
@click.option("--memory", metavar="SIZE", help="Memory of hosts without memory=, such as 192GB.")
@click.option("--link", metavar="NAME", help="rdma, tb-tcp, 10gbe (default without rdma=) or 1gbe.")
@click.option(
    "--calibration", type=click.Choice(["default", "paper", "paper-naive"]), default="default", show_default=True
)
@click.option("--local", type=click.IntRange(1), metavar="N", help="Plan N ranks on this machine (implies --probe).")
@click.option("--probe", is_flag=True, help="Ask the hosts over SSH and measure them, in some 10 seconds.")
@click.option("--what-if", is_flag=True, help="Show clusters that one could buy, without hosts.")
@common
def plan(common: Common, model: str, **options: Any) -> None:
    """Show which host would hold what, whether it fits, and how fast it would be.

    Nothing is downloaded or sent: DBRX is known by name, hosts by their keys in hosts.txt, by --chip and --memory, or
    by what they say when asked with --probe.

    \b
    Examples:
      moectl plan --hosts mac1,mac2 --chip m2-ultra --memory 192GB
      moectl plan --q-bits 4 --link rdma hosts.txt
      moectl plan --what-if
    """
    from moectl import report
    from moectl.plan import refusal
    from moectl.planning import plan_cluster, plan_purchase

    asked, wanted = _asked(options), _wanted(options)
    if options["what_if"]:
        priced, rows = plan_purchase(model, wanted, asked)
        common.print(report.what_if_text(priced, rows), report.what_if_json(priced, rows))
        return
    where, measured = _where(common, options["local"]), None
    if options["probe"] or options["local"]:
        from moectl.probing import probe_cluster

        answer, measured = probe_cluster(model, wanted, asked, where, say=common.say)
    else:
        answer = plan_cluster(model, wanted, asked, where.hosts)
    found = (answer.model, answer.question, answer.plan, measured)
    common.print(report.plan_text(*found), report.plan_json(*found))
    if not answer.plan.feasible:
        raise refusal(answer.plan)


def _where(common: Common, local: int | None) -> HostList:
    """Return the hosts of a plan: those in force, or so many ranks on this machine."""
    from moectl.hosts import Host, HostList

    if local is None:
        hosts = common.host_list(required=True)
        assert hosts is not None
        return hosts
    _refuse_both({"--local": local}, {"--hosts": common.hosts, "--hostfile": common.hostfile})
    return HostList((Host("localhost"),) * local)


def _asked(options: dict[str, Any]) -> Asked:
    from moectl.planning import Asked

    return Asked(
        **{k: options[k] for k in ("ctx", "concurrency", "prompt_tokens", "chip", "memory", "link", "calibration")}
    )


def _wanted(options: dict[str, Any], nodes: int | None = None) -> Wanted:
    from moectl.prepare import Wanted
    from moectl.routing import read_routing

    bits, stats = options["q_bits"], options["routing_stats"]
    return Wanted(
        split=options["split"],
        nodes=nodes,
        shares=_shares(options["shares"]),
        replicas=options["replicas"],
        frequencies=read_routing(stats).overall if stats else None,
        bits=int(bits) if bits else None,
        group_size=options["q_group_size"],
        mode=options["q_mode"],
    )


@cli.command(epilog=EXIT_STATUS)
@click.argument("model", default=DEFAULT_MODEL)
@click.option("-o", "--output", type=click.Path(path_type=Path, file_okay=False), help="Directory of the shard set.")
@click.option("-n", "--nodes", type=click.IntRange(1), help="Number of ranks (default: the hosts in force).")
@click.option("--split", type=SPLIT, default="auto", show_default=True, help="auto: what 'moectl plan' finds fastest.")
@click.option("--shares", metavar="A,B,…", help="Uneven parts: experts, units of the hidden dimension, or layers.")
@click.option("--replicas", type=click.IntRange(1), default=1, show_default=True, help="Copies of each whole expert.")
@click.option("--q-bits", type=Q_BITS, help="Bits per weight; 16 copies.")
@click.option("--q-group-size", type=int, help="Weights per scale (default: MLX's).")
@click.option("--q-mode", type=Q_MODE, default="affine", show_default=True)
@click.option("--routing-stats", type=FILE, metavar="FILE", help="Place whole experts by what 'moectl bench' counted.")
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

    MODEL is a directory or a Hugging Face repository (default: databricks/dbrx-instruct, or a mirror of it when that is
    out of reach). Running the same command again resumes it.

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
    from moectl.planning import Asked, place_on

    nodes = options.pop("nodes")
    hosts = common.host_list()
    if nodes is None and options["shares"] is None:
        if hosts is None:
            raise errors.UsageError("how many nodes? There is no hosts file", hint="use --nodes N or --hostfile FILE")
        nodes = len(hosts.hosts)
    wanted = _wanted(options, nodes)
    for name in ("split", "shares", "replicas", "routing_stats", "q_bits", "q_group_size", "q_mode"):
        del options[name]
    if hosts is not None:
        options["choose_place"] = place_on(hosts.hosts, Asked(), force=options["force"], say=common.say)
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

        made = prepare.shard(
            model,
            wanted,
            quantise=_quantise,
            on_plan=on_plan,
            on_download=_download_bars(bars),
            on_bytes=lambda n: cutting[0].advance(n),
            **options,
        )
    for warning in made.warnings:
        common.say(f"Warning: {warning}")
    return made


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
@click.option("--force", is_flag=True, help="Deploy although a host's memory will not do.")
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
    from moectl.planning import check_hosts

    if hostfile_:
        common.hostfile = hostfile_
    listed = common.host_list(required=True)
    assert listed is not None
    found = prepare.find_shards(shards) if shards else prepare.newest_shards(len(listed.hosts))
    directory, manifest = found
    common.say(f"{manifest.name} on {', '.join(host.address for host in listed.hosts)}")
    check_hosts(listed.hosts, manifest, force=options.pop("force"), warn=common.say, probe=True)
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
                case Working(host=host, what=what):
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


F = TypeVar("F", bound=Callable[..., Any])


def target_options(command: F) -> F:
    """Give a command the flags that say which model to run, where and how; `_target` and `_open` read them."""
    options = (
        click.option("--local", type=click.IntRange(1), metavar="N", help="Run N ranks on this machine."),
        click.option("--shards", metavar="DIR", help="Use this shard set on this machine."),
        click.option("--model", metavar="DIR|REPO", help="Use this model on this machine; sharded first when needed."),
        click.option("--split", type=SPLIT, help="For --model (default: auto)."),
        click.option("--shares", metavar="A,B,…", help="For --model: uneven parts."),
        click.option("--replicas", type=click.IntRange(1), help="For --model: copies of each whole expert."),
        click.option("--q-bits", type=Q_BITS, help="For --model: bits per weight."),
        click.option("--force", is_flag=True, help="Try it although memory will not do."),
        click.option(
            "--backend", type=click.Choice(["auto", "ring", "jaccl", "jaccl-ring"]), default="auto", show_default=True
        ),
        click.option(
            "--start-timeout",
            type=click.FloatRange(1, MAX_START_S),
            default=30.0,
            show_default=True,
            metavar="SECONDS",
        ),
        click.option(
            "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Arithmetic (default: the device's)."
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


@cli.command(epilog=EXIT_STATUS)
@click.argument("prompt", nargs=-1)
@click.option("-s", "--system", help="System prompt.")
@click.option("-m", "--max-tokens", type=click.IntRange(1), default=256, show_default=True)
@click.option("-t", "--temp", type=click.FloatRange(0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True)
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), help="Make sampling repeatable.")
@click.option("--raw", is_flag=True, help="Send the prompt as it is, without the chat template.")
@click.option("--stats", is_flag=True, help="Print speeds on stderr afterwards (-v implies it).")
@target_options
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
    from moectl.request import Request

    request = Request(
        1,
        _prompt_text(prompt, common),
        temperature=options["temp"],
        **{k: options[k] for k in ("max_tokens", "system", "raw", "top_p", "seed")},
    )
    with _open(common, options, _target(common, options)) as session:
        _answer(common, session, request, stats or bool(common.verbose))


def _open(common: Common, options: dict[str, Any], target: Any) -> contextlib.AbstractContextManager[Session]:
    from moectl import launch

    return launch.open_session(
        target,
        backend=options["backend"],
        start_timeout_s=options["start_timeout"],
        dtype=options["dtype"],
        force=options["force"],
        on_log=_log_printer(common),
    )


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


def _target(common: Common, options: dict[str, Any]) -> Any:
    """Return what to run: a shard set on this machine, or a deployment on hosts."""
    from moectl import launch
    from moectl.manifest import read_manifest
    from moectl.planning import check_here, check_hosts, place_here
    from moectl.prepare import Wanted, find_shards

    local, shards, model = options["local"], options["shards"], options["model"]
    here = {"--local": local, "--shards": shards, "--model": model}
    cutting = {f"--{name.replace('_', '-')}": options[name] for name in ("split", "shares", "replicas", "q_bits")}
    force = options["force"]
    _refuse_both({"--shards": shards}, {"--model": model, **cutting})
    _refuse_both({"--hosts": common.hosts, "--hostfile": common.hostfile}, here)
    if shards:
        directory, manifest = find_shards(shards)
        if local not in (None, manifest.world_size):
            raise errors.UsageError(
                f"{directory.name} is cut for {manifest.world_size} ranks, not {local}",
                hint=f"use --local {manifest.world_size}",
            )
        check_here(manifest, force=force, say=common.say)
        return launch.Local(directory, manifest)
    if not (local or model):
        deployment = launch.find_deployment(common.host_list())
        if deployment is not None:
            _refuse_both({f"the deployment {deployment.name}": True}, cutting)
            hosts = [rank.host for rank in deployment.ranks]
            with contextlib.suppress(errors.NotSharded, errors.IntegrityError):  # the operator's copy may be gone
                check_hosts(hosts, read_manifest(Path(deployment.shards)), force=force, warn=common.say)
            return deployment
        common.say("No hosts and nothing deployed: the bundled demo model answers on 2 local ranks.")
    shares = _shares(options["shares"])
    bits = int(options["q_bits"]) if options["q_bits"] else None
    nodes = local or (None if shares else 2)
    wanted = Wanted(options["split"] or "auto", nodes, shares, options["replicas"] or 1, bits=bits)
    place = place_here(force, common.say)
    return launch.prepare_local(
        model, wanted, shard=lambda m, w: _shard(common, m, w, cached=True, choose_place=place).directory
    )


def _refuse_both(these: dict[str, Any], those: dict[str, Any]) -> None:
    """Raise UsageError when a flag of each is given: one of them would be ignored."""
    for one in (name for name, value in these.items() if value):
        for other in (name for name, value in those.items() if value):
            raise errors.UsageError(f"{one} and {other} exclude each other")


def _log_printer(common: Common) -> Callable[[str, str], None]:
    if not common.verbose:
        return lambda host, line: None
    return lambda host, line: click.echo(f"[{host}] {line}", err=True)


def _answer(common: Common, session: Session, request: Any, stats: bool) -> None:
    from moectl import report
    from moectl.leash import Done

    pieces: list[str] = []
    with _cancel_on_interrupt(session, request.id) as interrupted:
        for event in session.generate(request):
            if isinstance(event, Done):
                done = event
                continue
            pieces.append(event.text)
            if not common.json:
                _write(event.text)
    whole = "".join(pieces)
    if common.json:
        click.echo(json.dumps(report.run_json(whole, done)))
    elif not whole.endswith("\n"):
        _write("\n")
    if stats:
        click.echo(report.stats_text(done.stats), err=True)
    if interrupted.is_set():
        raise KeyboardInterrupt


def _write(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise errors.MoectlError(f"cannot write the answer: {error.strerror}") from None


@contextlib.contextmanager
def _cancel_on_interrupt(session: Session, request_id: int) -> Iterator[threading.Event]:
    """Make the first Ctrl-C ask for the answer's end, which then comes as usual; the second ends at once.

    The wish is sent by a thread: the signal may have come while this one was sending.
    """
    interrupted = threading.Event()

    def on_interrupt(*_: object) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()
        threading.Thread(target=session.cancel, args=(request_id,), daemon=True).start()

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


@cli.command(epilog=EXIT_STATUS)
@click.option("-p", "--prompt-tokens", type=click.IntRange(1), default=512, show_default=True)
@click.option("-g", "--generation-tokens", type=click.IntRange(2), default=128, show_default=True)
@click.option("-n", "--num-trials", type=click.IntRange(1), default=5, show_default=True)
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
    from moectl import bench as benchmark
    from moectl import disk, report, routing
    from moectl import plot as plotting

    if options["routing_stats"]:
        disk.check_destination(options["routing_stats"])
    if plot:
        plotting.check_plot(plot)
    elif compare:
        raise errors.UsageError("--compare is for --plot", hint="add --plot FILE.svg")
    earlier = plotting.read_documents(compare)
    target = _target(common, options)
    predicted = benchmark.read_prediction(plan) if plan else _recalled(target, options)
    trials = options["num_trials"]

    def on_trial(number: int, trial: benchmark.Trial) -> None:
        speeds = f"prompt {trial.prefill_tok_s:.1f} tok/s, generate {trial.decode_tok_s:.1f} tok/s"
        common.say(f"trial {number} of {trials}: {speeds}")

    with _open(common, options, target) as session:
        counts = {key: options[key] for key in ("prompt_tokens", "generation_tokens")}
        result = benchmark.bench(session, target.name, trials=trials, predicted=predicted, on_trial=on_trial, **counts)
    document = report.bench_json(result)
    common.print(report.bench_text(result), document)
    if options["routing_stats"]:
        routing.write_routing(options["routing_stats"], result.routing)
    if plot:
        plotting.write_plot(plot, [*earlier, document])


def _recalled(target: Any, options: dict[str, Any]) -> Any:
    """Return what the last `plan --probe` of these hosts expects of these trials, if there was one."""
    from moectl import launch, probing
    from moectl.bench import Predicted
    from moectl.manifest import read_manifest

    try:
        if isinstance(target, launch.Local):
            manifest, hosts = target.manifest, ["localhost"] * target.manifest.world_size
        else:
            manifest, hosts = read_manifest(Path(target.shards)), [rank.host.name for rank in target.ranks]
    except errors.MoectlError:  # the operator's copy may be gone
        return None
    prompt, generated = options["prompt_tokens"], options["generation_tokens"]
    context = prompt + generated // 2
    found = probing.recall(hosts, manifest.placement, manifest.quantization, context=context, prompt_tokens=prompt)
    if found is None:
        return None
    return Predicted(found.decode_tok_s, found.prefill_tok_s, found.ttft_s, found.communication_share)


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
