"""From a model's name to a shard set on this machine: open the checkpoint, place it on ranks, cut it.

It joins `checkpoint`, `blueprint`, `placement` and `build`. What needs MLX is imported by the functions that cut or
look at a checkpoint: finding a finished set does without.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from moectl.errors import NotSharded, PlanError, ShardsDiffer
from moectl.model.catalog import MODELS, CatalogModel
from moectl.model.manifest import NAME as MANIFEST_NAME, Manifest, read_manifest
from moectl.model.ownership import Held
from moectl.model.placement import Placement, make_placement
from moectl.model.routing import Routing
from moectl.model.structure import Quantization, Structure
from moectl.paths import cache_dir, data_dir
from moectl.shards.source.checkpoint import Checkpoint, open_checkpoint
from moectl.shards.source.hub_environment import check_numbers
from moectl.shards.source.tensors import MODES

if TYPE_CHECKING:
    from moectl.shards.blueprint import Blueprint
    from moectl.shards.build import ComputeCanary
    from moectl.shards.writer import OnHashed

PLAIN_BITS = 16
_TOKENIZER = "tokenizer.json"
_WAIT_S = 30.0  # for another process that makes or checks the same set in the cache


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the user asked for; None leaves the choice to moectl."""

    split: str = "auto"
    nodes: int | None = None  # None: one per share, or 1
    shares: tuple[int | float, ...] | None = None
    replicas: int = 1  # of each expert, at most
    routing: Routing | None = None  # how often each expert was selected
    bits: int | None = None  # None: those of the checkpoint
    group_size: int | None = None
    mode: str = "affine"
    recipe: str | None = None  # one of mlx-lm's mixtures of precisions

    @property
    def leaves_precision(self) -> bool:
        """Whether the precision is left to moectl."""
        return self.bits is None and self.mode == "affine" and self.group_size is None and self.recipe is None


@dataclass(frozen=True, slots=True)
class Made:
    """A shard set: its directory, its placement, the bytes of its weight files, and their bits per weight."""

    directory: Path
    placement: Placement
    bytes: int
    bits: int


Place = Callable[[CatalogModel, Wanted], Placement]
ChooseBits = Callable[[CatalogModel, Wanted], Wanted]
Bars = Callable[[str, int], Callable[[int], None]]  # (label, total bytes) begins a bar; gives what counts more bytes


def choose_quantization(wanted: Wanted, kept: Quantization | None) -> Quantization | None:
    """Return how to quantise; None is a 16-bit copy. Raises PlanError where MLX or the checkpoint cannot do it.

    `kept` is how the checkpoint is quantised already.
    """
    if wanted.leaves_precision:
        return kept
    quantization = None
    if wanted.bits != PLAIN_BITS:
        bits, group_size = default_precision(wanted.mode)
        quantization = Quantization(wanted.bits or bits, wanted.group_size or group_size, wanted.mode)
    if kept is not None and quantization != kept:
        raise PlanError(
            f"the checkpoint is quantised ({kept}) and cannot become {quantization or f'{PLAIN_BITS}-bit'}",
            hint="leave --q-bits, --q-group-size and --q-mode out, or start from the 16-bit checkpoint",
        )
    if quantization is not None:
        _check_mode(quantization)
    return quantization


def _check_mode(wanted: Quantization) -> None:
    """Raise PlanError for a precision that MLX does not have."""
    if wanted.mode not in MODES:
        raise PlanError(f"unknown quantisation mode {wanted.mode!r}; it is one of {', '.join(MODES)}")
    groups, widths = MODES[wanted.mode]
    if wanted.bits not in widths:
        raise PlanError(f"{wanted.mode} cannot have {wanted.bits} bits; it can have {_list(widths)}")
    if wanted.group_size not in groups:
        raise PlanError(f"{wanted.mode} cannot have groups of {wanted.group_size}; it can have {_list(groups)}")


def _list(values: Sequence[int]) -> str:
    return ", ".join(map(str, sorted(values)))


def default_precision(mode: str) -> tuple[int, int]:
    """Return MLX's default (bits, group size) of a quantisation mode; an unknown one gets affine's."""
    groups, widths = MODES[mode] if mode in MODES and mode != "affine" else ((64,), (4,))
    return widths[0], groups[0]


