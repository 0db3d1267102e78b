"""`moectl setup`: addresses and RDMA for Macs that are cabled to each other."""

from __future__ import annotations

import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moectl import errors
from moectl.cli import suggest
from moectl.cli.options import Common, at_terminal, common, refuse_both
from moectl.cli.root import become_root, is_wanted
from moectl.cli.verb import verb
from moectl.text import count_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from moectl.cluster.setup.commands import Step, Wish
    from moectl.cluster.setup.plan import SetupPlan
    from moectl.cluster.setup.record import RecordedCommand
    from moectl.cluster.setup.run import OnCommand
    from moectl.cluster.setup.shape import Advice
    from moectl.hosts.hostfile import HostList
    from moectl.hosts.remote import Remote
    from moectl.hosts.thunderbolt import Cable

SCHEMA = "moectl.setup/1"
_CARRIES = {"jaccl": "RDMA", "jaccl-ring": "RDMA", "ring": "TCP"}


@verb("Prepare")
@click.argument("hostfile_", metavar="[HOSTFILE]", required=False, shell_complete=suggest.files)
@click.option("-n", "--dry-run", is_flag=True, help="Only show the commands: the default.")
@click.option("--apply", is_flag=True, help="Run the commands on the hosts, with sudo; asks first.")
@click.option("--undo", is_flag=True, help="Undo what --apply ran, last command first; asks first.")
@click.option("--again", is_flag=True, help="Run again what a restart of a Mac has lost.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the hosts file; as MLX's JSON to *.json.",
)
@click.option("--force", is_flag=True, help="Overwrite the file of -o.")
@click.option(
    "--over",
    type=click.Choice(["thunderbolt", "ethernet"]),
    default="thunderbolt",
    show_default=True,
    help="ethernet changes no network; it writes the addresses that hosts have.",
)
@click.option(
    "--backend",
    type=click.Choice(["auto", "ring", "jaccl", "jaccl-ring"]),
    default="auto",
    show_default=True,
    help="ring: TCP; jaccl: RDMA over a mesh; jaccl-ring: over a ring.",
)
@click.option("--no-sleep", is_flag=True, help="Also keep the Macs from sleeping (pmset).")
@click.option(
    "--wired-limit",
    metavar="SIZE",
    help="Also set how much memory their GPUs may use, such as 112GiB; auto: what the newest shard set needs.",
)
@common
def setup(common: Common, **options: Any) -> None:
    """Set up Macs that are cabled by Thunderbolt: addresses, and a hosts file.

    It asks every Mac how it is cabled, and proposes RDMA over a mesh where every two Macs are cabled, RDMA over a ring,
    or TCP over a ring. It shows every command. Nothing is changed without --apply, and --undo undoes that. Addresses
    and files are those that mlx.distributed_config would give. Hosts that are not Macs are left as they are.

    \b
    Examples:
      moectl setup hosts.txt
      moectl setup hosts.txt --apply -o cluster.txt && moectl doctor cluster.txt
      moectl setup --undo
    """
    refuse_both({"--undo": options["undo"]}, {"--apply": options["apply"], "--output": options["output"]})
    refuse_both({"--dry-run": options["dry_run"]}, {"--apply": options["apply"], "--again": options["again"]})
    refuse_both({"--again": options["again"]}, {f"--{name}": options[name] for name in ("apply", "undo", "output")})
    changes = (options["apply"] or options["undo"]) and not options["dry_run"]
    if changes and not (options["yes"] or at_terminal()):
        flag = "--undo" if options["undo"] else "--apply"
        raise errors.UsageError(
            f"{flag} asks before it changes anything, and standard input is no terminal",
            hint="use --yes to skip the question",
        )
    source = click.get_current_context().get_parameter_source("hostfile")
    typed = source is not None and source.name == "COMMANDLINE"  # the variable and the configuration name no hosts here
    named = bool(click.get_current_context().params["hostfile_"] or typed or common.hosts)
    if options["again"]:
        _repeat(common, named=named)
    elif options["undo"]:
        _undo(common, named=named, dry_run=options["dry_run"], yes=options["yes"])
    else:
        _set_up(common, options)


