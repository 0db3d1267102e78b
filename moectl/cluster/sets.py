"""The shard sets on this machine and the current deployment, with their sizes; and which sets may be deleted.

Only this machine's controllers are asked, for what they have loaded; no host is.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from moectl.errors import MoectlError, NotSharded, StateError
from moectl.files import explain_refusal
from moectl.model.manifest import NAME as MANIFEST_NAME, Manifest, read_manifest
from moectl.paths import cache_dir, data_dir
from moectl.server.client import Client, find_running
from moectl.session.deployment import find_deployment, find_deployments
from moectl.shards.journal import lock_directory

# In use; one that was deployed before the current one is still on its hosts, where `serve` offers it.
DEPLOYED, RUNNING, BEFORE = "deployed", "running", "deployed before"
_ASK_S = 2.0


@dataclass(frozen=True, slots=True)
class ShardSet:
    """One shard set's directory on this machine."""

    name: str
    directory: Path
    place: str  # "data": what a person cut; "cache": what `run` cut by itself; "elsewhere"
    bytes: int  # of all files in it
    changed_s: float  # when it was made, or named last
    state: str  # "complete", "unfinished" (running the same `shard` again goes on), "damaged", "download"
    use: str = ""  # "deployed", "running", "deployed before"
    ranks: int | None = None
    split: str | None = None
    bits: int | None = None


@dataclass(frozen=True, slots=True)
class DeployedSize:
    """What one host has of the deployed set; `bytes` is None when this machine does not know it any more."""

    rank: int
    host: str
    directory: str
    bytes: int | None


@dataclass(frozen=True, slots=True)
class DeploymentSizes:
    """The current deployment."""

    name: str
    ranks: tuple[DeployedSize, ...]


@dataclass(frozen=True, slots=True)
class Listing:
    """Everything that `list` shows."""

    sets: tuple[ShardSet, ...]
    deployment: DeploymentSizes | None


def make_listing() -> Listing:
    """Look at this machine's shard sets, newest first. Raises StateError when the deployment's record is damaged."""
    deployment = find_deployment()
    deployed = [Path(one.shards) for one in find_deployments()]
    uses = dict.fromkeys((path.resolve() for path in deployed), BEFORE)
    if deployment:
        uses[Path(deployment.shards).resolve()] = DEPLOYED
    running = {Path(one["shards"]).resolve() for one in _described()}
    roots = {"data": data_dir(), "cache": cache_dir()}
    places = [(path, place) for place, root in roots.items() for path in _directories(root / "shards")]
    known = {path.resolve() for path, _ in places}
    places += [(path, "elsewhere") for path in deployed if path.is_dir() and path.resolve() not in known]
    sets = []
    for path, place in places:
        here = path.resolve()
        sets.append(_look(path, place, RUNNING if here in running else uses.get(here, "")))
    sizes = None
    if deployment:
        manifest = None
        with contextlib.suppress(MoectlError):
            manifest = read_manifest(Path(deployment.shards))
        ranks = [
            DeployedSize(i, r.host.address, r.directory, _rank_bytes(manifest, i) if r.directory else None)
            for i, r in enumerate(deployment.ranks)
        ]
        sizes = DeploymentSizes(deployment.name, tuple(ranks))
    return Listing(tuple(sorted(sets, key=lambda one: -one.changed_s)), sizes)


def choose_old(listing: Listing) -> tuple[ShardSet, ...]:
    """Return the sets that may go: complete, not in use, and not the newest of their place and number of ranks.

    The newest one for this many hosts is what `deploy` takes next. Sets outside moectl's own directories stay, and
    unfinished ones too, which resume.
    """
    newest: set[tuple[str, int | None]] = set()
    old = []
    for one in listing.sets:  # newest first
        kind = (one.place, one.ranks)
        if one.state == "complete" and kind in newest and not one.use and one.place != "elsewhere":
            old.append(one)
        if one.state == "complete":
            newest.add(kind)
    return tuple(one for one in old if not one.directory.is_symlink())


def delete_set(one: ShardSet) -> None:
    """Delete a set's directory, the manifest first: without it, the rest is not taken for a whole set.

    Raises StateError when it is in use by now, when another moectl works on it, or when the disk refuses.
    """
    fresh = {other.directory: other for other in make_listing().sets}.get(one.directory)
    if fresh is None or fresh.use not in ("", BEFORE):
        raise StateError(f"{one.name} is {fresh.use if fresh else 'gone'} by now")
    _refuse_if_unknown()
    try:
        with lock_directory(one.directory):
            (one.directory / MANIFEST_NAME).unlink()
            shutil.rmtree(one.directory)
    except OSError as error:
        raise explain_refusal(error, one.directory) from None


def _refuse_if_unknown() -> None:
    """Raise StateError when a controller does not say what it has loaded."""
    for path in find_running():
        try:
            Client(path).describe(timeout_s=_ASK_S)
        except MoectlError:
            raise StateError(
                f"a controller does not say which shard set it uses: {path}", hint="try again when it has loaded"
            ) from None


def _described() -> Iterator[dict[str, str]]:
    for path in find_running():
        with contextlib.suppress(MoectlError):
            yield Client(path).describe(timeout_s=_ASK_S)


def _directories(root: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return sorted(path for path in root.iterdir() if path.is_dir())
    return []


def _look(path: Path, place: str, use: str) -> ShardSet:
    state, manifest = "complete", None
    try:
        manifest = read_manifest(path)
    except NotSharded:
        state = "download" if path.name.endswith(".source") else "unfinished"
    except MoectlError:
        state = "damaged"
    changed = path / MANIFEST_NAME if manifest else path
    found = ShardSet(path.name, path, place, _size(path), changed.stat().st_mtime, state, use)
    if manifest is None:
        return found
    bits = manifest.quantization.bits if manifest.quantization else 16
    return replace(found, ranks=manifest.world_size, split=manifest.split, bits=bits)


def _size(directory: Path) -> int:
    total = 0
    for place, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(OSError):
                total += (Path(place) / name).lstat().st_size
    return total


def _rank_bytes(manifest: Manifest | None, rank: int) -> int | None:
    return None if manifest is None else sum(f.bytes for f in manifest.files_of(rank).values())
