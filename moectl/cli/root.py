"""Becoming root on hosts: the question before it, and the password where sudo asks for one.

Commands are shown before they run. A password is asked for at a terminal only, and is not kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from moectl import errors
from moectl.cli.options import Common, at_terminal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moectl.cluster.setup.run import Sudo
    from moectl.hosts.hostfile import Host
    from moectl.hosts.remote import Remote


def become_root(remotes: Sequence[Remote]) -> Sudo:
    """Return how to become root on these hosts; asks for a password where sudo does."""
    from moectl.cluster.setup.run import Sudo, check_sudo, who_wants_password

    names = who_wants_password(remotes)
    if not names:
        return Sudo()
    if not at_terminal():
        raise errors.AuthFailed(
            "sudo asks for a password, and standard input is no terminal",
            host=names[0],
            hint="run it from a terminal, or run the commands of the dry run by hand",
        )
    sudo = Sudo(click.prompt(f"Password for sudo on {', '.join(names)} (it is not kept)", hide_input=True, err=True))
    check_sudo(sudo, remotes)
    return sudo


def is_wanted(common: Common, shown: str, commands: str, hosts: Sequence[Host], *, yes: bool) -> bool:
    """Show commands and ask whether to run them as root."""
    common.say(shown)
    if yes or click.confirm(f"Run {commands} as root on {', '.join(host.name for host in hosts)}?", err=True):
        return True
    common.say("Nothing was changed.")
    return False
