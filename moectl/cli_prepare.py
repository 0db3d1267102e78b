"""The verbs that prepare: plan, shard, pull, deploy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from moectl import errors, suggest
from moectl.cli_target import download_bars, read_shares, refuse_both, shard_model
from moectl.flags import DEFAULT_MODEL, FILE, Q_BITS, Q_MODE, SPLIT, Common, common
from moectl.verb import verb

if TYPE_CHECKING:
    from moectl.console import Bar, Progress
    from moectl.hosts.hostfile import HostList
    from moectl.planner.questions import Asked
    from moectl.shards.prepare import Wanted

F = TypeVar("F", bound=Callable[..., Any])


@verb("Prepare")
@click.argument("model", default=DEFAULT_MODEL, shell_complete=suggest.models)
@click.option("--ctx", type=click.IntRange(1), help="Tokens of context to keep (default: 4096, or the model's own).")
@click.option("--concurrency", type=click.IntRange(1), default=1, show_default=True, help="Answers at once.")
@click.option("-p", "--prompt-tokens", type=click.IntRange(1), help="For TTFT (default: 512, or the context).")
@click.option("--q-bits", type=Q_BITS, help="Bits per weight; 16 is bf16 (default: as the model is).")
@click.option("--q-group-size", type=click.IntRange(1), help="Weights per scale (default: MLX's).")
@click.option("--q-mode", type=Q_MODE, default="affine", show_default=True, help="MLX's way to quantise.")
@click.option("--split", type=SPLIT, default="auto", show_default=True, help="auto: the fastest that fits.")
@click.option("--shares", metavar="A,B,…", help="Uneven parts instead of those that the plan would choose.")
@click.option("--replicas", type=click.IntRange(1), default=1, show_default=True, help="Copies of each whole expert.")
@click.option("--routing-stats", type=FILE, metavar="FILE", help="Place whole experts by what 'moectl bench' counted.")
@click.option(
    "--chip", metavar="NAME", shell_complete=suggest.chips, help="Chip of hosts without chip=, such as m2-ultra."
)
@click.option("--memory", metavar="SIZE", help="Memory of hosts without memory=, such as 192GB.")
@click.option(
    "--link",
    metavar="NAME",
    shell_complete=suggest.links,
    help="rdma, tb-tcp, 10gbe (default without rdma=) or 1gbe.",
)
@click.option(
    "--calibration",
    type=click.Choice(["default", "paper", "paper-naive"]),
    default="default",
    show_default=True,
    help="Constants of the prediction: moectl's, or those that fit the paper's measurements.",
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
      moectl plan --q-bits 4 --link rdma --hostfile hosts.txt
      moectl plan --what-if
    """
    from moectl import report
    from moectl.planner.plan import refusal
    from moectl.planner.questions import plan_cluster, plan_purchase

    asked, wanted = _asked(options), _wanted(options)
    if options["what_if"]:
        names = ("split", "shares", "memory", "probe", "local", "routing_stats")
        given = {f"--{name.replace('_', '-')}": options[name] not in (None, False, "auto") for name in names}
        given |= {"--replicas": options["replicas"] > 1, "--hosts": common.hosts is not None}
        refuse_both({"--what-if": True}, given)
        priced, rows = plan_purchase(model, wanted, asked)
        common.print(report.what_if_text(priced, rows), report.what_if_json(priced, rows))
        return
    if options["local"] and model == DEFAULT_MODEL and not _was_given("model"):
        from moectl.demo import demo_dir

        model = str(demo_dir())  # as run and bench do
    where, measured = _where(common, options["local"]), None
    if options["probe"] or options["local"]:
        from moectl.cluster.probed_plan import probe_cluster

        answer, measured = probe_cluster(model, wanted, asked, where, say=common.say)
    else:
        answer = plan_cluster(model, wanted, asked, where.hosts)
    found = (answer.model, answer.question, answer.plan, measured)
    common.print(report.plan_text(*found), report.plan_json(*found))
    if not answer.plan.feasible:
        raise refusal(answer.plan)


