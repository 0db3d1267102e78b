"""Run what `setup` proposed, and undo it: host by host, each command recorded before it runs.

The plan says what to run, the record what to undo. Commands run through sudo. If sudo wants a password, it gets it on
stdin, never as an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from moectl.cluster.setup.commands import Step
from moectl.cluster.setup.machine import Machine, read_machine
from moectl.cluster.setup.plan import SetupPlan
from moectl.cluster.setup.record import Record, RecordedCommand
from moectl.errors import AuthFailed, CommandFailed, HostError, MoectlError, PartialFailure
from moectl.hosts.connect import ask_addresses, on_each, take_all
from moectl.hosts.hostfile import Host, parse_host_string
from moectl.hosts.remote import Completed, Remote, check_completed
from moectl.hosts.survey import survey_host
from moectl.hosts.thunderbolt import parse_ifconfig

COMMAND_S = 30.0
UNDO = "moectl setup --undo takes back what was run"
# sshd's PATH lacks /usr/sbin and /sbin on some systems; those that are there come first.
RUN = ("sh", "-c", 'PATH="$PATH:/usr/bin:/bin:/usr/sbin:/sbin"; export PATH LC_ALL=C; exec "$@"', "sh")

OnCommand = Callable[[str, tuple[str, ...], str], None]  # (host, argv, "run", "undo", or why it was skipped)


@dataclass(frozen=True, slots=True)
class Sudo:
    """How commands become root's: without a password, or with this one."""

    password: str | None = None

    def run(self, remote: Remote, argv: Sequence[str]) -> Completed:
        """Run a command as root; its exit code is the caller's to judge."""
        flags, stdin = (["-n"], b"") if self.password is None else (["-S", "-p", ""], self.password.encode() + b"\n")
        return remote.run([*RUN, "sudo", *flags, *argv], stdin=stdin, timeout_s=COMMAND_S, check=False)


def look(hosts: Sequence[Host], remotes: Sequence[Remote]) -> tuple[Machine, ...]:
    """Ask all hosts at once what they are. Raises the first host's error, with the names of the others."""

    def ask(place: int, host: Host) -> Machine:
        survey = survey_host(remotes[place])
        return read_machine(host, survey, None if host.is_local else ask_addresses(remotes[place])[1] or None)

    return tuple(take_all(hosts, on_each(hosts, ask)))


def who_wants_password(remotes: Sequence[Remote]) -> tuple[str, ...]:
    """Return the hosts on which sudo asks for a password; a host that is not reached is told when it is needed."""
    return tuple(remote.name for remote in remotes if _try_sudo(Sudo(), remote) is not None)


def check_sudo(sudo: Sudo, remotes: Sequence[Remote]) -> None:
    """Raise AuthFailed for the first host on which sudo does not let us be root."""
    for remote in remotes:
        said = _try_sudo(sudo, remote)
        if said is not None:
            hint = "the user has to be an administrator there; or run the printed commands by hand"
            raise AuthFailed(f"sudo was refused: {said}", host=remote.name, hint=hint)


def _try_sudo(sudo: Sudo, remote: Remote) -> str | None:
    """Return what sudo says instead of making us root; None when it does, or when there is no way to the host."""
    try:
        done = sudo.run(remote, ["true"])
    except HostError:
        return None
    said = done.stderr.decode("utf-8", "replace").strip().split("\n")[-1]
    return None if done.code == 0 else said or f"exit code {done.code}"


# Doing.


def apply(plan: SetupPlan, remotes: Sequence[Remote], record: Record, sudo: Sudo, on_command: OnCommand) -> int:
    """Run what is not in effect yet; return how many commands were run.

    A needed command that fails ends it: what was run so far stays, and is in the record. Raises what the hosts raise.
    """
    count = 0
    for machine, remote, steps in zip(plan.machines, remotes, plan.to_do, strict=True):
        for step in steps:
            try:
                count += _do(machine.host, remote, step, record, sudo, on_command)
            except MoectlError as error:
                total = sum(map(len, plan.to_do))
                message = f"{error.message} ({count} of {total} commands were run)"
                raise type(error)(message, hint=UNDO if record.entries else error.hint, host=error.host) from None
    return count


