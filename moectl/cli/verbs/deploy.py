"""`moectl deploy` and `moectl uninstall`: bring software and shards to every host, and remove them."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moectl import errors
from moectl.cli import suggest
from moectl.cli.options import WANTED, Common, common, confirm, cut_options, refuse_both, was_given
from moectl.cli.target import read_wanted, shard_model
from moectl.cli.verb import flag, verb
from moectl.errors import error_json
from moectl.text import size_text, table_text, time_text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from moectl.cluster.deploy.deploy import DeployResult
    from moectl.cluster.deploy.task import HostResult
    from moectl.cluster.deploy.uninstall import Cleared
    from moectl.hosts.hostfile import HostList
    from moectl.hosts.remote import Remote
    from moectl.shards.prepare import Bars


def deploy_text(result: DeployResult, *, dry_run: bool) -> str:
    """Return a line per host, or in a dry run the table of what would be copied."""
    if not dry_run:
        width = max(len(r.host.address) for r in result.results)
        return "\n".join(f"{r.host.address:{width}}  {_outcome(r)}" for r in result.results)
    header = ("HOST", "COPY", "KEEP", "FREE AFTER", "DESTINATION")
    lines = [
        (r.host.address, *map(size_text, (r.copied_bytes, r.kept_bytes, r.free_after_bytes)), r.directory)
        if r.error is None
        else (r.host.address, "-", "-", "-", "failed")
        for r in result.results
    ]
    total = sum(r.copied_bytes for r in result.succeeded)
    reasons = [f"{r.host.address}  {_outcome(r)}" for r in result.results if r.error is not None]
    summary = f"Dry run: nothing was copied. {size_text(total)} would be."
    return "\n".join([table_text(header, lines, right="bcd"), *reasons, summary])


def _outcome(result: HostResult) -> str:
    if result.error is not None:
        return f"failed  {result.error.message}"
    if not result.copied_bytes:
        return "ok      already there, verified"
    speed = size_text(result.copied_bytes / result.duration_s)
    relayed = f", {size_text(result.relayed_bytes)} of it from another host" if result.relayed_bytes else ""
    return f"ok      {size_text(result.copied_bytes)} in {time_text(result.duration_s)} ({speed}/s), verified{relayed}"


def deploy_json(result: DeployResult, name: str, *, dry_run: bool) -> dict[str, Any]:
    """Return the document of --json."""
    fields = ("rank", "ok", "copied_bytes", "kept_bytes", "relayed_bytes", "duration_s", "directory")
    hosts = [
        {**{name: getattr(r, name) for name in fields}, "host": r.host.address, "error": r.error and r.error.message}
        for r in result.results
    ]
    return {"schema": "moectl.deploy/1", "name": name, "dry_run": dry_run, "hosts": hosts}


def uninstall_text(results: list[Cleared], *, dry_run: bool) -> str:
    """Return a line per host, and one per thing that is left because it is not moectl's."""
    width = max(len(one.host) for one in results)
    lines = []
    for one in results:
        lines.append(f"{one.host:{width}}  {_cleared_text(one, dry_run)}")
        lines += [f"{'':{width}}  left: {path} is not moectl's" for path in one.left]
        if dry_run:
            lines += [f"{'':{width}}  would go: {name} ({size_text(size)})" for name, size in one.items.items()]
    return "\n".join(lines)


def _cleared_text(one: Cleared, dry_run: bool) -> str:
    if one.error is not None:
        return f"failed  {one.error.message}"
    if not one.items:
        return f"ok      nothing of moectl's is there{f' ({one.root})' if one.root else ''}"
    what = f"{size_text(one.bytes)} in {one.root}"
    return f"{'found' if dry_run else 'ok   '}   {what}{'' if dry_run else ', removed'}"


def uninstall_json(results: list[Cleared], *, dry_run: bool) -> dict[str, Any]:
    """Return the document of `uninstall --json`; `items` are what is (or would be) removed, in bytes."""
    fields = ("host", "root", "bytes", "items", "left")
    hosts = [
        {**{name: getattr(one, name) for name in fields}, "ok": one.error is None, "error": error_json(one.error)}
        for one in results
    ]
    return {"schema": "moectl.uninstall/1", "dry_run": dry_run, "hosts": hosts}