def _was_given(name: str) -> bool:
    source = click.get_current_context().get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _where(common: Common, local: int | None) -> HostList:
    """Return the hosts of a plan: those in force, or so many ranks on this machine."""
    from moectl.hosts.hostfile import Host, HostList

    if local is None:
        hosts = common.host_list(required=True)
        assert hosts is not None
        return hosts
    refuse_both({"--local": local}, {"--hosts": common.hosts, "--hostfile": common.hostfile})
    return HostList((Host("localhost"),) * local)


def _asked(options: dict[str, Any]) -> Asked:
    from moectl.planner.questions import Asked

    return Asked(
        **{k: options[k] for k in ("ctx", "concurrency", "prompt_tokens", "chip", "memory", "link", "calibration")}
    )


def _wanted(options: dict[str, Any], nodes: int | None = None) -> Wanted:
    from moectl.model.routing import read_routing
    from moectl.shards.prepare import Wanted

    bits, stats = options["q_bits"], options["routing_stats"]
    return Wanted(
        split=options["split"],
        nodes=nodes,
        shares=read_shares(options["shares"]),
        replicas=options["replicas"],
        routing=read_routing(stats) if stats else None,
        bits=int(bits) if bits else None,
        group_size=options["q_group_size"],
        mode=options["q_mode"],
    )


_OUTPUT = click.Path(path_type=Path, file_okay=False)
_CUT = (
    click.option("-o", "--output", type=_OUTPUT, help="Directory of the shard set."),
    click.option("--split", type=SPLIT, default="auto", show_default=True, help="auto: what 'plan' finds fastest."),
    click.option("--shares", metavar="A,B,…", help="Uneven parts: experts, units of the hidden dimension, or layers."),
    click.option("--replicas", type=click.IntRange(1), default=1, show_default=True, help="Copies of each expert."),
    click.option("--q-bits", type=Q_BITS, help="Bits per weight; 16 copies."),
    click.option("--q-group-size", type=click.IntRange(1), help="Weights per scale (default: MLX's)."),
    click.option("--q-mode", type=Q_MODE, default="affine", show_default=True, help="MLX's way to quantise."),
    click.option("--routing-stats", type=FILE, metavar="FILE", help="Place experts by what 'moectl bench' counted."),
    click.option("--revision", help="Branch, tag or commit on the Hub."),
    click.option(
        "--tokenizer", metavar="REPO|DIR", help="Take the tokenizer from here (default: the model's own, or DBRX's)."
    ),
    click.option("--keep-source", is_flag=True, help="Keep downloaded files in the Hugging Face cache."),
    click.option("--no-canary", is_flag=True, help="Do not run the set once for later starts to be compared with."),
)
_WANTED = ("split", "shares", "replicas", "routing_stats", "q_bits", "q_group_size", "q_mode")


def _cut_options(command: F) -> F:
    """Give a command the flags that say how to cut a model."""
    for option in reversed(_CUT):
        command = option(command)
    return command