def find_frequencies(wanted: Wanted, structure: Structure) -> tuple[float, ...] | None:
    """Return how often each expert is selected, where it was measured. Raises PlanError for another model's numbers."""
    routing = wanted.routing
    if routing is None:
        return None
    shape = (sum(1 for _ in structure.stacks), structure.n_experts)
    there = (sum(map(bool, routing.counts)), len(routing.overall))
    if shape != there:
        raise PlanError(
            f"the routing statistics are of {routing.model}, with {there[0]} layers of {there[1]} experts; "
            f"this model has {shape[0]} of {shape[1]}",
            hint="moectl bench --routing-stats FILE counts this model's",
        )
    return routing.overall


def place(model: CatalogModel, wanted: Wanted) -> Placement:
    """Return the placement for hosts of which nothing is known.

    `auto` is `experts` where copies or frequencies are given; else the first that the model can have of `hidden`,
    `tensor`, `layers`. Raises PlanError.
    """
    # Only whole experts can have copies, or be placed by frequency.
    usual = next((split for split in ("hidden", "tensor", "layers") if split not in model.structure.refused), "hidden")
    alone = usual if wanted.replicas == 1 and wanted.routing is None else "experts"
    return make_placement(
        model.structure,
        alone if wanted.split == "auto" else wanted.split,
        wanted.nodes if wanted.nodes is not None else len(wanted.shares or (1,)),
        shares=wanted.shares,
        replicas=wanted.replicas,
        frequencies=find_frequencies(wanted, model.structure),
    )


def draw_wanted(checkpoint: Checkpoint, wanted: Wanted) -> Blueprint:
    """Draw a checkpoint's model with the precision that is wanted. Raises CheckpointError, PlanError."""
    from moectl.shards.blueprint import draw, find_quantization, is_by_mlx

    kept = find_quantization(checkpoint.config)
    if kept is not None and not is_by_mlx(checkpoint.config) and wanted.bits != PLAIN_BITS:
        quantization = choose_quantization(wanted, None)  # of what is not packed yet, as mlx-lm does
    else:
        quantization = choose_quantization(wanted, kept)
    return draw(checkpoint, None if quantization == kept else quantization, wanted.recipe)


def _settle_bits(checkpoint: Checkpoint, wanted: Wanted, choose_bits: ChooseBits | None) -> tuple[Wanted, Blueprint]:
    """Draw a model with the precision that is wanted, or that is chosen where a model in 16 bits leaves it open."""
    blueprint = draw_wanted(checkpoint, wanted)
    if choose_bits is None or not wanted.leaves_precision or blueprint.quantization is not None:
        return wanted, blueprint
    chosen = choose_bits(CatalogModel(checkpoint.source, blueprint.structure, None), wanted)
    return chosen, blueprint if chosen == wanted else draw_wanted(checkpoint, chosen)


def shard_set_name(
    source: str, placement: Placement, quantization: Quantization | None, recipe: str | None = None
) -> str:
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
    if recipe is not None:
        precision = recipe
    name = f"{base}-{precision}-{placement.split}-{placement.world_size}"
    if placement.replicas > 1:
        name += f"-x{placement.replicas}"
    if len(set(placement.shares)) > 1:
        name += "-" + ".".join(f"{share:g}" for share in placement.shares)
    if placement.held is not None and placement.held != _hold_evenly(placement):
        name += "-" + hashlib.sha256(repr(placement.held).encode()).hexdigest()[:6]
    return name


def _hold_evenly(placement: Placement) -> Held | None:
    """Return the experts of each rank, if all experts were selected equally often."""
    return make_placement(
        placement.structure,
        placement.split,
        placement.world_size,
        shares=placement.shares,
        replicas=placement.replicas,
        frequencies=[1.0] * placement.structure.n_experts,
    ).held