@verb("Other")
@click.argument("hostfile_", metavar="[HOSTFILE]", required=False, shell_complete=suggest.files)
@click.option("-n", "--dry-run", is_flag=True, help="Show what would be removed.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@common
def uninstall(common: Common, dry_run: bool, yes: bool) -> None:
    """Remove from every host what moectl put there, and nothing else.

    That is the environment, the shards, wheels, logs and records under ~/.moectl, or under dir= in the hosts file.
    Files that are not moectl's are left and named. A host on which a worker runs is left as it is. Shard sets on this
    machine stay: `moectl list --prune`.

    \b
    Examples:
      moectl uninstall hosts.txt --dry-run
      moectl uninstall hosts.txt --yes
    """
    from moectl.cli.terminal import on_ctrl_t
    from moectl.cluster.deploy.uninstall import clear_hosts
    from moectl.hosts import connect
    from moectl.session.deployment import recall_hosts

    listed = recall_hosts(common.require_hosts())
    begin = time.monotonic()
    with on_ctrl_t(lambda: f"at work on {len(listed.hosts)} hosts since {time.monotonic() - begin:.0f} s", common.say):
        results = clear_hosts(listed.hosts, dry_run=True)
        if not dry_run and any(one.items for one in results):
            total = size_text(sum(one.bytes for one in results))
            if not (common.json or common.quiet):
                click.echo(uninstall_text(results, dry_run=True), err=True)
            confirm(f"Remove {total} from {sum(bool(one.items) for one in results)} of {len(results)} hosts?", yes=yes)
        if not dry_run:
            results = clear_hosts(listed.hosts, dry_run=False)
    common.print(uninstall_text(results, dry_run=dry_run), uninstall_json(results, dry_run=dry_run))
    connect.raise_failures({one.host: one.error for one in results}, then=".")


@verb("Prepare")
@click.argument("hostfile_", metavar="[HOSTFILE]", required=False, shell_complete=suggest.files)
@click.option(
    "--shards",
    metavar="DIR",
    shell_complete=suggest.shard_sets,
    help="The shard set (default: the newest that fits).",
)
@click.option(
    "--shard",
    "model",
    metavar="MODEL",
    shell_complete=suggest.models,
    help="Cut this model, and send each file at once.",
)
@cut_options
@click.option("-n", "--dry-run", is_flag=True, help="Show what would be copied.")
@flag("-j", "--jobs", rare=True, type=click.IntRange(1), help="Hosts at once (default: all).")
@click.option(
    "--only",
    multiple=True,
    metavar="HOST",
    shell_complete=suggest.hosts,
    help="Deploy to this host only (repeatable).",
)
@flag("--verify", rare=True, is_flag=True, help="Hash again what is there already.")
@flag("--relay/--no-relay", rare=True, default=True, help="Let hosts pass on to each other what all of them need.")
@flag("--force", rare=True, is_flag=True, help="Deploy although a host has too little memory.")
@flag(
    "--wheelhouse",
    rare=True,
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Wheels for hosts without internet; fetched here when DIR is not there.",
)
@flag("--no-check", rare=True, is_flag=True, help="Do not start the model once at the end to check its results.")
@flag("--wheelhouse-build", rare=True, is_flag=True, help="Fetch what the directory of --wheelhouse lacks.")
@common
def deploy(
    common: Common,
    shards: str | None,
    model: str | None,
    wheelhouse_build: bool,
    no_check: bool,
    **options: Any,
) -> None:
    """Bring every host its software and its shard, and verify them.

    Hosts get a virtual environment with this machine's versions of moectl, mlx and mlx-lm, and the files of their rank.
    The same command again resumes it. --shard cuts the model and deploys it at the same time. At the end the model is
    started once, and every host must compute what one process computed when the set was cut.

    This machine sends files that all hosts need only once: hosts take them from each other.

    \b
    Examples:
      moectl deploy hosts.txt --dry-run
      moectl deploy hosts.txt
      moectl deploy hosts.txt --shard databricks/dbrx-instruct --q-bits 4
      moectl deploy --only mac2 --verify
      moectl deploy --wheelhouse wheels
    """
    from moectl.hosts.connect import open_remotes
    from moectl.session.deployment import recall_hosts

    listed = recall_hosts(common.require_hosts())
    cut = {name: options.pop(name) for name in (*WANTED, "output", "revision", "tokenizer", "keep_source", "no_canary")}
    force, dry_run = options["force"], options["dry_run"]
    with open_remotes(listed.hosts) as remotes:
        options |= {"backend": listed.backend, "envs": listed.envs, "remotes": remotes}
        _fill_wheelhouse(common, listed, wheelhouse_build, options)
        if model is None:
            _refuse_alone(cut)
            name, result = _deploy_cut(common, listed, shards, options)
        else:
            refuse_both({"--shard": model}, {"--shards": shards})
            name, result = _deploy_growing(common, listed, model, cut, options)
        common.print(deploy_text(result, dry_run=dry_run), deploy_json(result, name, dry_run=dry_run))
        result.raise_failures()
        if not (dry_run or options["only"] or no_check):
            _check_results(common, remotes, force=force)


def _check_results(common: Common, remotes: Sequence[Remote], *, force: bool) -> None:
    """Start what was just deployed, and end it; raises when a rank computes something else."""
    from moectl.engine.protocol import RunOptions
    from moectl.model.manifest import read_manifest
    from moectl.server import attach
    from moectl.session import target as launch

    target = launch.find_deployment(None)
    if target is None or read_manifest(Path(target.shards)).canary is None:
        common.say(
            "Not checked: the set has no canary (it was cut with --no-canary, or none can be computed for its model)."
        )
    elif attach.is_loaded(target):
        common.say("Not checked: the model is running. After 'moectl stop', the next start checks it.")
    else:
        common.say("Starting it once to check its results")
        with launch.open_session(target, RunOptions(force=force), remotes=remotes) as session:
            off = session.model.deviation
        common.say(f"Checked: every rank computes what it should (off by {off:.1g} at most). Next: moectl run")


def _fill_wheelhouse(common: Common, listed: HostList, wanted: bool, options: dict[str, Any]) -> None:
    """Fetch the wheels that the hosts need, if --wheelhouse does not exist yet or --wheelhouse-build is given."""
    from moectl.cluster.deploy import deploy as deploy_

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

    platforms = wheelhouse.ask_platforms(listed.hosts, options["remotes"])
    wheelhouse.build(directory, platforms, deploy_.wanted_versions(), say=common.say)


def _refuse_alone(cut: dict[str, Any]) -> None:
    """Raise UsageError for a flag that says how to cut, without --shard."""
    for name in cut:
        if was_given(name):
            raise errors.UsageError(f"--{name.replace('_', '-')} needs --shard MODEL")


def _deploy_cut(common: Common, listed: HostList, shards: str | None, options: dict[str, Any]) -> tuple[str, Any]:
    """Deploy a shard set that exists; return its name and the result."""
    from moectl.cli.progress import progress
    from moectl.cluster.deploy import deploy as deploy_
    from moectl.planner.questions import check_hosts
    from moectl.shards import prepare
    from moectl.shards.tokenizer_files import find_stray

    directory, manifest = prepare.find_shards(shards) if shards else prepare.newest_shards(len(listed.hosts))
    common.say(f"{manifest.name} on {', '.join(host.address for host in listed.hosts)}")
    if stray := find_stray(directory, manifest):
        common.say(f"Warning: {stray}")
    force = options.pop("force")
    check_hosts(listed.hosts, manifest, force=force, warn=common.say, remotes=options["remotes"])
    with progress(quiet=common.quiet) as bars:
        on_event = _draw_deploy(common, bars)
        return manifest.name, deploy_.deploy(listed.hosts, directory, manifest, on_event=on_event, **options)


def _deploy_growing(
    common: Common, listed: HostList, model: str, cut: dict[str, Any], options: dict[str, Any]
) -> tuple[str, Any]:
    """Cut a model and deploy it at the same time; return the set's name and the result."""
    from moectl.cli.progress import progress
    from moectl.cluster.deploy.feed import shard_and_deploy
    from moectl.planner.questions import PlanOptions, choose_bits_on, place_on, refuse_early

    hosts, force = listed.hosts, options.pop("force")
    wanted = read_wanted(cut, len(hosts))
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
            choose_bits=None
            if force
            else choose_bits_on(hosts, PlanOptions(), say=common.say, remotes=options["remotes"]),
            choose_place=place_on(hosts, PlanOptions(), force=force, say=common.say, remotes=options["remotes"]),
        )
        try:
            fed = shard_and_deploy(shard, hosts, on_event=_draw_deploy(common, bars), **options)
        except errors.ShardsDiffer as error:
            hint = "choose another directory with -o, or make it again first: moectl shard --force"
            raise errors.with_hint(error, hint) from None
    if fed.made is None:
        common.say("Every host has failed. The files that are cut stay; the same command continues.")
    return fed.name, fed.result


def _draw_deploy(common: Common, bars: Bars) -> Callable[[Any], None]:
    """Return what draws a bar per host; their results are printed afterwards."""
    from moectl.cluster.deploy.task import Advanced, Planned, Working

    drawn: dict[str, Callable[[int], None]] = {}

    def on_event(event: Any) -> None:
        match event:
            case Planned(host=host, copy_bytes=size) if size:
                drawn[host] = bars(host, size)
            case Advanced(host=host, bytes=n) if host in drawn:
                drawn[host](n)
            case Working(host=host, what=what):
                common.say(f"[{host}] {what}")

    return on_event