@verb("Prepare")
@click.argument("model", default=DEFAULT_MODEL, shell_complete=suggest.models)
@click.option("-n", "--nodes", type=click.IntRange(1), help="Number of ranks (default: the hosts in force).")
@_cut_options
@click.option("-j", "--jobs", type=click.IntRange(1), help="Streams at once (default: all cores but one, at most 4).")
@click.option("--dry-run", is_flag=True, help="Show what would be made.")
@click.option("--force", is_flag=True, help="Make a shard set anew over another one.")
@click.option(
    "--verify",
    type=click.Path(path_type=Path),
    metavar="DIR",
    shell_complete=suggest.directories,
    help="Hash every file of a shard set instead.",
)
@click.option(
    "--add-tokenizer",
    metavar="REPO|DIR",
    help="Give the shard set of --output (default: the newest) this tokenizer instead.",
)
@common
def shard(
    common: Common, model: str, verify: Path | None, add_tokenizer: str | None, dry_run: bool, **options: Any
) -> None:
    """Cut a checkpoint into one shard per node.

    MODEL is a directory or a Hugging Face repository (default: databricks/dbrx-instruct, or a mirror of it when that is
    out of reach). Running the same command again resumes it.

    \b
    Examples:
      moectl shard databricks/dbrx-instruct --nodes 4 --q-bits 4
      moectl shard ./my-dbrx --nodes 3 --split experts --shares 8,4,4
      moectl shard --add-tokenizer Xenova/dbrx-instruct-tokenizer
      moectl shard --verify ~/.local/share/moectl/shards/dbrx-instruct-q4-hidden-4
    """
    refuse_both({"--verify": verify}, {"--add-tokenizer": add_tokenizer, "--tokenizer": options["tokenizer"]})
    refuse_both({"--add-tokenizer": add_tokenizer}, {"--tokenizer": options["tokenizer"], "--dry-run": dry_run})
    if verify:
        _verify(common, verify)
        return
    if add_tokenizer:
        _add_tokenizer(common, add_tokenizer, options["output"])
        return
    from moectl import report
    from moectl.planner.questions import Asked, place_on, refuse_early

    nodes = options.pop("nodes")
    hosts = common.host_list()
    if nodes is None and options["shares"] is None:
        if hosts is None:
            raise errors.UsageError("how many nodes? There is no hosts file", hint="use --nodes N or --hostfile FILE")
        nodes = len(hosts.hosts)
    wanted = _wanted(options, nodes)
    for name in _WANTED:
        del options[name]
    if hosts is not None:
        if nodes in (None, len(hosts.hosts)) and not options["force"]:
            refuse_early(model, wanted, hosts.hosts)
        options["choose_place"] = place_on(hosts.hosts, Asked(), force=options["force"], say=common.say)
    options["directory"] = options.pop("output")
    made = shard_model(common, model, wanted, dry_run=dry_run, **options)
    common.print(
        report.shard_text(made, dry_run=dry_run), report.shard_json(made, dry_run=dry_run), str(made.directory)
    )


def _add_tokenizer(common: Common, source: str, where: Path | None) -> None:
    from moectl.shards import prepare, tokenizer_files

    if where is None:
        hosts = common.host_list()
        directory, _ = prepare.newest_shards(None if hosts is None else len(hosts.hosts))
    else:
        directory, _ = prepare.find_shards(where)
    manifest = tokenizer_files.add_tokenizer(directory, source)
    document = {"schema": "moectl.tokenizer/1", "directory": str(directory), "name": manifest.name, "source": source}
    text = f"{manifest.name} in {directory} has the tokenizer of {source} now. Where it is deployed: moectl deploy"
    common.print(text, document, str(directory))


def _verify(common: Common, directory: Path) -> None:
    from moectl.console import progress
    from moectl.model.manifest import read_manifest
    from moectl.shards import build
    from moectl.text import size_text

    total = sum(f.bytes for f in read_manifest(directory).files.values())
    with progress(quiet=common.quiet) as bars:
        manifest = build.verify(directory, on_bytes=bars.bar(directory.name, total).advance)
    count = len(manifest.files)
    document = {"schema": "moectl.verify/1", "files": count, "bytes": total}
    common.print(f"{count} files, {size_text(total)}: every hash is right.", document)


@verb("Prepare")
@click.argument("model", default=DEFAULT_MODEL, shell_complete=suggest.models)
@click.option("--revision", help="Branch, tag or commit on the Hub.")
@common
def pull(common: Common, model: str, revision: str | None) -> None:
    """Download a checkpoint into the Hugging Face cache, without cutting it.

    `moectl shard` downloads by itself, file by file; this keeps everything.

    \b
    Example:
      moectl pull mlx-community/dbrx-instruct-4bit
    """
    from moectl.console import progress
    from moectl.shards import checkpoint

    with progress(quiet=common.quiet) as bars:
        directory = checkpoint.pull(model, revision=revision, on_bytes=download_bars(bars))
    common.print(str(directory), {"schema": "moectl.pull/1", "directory": str(directory)}, str(directory))