def shard(
    source: str,
    wanted: Wanted,
    *,
    directory: Path | None = None,
    revision: str | None = None,
    keep_source: bool = False,
    jobs: int | None = None,
    force: bool = False,
    cached: bool = False,
    dry_run: bool = False,
    choose_bits: ChooseBits | None = None,
    choose_place: Place | None = None,
    choose_tokenizer: Callable[[Checkpoint, int], Checkpoint] | None = None,
    compute_canary: ComputeCanary | None = None,
    say: Callable[[str], None] = lambda _: None,
    bars: Bars = lambda *_: lambda _: None,
    on_files: Callable[[str, Path, Placement, Mapping[str, int]], None] = lambda *_: None,
    on_file: OnHashed = lambda *_: None,
) -> Made:
    """Make (or finish, or find) a shard set; return where it is. `dry_run` writes nothing.

    `force` starts afresh. `cached` sets live in the cache, apart from those that a person made, and one of another
    source or with other settings is replaced. `choose_bits` decides on the precision of a model in 16 bits where
    `wanted` leaves it open. `choose_place` decides who holds what (default: `place`) and may refuse.
    `choose_tokenizer` returns the checkpoint with the tokenizer that it is to have, and may refuse it.
    `compute_canary` runs what was cut, so that every start can be compared with it (None: not done).

    `say` is told what the model's files ask for and moectl leaves to each request. `bars` shows downloads and the cut.
    Before anything is written, `on_files` gets the set's name, its directory, who holds what and the bytes of each
    weight file; then `on_file` gets each file that is whole, as in `build.cut`.
    """
    check_numbers()  # what follows imports mlx-lm, and with it huggingface_hub
    from moectl.shards import build
    from moectl.shards.recipe import plan_files

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
        wanted, blueprint = _settle_bits(checkpoint, wanted, choose_bits)
        if blueprint.left:
            stays = f"{blueprint.left:.1%} of the weights stay in 16 bits: their rows are no whole groups"
            say(f"Warning: {stays}; --q-group-size 32 has the smallest groups")
        if choose_tokenizer:
            checkpoint = choose_tokenizer(checkpoint, blueprint.structure.vocab_size)
        model = CatalogModel(checkpoint.source, blueprint.structure, blueprint.quantization)
        placement = (choose_place or place)(model, wanted)
        name = shard_set_name(checkpoint.source, placement, blueprint.quantization, wanted.recipe)
        directory = directory or (cache_dir() if cached else data_dir()) / "shards" / name
        files = plan_files(blueprint, checkpoint.stored, placement)
        output_bytes = build.output_bytes(files)
        if force or not (directory / MANIFEST_NAME).exists():
            _check_tokenizer(checkpoint)
        on_files(name, directory, placement, {f.path: f.bytes for f in files})
        if dry_run and not force and not cached:
            build.check(checkpoint, blueprint, placement, directory, name=name)
        if not dry_run:
            cut = partial(
                build.cut,
                checkpoint,
                blueprint,
                placement,
                directory,
                name=name,
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
        bits = blueprint.quantization.bits if blueprint.quantization else PLAIN_BITS
        return Made(directory, placement, output_bytes, bits)
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
    from moectl.shards.chat.tokenizer import read_tokenizer

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
        check_numbers()
        from moectl.shards.blueprint import draw

        with open_checkpoint(source) as checkpoint:
            blueprint = draw(checkpoint)
            return CatalogModel(checkpoint.source, blueprint.structure, blueprint.quantization, checkpoint.config), None
    return CatalogModel(manifest.name, manifest.structure, manifest.quantization, manifest.config), manifest


def names_shards(where: str) -> bool:
    """Return whether this is a shard set, by directory or by name."""
    return any((directory / MANIFEST_NAME).is_file() for directory in _places(where))


def find_shards(where: str | Path) -> tuple[Path, Manifest]:
    """Return a shard set by directory or by name, also one that `run` cut for itself. Raises NotSharded."""
    for directory in _places(where):
        if directory.is_dir():
            return directory, read_manifest(directory)
    raise NotSharded(f"there is no shard set {str(where)!r}", hint="moectl shard MODEL")


def _places(where: str | Path) -> tuple[Path, ...]:
    return Path(where).expanduser(), *(root / "shards" / where for root in (data_dir(), cache_dir()))


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