def _set_up(common: Common, options: dict[str, Any]) -> None:
    from moectl.cluster.setup import run as setup_run
    from moectl.cluster.setup.plan import plan_setup
    from moectl.files import write_whole
    from moectl.hosts.connect import open_remotes

    hosts = common.require_hosts()
    output, wish = options["output"], _wish(options, len(hosts.hosts))
    if output is not None:
        _check_output(output, force=options["force"])
    with open_remotes(hosts.hosts) as remotes:
        common.say(f"Looking at {', '.join(host.address for host in hosts.hosts)}")
        plan = plan_setup(setup_run.look(hosts.hosts, remotes), hosts, wish)
        content = file_text(plan, str(output)) if output else ""  # what it cannot hold is told first
        count = _apply(common, plan, hosts, wish, remotes, yes=options["yes"]) if options["apply"] else 0
    if count is None:
        return
    if output is not None:
        _check_output(output, force=options["force"])  # it may have come between
        write_whole(output, content.encode())
    state = "applied" if options["apply"] else "planned"
    document = plan_json(plan, state=state, written=str(output) if output else None, run=count)
    common.print(_result_text(common, plan, output, applied=count if options["apply"] else None), document)


def _wish(options: dict[str, Any], world_size: int) -> Wish:
    from moectl.cluster.setup.commands import Wish
    from moectl.hosts.hostfile import parse_size

    limit = options["wired_limit"]
    wish = Wish(options["over"], options["backend"], options["no_sleep"])
    if limit is None:
        return wish
    if limit == "auto":
        return replace(wish, needs_bytes=_needs(world_size))
    return replace(wish, wired_limit_bytes=parse_size(limit))


def _needs(world_size: int) -> tuple[int, ...]:
    """Return the bytes that each rank of the newest shard set needs."""
    from moectl.planner.memory import METAL_DTYPE_BYTES
    from moectl.planner.this_machine import least_need
    from moectl.shards.prepare import newest_shards

    _, manifest = newest_shards(world_size)
    return tuple(least_need(manifest.placement, [rank], METAL_DTYPE_BYTES) for rank in range(world_size))


def _check_output(output: Path, *, force: bool) -> None:
    """Raise UsageError for a file that is there, or cannot be made."""
    from moectl.files import check_destination

    check_destination(output)
    if output.exists() and not force:
        raise errors.UsageError(f"{output} is there already", hint="choose another name, or --force to overwrite it")


def _result_text(common: Common, plan: SetupPlan, output: Path | None, *, applied: int | None) -> str:
    if applied:  # the plan was shown before the question
        lines = [f"{count_text(applied, 'command')} run; moectl setup --undo takes them back."]
    else:
        lines = [plan_text(plan, verbose=common.verbose > 0), ""]
    if output is not None:
        lines.append(f"The hosts file is in {output}.")
    else:
        name = "hosts.json" if plan.hosts.envs else "hosts.txt"  # text cannot hold variables
        lines += ["The hosts file (-o FILE writes it):", file_text(plan, name)]
    if applied == 0:
        lines.append("Nothing had to be changed.")
    elif applied is None and any(plan.to_do):
        lines.append(f"Nothing was changed. --apply runs {_to_do_text(plan)}.")
    elif applied is None:
        lines.append("Nothing has to be changed on the hosts.")
    return "\n".join(lines)


def _apply(
    common: Common, plan: SetupPlan, hosts: HostList, wish: Wish, remotes: Sequence[Remote], *, yes: bool
) -> int | None:
    """Run what the plan says and look whether it took effect; return how many commands ran, None when told not to."""
    from moectl.cluster.setup import run as setup_run
    from moectl.cluster.setup.plan import plan_setup
    from moectl.cluster.setup.record import open_record

    if plan.blockers:
        found = plan.blockers[0]
        raise errors.PlanError(found.text.partition(": ")[0], host=found.host, hint=found.text.partition(": ")[2])
    changed = [place for place, steps in enumerate(plan.to_do) if steps]
    if not changed:
        return 0
    affected = [plan.machines[place].host for place in changed]
    if not is_wanted(common, plan_text(plan, verbose=common.verbose > 0), _to_do_text(plan), affected, yes=yes):
        return None
    sudo = become_root([remotes[place] for place in changed])
    with open_record() as record:
        count = setup_run.apply(plan, remotes, record, sudo, _teller(common))
    again = plan_setup(setup_run.look(hosts.hosts, remotes), hosts, wish)
    if lacks := setup_run.find_unfinished(again):
        raise errors.PartialFailure(
            f"{len(lacks)} of the commands succeeded but had no effect: {'; '.join(lacks)}", hint=setup_run.UNDO
        )
    return count


