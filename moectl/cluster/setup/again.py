"""Run again what `setup --apply` ran and a restart of a Mac lost: addresses, routes, the bridge, the GPU's limit.

The record says what that is. Nothing is run that is in effect, and nothing new is recorded. `pmset` is not among it:
what it sets outlives a restart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from moectl.cluster.setup.record import RecordedCommand
from moectl.cluster.setup.run import COMMAND_S, RUN, OnCommand, Sudo, find_hosts_of
from moectl.errors import AuthFailed, MoectlError
from moectl.hosts.connect import on_each, open_remotes, raise_failures
from moectl.hosts.hostfile import Host
from moectl.hosts.remote import Completed, Remote, check_completed
from moectl.hosts.thunderbolt import Interface, parse_ifconfig
from moectl.text import last_line

_PLACES = {"ifconfig": "/sbin/ifconfig", "route": "/sbin/route", "sysctl": "/usr/sbin/sysctl"}  # on a Mac
_PASSWORD = "password is required"


def repeat(entries: Sequence[RecordedCommand], sudo: Mapping[str, Sudo], on_command: OnCommand) -> int:
    """Run on each host what is not in effect any more; return how many commands were run.

    `sudo` says for a host how to become root there, where that needs a password. All hosts are worked on, also where
    one fails. Raises AuthFailed where sudo asks for a password, PartialFailure, or what the hosts raise.
    """
    hosts = find_hosts_of(entries)
    with open_remotes(hosts) as remotes:

        def work(place: int, host: Host) -> int:
            mine = [entry for entry in entries if entry.host == host.address]
            return _repeat_host(remotes[place], mine, sudo.get(host.address, Sudo()), on_command)

        done = on_each(hosts, work)
    failed = {host.address: one for host, one in zip(hosts, done, strict=True) if isinstance(one, MoectlError)}
    raise_failures({**dict.fromkeys((host.address for host in hosts), None), **failed}, then=", then run it again")
    return sum(one for one in done if isinstance(one, int))


def _repeat_host(remote: Remote, entries: Sequence[RecordedCommand], sudo: Sudo, on_command: OnCommand) -> int:
    count = 0
    for entry in _list_lost(remote, entries):
        on_command(entry.host, entry.argv, "run")
        done = sudo.run(remote, entry.argv)
        count += done.code == 0
        if done.code == 0:
            continue
        if _PASSWORD in last_line(done.stderr):
            raise AuthFailed(
                f"sudo asks for a password: {' '.join(entry.argv)} was not run",
                host=entry.host,
                hint=_rule_hint(entries),
            )
        if entry.needed:
            check_completed(done, ["sudo", *entry.argv], entry.host)
        on_command(entry.host, entry.argv, f"goes on without: {last_line(done.stderr)}")
    return count


def _list_lost(remote: Remote, entries: Sequence[RecordedCommand]) -> Iterator[RecordedCommand]:
    """Yield the entries that are not in effect, oldest first."""
    interfaces = {one.name: one for one in parse_ifconfig(_text(_ask(remote, "ifconfig")))}
    newest = {entry.interface: entry.number for entry in entries if entry.address}  # a port has one address
    entries = [entry for entry in entries if not entry.address or newest[entry.interface] == entry.number]
    addressed = {entry.interface for entry in entries if _lacks_address(entry, interfaces)}
    for entry in entries:
        if _lacks_address(entry, interfaces):
            yield entry
        elif entry.argv[0] == "route":
            if entry.interface in addressed:  # it went with the address
                yield entry
        elif entry.argv[0] == "ifconfig" and entry.argv[2:] == ("down",):
            interface = interfaces.get(entry.argv[1])
            if interface is not None and interface.is_up:
                yield entry
        elif entry.argv[0] == "sysctl":
            name, _, value = entry.argv[1].partition("=")
            if _text(_ask(remote, "sysctl", "-n", name)).strip() != value:
                yield entry


def _lacks_address(entry: RecordedCommand, interfaces: Mapping[str, Interface]) -> bool:
    if entry.address is None:
        return False
    interface = interfaces.get(entry.interface or "")
    return interface is None or entry.address not in {str(address.ip) for address in interface.ipv4}


def _ask(remote: Remote, *argv: str) -> Completed:
    return remote.run([*RUN, *argv], timeout_s=COMMAND_S)


def _text(done: Completed) -> str:
    return done.stdout.decode("utf-8", "replace")


def _rule_hint(entries: Sequence[RecordedCommand]) -> str:
    rule = sudo_rule(entries)
    return f"run it at a terminal; or, on that Mac: sudo visudo -f /etc/sudoers.d/moectl, and in that file: {rule}"


def sudo_rule(entries: Sequence[RecordedCommand]) -> str:
    """Return the line of sudoers(5) that lets a Mac's administrators run these commands, and no others, unasked."""
    commands = [(_PLACES[argv[0]], *argv[1:]) for argv in (entry.argv for entry in entries) if argv[0] in _PLACES]
    return (
        f"%admin ALL=(root) NOPASSWD: {', '.join(' '.join(map(_escape, words)) for words in dict.fromkeys(commands))}"
    )


def _escape(word: str) -> str:
    for letter in "\\,:=":
        word = word.replace(letter, f"\\{letter}")
    return word
