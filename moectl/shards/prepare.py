"""From a model's name to a shard set on this machine: open the checkpoint, place it on ranks, cut it.

It joins `checkpoint`, `placement` and `build`. MLX comes in only as `quantise`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from moectl.errors import NotSharded, PlanError, ShardsDiffer
from moectl.model.catalog import MODELS, CatalogModel
from moectl.model.geometry import Geometry
from moectl.model.manifest import NAME as MANIFEST_NAME, Manifest, read_manifest
from moectl.model.placement import Placement, make_placement, place_copies
from moectl.model.routing import Routing
from moectl.model.structure import Quantization
from moectl.paths import cache_dir, data_dir
from moectl.shards import build
from moectl.shards.build import ComputeCanary
from moectl.shards.checkpoint import Checkpoint, open_checkpoint
from moectl.shards.hub_environment import check_numbers
from moectl.shards.recipe import Described, check_quantization, plan_files
from moectl.shards.tensors import MODES
from moectl.shards.writer import OnHashed, OpenQuantise

PLAIN_BITS = 16
_TOKENIZER = "tokenizer.json"
_WAIT_S = 30.0  # for another process that makes or checks the same set in the cache


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the user asked for; None leaves the choice to moectl."""

    split: str = "auto"
    nodes: int | None = None  # None: one per share, or 1
    shares: tuple[int, ...] | None = None
    replicas: int = 1  # of each expert, at most
    routing: Routing | None = None  # how often each expert was selected
    bits: int | None = None  # None: those of the checkpoint
    group_size: int | None = None
    mode: str = "affine"


@dataclass(frozen=True, slots=True)
class Made:
    """A shard set: its directory, its placement, and the bytes of its weight files."""

    directory: Path
    placement: Placement
    bytes: int


Place = Callable[[Checkpoint, Wanted, Quantization | None], Placement]
Bars = Callable[[str, int], Callable[[int], None]]  # (label, total bytes) begins a bar; gives what counts more bytes


def choose_quantization(wanted: Wanted, checkpoint: Described) -> Quantization | None:
    """Return how to quantise; None is a 16-bit copy. Raises PlanError where MLX or the checkpoint cannot do it."""
    if wanted.bits is None and wanted.mode == "affine" and wanted.group_size is None:
        return checkpoint.quantization
    quantization = None
    if wanted.bits != PLAIN_BITS:
        bits, group_size = default_precision(wanted.mode)
        quantization = Quantization(wanted.bits or bits, wanted.group_size or group_size, wanted.mode)
    check_quantization(checkpoint, quantization)
    return quantization


def default_precision(mode: str) -> tuple[int, int]:
    """Return MLX's default (bits, group size) of a quantisation mode; an unknown one gets affine's."""
    groups, widths = MODES[mode] if mode in MODES and mode != "affine" else ((64,), (4,))
    return widths[0], groups[0]


def find_frequencies(wanted: Wanted, geometry: Geometry) -> tuple[float, ...] | None:
    """Return how often each expert is selected, where it was measured. Raises PlanError for another model's numbers."""
    routing = wanted.routing
    if routing is None:
        return None
    shape, there = (geometry.n_layers, geometry.n_experts), (len(routing.counts), len(routing.counts[0]))
    if shape != there:
        raise PlanError(
            f"the routing statistics are of {routing.model}, with {there[0]} layers of {there[1]} experts; "
            f"this model has {shape[0]} of {shape[1]}",
            hint="moectl bench --routing-stats FILE counts this model's",
        )
    return routing.overall