@verb("Prepare")
@click.argument("hostfile_", metavar="[HOSTFILE]", required=False, shell_complete=suggest.files)
@click.option(
    "--shards",
    metavar="DIR",
    shell_complete=suggest.shard_sets,
    help="The shard set (default: the newest that fits the hosts).",
)
@click.option(
    "--shard",
    "model",
    metavar="MODEL",
    shell_complete=suggest.models,
    help="Cut this model, and push each file as soon as it is made.",
)
@_cut_options
@click.option("-n", "--dry-run", is_flag=True, help="Show what would be copied.")
@click.option("-j", "--jobs", type=click.IntRange(1), help="Hosts at once (default: all).")
@click.option(
    "--only",
    multiple=True,
    metavar="HOST",
    shell_complete=suggest.hosts,
    help="Deploy to this host only (repeatable).",
)
@click.option("--verify", is_flag=True, help="Hash again what is there already.")
@click.option("--relay/--no-relay", default=True, help="Let hosts pass on to each other what all of them need.")
@click.option("--force", is_flag=True, help="Deploy although a host's memory will not do.")
@click.option(
    "--wheelhouse",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Wheels for hosts without internet; fetched here when DIR is not there.",
)
@click.option("--no-check", is_flag=True, help="Do not start the model once to see whether it computes rightly.")
@click.option("--wheelhouse-build", is_flag=True, help="Fetch what the directory of --wheelhouse lacks.")
@common
def deploy(
    common: Common,
    hostfile_: str | None,
    shards: str | None,
    model: str | None,
    wheelhouse_build: bool,
    no_check: bool,
    **options: Any,
) -> None:
    """Bring every host its software and its shard, and verify them.

    Hosts get a virtual environment with this machine's versions of moectl, mlx and mlx-lm, and the files of their rank.
    Running the same command again resumes it; what is there already is not sent. --shard does both at once, 'moectl
    shard' and this; the flags from --output to --no-canary are for it. At the end the model is started once, and every
    host has to compute what one process computed when the set was cut.

    Files that all hosts need leave this machine once: hosts take them from each other, over connections that only hosts
    of this deployment can use. Where that fails, this machine sends them.

    \b
    Examples:
      moectl deploy hosts.txt --dry-run
      moectl deploy hosts.txt
      moectl deploy hosts.txt --shard databricks/dbrx-instruct --q-bits 4
      moectl deploy --only mac2 --verify
      moectl deploy --wheelhouse wheels
    """
    from moectl import report
    from moectl.session.deployment import recall_hosts

    if hostfile_:
        common.hostfile = hostfile_
    listed = common.host_list(required=True)
    assert listed is not None
    listed = recall_hosts(listed)
    cut = {
        name: options.pop(name) for name in (*_WANTED, "output", "revision", "tokenizer", "keep_source", "no_canary")
    }
    options |= {"backend": listed.backend, "envs": listed.envs}
    force = options["force"]
    _fill_wheelhouse(common, listed, wheelhouse_build, options)
    if model is None:
        _refuse_alone(cut)
        name, result = _deploy_cut(common, listed, shards, options)
    else:
        refuse_both({"--shard": model}, {"--shards": shards})
        name, result = _deploy_growing(common, listed, model, cut, options)
    dry_run = options["dry_run"]
    common.print(report.deploy_text(result, dry_run=dry_run), report.deploy_json(result, name, dry_run=dry_run))
    result.raise_failures()
    if not (dry_run or options["only"] or no_check):
        _check_results(common, force=force)


def _check_results(common: Common, *, force: bool) -> None:
    """Start what was just deployed, and end it; raises when a rank computes something else."""
    from moectl.model.manifest import read_manifest
    from moectl.server import attach
    from moectl.session import target as launch

    target = launch.find_deployment(None)
    if target is None or read_manifest(Path(target.shards)).canary is None:
        common.say("Not checked: the set was cut with --no-canary, or by an older moectl.")
    elif attach.is_loaded(target):
        common.say("Not checked: it is running. 'moectl stop', then the next start checks it.")
    else:
        common.say("Starting it once to check its results")
        with launch.open_session(target, force=force) as session:
            off = session.model.deviation
        common.say(f"Checked: every rank computes what it should (off by {off:.1g} at most). Next: moectl run")


