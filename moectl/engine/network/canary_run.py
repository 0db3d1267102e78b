"""Compute the canary of a shard set on one machine: what each rank has to add to each exchange.

The reference is mlx-lm's undivided model (`reference`), joined from the files of all ranks, so a model that no machine
holds can be run once on the machine that cut it. The ranks' parts (`rehearsal`) have to add up to it: a division that
does not is refused here, before it computes anything. Nothing is exchanged. It finds what differs between machines, and
no misread config.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from moectl.engine.network.exchange import Exchange, observed, seam
from moectl.engine.network.fingerprint import take_fingerprint
from moectl.engine.network.joined import JoinedSet
from moectl.engine.network.load import build_skeleton, compute_dtype
from moectl.engine.network.parallel import install_sums
from moectl.engine.network.reference import LayerRecord, PromptBatch, Reference, arrays_of
from moectl.engine.network.rehearsal import Rehearsal, StandInGroup, WrongPart
from moectl.engine.network.routing import count_experts, deal, run_dealt
from moectl.engine.network.stored import Reader
from moectl.errors import IntegrityError
from moectl.model.canary import CHUNK, LONG, TOP, WIDTH, Canary, NoReference, cut_chunks, encode_points, make_prompts
from moectl.model.manifest import Manifest
from moectl.model.regions import Role
from moectl.shards.look.hooks import Hook, hook_call, uncompiled
from moectl.shards.look.routers import find_stacks
from moectl.shards.look.skeleton import Skeleton, make_skeleton
from moectl.shards.look.units import at
from moectl.shards.trace.precision import quantise_by

# Of the sum of all ranks' parts; in 16 bits each of them is rounded.
_TOLERANCE = 1e-3
_TOLERANCE_LOW_PRECISION = 0.03
_Points = list[list[list[mx.array]]]  # by rank, prompt and exchange


def compute_canary(
    directory: Path,
    manifest: Manifest,
    *,
    dtype: mx.Dtype | None = None,
    on_layer: Callable[[int, int], None] = lambda done, of: None,
) -> Canary:
    """Run the canary's prompts through a finished shard set.

    `dtype` is what activations are rounded to (None: `compute_dtype()`, what ranks on machines like this one have).
    `on_layer(done, of)` is told how far it is. Raises IntegrityError, also where the ranks' parts do not add up to the
    whole, and NoReference where the model cannot be run without a GPU, or not without much memory.
    """
    dtype = dtype or compute_dtype()
    with _on_cpu(), Reader() as reader:
        return _Run(directory, manifest, reader, dtype).compute(on_layer)


class _Run:
    def __init__(self, directory: Path, manifest: Manifest, reader: Reader, dtype: mx.Dtype) -> None:
        self._manifest, self._placement, self._dtype = manifest, manifest.placement, dtype
        structure, size = manifest.structure, manifest.world_size
        prompts = make_prompts(structure.vocab_size, structure.context, CHUNK)
        self._batch = PromptBatch.of(prompts)
        self._experts = count_experts(structure)
        self._met = [set[int]() for _ in self._experts]
        self._points: _Points = [[[] for _ in prompts] for _ in range(size)]
        joined = JoinedSet(directory, manifest, reader)
        skeleton, self._found = build_skeleton(manifest)
        is_divided = size > 1 and self._placement.split != "layers"
        self._whole = _start(lambda: Reference(joined, skeleton, self._build(), self._batch, ranks=size, dtype=dtype))
        self._ranks: list[Rehearsal] = []
        for rank in range(size) if is_divided else ():
            chunks = self._list_chunks()
            parts, placement = self._found.parts, self._placement
            self._ranks.append(Rehearsal(self._build(), parts, placement, rank, joined, self._whole, chunks))
        self._hook_whole()

    def compute(self, on_layer: Callable[[int, int], None]) -> Canary:
        done = 0

        def note(number: int, args: tuple[Any, ...], kwargs: dict[str, Any], found: Any, record: LayerRecord) -> None:
            nonlocal done
            self._note_layer(number, args, kwargs, found, record)
            done += 1
            on_layer(done, self._whole.calls)

        with uncompiled(), seam(), observed(self._see):
            logits = self._whole.run(note)
        points = tuple(
            tuple(encode_points([_numbers(point) for point in prompt]) for prompt in rank) for rank in self._points
        )
        top, spread = _read_head(logits)
        return Canary(
            str(self._dtype).rpartition(".")[2], points, top, spread, chunk=CHUNK, unmet=tuple(self._find_unmet())
        )

    def _build(self) -> Skeleton:
        skeleton = make_skeleton(self._manifest.config)
        if self._manifest.table is not None:
            quantise_by(skeleton.model, self._manifest.table, self._manifest.tensors)
        return skeleton

    def _list_chunks(self) -> list[tuple[int, int]]:
        """Return the spans of tokens, counted through all prompts, that ranks read at a time."""
        chunks = [chunk for length in self._batch.lengths for chunk in cut_chunks(range(length), CHUNK)]
        return list(pairwise(accumulate(map(len, chunks), initial=0)))

    def _hook_whole(self) -> None:
        """Let the whole model note what exchanges have to add up to, and deal tokens out."""
        model, size = self._whole.model, self._placement.world_size
        if self._ranks:
            holdings = self._ranks[0].holdings
            for layer in self._found.parts:
                for unit in (unit for block in layer.blocks for unit in block.units):
                    path = f"{layer.path}.{unit.path}"
                    if holdings[f"{path}.{unit.down}"].division.pieces.role is Role.EXPERT:
                        hook_call(at(model, path), partial(self._note_pairs, path))
            install_sums(model, self._found.parts, holdings, StandInGroup(0, size))
        for stack in find_stacks(model):
            hook_call(stack.module, partial(self._deal, stack.layer, is_whole=True))
        for rank in self._ranks:
            for stack in find_stacks(rank.model):
                hook_call(stack.module, partial(self._deal, stack.layer, is_whole=False))

    def _see(self, x: mx.array, exchange: Exchange) -> mx.array:
        self._whole.record.totals.append(x)
        return x

    def _note_pairs(self, path: str, call: Hook, x: mx.array, indices: mx.array, *args: Any) -> mx.array:
        found: mx.array = call(x, indices, *args)
        mx.eval(found, indices)
        self._whole.record.pairs[path] = indices, found
        return found

    def _deal(self, layer: int, call: Hook, x: mx.array, indices: mx.array, *args: Any, is_whole: bool) -> mx.array:
        """Let the short prompt's tokens go to the experts that were chosen, and the long one's to all in turn.

        What is not a prompt's token goes to none.
        """
        keep, short = mx.array(self._batch.keep), sum(self._batch.lengths[:LONG])
        chosen = indices.reshape(-1, indices.shape[-1])[keep]
        dealt = deal(0, (chosen.shape[0] - short, chosen.shape[1]), self._experts[layer]).astype(indices.dtype)
        mixed = mx.concatenate([chosen[:short], dealt])
        if is_whole:
            self._met[layer].update(np.unique(np.array(mixed)).tolist())
        found = call(x.reshape(-1, x.shape[-1])[keep][None], mixed[None], *args)[0]
        found = mx.concatenate([found[:short], run_dealt(lambda *_: found[short:], x, dealt)])
        return found[mx.array(self._batch.spread)].reshape(*indices.shape, -1)

    def _note_layer(
        self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any], found: Any, record: LayerRecord
    ) -> None:
        added: list[list[mx.array]] = []
        totals, record.totals = list(record.totals), list(record.totals)
        for rank, rehearsal in enumerate(self._ranks):
            try:
                added.append(rehearsal.run(number, args, kwargs, found, record))
            except WrongPart as error:
                raise self._refuse(number, f"rank {rank}: {error}") from error
        for exchange, total in enumerate(totals if self._ranks else ()):
            parts = [self._take_points(each[exchange]) for each in added]
            for prompt, wanted in enumerate(self._take_points(total)):
                each = [part[prompt] for part in parts]
                self._check_sum(number, wanted, each)
                for rank, point in enumerate(each):
                    self._points[rank][prompt].append(point)
        if self._placement.split == "layers":
            self._note_hand_over(number, found)

    def _find_unmet(self) -> Iterator[tuple[int, int]]:
        """Yield (layer, expert) of those that no token reached, or not in each copy."""
        for number, count in enumerate(self._experts):
            unmet = set(range(count)) - self._met[number]
            for rank in self._ranks:
                held = {expert for numbers in self._stack_holdings(rank, number) for expert in numbers}
                unmet |= held - rank.met[number]
            yield from ((number, expert) for expert in sorted(unmet))

    def _stack_holdings(self, rehearsal: Rehearsal, number: int) -> Iterator[list[int]]:
        for unit in (unit for block in self._found.parts[number].blocks for unit in block.units):
            holding = rehearsal.holdings[f"{self._found.parts[number].path}.{unit.path}.{unit.down}"]
            if holding.division.pieces.role is Role.EXPERT:
                yield holding.numbers

    def _take_points(self, x: mx.array) -> list[mx.array]:
        """Return the fingerprint of each prompt's tokens in a batch's array, and the size that such have."""
        rows = x.reshape(*self._batch.tokens.shape, -1, x.shape[-1])
        found = []
        for prompt, length in enumerate(self._batch.lengths):
            mine = rows[prompt, :length].astype(mx.float32)
            size = math.sqrt(WIDTH) * mx.linalg.norm(mine.reshape(-1))
            found.append(mx.concatenate([take_fingerprint(mine, 0, length), size[None]]))
        mx.eval(found)
        return found

    def _check_sum(self, number: int, wanted: mx.array, parts: list[mx.array]) -> None:
        size = sum(_numbers(part)[WIDTH] for part in [wanted, *parts])
        off = math.hypot(*_numbers(sum(parts[1:], parts[0]) - wanted)[:WIDTH])
        if not off <= (_TOLERANCE if self._dtype == mx.float32 else _TOLERANCE_LOW_PRECISION) * size:
            raise self._refuse(number, f"they are off by {off / max(size, 1e-30):.1g}")

    def _refuse(self, number: int, reason: str) -> IntegrityError:
        return IntegrityError(
            f"the ranks' parts of layer {number} of {self._manifest.name} do not add up to the model's ({reason})",
            hint="choose another --split; --no-canary cuts it without this check",
        )

    def _note_hand_over(self, number: int, found: Any) -> None:
        spans = [self._placement.layers(rank) for rank in range(self._placement.world_size)]
        for rank, (_, stop) in enumerate(spans[:-1]):
            if stop == number + 1:
                for prompt, point in enumerate(self._take_points(next(arrays_of(found)))):
                    self._points[rank][prompt].append(point)


def _start(make: Callable[[], Reference]) -> Reference:
    """Return a reference; what keeps a model file from running here is NoReference, too."""
    try:
        return make()
    except RuntimeError as error:  # some want Apple's GPU
        raise NoReference(f"it cannot run on a CPU: {str(error).partition(chr(10))[0]}") from error


def _read_head(logits: mx.array) -> tuple[tuple[tuple[tuple[int, float], ...], ...], tuple[float, ...]]:
    top, spread = [], []
    for row in logits:
        ids = mx.argsort(-row)[: min(TOP, row.size)]
        pairs = zip(_numbers(ids), _numbers(row[ids]), strict=True)
        top.append(tuple((int(token), float(f"{value:.6g}")) for token, value in pairs))
        spread.append(float(f"{mx.std(row).item():.6g}"))
    return tuple(top), tuple(spread)


def _numbers(x: mx.array) -> list[float]:
    found: list[float] = x.tolist()  # type: ignore[assignment]
    return found


@contextmanager
def _on_cpu() -> Iterator[None]:
    """Compute on the CPU meanwhile."""
    before = mx.default_device()
    mx.clear_cache()
    mx.set_default_device(mx.Device(mx.cpu))
    try:
        yield
    finally:
        mx.set_default_device(before)
        mx.clear_cache()
