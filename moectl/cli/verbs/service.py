"""`moectl service`: `serve` that launchd or systemd starts, at boot or at login."""

from __future__ import annotations

import copy
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moectl import errors
from moectl.cli.flag_words import list_words
from moectl.cli.options import Common, at_terminal, common
from moectl.cli.root import become_root, is_wanted
from moectl.cli.verb import EXIT_CODES, verb
from moectl.cli.verbs.serve import base_url, read_visitors, serve
from moectl.text import count_text, printable, time_text

if TYPE_CHECKING:
    from moectl.cluster.service.job import Manager, ServiceJob, Standing
    from moectl.cluster.service.service import Service

NONE = "No service is installed."
_LASTING = (2, 4)  # exit codes of what does not mend itself
# Flags of `serve` that make no sense here, or that this verb has itself.
_NOT_FOR_A_SERVICE = {"detach", "json", "quiet", "verbose", "color"}
_OF_ALL = {"action", "yes", "hosts", "hostfile", "json", "quiet", "verbose", "color"}  # flags that every action takes


@verb("Use")
@click.argument(
    "action", metavar="install|start|status|remove", type=click.Choice(["install", "start", "status", "remove"])
)
@click.option(
    "--at",
    type=click.Choice(["login", "boot"]),
    default="login",
    show_default=True,
    help="When it starts; boot: before anyone logs in.",
)
@click.option("-n", "--dry-run", is_flag=True, help="For install: only show the file and the commands.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@common
def service(common: Common, action: str, at: str, dry_run: bool, yes: bool, **_: Any) -> None:
    """Start `moectl serve` with this machine: by launchd on a Mac, by systemd on Linux.

    install takes the flags of `moectl serve`, checks them, and starts it: now, and at each login or boot. What setup
    did and a restart of a Mac has lost is done again before that. The service is started again 30 s after it has
    failed, but not after `moectl stop`: then start starts it. --at boot needs root on a Mac, and asks before that.

    \b
    Examples:
      moectl service install --hostfile hosts.txt --port 8080
      moectl service install --at boot --host 0.0.0.0 --api-key-file key.txt
      moectl service status
      moectl service remove
    """
    from moectl.cluster.service import service as service_

    ctx = click.get_current_context()
    if action != "install":
        _refuse_flags(ctx, action)
    manager = service_.find_manager()
    found = service_.find_service(manager)
    match action:
        case "install":
            _install(common, manager, found, _make_job(ctx, at), dry_run=dry_run, yes=yes)
        case "start":
            common.print(*start_service(common, yes=yes))
        case "status":
            _show(common, manager, found)
        case _:
            _remove(common, manager, found, yes=yes)


def _flags_of_serve() -> list[click.Parameter]:
    return [param for param in serve.params if param.name not in _NOT_FOR_A_SERVICE]


def _take_flags_of_serve() -> None:
    """Give this verb the flags of `serve`: in --help-all and at Tab, so that both verbs have the same ones."""
    own = {param.name for param in service.params}
    for param in _flags_of_serve():
        if param.name not in own:
            taken: Any = copy.copy(param)
            taken.rare, taken.group = True, "For install: the flags of serve"
            service.params.append(taken)


_take_flags_of_serve()


def _refuse_flags(ctx: click.Context, action: str) -> None:
    """Raise UsageError for a flag on the command line that only install has."""
    params = {param.name: param for param in ctx.command.params if param.name not in _OF_ALL}
    for name, param in params.items():
        source = ctx.get_parameter_source(name or "")
        if source is click.core.ParameterSource.COMMANDLINE:
            raise errors.UsageError(f"{param.opts[-1]} is for 'moectl service install', not for {action}")


def _make_job(ctx: click.Context, at: str) -> ServiceJob:
    """Return what these flags ask for, once `serve` has read them. Raises UsageError, NotDeployed, NotSharded."""
    from moectl.cluster.service.job import make_job
    from moectl.server.sockets import find_interface

    given = list_words(ctx, _flags_of_serve())
    with serve.make_context("serve", given, parent=ctx.parent) as inner:  # it adds its variables and configuration
        flags = inner.params
        if flags["api_key"] is not None:
            raise errors.UsageError(
                "the key would stand in a file that other users can read",
                hint="write the key into a file that only you can read, and name it: --api-key-file FILE",
            )
        if flags["detach"]:
            raise errors.UsageError("a service does not detach", hint="take detach out of the configuration of serve")
        if flags["hostfile"] == "-":
            raise errors.UsageError("a service has no standard input", hint="write a hosts file: --hostfile FILE")
        if flags["port"] == 0:
            raise errors.UsageError("clients could not find a service on any free port", hint="choose a --port")
        keys, _, _ = read_visitors(flags)
        find_interface(flags["host"], flags["port"], has_key=bool(keys))
        words = list_words(inner, _flags_of_serve())
        words += _check_model(flags)
        return make_job(at, words, base_url(flags["host"], flags["port"]))


def _check_model(flags: dict[str, Any]) -> list[str]:
    """Raise NotDeployed or NotSharded where there is nothing to serve; return words for a hosts file found here."""
    from moectl.hosts.hostfile import find_hosts
    from moectl.session import target
    from moectl.shards.prepare import find_shards

    if flags.get("shards"):
        find_shards(flags["shards"])
    if any(flags.get(name) for name in ("shards", "local", "model", "demo")):
        return []
    listed = find_hosts(flags["hosts"], flags["hostfile"])
    if target.find_deployment(listed) is None:
        raise errors.NotDeployed(
            "no model is named and none is deployed: it would serve the demo, a toy", hint="moectl deploy hosts.txt"
        )
    if flags["hosts"] is None and flags["hostfile"] is None and Path("hosts.txt").is_file():
        return ["--hostfile", str(Path("hosts.txt").absolute())]  # the service starts in another directory
    return []


def _install(
    common: Common, manager: Manager, before: Service | None, job: ServiceJob, *, dry_run: bool, yes: bool
) -> None:
    from moectl.cluster.service import service as service_

    path, text = manager.path(job.at), manager.render(job).decode()
    document = {**_document(manager, job.at, job), "file": text, "dry_run": dry_run}
    same = before is not None and (before.at, before.text) == (job.at, text.encode())
    if dry_run:
        commands = [f"As root:\n{_root_text(manager, 'install')}"] if manager.needs_root(job.at) else []
        common.print("\n".join([f"{path}:", text, *commands, "Nothing was changed."]), document, text.rstrip("\n"))
        return
    manager.refuse(job.at)
    if before is not None and same and service_.is_up(manager.look(job.at)):
        common.print(f"The service is installed already, and nothing has changed: {job.url}", document, job.url)
        return
    if before is not None and not same and not _may_replace(common, before, text, yes=yes):
        return
    _warn_of_others(common, before, manager)
    _warn_of_agent(common)
    places = {job.at, before.at} if before is not None else {job.at}
    if not all(_allow(common, manager, at, "install", yes=yes) for at in sorted(places) if manager.needs_root(at)):
        return
    told = service_.install(manager, job, before)
    if told:
        common.say(told)
    common.print(
        f"{'Installed again' if before else 'Installed'} in {path}. It loads now, and then serves {job.url}.\n"
        "'moectl service status' says how it stands, 'moectl logs controller' what it says.",
        document,
        job.url,
    )


def _may_replace(common: Common, before: Service, text: str, *, yes: bool) -> bool:
    """Show what a new file changes, and ask."""
    import difflib

    lines = difflib.unified_diff(
        before.text.decode("utf-8", "replace").splitlines(), text.splitlines(), "installed", "new", lineterm="", n=0
    )
    common.say("\n".join(map(printable, lines)))
    if not yes and not at_terminal():
        raise errors.UsageError(
            "another service is installed, and standard input is no terminal", hint="use --yes to replace it"
        )
    if yes or click.confirm("Replace the service that is installed?", err=True):
        return True
    common.say("Nothing was changed.")
    return False


def _warn_of_others(common: Common, before: Service | None, manager: Manager) -> None:
    from moectl.server.client import find_running

    if find_running() and not (before and manager.look(before.at).pid):
        common.say("Warning: a controller runs on this machine. The service waits until it has ended: moectl stop")


def _warn_of_agent(common: Common) -> None:
    """Warn where only this login's ssh agent opens a host: at boot there is none."""
    from moectl.hosts.connect import on_each, open_remotes
    from moectl.session.deployment import find_deployment

    agent = os.environ.get("SSH_AUTH_SOCK")
    deployment = find_deployment()
    hosts = [rank.host for rank in deployment.ranks if not rank.host.is_local] if deployment else []
    if not agent or not hosts:
        return
    del os.environ["SSH_AUTH_SOCK"]
    try:
        with open_remotes(hosts) as remotes:
            found = on_each(hosts, lambda place, _: remotes[place].run(["true"]), limit_s=20)
    finally:
        os.environ["SSH_AUTH_SOCK"] = agent
    names = [host.name for host, one in zip(hosts, found, strict=True) if isinstance(one, errors.AuthFailed)]
    if names:
        common.say(
            f"Warning: only the ssh agent of this login opens {', '.join(names)}, and the service may have none. "
            "Give it a key file without a passphrase (IdentityFile in ~/.ssh/config)."
        )


def start_service(common: Common, *, yes: bool) -> tuple[str, dict[str, Any]]:
    """Start the service that is installed; return what a person and what a script should know. Raises StateError."""
    from moectl.cluster.service import service as service_

    manager = service_.find_manager()
    found = service_.require_service(manager)
    manager.refuse(found.at)
    document = _document(manager, found.at, found.job)
    if service_.is_up(manager.look(found.at)):
        return "The service runs already.", document
    if not _allow(common, manager, found.at, "start", yes=yes):
        return "", document
    manager.start(found.at)
    return "Started: it loads now. 'moectl service status' says how it stands.", document


def _remove(common: Common, manager: Manager, found: Service | None, *, yes: bool) -> None:
    from moectl.cluster.service import service as service_

    document = {"schema": "moectl.service/1", "installed": False, "removed": found is not None}
    if found is None:
        common.print(NONE, document)
        return
    if not _allow(common, manager, found.at, "remove", yes=yes):
        return
    service_.remove(manager, found)
    if manager.name == "systemd" and found.job is not None and found.job.at == "boot":
        common.say("This user still lingers. Where nothing else needs that: loginctl disable-linger")
    common.print(f"The service has ended, and {found.path} is removed.", document)


def _allow(common: Common, manager: Manager, at: str, action: str, *, yes: bool) -> bool:
    """Return whether it may go on; where only root can, ask before that and become root."""
    from moectl.cluster.service.launchd import Launchd
    from moectl.hosts.connect import make_remote
    from moectl.hosts.hostfile import Host

    if not manager.needs_root(at):
        return True
    if not yes and not at_terminal():
        raise errors.UsageError(
            f"{action} asks before it runs commands as root, and standard input is no terminal",
            hint="use --yes to skip the question",
        )
    shown = _root_text(manager, action)
    if not is_wanted(common, shown, count_text(shown.count("\n") + 1, "command"), [Host("localhost")], yes=yes):
        return False
    assert isinstance(manager, Launchd)
    manager.sudo = become_root([make_remote(Host("localhost"))])
    return True


def _root_text(manager: Manager, action: str) -> str:
    from moectl.cluster.service.launchd import root_commands

    return "\n".join(f"  sudo {shlex.join(argv)}" for argv in root_commands(action))


def _show(common: Common, manager: Manager, found: Service | None) -> None:
    from moectl.cluster.service import service as service_

    if found is None:
        common.print(NONE, {"schema": "moectl.service/1", "installed": False})
        return
    standing = manager.look(found.at)
    document = {
        **_document(manager, found.at, found.job),
        "as_written": service_.is_as_written(manager, found),
        **{name: getattr(standing, name) for name in ("state", "enabled", "pid", "up_s", "exit_code", "starts")},
    }
    lines = list(_status_lines(manager, found, standing))
    if not document["as_written"]:
        lines.append(f"{found.path} is not what moectl wrote; 'moectl service install' with its flags writes it again.")
    common.print("\n".join(lines), document)


def _status_lines(manager: Manager, found: Service, standing: Standing) -> list[str]:
    """Return how the service stands, and what to do where it does not run."""
    job = found.job
    url = job.url if job else "an address that is not known"
    lines = [f"{standing.state:8}  {url}  ({manager.name}, at {job.at if job else found.at})"]
    if standing.pid:
        up = f", for {time_text(standing.up_s)}" if standing.up_s is not None else ""
        lines[0] += f"  pid {standing.pid}{up}"
    if not standing.enabled:
        lines.append(f"It is disabled in {manager.name}, and does not start by itself: moectl service install")
    if standing.exit_code:
        lines.append(f"It ended with {standing.exit_code} ({EXIT_CODES.get(standing.exit_code, 'no code of moectl')}).")
        if job and (last := _last_line(Path(job.log))):
            lines.append(f"Its last words: {last}")
    if standing.state == "waiting":
        lines.append("It is started again every 30 s. 'moectl logs controller' says more.")
    elif standing.state in ("failed", "stopped"):
        mend = "mend that, then: " if standing.exit_code in _LASTING else ""
        lines.append(f"To start it, {mend}moectl service start")
    return lines


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    told = [line.strip() for line in lines if line.strip()]
    return printable(next((line for line in reversed(told) if line.startswith("Error:")), told[-1] if told else ""))


def _document(manager: Manager, at: str, job: ServiceJob | None) -> dict[str, Any]:
    """Return what all documents of this verb have in common."""
    rest = {"url": job.url, "command": list(job.serve), "log": job.log} if job else {}
    where = {"manager": manager.name, "at": job.at if job else at, "path": str(manager.path(at))}
    return {"schema": "moectl.service/1", "installed": True, **where, **rest}
