"""What Tab offers as a parameter's value: hosts, shard sets, models, chips, files. It connects to no host.

Each function is a click parameter's `shell_complete`. A Tab press never fails: what cannot be read offers nothing.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Iterable

    from click.shell_completion import CompletionItem

    from moectl.hosts.hostfile import Host

Offers = list["CompletionItem"]


def files(ctx: click.Context, param: click.Parameter, incomplete: str) -> Offers:
    """Offer files of this machine; the shell lists them."""
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type="file")]


def directories(ctx: click.Context, param: click.Parameter, incomplete: str) -> Offers:
    """Offer directories of this machine; the shell lists them."""
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type="dir")]


def hosts(ctx: click.Context, param: click.Parameter, incomplete: str) -> Offers:
    """Offer the hosts in force that are not on the line yet, else those of the deployment."""
    found = _hosts(ctx)
    names = [host.name for host in found]
    # One name may stand for several ports; then only the address tells them apart.
    words = [host.name if names.count(host.name) == 1 else host.address for host in found]
    given = ctx.params.get(param.name or "")
    taken = set(given) if isinstance(given, tuple) else set()
    return _matching((word for word in words if word not in taken), incomplete)


def host_list(ctx: click.Context, param: click.Parameter, incomplete: str) -> Offers:
    """Offer the next host of a list a,b,c."""
    done, comma, _ = incomplete.rpartition(",")
    taken = set(done.split(","))
    # --hosts holds the list being typed: the names come from elsewhere.
    found = (host.address for host in _hosts(ctx, typed=False))
    return _matching((f"{done}{comma}{address}" for address in found if address not in taken), incomplete)


def families(ctx: click.Context, param: click.Parameter, incomplete: str) -> Offers:
    """Offer the families of models that moectl's tests compared."""
    from importlib.resources import files as package

    return _matching(json.loads((package("moectl.model") / "families.json").read_text(encoding="utf-8")), incomplete)


def topics(ctx: click.Context, param: click.Parameter, incomplete: str) -> Offers:
    """Offer the guides, then the verbs."""
    from moectl.cli.guides import TOPICS

    verbs = ctx.find_root().command
    shown = verbs.commands.items() if isinstance(verbs, click.Group) else ()
    return _matching([*TOPICS, *(name for name, verb in shown if not verb.hidden)], incomplete)


def shard_sets(ctx: click.Context, param: click.Parameter, incomplete: str) -> Offers:
    """Offer the shard sets by name, with the one deployed, or directories where none has that name."""
    return _matching(_shard_set_names(), incomplete) or directories(ctx, param, incomplete)


def models(ctx: click.Context, param: click.Parameter, incomplete: str) -> Offers:
    """Offer the models that moectl knows by name, or directories where none has that name."""
    from moectl.model.catalog import MODELS

    return _matching(MODELS, incomplete) or directories(ctx, param, incomplete)


def chips(ctx: click.Context, param: click.Parameter, incomplete: str) -> Offers:
    """Offer the chips that the planner knows."""
    from moectl.planner.chips import CHIPS

    return _matching(CHIPS, incomplete)


def links(ctx: click.Context, param: click.Parameter, incomplete: str) -> Offers:
    """Offer the links that the planner knows."""
    from moectl.planner.calibration import LINKS

    return _matching(LINKS, incomplete)


def _matching(names: Iterable[str], incomplete: str) -> Offers:
    from click.shell_completion import CompletionItem

    # The scripts read lines, and a terminal obeys control characters.
    return [CompletionItem(name) for name in names if name.startswith(incomplete) and name.isprintable()]


def _hosts(ctx: click.Context, *, typed: bool = True) -> list[Host]:
    from moectl.hosts.hostfile import Host, find_hosts

    hostfile = _hostfile_argument(ctx) or ctx.params.get("hostfile")
    with contextlib.suppress(Exception):
        # To read a terminal or a pipe may never end.
        if hostfile is not None and not Path(hostfile).expanduser().is_file():
            return []
        found = find_hosts(ctx.params.get("hosts") if typed else None, hostfile)
        if found is not None:
            return list(found.hosts)
        return [Host(**rank["host"]) for rank in _deployed()["ranks"]]
    return []


def _hostfile_argument(ctx: click.Context) -> str | None:
    """Return the hosts file that is an argument on the line, as in `deploy`."""
    if "hostfile_" not in ctx.params:
        return None
    # After an option whose value is being typed, click leaves the arguments in `args`.
    words = [ctx.params["hostfile_"], *ctx.args]
    return next((word for word in words if word), None)


def _shard_set_names() -> list[str]:
    from moectl.paths import data_dir

    root, names = data_dir() / "shards", []
    with contextlib.suppress(OSError):
        names = sorted(path.parent.name for path in root.glob("*/moectl.json"))
    with contextlib.suppress(Exception):
        shards = str(_deployed()["shards"])
        # One that was cut into another directory, with -o, is known by that.
        if Path(shards).parent not in (root, root.resolve()):
            names.append(shards)
    return names


def _deployed() -> Any:
    """Return the current deployment as it is written: checking it would load a library, and Tab is to be quick."""
    from moectl.session.deployment import deployment_path

    return json.loads(deployment_path().read_text(encoding="utf-8"))