def place(checkpoint: Checkpoint, wanted: Wanted, quantization: Quantization | None) -> Placement:
    """Return the placement for hosts of which nothing is known.

    `auto` is `hidden` then, or `experts` where copies or frequencies are given. Raises PlanError.
    """
    # Only whole experts can have copies, or be placed by frequency.
    alone = "hidden" if wanted.replicas == 1 and wanted.routing is None else "experts"
    split = alone if wanted.split == "auto" else wanted.split
    nodes = wanted.nodes if wanted.nodes is not None else len(wanted.shares or (1,))
    group_size = quantization.group_size if quantization else None
    return make_placement(
        checkpoint.geometry,
        split,
        nodes,
        shares=wanted.shares,
        group_size=group_size,
        replicas=wanted.replicas,
        frequencies=find_frequencies(wanted, checkpoint.geometry),
    )


def shard_set_name(source: str, placement: Placement, quantization: Quantization | None) -> str:
    """Return the directory name of a shard set: NAME-q4-hidden-4, with the shares when they are uneven.

    Copies of experts show as NAME-q4-experts-4-x2, places by frequency as six hexadecimal digits of their hash.
    """
    base = source.rstrip("/").rsplit("/", 1)[-1]
    if quantization is None:
        precision = "bf16"
    else:
        precision = f"q{quantization.bits}" if quantization.mode == "affine" else quantization.mode
        if quantization.group_size != default_precision(quantization.mode)[1]:
            precision += f"g{quantization.group_size}"
    name = f"{base}-{precision}-{placement.split}-{placement.world_size}"
    if placement.replicas > 1:
        name += f"-x{placement.replicas}"
    if max(placement.shares) - min(placement.shares) > 1:
        name += "-" + ".".join(map(str, placement.shares))
    if placement.held is not None and placement.held != place_copies(
        placement.shares, placement.replicas, [1.0] * placement.geometry.n_experts
    ):
        name += "-" + hashlib.sha256(repr(placement.held).encode()).hexdigest()[:6]
    return name


def shard(
    source: str,
    wanted: Wanted,
    *,
    directory: Path | None = None,
    revision: str | None = None,
    quantise: OpenQuantise,
    keep_source: bool = False,
    jobs: int | None = None,
    force: bool = False,
    cached: bool = False,
    dry_run: bool = False,
    choose_place: Place | None = None,
    choose_tokenizer: Callable[[Checkpoint], Checkpoint] | None = None,
    compute_canary: ComputeCanary | None = None,
    say: Callable[[str], None] = lambda _: None,
    bars: Bars = lambda *_: lambda _: None,
    on_files: Callable[[str, Path, Placement, Mapping[str, int]], None] = lambda *_: None,
    on_file: OnHashed = lambda *_: None,
) -> Made:
    """Make (or finish, or find) a shard set; return where it is. `dry_run` writes nothing.

    `force` starts afresh. `cached` sets live in the cache, apart from those that a person made, and one of another
    source or with other settings is replaced. `choose_place` decides who holds what (default: `place`) and may refuse.
    `choose_tokenizer` returns the checkpoint with the tokenizer that it is to have, and may refuse it.
    `compute_canary` runs what was cut, so that every start can be compared with it (None: not done).

    `say` is told what the model's files ask for and moectl leaves to each request. `bars` shows downloads and the cut.
    Before anything is written, `on_files` gets the set's name, its directory, who holds what and the bytes of each
    weight file; then `on_file` gets each file that is whole, as in `build.cut`.
    """
    check_numbers()  # the canary loads huggingface_hub after the cut
    checkpoint = open_checkpoint(
        source,
        revision=revision,
        work_dir=_work_dir(directory, source, cached),
        keep_source=keep_source,
        on_bytes=download_bars(bars),
    )
    try:
        for note in checkpoint.notes:
            say(f"Warning: {note}")
        checkpoint = choose_tokenizer(checkpoint) if choose_tokenizer else checkpoint
        quantization = choose_quantization(wanted, checkpoint)
        placement = (choose_place or place)(checkpoint, wanted, quantization)
        name = shard_set_name(checkpoint.source, placement, quantization)
        directory = directory or (cache_dir() if cached else data_dir()) / "shards" / name
        files = plan_files(checkpoint, placement, quantization)
        output_bytes = build.output_bytes(files)
        if force or not (directory / MANIFEST_NAME).exists():
            _check_tokenizer(checkpoint)
        on_files(name, directory, placement, {f.path: f.bytes for f in files})
        if dry_run and not force and not cached:
            build.check(checkpoint, placement, quantization, directory, name=name)
        if not dry_run:
            cut = partial(
                build.cut,
                checkpoint,
                placement,
                quantization,
                directory,
                name=name,
                quantise=quantise,
                jobs=jobs or build.default_jobs(),
                on_bytes=bars(directory.name, output_bytes),
                on_file=on_file,
                compute_canary=compute_canary,
                wait_s=_WAIT_S if cached else 0.0,
            )
            try:
                cut(force=force)
            except ShardsDiffer:
                if not cached:
                    raise
                cut(force=True)
            # `deploy` takes the set that the user named last, also one that was there already.
            (directory / MANIFEST_NAME).touch()
        return Made(directory, placement, output_bytes)
    finally:
        checkpoint.close()


