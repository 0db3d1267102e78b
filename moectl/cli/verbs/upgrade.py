"""`moectl upgrade`: this machine's moectl, and then that of the hosts."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moectl import __version__, errors
from moectl.cli import suggest
from moectl.cli.options import Common, at_terminal, common, refuse_both
from moectl.cli.target import find_deployment_or_hosts
from moectl.cli.verb import flag, verb
from moectl.errors import error_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moectl.cluster.deploy.installed import Installation
    from moectl.cluster.deploy.upgrade import Upgraded
    from moectl.hosts.hostfile import Host


@verb("Prepare")
@click.argument("hostfile_", metavar="[HOSTFILE]", required=False, shell_complete=suggest.files)
@click.option("--check", is_flag=True, help="Only say whether there is a newer version.")
@click.option("-n", "--dry-run", is_flag=True, help="Show what would be upgraded.")
@click.option("--hosts-only", is_flag=True, help="Leave this machine as it is; bring the hosts to its version.")
@click.option("--restart", is_flag=True, help="Stop the model before, and start the service again afterwards.")
@flag(
    "--wheelhouse",
    rare=True,
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    metavar="DIR",
    help="Wheels for hosts without internet.",
)
@click.option("--since", hidden=True, metavar="VERSION", help="This machine had this version before.")
@click.option("--start-service", hidden=True, is_flag=True, help="The service was stopped for this.")
@common
def upgrade(common: Common, **options: Any) -> None:
    """Upgrade moectl on this machine, and bring the hosts to the same version.

    This machine's is upgraded by what installed it: pipx, uv or pip. Hosts get its moectl, mlx and mlx-lm as by
    `deploy`; shards stay. The hosts are those of the deployment, or those that are named. A model that runs has to be
    stopped: moectl asks, or does so with --restart. The same command again goes on where a host has failed.

    \b
    Examples:
      moectl upgrade --check
      moectl upgrade --dry-run
      moectl upgrade --restart
      moectl upgrade hosts.txt --hosts-only
    """
    refuse_both({"--check": options["check"]}, {f"--{name}": options[name.replace("-", "_")] for name in _NOT_CHECKED})
    installation = newer = None
    if not options["hosts_only"]:
        from moectl.cluster.deploy.installed import find_installation

        installation = find_installation()
        newer = installation.find_newer()
    if options["check"]:
        told = f"moectl {newer} is there: moectl upgrade" if newer else f"moectl {__version__} is the newest."
        common.print(told, {**_document(newer), "hosts": []}, newer or __version__)
        return
    hosts = _find_hosts(common)
    if options["dry_run"]:
        _show(common, installation, newer, hosts, options["wheelhouse"])
        return
    if installation is not None and newer is not None:
        _upgrade_here(common, installation, newer, options)
    _upgrade_hosts(common, hosts, options)


_NOT_CHECKED = ("dry-run", "hosts-only", "restart", "wheelhouse")


def _find_hosts(common: Common) -> Sequence[Host]:
    """Return the hosts that are named, else those of the deployment, else none."""
    from moectl.session.deployment import recall_hosts

    deployment, listed = find_deployment_or_hosts(common)
    if listed:
        return recall_hosts(common.require_hosts()).hosts
    return [rank.host for rank in deployment.ranks] if deployment else []


def _document(newer: str | None) -> dict[str, Any]:
    return {"schema": "moectl.upgrade/1", "version": __version__, "newer": newer}


def _show(
    common: Common, installation: Installation | None, newer: str | None, hosts: Sequence[Host], wheelhouse: Path | None
) -> None:
    """Print what would be done."""
    from moectl.server.client import find_running

    lines = [f"this machine  {__version__}, the newest"]
    if newer and installation:
        lines = [f"this machine  {__version__} → {newer}: {shlex.join(installation.upgrade)}"]
    elif installation is None:
        lines = [f"this machine  {__version__}, left as it is"]
    results = _run_hosts(common, hosts, dry_run=True, wheelhouse=wheelhouse)
    if newer:
        lines += [f"{one.host}  {one.before or 'nothing'} → {newer}" for one in results if one.error is None]
        lines += [f"{one.host}  failed  {one.error.message}" for one in results if one.error]
    elif results:
        lines.append(hosts_text(results, dry_run=True))
    if find_running():
        lines.append("The model runs: it would have to be stopped (--restart).")
    common.print("\n".join([*lines, "Dry run: nothing was changed."]), hosts_json(results, newer, dry_run=True))
    _raise_failures(results)


def _upgrade_here(common: Common, installation: Installation, newer: str, options: dict[str, Any]) -> None:
    """Upgrade this machine's moectl, and go on as the new one: what this process would still load has changed."""
    from moectl.cluster.deploy.installed import MODULE

    was_service = _stop(common, restart=options["restart"])
    common.say(f"Upgrading moectl {__version__} to {newer}: {shlex.join(installation.upgrade)}")
    try:
        after = installation.run()
    except errors.MoectlError:
        if was_service:
            _start_service(common)
        raise
    common.say(f"This machine has moectl {after} now.")
    words = ["--hosts-only", "--since", __version__]
    words += ["--restart"] * options["restart"] + ["--start-service"] * (was_service or options["start_service"])
    words += ["--wheelhouse", str(options["wheelhouse"])] if options["wheelhouse"] else []
    words += ["--json"] * common.json + ["--quiet"] * common.quiet
    words += ["--hosts", common.hosts] if common.hosts else []
    words += ["--hostfile", common.hostfile] if common.hostfile else []
    sys.stdout.flush()
    os.execv(sys.executable, [*MODULE, "upgrade", *words])


