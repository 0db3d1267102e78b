"""The verb that sets Macs up for each other: setup.

Imports of the working modules are inside the commands, so that `--help` and Tab load click only.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moectl import errors, suggest
from moectl.cli_target import refuse_both
from moectl.flags import Common, common
from moectl.verb import verb

if TYPE_CHECKING:
    from moectl.cluster.setup.plan import SetupPlan, Wish
    from moectl.cluster.setup.run import OnCommand, Sudo
    from moectl.hosts.hostfile import Host, HostList
    from moectl.hosts.remote import Remote


@verb("Prepare")
@click.argument("hostfile_", metavar="[HOSTFILE]", required=False, shell_complete=suggest.files)
@click.option("-n", "--dry-run", is_flag=True, help="Only show what would be run: the default.")
@click.option("--apply", is_flag=True, help="Run the commands on the hosts, with sudo; asks first.")
@click.option("--undo", is_flag=True, help="Take back what --apply ran, last command first; asks first.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the new hosts file; MLX's JSON where the name ends in .json.",
)
@click.option("--force", is_flag=True, help="Overwrite the file of -o.")
@click.option(
    "--over",
    type=click.Choice(["thunderbolt", "ethernet"]),
    default="thunderbolt",
    show_default=True,
    help="ethernet changes no network: it writes the addresses that hosts have.",
)
@click.option(
    "--backend",
    type=click.Choice(["auto", "ring", "jaccl", "jaccl-ring"]),
    default="auto",
    show_default=True,
    help="ring is TCP; jaccl is RDMA over a mesh, jaccl-ring over a ring.",
)
@click.option("--no-sleep", is_flag=True, help="Also keep the Macs from sleeping (pmset).")
@click.option(
    "--wired-limit",
    metavar="SIZE",
    help="Also let their GPUs hold so much memory, such as 112GiB; auto: what the newest shard set needs.",
)
@common
def setup(common: Common, hostfile_: str | None, **options: Any) -> None:
    """Set up Macs that are cabled by Thunderbolt: addresses, and a hosts file.

    Asks every Mac how it is cabled, proposes RDMA over a mesh where every two are cabled, RDMA over a ring, or TCP over
    a ring, and shows every command. Nothing is changed without --apply, and then --undo takes it back. Addresses and
    files are those that mlx.distributed_config would give. Hosts that are no Macs are left as they are.

    \b
    Examples:
      moectl setup hosts.txt
      moectl setup hosts.txt --apply -o cluster.txt && moectl doctor cluster.txt
      moectl setup --undo
    """
    refuse_both({"--undo": options["undo"]}, {"--apply": options["apply"], "--output": options["output"]})
    refuse_both({"--dry-run": options["dry_run"]}, {"--apply": options["apply"]})
    changes = (options["apply"] or options["undo"]) and not options["dry_run"]
    if changes and not (options["yes"] or _at_terminal()):
        flag = "--undo" if options["undo"] else "--apply"
        raise errors.UsageError(
            f"{flag} asks before it changes anything, and standard input is no terminal",
            hint="use --yes to skip the question",
        )
    source = click.get_current_context().get_parameter_source("hostfile")
    typed = source is not None and source.name == "COMMANDLINE"  # the variable and the configuration name no hosts here
    if hostfile_:
        common.hostfile = hostfile_
    if options["undo"]:
        named = bool(hostfile_ or typed or common.hosts)
        _undo(common, named=named, dry_run=options["dry_run"], yes=options["yes"])
    else:
        _set_up(common, options)


def _at_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _set_up(common: Common, options: dict[str, Any]) -> None:
    from moectl import setup_report
    from moectl.cluster.setup import run as setup_run
    from moectl.cluster.setup.plan import plan_setup

    hosts = common.host_list(required=True)
    assert hosts is not None
    output, wish = options["output"], _wish(options, len(hosts.hosts))
    if output is not None:
        _check_output(output, force=options["force"])
    with setup_run.open_remotes(hosts.hosts) as remotes:
        common.say(f"Looking at {', '.join(host.address for host in hosts.hosts)}")
        plan = plan_setup(setup_run.look(hosts.hosts, remotes), hosts, wish)
        content = setup_report.file_text(plan, str(output)) if output else ""  # what it cannot hold is told first
        count = _apply(common, plan, hosts, wish, remotes, yes=options["yes"]) if options["apply"] else 0
    if count is None:
        return
    if output is not None:
        _write(output, content, force=options["force"])
    state = "applied" if options["apply"] else "planned"
    document = setup_report.plan_json(plan, state=state, written=str(output) if output else None, run=count)
    common.print(_result_text(common, plan, output, applied=count if options["apply"] else None), document)


def _wish(options: dict[str, Any], world_size: int) -> Wish:
    from moectl.cluster.setup.plan import Wish
    from moectl.hosts.hostfile import parse_size

    limit = options["wired_limit"]
    wish = Wish(options["over"], options["backend"], options["no_sleep"])
    if limit is None:
        return wish
    if limit == "auto":
        return replace(wish, needs_bytes=_needs(world_size))
    return replace(wish, wired_limit_bytes=parse_size(limit))


def _needs(world_size: int) -> tuple[int, ...]:
    """Return the bytes that each rank of the newest shard set needs at the context that plans assume."""
    from moectl.planner.memory import rank_need
    from moectl.planner.this_machine import CONTEXT
    from moectl.shards.prepare import newest_shards

    _, manifest = newest_shards(world_size)
    context = min(CONTEXT, manifest.geometry.max_seq_len)
    return tuple(
        rank_need(manifest.placement, manifest.quantization, rank, context=context).total for rank in range(world_size)
    )


def _check_output(output: Path, *, force: bool) -> None:
    """Raise UsageError for a file that is there, or cannot be made."""
    from moectl.files import check_destination

    check_destination(output)
    if output.exists() and not force:
        raise errors.UsageError(f"{output} is there already", hint="choose another name, or --force to overwrite it")


def _write(output: Path, content: str, *, force: bool) -> None:
    from moectl.files import write_whole

    _check_output(output, force=force)
    write_whole(output, content.encode())


def _result_text(common: Common, plan: SetupPlan, output: Path | None, *, applied: int | None) -> str:
    from moectl import setup_report

    if applied:  # the plan was shown before the question
        lines = [f"{applied} command{'s' * (applied != 1)} run; moectl setup --undo takes them back."]
    else:
        lines = [setup_report.plan_text(plan, verbose=common.verbose > 0), ""]
    if output is not None:
        lines.append(f"The hosts file is in {output}.")
    else:
        lines += ["The hosts file (-o FILE writes it):", setup_report.hosts_text(plan)]
    if applied == 0:
        lines.append("Nothing had to be changed.")
    elif applied is None and any(plan.to_do):
        lines.append(f"Nothing was changed. --apply runs {setup_report.commands_text(plan.to_do)}.")
    elif applied is None:
        lines.append("Nothing has to be changed on the hosts.")
    return "\n".join(lines)


def _apply(
    common: Common, plan: SetupPlan, hosts: HostList, wish: Wish, remotes: Sequence[Remote], *, yes: bool
) -> int | None:
    """Run what the plan says and look whether it took effect; return how many commands ran, None when told not to."""
    from moectl import setup_report
    from moectl.cluster.setup import run as setup_run
    from moectl.cluster.setup.plan import plan_setup
    from moectl.cluster.setup.record import open_record

    if plan.blockers:
        found = plan.blockers[0]
        raise errors.PlanError(found.text.partition(": ")[0], host=found.host, hint=found.text.partition(": ")[2])
    at = [
        (machine.host, remote)
        for machine, remote, steps in zip(plan.machines, remotes, plan.to_do, strict=True)
        if steps
    ]
    if not at:
        return 0
    names = ", ".join(host.name for host, _ in at)
    common.say(setup_report.plan_text(plan, verbose=common.verbose > 0))
    if not yes and not _ask(f"Run {setup_report.commands_text(plan.to_do)} as root on {names}?"):
        common.say("Nothing was changed.")
        return None
    sudo = _become_root([remote for _, remote in at])
    with open_record() as record:
        count = setup_run.apply(plan, remotes, record, sudo, _teller(common))
    again = plan_setup(setup_run.look(hosts.hosts, remotes), hosts, wish)
    lacks = setup_run.find_unfinished(again)
    if lacks:
        raise errors.PartialFailure(
            f"{len(lacks)} of the commands ended well and had no effect: {'; '.join(lacks)}", hint=setup_run.UNDO
        )
    return count


def _undo(common: Common, *, named: bool, dry_run: bool, yes: bool) -> None:
    from moectl import setup_report
    from moectl.cluster.setup import run as setup_run
    from moectl.cluster.setup.record import open_record, read_record

    listed: tuple[Host, ...] | None = None
    if named:
        hosts = common.host_list(required=True)
        assert hosts is not None
        listed = hosts.hosts
    entries = setup_run.choose_entries(read_record(), listed)
    if not entries:
        common.print("There is nothing to undo.", setup_report.undo_json((), state="undone", run=0))
        return
    if dry_run:
        text = f"{setup_report.undo_text(entries)}\nNothing was changed."
        common.print(text, setup_report.undo_json(entries, state="planned", run=0))
        return
    at = setup_run.find_hosts_of(entries)
    common.say(setup_report.undo_text(entries))
    count = f"{len(entries)} command{'s' * (len(entries) != 1)}"
    if not yes and not _ask(f"Run {count} as root on {', '.join(host.name for host in at)}?"):
        common.say("Nothing was changed.")
        return
    with setup_run.open_remotes(at) as remotes, open_record() as record:
        sudo = _become_root(remotes)
        entries = setup_run.choose_entries(record.entries, listed)  # another setup may have come between
        by_host = {host.address: remote for host, remote in zip(at, remotes, strict=True)}
        ran = setup_run.undo(entries, by_host, record, sudo, _teller(common))
    document = setup_report.undo_json(entries, state="undone", run=ran)
    common.print(f"{ran} command{'s' * (ran != 1)} run: what setup had changed is undone.", document)


def _become_root(remotes: Sequence[Remote]) -> Sudo:
    """Return how to become root on these hosts; asks for a password where sudo does."""
    from moectl.cluster.setup.run import Sudo, check_sudo, who_wants_password

    names = who_wants_password(remotes)
    if not names:
        return Sudo()
    if not _at_terminal():
        raise errors.AuthFailed(
            "sudo asks for a password, and standard input is no terminal",
            host=names[0],
            hint="run it from a terminal, or run the commands of the dry run by hand",
        )
    sudo = Sudo(click.prompt(f"Password for sudo on {', '.join(names)} (it is not kept)", hide_input=True, err=True))
    check_sudo(sudo, remotes)
    return sudo


def _ask(question: str) -> bool:
    return click.confirm(question, err=True)


def _teller(common: Common) -> OnCommand:
    from moectl.setup_report import command_text

    def tell(host: str, argv: tuple[str, ...], what: str) -> None:
        common.say(f"[{host}] {command_text(argv)}" + ("" if what in ("run", "undo") else f": {what}"))

    return tell
