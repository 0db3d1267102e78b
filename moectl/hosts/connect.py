"""Connections to all hosts at once: one login for each, work on each of them, and one error for all failures."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

from moectl.errors import MoectlError, PartialFailure, Unreachable, unexpected
from moectl.hosts.hostfile import Host
from moectl.hosts.remote import LocalRemote, Remote

ROOT = "~/.moectl"
CLOSE_S = 0.5
_R = TypeVar("_R")
_T = TypeVar("_T")


def raise_failures(
    errors: Mapping[str, MoectlError | None],
    *,
    then: str = "; then run it again: the other hosts will be skipped.",
    told: bool = False,
) -> None:
    """Raise an error for the hosts that failed: their own when all failed alike, PartialFailure otherwise.

    `told`: where several failed, the reason of each was printed before.
    """
    failed = {name: error for name, error in errors.items() if error is not None}
    if not failed:
        return
    first = next(iter(failed.values()))
    if len(failed) == len(errors) and len({type(e) for e in failed.values()}) == 1:
        if len(failed) == 1:
            raise first
        why = "" if told else f"; first {first}"
        raise type(first)(f"all {len(failed)} hosts failed{why}", hint=first.hint)
    names = ", ".join(failed)
    raise PartialFailure(
        f"{len(failed)} of {len(errors)} hosts failed: {names}.",
        hint=f"{first.hint or f'repair {names}'}{then}",
    )


def take_all(hosts: Sequence[Host], found: Sequence[_R | MoectlError]) -> list[_R]:
    """Return what `on_each` found; raise the first host's error, which names the others that failed too."""
    failed = [(host, one) for host, one in zip(hosts, found, strict=True) if isinstance(one, MoectlError)]
    for host, error in failed:
        error.host = error.host or host.address
    if len(failed) > 1:
        failed[0][1].message += f" (and {', '.join(str(e.host) for _, e in failed[1:])} cannot be used either)"
    if failed:
        raise failed[0][1]
    return [one for one in found if not isinstance(one, MoectlError)]


def make_remote(host: Host) -> Remote:
    """Return the way to a host; it connects when first used."""
    if host.is_local:
        return LocalRemote(host.name, python=host.python)
    from moectl.hosts.ssh.remote import SSHRemote

    return SSHRemote(host)


def ask_addresses(remote: Remote) -> tuple[str, str]:
    """Return (this machine's address, the host's address) as the host's sshd sees them; empty when it does not say."""
    words = remote.run(["printenv", "SSH_CONNECTION"], check=False).stdout.decode("utf-8", "replace").split()
    return (words[0], words[2]) if len(words) == 4 else ("", "")


@contextlib.contextmanager
def open_remotes(hosts: Sequence[Host]) -> Iterator[list[Remote]]:
    """Yield the way to each host, for all questions of a command: it logs in when first used, and stays."""
    remotes = [make_remote(host) for host in hosts]
    try:
        yield remotes
    finally:
        close_all(remotes)


@contextlib.contextmanager
def connect(hosts: Sequence[Host]) -> Iterator[list[Remote]]:
    """Connect to all hosts at once, for work that needs every one; raise the first host's error when any fails."""
    with open_remotes(hosts) as remotes:
        take_all(hosts, on_each(hosts, lambda rank, _: remotes[rank].run(["true"])))
        yield remotes


def close_all(remotes: Sequence[Remote]) -> None:
    """Close connections, except one that is still being made: to a silent host that could take minutes."""

    def close(remote: Remote) -> None:
        with contextlib.suppress(MoectlError, OSError):
            remote.close()

    run_at_once([partial(close, remote) for remote in remotes], CLOSE_S)


def on_each(
    hosts: Sequence[Host], work: Callable[[int, Host], _R], *, limit_s: float | None = None
) -> list[_R | MoectlError]:
    """Return work(index, host) of every host, done at once, or its error.

    A host that has not answered after `limit_s` is Unreachable; its thread runs on.
    """
    results: list[_R | MoectlError] = [
        Unreachable(f"no answer within {limit_s or 0:g} s", host=host.address) for host in hosts
    ]

    def run(index: int, host: Host) -> None:
        try:
            results[index] = work(index, host)
        except Exception as error:
            results[index] = as_ours(error, host)

    run_at_once([partial(run, *each) for each in enumerate(hosts)], limit_s)
    return list(results)


def run_at_once(tasks: Sequence[Callable[[], None]], limit_s: float | None = None) -> list[bool]:
    """Run all tasks, each in a thread; return which ended in time. The other threads run on."""
    # Daemons, not a pool: Ctrl-C has to end moectl at once, although a silent host may hold a thread for minutes.
    threads = [threading.Thread(target=task, daemon=True) for task in tasks]
    for thread in threads:
        thread.start()
    deadline = None if limit_s is None else time.monotonic() + limit_s
    for thread in threads:
        thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
    return [not thread.is_alive() for thread in threads]


def as_ours(error: Exception, host: Host) -> MoectlError:
    """Return an error as one of ours: a bug on one host must not hide the results of the others."""
    if isinstance(error, MoectlError):
        return error
    if os.environ.get("MOECTL_DEBUG"):
        traceback.print_exception(error)
    return unexpected(error, host=host.address)


def map_at_once(work: Callable[[_T], _R], items: Sequence[_T]) -> list[_R]:
    """Return work(item) of every item, each in its own thread; raise the error of the first item that has one."""
    futures: list[Future[_R]] = [Future() for _ in items]

    def run(future: Future[_R], item: _T) -> None:
        try:
            future.set_result(work(item))
        except BaseException as error:
            future.set_exception(error)

    run_at_once([partial(run, *each) for each in zip(futures, items, strict=True)])
    return [future.result() for future in futures]
