"""A plan of `setup`, and what came of it, as text for people and as JSON. It decides nothing."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from moectl.cluster.setup.plan import Advice, SetupPlan, Step
from moectl.cluster.setup.record import Entry
from moectl.hosts.hostfile import HostList, format_hosts, to_mlx_devices, to_mlx_json
from moectl.hosts.thunderbolt import Cable

SCHEMA = "moectl.setup/1"
_CARRIES = {"jaccl": "RDMA", "jaccl-ring": "RDMA", "ring": "TCP"}


def plan_text(plan: SetupPlan, *, verbose: bool = False) -> str:
    """Return the whole proposal: cables, commands by host, what to know; `verbose` adds what undoes each command."""
    lines = [_title(plan), *_cable_lines(plan)]
    for machine, steps in zip(plan.machines, plan.steps, strict=True):
        if steps:
            lines += ["", machine.host.name, *_step_lines(steps, verbose=verbose)]
    told = [f"note  {text}" for text in _advice_texts(plan.advice)]
    told += [f"stop  {text}" for text in _advice_texts(plan.blockers)]
    return "\n".join([*lines, "", *told] if told else lines)


def hosts_text(plan: SetupPlan) -> str:
    """Return the hosts file in text; MLX's JSON where the text cannot hold it."""
    return file_text(plan, "hosts.json" if plan.hosts.envs else "hosts.txt")


def file_text(plan: SetupPlan, name: str) -> str:
    """Return what a hosts file of this name holds: MLX's JSON for .json. Raises HostsError."""
    if name.endswith(".json"):
        return to_mlx_json(plan.hosts)
    return f"# {_title(plan)}; written by moectl setup\n{format_hosts(plan.hosts)}"


def commands_text(steps: Sequence[Sequence[Step]]) -> str:
    """Return "12 commands"."""
    count = sum(map(len, steps))
    return f"{count} command{'s' * (count != 1)}"


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
        "advice": [{"host": advice.host, "text": advice.text} for advice in plan.advice],
        "blockers": [{"host": advice.host, "text": advice.text} for advice in plan.blockers],
        "hostfile": _hostfile_json(plan.hosts),
        "commands_run": run,
        "written": written,
    }


def undo_text(entries: Sequence[Entry]) -> str:
    """Return what would be undone, by host, in the order of undoing."""
    lines: list[str] = []
    for host in dict.fromkeys(entry.host for entry in entries):
        lines += [host, *(f"  {command_text(entry.undo)}" for entry in entries if entry.host == host)]
    return "\n".join(lines)


def undo_json(entries: Sequence[Entry], *, state: str, run: int) -> dict[str, Any]:
    """Return what was or would be undone as a JSON document; `state` is "planned" or "undone"."""
    listed = [
        {"host": entry.host, "command": list(entry.argv), "undo": list(entry.undo), "done": entry.done}
        for entry in entries
    ]
    return {"schema": "moectl.setup-undo/1", "state": state, "commands": listed, "commands_run": run}


def _title(plan: SetupPlan) -> str:
    count = len(plan.machines)
    if plan.shape == "ethernet":
        return f"{count} host{'s' * (count != 1)} over the addresses that they have (TCP)"
    cables = len(plan.topology.cables)
    return (
        f"Thunderbolt {plan.shape} of {count} Macs, {cables} cable{'s' * (cables != 1)}: "
        f"{_CARRIES[plan.hosts.backend]} ({plan.hosts.backend})"
    )


def _cable_lines(plan: SetupPlan) -> Iterator[str]:
    names = [machine.host.name for machine in plan.machines]
    for cable in plan.topology.cables:
        speed = f"{cable.link_bit_s / 1e9:.0f} Gb/s" if cable.link_bit_s else "unknown speed"
        ends = (
            f"{names[place]} port {port.receptacle} ({port.interface})"
            for place, port in ((cable.a, cable.a_port), (cable.b, cable.b_port))
        )
        yield f"  {' - '.join(ends)}  {speed}"


def _step_lines(steps: Sequence[Step], *, verbose: bool) -> Iterator[str]:
    """Commands stand alone on their lines, to be copied; zsh would take a comment behind one for words of it."""
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
    ends = ((cable.a, cable.a_port), (cable.b, cable.b_port))
    return {
        "ends": [
            {"host": names[place], "port": port.receptacle, "interface": port.interface, "rdma": port.rdma}
            for place, port in ends
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
    rows = [
        {"host": host.address, "ips": list(host.ips), "rdma": [to_mlx_devices(entry) for entry in host.rdma]}
        for host in hosts.hosts
    ]
    return {"backend": hosts.backend, "envs": list(hosts.envs), "hosts": rows}