def _do(host: Host, remote: Remote, step: Step, record: Record, sudo: Sudo, on_command: OnCommand) -> bool:
    entry = RecordedCommand(0, host.address, step.argv, step.undo, step.interface, step.address, step.needed)
    number = record.begin(entry)
    on_command(host.name, step.argv, "run")
    done = sudo.run(remote, step.argv)  # a command whose end is not known stays in the record
    if done.code == 0:
        record.finish(number)
        return True
    record.forget(number)
    try:
        check_completed(done, ["sudo", *step.argv], host.address)
    except CommandFailed as error:
        if step.needed:
            raise
        on_command(host.name, step.argv, f"goes on without: {error.message}")
    return False


def find_unfinished(plan: SetupPlan) -> tuple[str, ...]:
    """Return, of a plan made after everything was run, the needed commands that had no effect: "mac1: ifconfig …"."""
    return tuple(
        f"{machine.host.name}: {' '.join(step.argv)}"
        for machine, steps in zip(plan.machines, plan.to_do, strict=True)
        for step in steps
        if step.needed
    )


# Undoing.


def choose_entries(entries: Sequence[RecordedCommand], hosts: Sequence[Host] | None) -> tuple[RecordedCommand, ...]:
    """Return the entries of these hosts, of all hosts for None, in the order of undoing: the last one first."""
    names = None if hosts is None else {host.address for host in hosts}
    return tuple(entry for entry in reversed(entries) if names is None or entry.host in names)


def find_hosts_of(entries: Sequence[RecordedCommand]) -> tuple[Host, ...]:
    """Return the hosts of some entries, each once."""
    return tuple(parse_host_string(name).hosts[0] for name in dict.fromkeys(entry.host for entry in entries))


def undo(
    entries: Sequence[RecordedCommand], remotes: Mapping[str, Remote], record: Record, sudo: Sudo, on_command: OnCommand
) -> int:
    """Undo each entry, host by host, in the order given; return how many commands were run.

    An address that its interface does not have any more, as after a restart, is left alone. What cannot be undone stays
    in the record, and the other hosts are undone all the same. Raises PartialFailure, or a single host's error.
    """
    count, failed = 0, []
    for name, remote in remotes.items():
        mine = [entry for entry in entries if entry.host == name]
        try:
            count += _undo_host(name, remote, mine, record, sudo, on_command)
        except MoectlError as error:
            failed.append(type(error)(error.message, hint=error.hint, host=name))
    if failed and len(failed) == len(remotes) == 1:
        raise failed[0]
    if failed:
        said = "; ".join(str(error) for error in failed)
        raise PartialFailure(f"not everything was undone: {said}", hint="mend that, and run moectl setup --undo again")
    return count


def _undo_host(
    name: str, remote: Remote, entries: Sequence[RecordedCommand], record: Record, sudo: Sudo, on_command: OnCommand
) -> int:
    """Undo one host's entries; go on past a failure, and raise the first one at the end."""
    have = _addresses(remote)
    count, first = 0, None
    for entry in entries:
        if entry.address is not None and (entry.interface, entry.address) not in have:
            on_command(name, entry.undo, f"left out: {entry.interface} does not have {entry.address} any more")
            record.forget(entry.number)
            continue
        on_command(name, entry.undo, "undo")
        done = sudo.run(remote, entry.undo)
        if done.code == 0 or not entry.needed:
            record.forget(entry.number)
            count += 1
            continue
        try:
            check_completed(done, ["sudo", *entry.undo], name)
        except CommandFailed as error:
            first = first or error
    if first is not None:
        raise first
    return count


def _addresses(remote: Remote) -> set[tuple[str | None, str]]:
    """Return (interface, address) of a host as they are now."""
    done = remote.run([*RUN, "ifconfig"], timeout_s=COMMAND_S)
    interfaces = parse_ifconfig(done.stdout.decode("utf-8", "replace"))
    return {(interface.name, str(address.ip)) for interface in interfaces for address in interface.ipv4}