def download_bars(bars: Bars) -> Callable[[str, int, int], None]:
    """Return what shows a bar for each file that comes from the Hub."""
    downloads: dict[str, tuple[Callable[[int], None], int]] = {}

    def on_download(file: str, done: int, total: int) -> None:
        advance, before = downloads.get(file) or (bars(file, total), 0)
        advance(done - before)
        downloads[file] = (advance, done)

    return on_download


def _check_tokenizer(checkpoint: Checkpoint) -> None:
    """Open the tokenizer as each start of a session does, before anything is written. Raises CheckpointError."""
    if _TOKENIZER not in checkpoint.sidecars:
        return  # `choose_tokenizer` has reported it
    from moectl.shards.tokenizer import read_tokenizer

    def read(name: str) -> bytes | None:
        return checkpoint.path(name).read_bytes() if name in checkpoint.sidecars else None

    read_tokenizer(read, checkpoint.source)


def describe_model(source: str) -> tuple[CatalogModel, Manifest | None]:
    """Return a model for the planner: one that moectl knows by name, a shard set, or a checkpoint by its headers.

    A shard set comes with its manifest. Raises what `open_checkpoint` raises.
    """
    if source in MODELS and not Path(source).is_dir():
        return MODELS[source], None
    try:
        _, manifest = find_shards(source)
    except NotSharded:
        with open_checkpoint(source) as checkpoint:
            return CatalogModel(checkpoint.source, checkpoint.geometry, checkpoint.quantization), None
    return CatalogModel(manifest.name, manifest.geometry, manifest.quantization), manifest


def find_shards(where: str | Path) -> tuple[Path, Manifest]:
    """Return a shard set by directory or by name. Raises NotSharded."""
    for directory in (Path(where).expanduser(), data_dir() / "shards" / where):
        if directory.is_dir():
            return directory, read_manifest(directory)
    raise NotSharded(f"there is no shard set {str(where)!r}", hint="moectl shard MODEL")


def newest_shards(world_size: int | None) -> tuple[Path, Manifest]:
    """Return the newest finished shard set cut for this many hosts (None: for any). Raises NotSharded."""
    root = data_dir() / "shards"
    found = sorted(root.glob("*/moectl.json"), key=lambda p: p.stat().st_mtime, reverse=True)
    for path in found:
        manifest = read_manifest(path.parent)
        if world_size in (None, manifest.world_size):
            return path.parent, manifest
    if world_size is None:
        raise NotSharded(f"there is no shard set in {root}", hint="moectl shard MODEL")
    raise NotSharded(
        f"there is no shard set for {world_size} hosts in {root}", hint=f"moectl shard MODEL --nodes {world_size}"
    )


def _work_dir(directory: Path | None, source: str, cached: bool) -> Path:
    # Beside the output, so that the free space of the right disk is checked; one per source, so that downloads resume.
    root = directory.parent if directory else (cache_dir() if cached else data_dir()) / "shards"
    return root / f".{source.rstrip('/').rsplit('/', 1)[-1]}.source"
