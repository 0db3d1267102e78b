"""From what is to run to a client of the controller that runs it: a running one, or a new one.

There is one controller for each set of ranks on its hosts; its socket's name follows from what it runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moectl.engine.protocol import RunOptions
from moectl.errors import AlreadyRunning, MoectlError, RemoteError, StateError
from moectl.records import build
from moectl.server import background
from moectl.server.client import Client, find_running, is_running, last_beat, socket_path
from moectl.server.contracts import ControllerOptions
from moectl.session.target import Local, Target, decode_target, encode_target, target_key

OnLog = Callable[[str, str], None]
_OPEN = (None, "auto", 0, False)  # values that agree with any other
_SAFEGUARDS = ("agree_routing", "paranoia")  # wanted ones have to be on
_ATTEMPTS = 3
_LEAVING_S = 30.0
_LOOK_S = 2.0  # for a controller to say what it has


@dataclass(frozen=True, slots=True)
class Attached:
    """A controller to talk to; `started`: it was not running before."""

    client: Client
    started: bool


def attach(
    target: Target,
    options: RunOptions,
    settings: ControllerOptions,
    *,
    say: Callable[[str], None] = lambda text: None,
    on_log: OnLog = lambda host, line: None,
) -> Attached:
    """Return a client of the target's controller, which is started when there is none.

    Waits until the model is loaded. Raises StateError when one runs with other options, and what starting raises.
    """
    for _ in range(_ATTEMPTS):
        client = Client(find_place(target) or settings.socket_path)
        if is_running(client.path) and _join(client, target, options, settings.keep_alive_s):
            return Attached(client, False)
        ranks = len(target.addresses)
        say(f"Loading {target.name} on {ranks} rank{'s' * (ranks > 1)}.")
        with contextlib.suppress(AlreadyRunning):  # another process has started one meanwhile: join that
            start(target, options, settings, on_log=on_log)
            return Attached(client, True)
    raise StateError(f"the controller of {target.name} keeps exiting", hint="moectl stop --now, then run it again")


def _join(client: Client, target: Target, options: RunOptions, keep_alive_s: float) -> bool:
    """Tell a running controller that a question comes; return whether it will be there for that."""
    try:
        _compare(target, options, client.describe(timeout_s=None)["options"])
        client.keep_alive(keep_alive_s, asks=True)
        return True
    except RemoteError:  # it is leaving
        client.wait_until_gone(_LEAVING_S)
        return False


def _compare(target: Target, options: RunOptions, running: Mapping[str, Any]) -> None:
    """Raise StateError when a controller runs with other options than are wanted."""
    for name, wanted in options.shared().items():
        loaded = running.get(name)
        if wanted in _OPEN or wanted == loaded:
            continue
        if loaded not in _OPEN:
            what = f"{target.name} is loaded with {name} {loaded}"
        elif name in _SAFEGUARDS:
            what = f"{target.name} is loaded without --{name.replace('_', '-')}"
        elif name == "dtype":
            what = f"{target.name} is loaded with the device's own dtype"
        else:
            continue
        raise StateError(what, hint="moectl stop, then run it again")


def place_of(target: Target) -> Path:
    """Return the socket on which the controller of a target listens."""
    return socket_path(target_key(target))


def describe_place(target: Target) -> str:
    """Return in words what runs where."""
    ranks = len(target.addresses)
    where = f"{ranks} rank{'s' * (ranks > 1)} of this machine" if isinstance(target, Local) else f"{ranks} hosts"
    return f"{target.name} on {where}"


def find_place(target: Target) -> Path | None:
    """Return the socket of the controller that runs a target, or that may load it for a request; None for none."""
    own = place_of(target)
    if is_running(own):
        return own
    key = target_key(target)
    for path in find_running():
        with contextlib.suppress(MoectlError):  # one that does not answer loads its first model, which is another
            if key in Client(path).describe(timeout_s=_LOOK_S).get("offers", ()):
                return path
    return None


def is_loaded(target: Target) -> bool:
    """Return whether a controller of the target runs."""
    return find_place(target) is not None


def refuse_second(target: Target) -> None:
    """Raise StateError when a controller runs this target already."""
    if is_loaded(target):
        raise StateError(f"{target.name} is loaded already, by another controller", hint="moectl stop")


def start(
    target: Target, options: RunOptions, settings: ControllerOptions, *, others: Sequence[Target] = (), on_log: OnLog
) -> int | None:
    """Start a controller in the background; return its TCP port. `others` are loaded where requests ask for them.

    Raises what went wrong there.
    """
    order = {
        "targets": [encode_target(each) for each in (target, *others)],
        "settings": {**asdict(settings), "socket_path": str(settings.socket_path)},
        "options": asdict(options),
    }
    name = f"{target.name}-{target_key(target)}"
    return background.start(order, name=name, on_log=on_log, sign=lambda: last_beat(settings.socket_path))


def obey(advise: Callable[[Target, MoectlError], str | None]) -> None:
    """Be the controller that `start` started, until it is over; `advise` is `run`'s."""
    from moectl.server.run import run

    order = background.take_order()
    settings = build(ControllerOptions, order["settings"])
    try:
        run(
            [decode_target(each) for each in order["targets"]],
            build(RunOptions, order["options"]),
            settings,
            on_ready=lambda sockets: background.tell_ready(sockets[1].getsockname()[1] if settings.tcp else None),
            on_log=background.tell_log,
            say=background.note,
            advise=advise,
        )
    except MoectlError as error:
        background.tell_failure(error)
        raise
