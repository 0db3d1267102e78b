"""The verbs that observe and clear up: status, logs, list, uninstall."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from moectl import errors, suggest
from moectl.flags import Common, Duration, common
from moectl.verb import verb

if TYPE_CHECKING:
    from moectl.cluster.logs import Reader
    from moectl.cluster.sets import Listing, ShardSet
    from moectl.cluster.status import Observer, Status
    from moectl.hosts.hostfile import Host
    from moectl.session.deployment import Deployment

WATCH_S = 2.0
WATCH_LOOK_S = 6.0  # for a host to answer before it is shown as down
LINES = 50  # of each log, unless told otherwise


@verb("Observe")
@click.option("-w", "--watch", is_flag=True, help="Go on showing it, until Ctrl-C.")
@common
def status(common: Common, watch: bool) -> None:
    """Show what each host is doing.

    Asks the hosts of the deployment over SSH, or those that --hosts or --hostfile names, and the controllers on this
    machine. A host is running, idle, down, or unknown (it was reached and could not tell). TOKENS and TOK/S are the
    whole model's; LINK is what each rank sends for them, counted from the model's shape. `moectl ps` is the same.

    \b
    Examples:
      moectl status
      moectl status --watch
      moectl ps --json | jq '.hosts[] | select(.state == "down")'
    """
    from moectl.cluster.status import Observer
    from moectl.live import can_redraw, on_ctrl_t

    deployment, hosts = _find_hosts(common)
    begin = time.monotonic()
    redraws = watch and can_redraw(sys.stdout) and not (common.json or common.quiet)
    with (
        on_ctrl_t(lambda: f"asking the hosts since {time.monotonic() - begin:.1f} s", _mute if redraws else common.say),
        Observer(deployment, hosts, **({"limit_s": WATCH_LOOK_S} if watch else {})) as observer,
    ):
        if redraws:
            _show_live(common, observer)
        if watch:
            _show_changes(common, observer)
        _print_status(common, observer.look(), deployment is not None or bool(hosts))


def _find_hosts(common: Common) -> tuple[Deployment | None, tuple[Host, ...]]:
    """Return the deployment to look at; or hosts that are named and are not its own."""
    from moectl.session.deployment import find_deployment

    deployment = find_deployment()
    named = common.hosts is not None or common.hostfile is not None
    listed = common.host_list() if named or deployment is None else None
    if listed is None:
        return deployment, ()
    if deployment is not None and [r.host.address for r in deployment.ranks] == [h.address for h in listed.hosts]:
        return deployment, ()
    return None, listed.hosts


def _print_status(common: Common, found: Status, asked: bool) -> None:
    from moectl import report_observe
    from moectl.hosts import connect

    if not (found.rows or asked or found.silent):
        raise errors.NotDeployed("nothing is running, and no model is deployed.", hint="moectl deploy hosts.txt")
    common.print(report_observe.status_text(found), report_observe.status_json(found))
    connect.raise_failures(found.errors, then=".")


def _mute(text: str) -> None:
    """Say nothing: a line on the terminal would disturb the picture, which tells it all."""


def _show_live(common: Common, observer: Observer) -> None:
    """Look again and again and draw what is seen in the same place; ends by Ctrl-C only."""
    from moectl.live import LiveView

    with LiveView(sys.stdout) as view:
        for text in _pictures(common, observer):
            view.draw(text)


def _show_changes(common: Common, observer: Observer) -> None:
    """Look again and again and print a line per change, or every look as JSON; ends by Ctrl-C only."""
    before: Status | None = None
    for found in _looks(observer):
        _print_changes(common, found, before)
        before = found


def _looks(observer: Observer) -> Iterator[Status]:
    while True:
        begin = time.monotonic()
        yield observer.look()
        time.sleep(max(0.1, WATCH_S - (time.monotonic() - begin)))


def _pictures(common: Common, observer: Observer) -> Iterator[str]:
    from moectl import report_observe, text as text_
    from moectl.text import colour_wanted

    coloured = colour_wanted(common.color, sys.stdout)
    yield "Asking the hosts…"
    for found in _looks(observer):
        text = f"{report_observe.status_text(found)}\n\n{text_.clock_text(found.time_s)}  Ctrl-C leaves."
        yield text if coloured else click.unstyle(text)


def _print_changes(common: Common, found: Status, before: Status | None) -> None:
    from moectl import report_observe

    if common.json:
        click.echo(json.dumps(report_observe.status_json(found)))
        return
    for line in report_observe.changed_lines(found, before):
        click.echo(line)


@verb("Observe")
@click.argument("names", metavar="[HOST]...", nargs=-1, shell_complete=suggest.hosts)
@click.option("-f", "--follow", is_flag=True, help="Go on with what is appended, until Ctrl-C.")
@click.option("-n", "--tail", type=click.IntRange(0), metavar="N", help=f"Last lines of each (default: {LINES}).")
@click.option("--since", type=Duration(), metavar="TIME", help="Only what is not older: 30s, 10m, 2h.")
@click.option("-t", "--timestamps", is_flag=True, help="Show when each line was written, in UTC.")
@common
def logs(common: Common, names: tuple[str, ...], **options: Any) -> None:
    """Show the workers' logs, in order of time.

    HOST is a host of the deployment, `localhost` for ranks on this machine, or `controller`. Without it: all of the
    deployment, with its controller, and what runs here. Prompts and answers are in no log.

    \b
    Examples:
      moectl logs mac3 -n 20 -t
      moectl logs --follow
      moectl logs --since 10m --json
    """
    from moectl.cluster.logs import Asked, Reader, find_sources
    from moectl.live import on_ctrl_t

    deployment, hosts = _find_hosts(common)
    if hosts:
        listed = ", ".join(host.address for host in hosts)
        raise errors.NotDeployed(f"no model is deployed on {listed}.", hint="moectl deploy")
    sources = find_sources(deployment, names)
    if not sources:
        raise errors.NotDeployed("nothing has been logged: no model ran here, and none is deployed.", hint="moectl run")
    tail = LINES if options["tail"] is None and options["since"] is None else options["tail"]
    reader = Reader(sources, Asked(tail, options["since"], options["follow"]))
    where = f"{len(sources)} log{'s'[: len(sources) > 1]}"
    with on_ctrl_t(lambda: f"{reader.lines} lines of {where}", common.say), reader:
        _print_logs(common, reader, {source.label for source in sources}, options)


def _print_logs(common: Common, reader: Reader, labels: set[str], options: dict[str, Any]) -> None:
    from moectl import report_observe
    from moectl.cluster.logs import Line
    from moectl.hosts import connect

    failed: dict[str, errors.MoectlError] = {}
    kept: list[Line] = []
    for item in reader.read():
        if not isinstance(item, Line):
            common.say(f"[{item.label}] {item.text}")
            if item.error is not None:
                failed[item.label] = item.error
        elif not common.json:
            click.echo(report_observe.line_text(item, prefix=len(labels) > 1, timestamps=options["timestamps"]))
        elif options["follow"]:
            click.echo(json.dumps({"schema": "moectl.logs/1", **report_observe.line_json(item)}))
        else:
            kept.append(item)
    if common.json and not options["follow"]:
        click.echo(json.dumps(report_observe.logs_json(kept, failed)))
    connect.raise_failures({**dict.fromkeys(reader.hosts), **failed}, then=".")


@verb("Observe", name="list")
@click.option("--prune", is_flag=True, help="Delete old shard sets on this machine.")
@click.option("-n", "--dry-run", is_flag=True, help="With --prune: only show what would go.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@common
def list_(common: Common, prune: bool, dry_run: bool, yes: bool) -> None:
    """List the shard sets on this machine and the current deployment, with sizes.

    --prune deletes sets that are complete, neither deployed nor running, and not the newest for their number of hosts;
    those outside moectl's own directories stay. Hosts are not asked: what they hold is what was deployed.

    \b
    Examples:
      moectl list
      moectl list --prune --dry-run
      moectl list --json | jq '.sets[].bytes'
    """
    from moectl import report_observe
    from moectl.cluster import sets as listing

    found = listing.make_listing()
    if prune:
        _prune(common, found, dry_run=dry_run, yes=yes)
        return
    if dry_run or yes:
        raise errors.UsageError("--dry-run and --yes are for --prune", hint="moectl list --prune")
    names = "\n".join(one.name for one in found.sets)
    common.print(report_observe.list_text(found), report_observe.list_json(found), names)


def _prune(common: Common, found: Listing, *, dry_run: bool, yes: bool) -> None:
    from moectl import report_observe
    from moectl.cluster import sets as listing
    from moectl.text import size_text

    old = listing.choose_old(found)
    total = size_text(sum(one.bytes for one in old))
    if not old:
        common.print("There is nothing old to delete.", report_observe.list_json(found, ()))
        return
    for one in old:
        common.say(f"{one.directory}  {size_text(one.bytes)}")
    if dry_run:
        text = f"Dry run: nothing was deleted. {total} would be."
        common.print(text, {**report_observe.list_json(found, ()), "would_prune": [one.name for one in old]})
        return
    _confirm(f"Delete {_count(old)}, {total}?", yes=yes)
    for one in old:
        listing.delete_set(one)
    common.print(f"Deleted {_count(old)}, {total}.", report_observe.list_json(listing.make_listing(), old))


def _count(sets: tuple[ShardSet, ...]) -> str:
    return f"{len(sets)} shard set{'s'[: len(sets) > 1]}"


def _confirm(question: str, *, yes: bool) -> None:
    """Ask; exit 1 on "no". Raises UsageError where there is nobody to ask."""
    if yes:
        return
    if sys.stdin is None or not sys.stdin.isatty():
        raise errors.UsageError(f"{question} Nobody is there to say.", hint="use --yes to skip confirmation")
    if not click.confirm(question, err=True):
        click.echo("Nothing was deleted.", err=True)
        raise click.exceptions.Exit(1)


@verb("Other")
@click.argument("hostfile_", metavar="[HOSTFILE]", required=False, shell_complete=suggest.files)
@click.option("-n", "--dry-run", is_flag=True, help="Show what would be removed.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@common
def uninstall(common: Common, hostfile_: str | None, dry_run: bool, yes: bool) -> None:
    """Remove from every host what moectl put there, and nothing else.

    That is the environment, the shards, wheels, logs and records under ~/.moectl, or under dir= in the hosts file.
    Files that are not moectl's are left and named. A host on which a worker runs is left as it is. Shard sets on this
    machine stay: `moectl list --prune`.

    \b
    Examples:
      moectl uninstall hosts.txt --dry-run
      moectl uninstall hosts.txt --yes
    """
    from moectl import report_observe
    from moectl.cluster.deploy.uninstall import clear_hosts
    from moectl.hosts import connect
    from moectl.live import on_ctrl_t
    from moectl.session.deployment import recall_hosts
    from moectl.text import size_text

    if hostfile_:
        common.hostfile = hostfile_
    listed = common.host_list(required=True)
    assert listed is not None
    listed = recall_hosts(listed)
    begin = time.monotonic()
    with on_ctrl_t(lambda: f"at work on {len(listed.hosts)} hosts since {time.monotonic() - begin:.0f} s", common.say):
        results = clear_hosts(listed.hosts, dry_run=True)
        if not dry_run and any(one.items for one in results):
            total = size_text(sum(one.bytes for one in results))
            if not (common.json or common.quiet):
                click.echo(report_observe.uninstall_text(results, dry_run=True), err=True)
            _confirm(f"Remove {total} from {sum(bool(one.items) for one in results)} of {len(results)} hosts?", yes=yes)
        if not dry_run:
            results = clear_hosts(listed.hosts, dry_run=False)
    common.print(
        report_observe.uninstall_text(results, dry_run=dry_run), report_observe.uninstall_json(results, dry_run=dry_run)
    )
    connect.raise_failures({one.host: one.error for one in results}, then=".")