def _undo(common: Common, *, named: bool, dry_run: bool, yes: bool) -> None:
    from moectl.cluster.setup import run as setup_run
    from moectl.cluster.setup.record import open_record, read_record
    from moectl.hosts.connect import open_remotes

    listed = common.require_hosts().hosts if named else None
    entries = setup_run.choose_entries(read_record(), listed)
    if not entries:
        common.print("There is nothing to undo.", undo_json((), state="undone", run=0))
        return
    if dry_run:
        text = f"{undo_text(entries)}\nNothing was changed."
        common.print(text, undo_json(entries, state="planned", run=0))
        return
    at = setup_run.find_hosts_of(entries)
    if not is_wanted(common, undo_text(entries), count_text(len(entries), "command"), at, yes=yes):
        return
    with open_remotes(at) as remotes, open_record() as record:
        sudo = become_root(remotes)
        entries = setup_run.choose_entries(record.entries, listed)  # another setup may have come between
        by_host = {host.address: remote for host, remote in zip(at, remotes, strict=True)}
        ran = setup_run.undo(entries, by_host, record, sudo, _teller(common))
    document = undo_json(entries, state="undone", run=ran)
    common.print(f"{count_text(ran, 'command')} run: what setup had changed is undone.", document)


def _repeat(common: Common, *, named: bool) -> None:
    """Run again what a restart has lost; it asks for a password only at a terminal."""
    from moectl.cluster.setup.again import repeat
    from moectl.cluster.setup.record import read_record
    from moectl.cluster.setup.run import choose_entries, find_hosts_of
    from moectl.hosts.connect import open_remotes

    entries = choose_entries(read_record(), common.require_hosts().hosts if named else None)[::-1]
    try:
        ran = repeat(entries, {}, _teller(common))
    except (errors.AuthFailed, errors.PartialFailure):
        if not at_terminal():
            raise
        hosts = find_hosts_of(entries)
        with open_remotes(hosts) as remotes:
            sudo = become_root(remotes)
        ran = repeat(entries, {host.address: sudo for host in hosts}, _teller(common))
    text = f"{count_text(ran, 'command')} run again." if ran else "Nothing that setup did is lost."
    common.print(text, {"schema": "moectl.setup-again/1", "commands_run": ran}, "")


def _teller(common: Common) -> OnCommand:
    def tell(host: str, argv: tuple[str, ...], what: str) -> None:
        common.say(f"[{host}] {command_text(argv)}" + ("" if what in ("run", "undo") else f": {what}"))

    return tell


def plan_text(plan: SetupPlan, *, verbose: bool = False) -> str:
    """Return the whole proposal: cables, commands by host, what to know; `verbose` adds what undoes each command."""
    lines = [_title(plan), *_cable_lines(plan)]
    for machine, steps in zip(plan.machines, plan.steps, strict=True):
        if steps:
            lines += ["", machine.host.name, *_step_lines(steps, verbose=verbose)]
    told = [f"note  {text}" for text in _advice_texts(plan.advice)]
    told += [f"stop  {text}" for text in _advice_texts(plan.blockers)]
    return "\n".join([*lines, "", *told] if told else lines)


def file_text(plan: SetupPlan, name: str) -> str:
    """Return what a hosts file of this name holds: MLX's JSON for .json. Raises HostsError."""
    from moectl.hosts.hostfile import format_hosts
    from moectl.hosts.mlx_hostfile import to_mlx_json

    if name.endswith(".json"):
        return to_mlx_json(plan.hosts)
    return f"# {_title(plan)}; written by moectl setup\n{format_hosts(plan.hosts)}"


def _to_do_text(plan: SetupPlan) -> str:
    return count_text(sum(map(len, plan.to_do)), "command")


def command_text(argv: Sequence[str]) -> str:
    """Return a command as a person would type it."""
    return shlex.join(["sudo", *argv])