def _upgrade_hosts(common: Common, hosts: Sequence[Host], options: dict[str, Any]) -> None:
    starts = options["start_service"]
    results = _run_hosts(common, hosts, dry_run=True, wheelhouse=options["wheelhouse"])
    if any(one.changed for one in results):
        starts = _stop(common, restart=options["restart"]) or starts
        results = _run_hosts(common, hosts, dry_run=False, wheelhouse=options["wheelhouse"])
    since = options["since"]
    here = f"this machine  {f'{since} → {__version__}' if since else f'{__version__}, as before'}"
    text = "\n".join([here, *([hosts_text(results, dry_run=False)] if results else [])])
    common.print(text, {**hosts_json(results, None, dry_run=False), "since": since})
    if starts and any(one.error for one in results):
        common.say("The service stays stopped, as versions differ. After the upgrade: moectl service start")
    _raise_failures(results)
    if starts:
        _start_service(common)


def _run_hosts(common: Common, hosts: Sequence[Host], *, dry_run: bool, wheelhouse: Path | None) -> list[Upgraded]:
    from moectl.cluster.deploy.task import Working
    from moectl.cluster.deploy.upgrade import upgrade_hosts
    from moectl.hosts.connect import open_remotes

    if not hosts:
        return []

    def on_event(event: object) -> None:
        if isinstance(event, Working):
            common.say(f"[{event.host}] {event.what}")

    with open_remotes(hosts) as remotes:
        return upgrade_hosts(hosts, remotes, dry_run=dry_run, on_event=on_event, wheelhouse=wheelhouse)


def _stop(common: Common, *, restart: bool) -> bool:
    """Stop what runs on this machine, once that is allowed; return whether it was the service.

    Raises StateError where it is not allowed, and what stopping raises.
    """
    from moectl.cluster.service import service as service_
    from moectl.server.client import Client, find_running

    manager = service_.find_manager()
    found = service_.find_service(manager)
    is_up = found is not None and service_.is_up(manager.look(found.at))
    running = find_running()
    if not running and not is_up:
        return False
    if not restart:
        if not at_terminal():
            raise errors.StateError(
                "the model runs, and an upgrade changes what it runs from", hint="moectl stop before it, or --restart"
            )
        if not click.confirm("The model runs. Stop it for the upgrade?", err=True):
            common.say("Nothing was changed.")
            raise click.exceptions.Exit(1)
    if not is_up and running:
        common.say("What runs is not started again by itself: it was not the service.")
    for path in running:
        Client(path).stop(_GRACE_S)
    if found is not None and is_up and manager.look(found.at).state != "stopped" and not manager.needs_root(found.at):
        manager.stop(found.at)
    return is_up


_GRACE_S = 10.0  # for answers in progress, as `moectl stop`


def _start_service(common: Common) -> None:
    from moectl.cli.verbs.service import start_service

    common.say(start_service(common, yes=True)[0])


def _raise_failures(results: Sequence[Upgraded]) -> None:
    from moectl.hosts.connect import raise_failures

    raise_failures({one.host: one.error for one in results})


def hosts_text(results: Sequence[Upgraded], *, dry_run: bool) -> str:
    """Return a line per host."""
    width = max(len(one.host) for one in results)
    return "\n".join(f"{one.host:{width}}  {_outcome(one, dry_run)}" for one in results)


def _outcome(one: Upgraded, dry_run: bool) -> str:
    if one.error is not None:
        return f"failed  {one.error.message}"
    if not one.changed:
        return f"ok      {one.after}, as before"
    same = one.before == one.after
    change = f"{one.after}, other files" if same else f"{one.before or 'nothing'} → {one.after}"
    return f"{'would  ' if dry_run else 'ok     '} {change}"


def hosts_json(results: Sequence[Upgraded], newer: str | None, *, dry_run: bool) -> dict[str, Any]:
    """Return the document of --json; `changed` is what would be in a dry run."""
    fields = ("host", "before", "after", "changed")
    hosts = [
        {**{name: getattr(one, name) for name in fields}, "ok": one.error is None, "error": error_json(one.error)}
        for one in results
    ]
    return {**_document(newer), "dry_run": dry_run, "hosts": hosts}