def _fill_wheelhouse(common: Common, listed: HostList, wanted: bool, options: dict[str, Any]) -> None:
    """Fetch the wheels that the hosts need, where the directory is not there yet or that was asked for."""
    from moectl.cluster.deploy import deploy as cluster

    directory = options["wheelhouse"]
    if directory is None:
        if wanted:
            raise errors.UsageError("--wheelhouse-build is for --wheelhouse", hint="add --wheelhouse DIR")
        return
    if directory.exists() and not wanted:
        return
    if options["dry_run"]:
        common.say(f"{directory} would be filled with wheels.")
        options["wheelhouse"] = directory if directory.exists() else None
        return
    from moectl.cluster.deploy import wheelhouse

    platforms = wheelhouse.ask_platforms(listed.hosts)
    wheelhouse.build(directory, platforms, cluster.wanted_versions(), say=common.say)


def _refuse_alone(cut: dict[str, Any]) -> None:
    """Raise UsageError when a flag says how to cut, and nothing is to be cut."""
    for name in cut:
        if _was_given(name):
            raise errors.UsageError(f"--{name.replace('_', '-')} needs --shard MODEL")


def _deploy_cut(common: Common, listed: HostList, shards: str | None, options: dict[str, Any]) -> tuple[str, Any]:
    """Deploy a shard set that is there; return its name and what came of it."""
    from moectl.cluster.deploy import deploy as cluster
    from moectl.console import progress
    from moectl.planner.questions import check_hosts
    from moectl.shards import prepare
    from moectl.shards.tokenizer_files import find_stray

    directory, manifest = prepare.find_shards(shards) if shards else prepare.newest_shards(len(listed.hosts))
    common.say(f"{manifest.name} on {', '.join(host.address for host in listed.hosts)}")
    if stray := find_stray(directory, manifest):
        common.say(f"Warning: {stray}")
    check_hosts(listed.hosts, manifest, force=options.pop("force"), warn=common.say, probe=True)
    with progress(quiet=common.quiet) as bars:
        on_event = _draw_deploy(common, bars)
        return manifest.name, cluster.deploy(listed.hosts, directory, manifest, on_event=on_event, **options)


def _deploy_growing(
    common: Common, listed: HostList, model: str, cut: dict[str, Any], options: dict[str, Any]
) -> tuple[str, Any]:
    """Cut a model and deploy it meanwhile; return the set's name and what came of the hosts."""
    from moectl.cluster.deploy.feed import shard_and_deploy
    from moectl.console import progress
    from moectl.planner.questions import Asked, place_on, refuse_early

    hosts, force = listed.hosts, options.pop("force")
    wanted = _wanted(cut, len(hosts))
    if not force:
        refuse_early(model, wanted, hosts)
    with progress(quiet=common.quiet) as bars:
        shard = partial(
            shard_model,
            common,
            model,
            wanted,
            dry_run=options["dry_run"],
            among=bars,
            directory=cut["output"],
            revision=cut["revision"],
            tokenizer=cut["tokenizer"],
            keep_source=cut["keep_source"],
            no_canary=cut["no_canary"],
            choose_place=place_on(hosts, Asked(), force=force, say=common.say, probe=True),
        )
        try:
            fed = shard_and_deploy(shard, hosts, on_event=_draw_deploy(common, bars), **options)
        except errors.ShardsDiffer as error:
            error.hint = "choose another directory with -o, or make it anew first: moectl shard --force"
            raise
    if fed.made is None:
        common.say("No host is left to cut for; what is cut stays, and the same command goes on with it.")
    return fed.name, fed.result


def _draw_deploy(common: Common, bars: Progress) -> Callable[[Any], None]:
    """Return what draws a bar per host; how each ended is told afterwards."""
    from moectl.cluster.deploy.provision import Advanced, Planned, Working

    drawn: dict[str, Bar] = {}

    def on_event(event: Any) -> None:
        match event:
            case Planned(host=host, copy_bytes=size) if size:
                drawn[host] = bars.bar(host, size)
            case Advanced(host=host, bytes=n) if host in drawn:
                drawn[host].advance(n)
            case Working(host=host, what=what):
                common.say(f"[{host}] {what}")

    return on_event
