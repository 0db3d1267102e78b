"""`moectl list`: the shard sets on this machine, and which of them may be deleted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from moectl import errors
from moectl.cli import suggest
from moectl.cli.options import Common, common, confirm
from moectl.cli.verb import verb
from moectl.text import clock_text, columns, count_text, did_you_mean, size_text, table_text

if TYPE_CHECKING:
    from moectl.cluster.sets import Listing, ShardSet


def list_text(listing: Listing, *, width: int | None = None) -> str:
    """Return the tables of `moectl list`, `width` columns wide (None: as wide as the terminal)."""
    width = width or columns()
    parts = []
    if listing.sets:
        header = ("SHARD SET", "RANKS", "SPLIT", "SIZE", "CHANGED", "USE", "DIRECTORY")
        rows = [_set_row(one) for one in listing.sets]
        parts.append(table_text(header, rows, right="bd", width=width))
    else:
        parts.append("There are no shard sets here.")
    if listing.deployment is not None:
        ranks = [
            (str(r.rank), r.host, "-" if r.bytes is None else size_text(r.bytes), r.directory or "not deployed yet")
            for r in listing.deployment.ranks
        ]
        table = table_text(("RANK", "HOST", "SIZE", "DIRECTORY"), ranks, right="ac", width=width)
        parts.append(f"\nDeployed: {listing.deployment.name}\n{table}")
    return "\n".join(parts)


def _set_row(one: ShardSet) -> tuple[str, ...]:
    use = one.use or ("" if one.state == "complete" else one.state)
    ranks = "" if one.ranks is None else str(one.ranks)
    changed = clock_text(one.changed_s)[:10]
    return (one.name, ranks, one.split or "", size_text(one.bytes), changed, use, str(one.directory))


def list_json(listing: Listing, pruned: tuple[ShardSet, ...] | None = None) -> dict[str, Any]:
    """Return the document of `list --json`; `pruned` are sets that have just been deleted."""
    deployment = listing.deployment
    return {
        "schema": "moectl.list/1",
        "sets": [_set_json(one) for one in listing.sets],
        "deployment": deployment
        and {
            "name": deployment.name,
            "hosts": [
                {"rank": r.rank, "host": r.host, "bytes": r.bytes, "directory": r.directory} for r in deployment.ranks
            ],
        },
        **({} if pruned is None else {"pruned": [_set_json(one) for one in pruned]}),
    }


def _set_json(one: ShardSet) -> dict[str, Any]:
    fields = ("name", "ranks", "split", "bits", "bytes", "changed_s", "place", "state", "use")
    return {**{name: getattr(one, name) for name in fields}, "directory": str(one.directory)}


@verb("Observe", name="list")
@click.option("--prune", is_flag=True, help="Delete old shard sets on this machine.")
@click.option("-n", "--dry-run", is_flag=True, help="With --prune: only show what would go.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@common
def list_(common: Common, prune: bool, dry_run: bool, yes: bool) -> None:
    """List the shard sets on this machine and the current deployment, with sizes.

    --prune deletes sets that are complete, neither deployed nor running, and not the newest for their number of hosts;
    those outside moectl's own directories stay. Hosts are not asked: what they have is what was deployed.

    \b
    Examples:
      moectl list
      moectl list --prune --dry-run
      moectl ls --json | jq '.sets[].bytes'
    """
    from moectl.cluster import sets as listing

    found = listing.make_listing()
    if prune:
        _prune(common, found, dry_run=dry_run, yes=yes)
        return
    if dry_run or yes:
        raise errors.UsageError("--dry-run and --yes are for --prune", hint="moectl list --prune")
    names = "\n".join(one.name for one in found.sets)
    common.print(list_text(found), list_json(found), names)


@verb("Observe")
@click.argument("name", shell_complete=suggest.shard_sets)
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@common
def rm(common: Common, name: str, yes: bool) -> None:
    """Delete a shard set on this machine.

    NAME is what 'moectl list' shows, or the directory. A set that is deployed or running stays. What hosts have stays
    too.

    \b
    Examples:
      moectl rm dbrx-instruct-q4-hidden-4
      moectl rm dbrx-instruct-q4-hidden-4 --yes
    """
    from pathlib import Path

    from moectl.cluster import sets as listing

    found = listing.make_listing()
    same = [one for one in found.sets if one.name == name or one.directory == Path(name).expanduser().absolute()]
    if not same:
        guess = did_you_mean(name, [one.name for one in found.sets])
        raise errors.NotSharded(f"there is no shard set {name!r} here.{guess}", hint="moectl list")
    if len(same) > 1:
        raise errors.UsageError(f"{len(same)} shard sets have the name {name}", hint="moectl list")
    [one] = same
    if one.use not in ("", listing.BEFORE):
        raise errors.StateError(f"{name} is {one.use}", hint="moectl list")
    confirm(f"Delete {one.name}, {size_text(one.bytes)}?", yes=yes)
    listing.delete_set(one)
    common.print(f"Deleted {one.name}, {size_text(one.bytes)}.", list_json(listing.make_listing(), (one,)))


def _prune(common: Common, found: Listing, *, dry_run: bool, yes: bool) -> None:
    from moectl.cluster import sets as listing

    old = listing.choose_old(found)
    total = size_text(sum(one.bytes for one in old))
    if not old:
        common.print("There is nothing old to delete.", list_json(found, ()))
        return
    for one in old:
        common.say(f"{one.directory}  {size_text(one.bytes)}")
    if dry_run:
        text = f"Dry run: nothing was deleted. {total} would be."
        common.print(text, {**list_json(found, ()), "would_prune": [one.name for one in old]})
        return
    which = f"{count_text(len(old), 'shard set')}, {total}"
    confirm(f"Delete {which}?", yes=yes)
    for one in old:
        listing.delete_set(one)
    common.print(f"Deleted {which}.", list_json(listing.make_listing(), old))