def plan_json(plan: SetupPlan, *, state: str, written: str | None, run: int = 0) -> dict[str, Any]:
    """Return the proposal as a JSON document; `state` is "planned" or "applied"."""
    names = [machine.host.name for machine in plan.machines]
    missing = plan.topology.missing_of_mesh if plan.shape != "ethernet" else ()
    return {
        "schema": SCHEMA,
        "state": state,
        "shape": plan.shape,
        "backend": plan.hosts.backend,
        "cables": [_cable_json(cable, names) for cable in plan.topology.cables],
        "missing_of_mesh": [[names[a], names[b]] for a, b in missing],
        "hosts": [
            {"host": machine.host.address, "mac": machine.is_mac, "commands": [_step_json(step) for step in steps]}
            for machine, steps in zip(plan.machines, plan.steps, strict=True)
        ],
        "advice": [asdict(advice) for advice in plan.advice],
        "blockers": [asdict(advice) for advice in plan.blockers],
        "hostfile": _hostfile_json(plan.hosts),
        "commands_run": run,
        "written": written,
    }


def undo_text(entries: Sequence[RecordedCommand]) -> str:
    """Return what would be undone, by host, in the order of undoing."""
    lines: list[str] = []
    for host in dict.fromkeys(entry.host for entry in entries):
        lines += [host, *(f"  {command_text(entry.undo)}" for entry in entries if entry.host == host)]
    return "\n".join(lines)


def undo_json(entries: Sequence[RecordedCommand], *, state: str, run: int) -> dict[str, Any]:
    """Return what was or would be undone as a JSON document; `state` is "planned" or "undone"."""
    listed = [
        {"host": entry.host, "command": list(entry.argv), "undo": list(entry.undo), "done": entry.done}
        for entry in entries
    ]
    return {"schema": "moectl.setup-undo/1", "state": state, "commands": listed, "commands_run": run}


def _title(plan: SetupPlan) -> str:
    count, backend = len(plan.machines), plan.hosts.backend
    if plan.shape == "ethernet":
        return f"{count_text(count, 'host')} over the addresses that they have (TCP)"
    cables = count_text(len(plan.topology.cables), "cable")
    return f"Thunderbolt {plan.shape} of {count} Macs, {cables}: {_CARRIES[backend]} ({backend})"


def _cable_lines(plan: SetupPlan) -> Iterator[str]:
    names = [machine.host.name for machine in plan.machines]
    for cable in plan.topology.cables:
        speed = f"{cable.link_bit_s / 1e9:.0f} Gb/s" if cable.link_bit_s else "unknown speed"
        ends = (f"{names[place]} port {port.receptacle} ({port.interface})" for place, port in cable.ends)
        yield f"  {' - '.join(ends)}  {speed}"


def _step_lines(steps: Sequence[Step], *, verbose: bool) -> Iterator[str]:
    """Yield each command on a line of its own, to be copied: zsh would take a comment behind it for a part of it."""
    for step in steps:
        yield f"  {step.why}{', in effect already' if step.already else ''}:"
        yield f"    {command_text(step.argv)}"
        if verbose:
            yield f"    undone by: {command_text(step.undo)}"


def _advice_texts(told: Sequence[Advice]) -> list[str]:
    """Return each advice once, behind the names of all hosts that it is for."""
    hosts: dict[str, list[str]] = {}
    for advice in told:
        hosts.setdefault(advice.text, []).extend([advice.host] if advice.host else [])
    return [f"{', '.join(names)}: {text}" if names else text for text, names in hosts.items()]


def _cable_json(cable: Cable, names: Sequence[str]) -> dict[str, Any]:
    return {
        "ends": [
            {"host": names[place], "port": port.receptacle, "interface": port.interface, "rdma": port.rdma}
            for place, port in cable.ends
        ],
        "bit_s": cable.link_bit_s,
    }


def _step_json(step: Step) -> dict[str, Any]:
    return {
        "command": list(step.argv),
        "undo": list(step.undo),
        "why": step.why,
        "needed": step.needed,
        "already": step.already,
    }


def _hostfile_json(hosts: HostList) -> dict[str, Any]:
    from moectl.hosts.mlx_hostfile import to_mlx_devices

    rows = [
        {"host": host.address, "ips": list(host.ips), "rdma": [to_mlx_devices(entry) for entry in host.rdma]}
        for host in hosts.hosts
    ]
    return {"backend": hosts.backend, "envs": list(hosts.envs), "hosts": rows}
