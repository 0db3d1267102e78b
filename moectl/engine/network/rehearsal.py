"""One rank's part of a layer, computed from what the whole layer's matrices gave, and nothing read again.

It is the rank's own model, divided as on its host; only the products of its matrices are taken from the record of the
whole. So what ranks add to each exchange is known, and that it adds up to what the whole model computes.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from moectl.engine.network.exchange import Exchange, observed, seam
from moectl.engine.network.experts import run_grouped, to_numpy
from moectl.engine.network.joined import JoinedSet
from moectl.engine.network.parallel import divide
from moectl.engine.network.reference import (
    LayerRecord,
    Product,
    Reference,
    arrays_of,
    fill,
    find_matrices,
    forget,
    take_columns,
)
from moectl.model.ownership import Holding
from moectl.model.placement import Placement
from moectl.model.regions import Role
from moectl.shards.look.caches import list_parts
from moectl.shards.look.hooks import Hook, hook_call
from moectl.shards.look.skeleton import Skeleton
from moectl.shards.look.units import LayerParts, at, divisions_of

_TOLERANCE = 1e-4
Rows = Sequence[tuple[int, int]]  # spans of tokens that ranks meet together, in order


class WrongPart(Exception):
    """What a rank computes is no part of the whole; says why."""


class StandInGroup:
    """Stands in for the group of all ranks, of which only one is here."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


class Rehearsal:
    """One rank; `rows` are the spans of tokens, counted through all prompts, in which it meets them."""

    def __init__(
        self,
        skeleton: Skeleton,
        parts: list[LayerParts],
        placement: Placement,
        rank: int,
        joined: JoinedSet,
        whole: Reference,
        rows: Rows,
    ) -> None:
        self.met: defaultdict[int, set[int]] = defaultdict(set)  # by layer: the experts that it ran
        self.holdings = placement.hold(divisions_of(skeleton.model, parts, placement.split), rank)
        self.model: Any = skeleton.model
        self._rank, self._joined, self._rows = rank, joined, rows
        self._record, self._layer = LayerRecord(), 0
        self._done: defaultdict[str, int] = defaultdict(int)  # calls of each matrix
        self._known: dict[int, tuple[Any, Any]] = {}  # what is the whole's, and this rank's in its place
        matrices = find_matrices(self.model)
        self._skipped = {f"{path}.bias" for path in matrices}  # is in the recorded products
        forget(self.model)
        for path, module in matrices.items():
            hook_call(module, partial(self._replay, path))
        stacks = dict(self._find_stacks(parts))
        for path, (module, holding) in stacks.items():
            hook_call(module, partial(self._look_up, path, holding))
        divide(
            self.model, parts, self.holdings, StandInGroup(rank, placement.world_size), rank=rank, held=placement.held
        )
        for module, _ in stacks.values():
            hook_call(module, self._by_rows)
        for theirs, ours in zip(whole.caches, make_prompt_cache(self.model), strict=True):
            for one, other in [(theirs, ours), *zip(list_parts(theirs), list_parts(ours), strict=True)]:
                self._known[id(one)] = one, other

    def run(
        self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, record: LayerRecord
    ) -> list[mx.array]:
        """Return what the rank adds to each exchange of a layer, which was called with these arguments.

        Raises WrongPart.
        """
        self._record, self._layer = record, number
        self._done.clear()
        small = {name: array for name, array in record.small.items() if name not in self._skipped}
        fill(self.model, {name: self._joined.take(name, array, self._rank) for name, array in small.items()})
        added: list[mx.array] = []

        def see(x: mx.array, exchange: Exchange) -> mx.array:
            if len(added) == len(record.totals) or x.shape != record.totals[len(added)].shape:
                raise WrongPart("it would exchange other things")
            added.append(x)
            return record.totals[len(added) - 1]

        try:
            with seam(), observed(see):
                found = self.model.layers[number](*self._own(args), **self._own(kwargs))
            mx.eval(added, list(arrays_of(found)))
        except (IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:  # parts that do not fit each other
            raise WrongPart(f"its parts do not fit: {str(error).partition(chr(10))[0]}") from error
        if len(added) != len(record.totals):
            raise WrongPart("it would exchange other things")
        theirs, ours = list(arrays_of(result)), list(arrays_of(found))
        if len(theirs) > 1:  # a later layer may take what this rank has of it
            self._known |= {id(one): (one, other) for one, other in zip(theirs, ours, strict=True)}
        forget(self.model, list(small))
        self._record = LayerRecord()
        return added

    def _own(self, value: Any) -> Any:
        """Return arguments with this rank's caches, and its parts of what earlier layers gave."""
        if isinstance(value, tuple):
            return tuple(map(self._own, value))
        if isinstance(value, list):
            return [self._own(part) for part in value]
        if isinstance(value, dict):
            return {key: self._own(part) for key, part in value.items()}
        if isinstance(value, mx.array) or id(value) in self._known:
            return self._known.get(id(value), (value, value))[1]
        return copy.deepcopy(value)

    def _replay(self, path: str, call: Hook, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        """Return a rank's part of the next product of a matrix."""
        number, self._done[path] = self._done[path], self._done[path] + 1
        product = self._record.products[path][number]
        matrix = product.matrix
        spans = matrix.spans(self._rank)
        if matrix.axis == -1:
            is_known = _are_close(x, take_columns(product.x, spans))
            y = product.parts[self._rank] if is_known else self._multiply(product, x, matrix.times_part)
            bias = product.bias if self.holdings[path].adds else None
        else:
            # A matrix behind the units, which every rank has whole, meets a rank's part of what comes out of them.
            is_known = _are_close(x, product.x)
            y = product.y if is_known else self._multiply(product, x, lambda _, *pair: matrix.times(*pair))
            bias = None if is_known else product.bias
        y = y if bias is None else y + bias
        return take_columns(y, spans) if matrix.axis == -2 else y.astype(x.dtype)

    def _multiply(self, product: Product, x: mx.array, multiply: Callable[..., Any]) -> mx.array:
        """Return a product that is in no record, because its input is another than the whole's."""
        times = partial(multiply, self._rank)
        if product.indices is not None:
            return run_grouped(x, product.indices, product.matrix.rows, times)
        found = times(to_numpy(x).reshape(-1, x.shape[-1]))
        return mx.array(found).reshape(*x.shape[:-1], product.matrix.rows)

    # Whole experts: their results are known by token and expert, so tokens travel as numbers in the place of states.

    def _find_stacks(self, parts: list[LayerParts]) -> Iterator[tuple[str, tuple[nn.Module, Holding]]]:
        for layer in parts:
            for unit in (unit for block in layer.blocks for unit in block.units):
                path = f"{layer.path}.{unit.path}"
                holding = self.holdings[f"{path}.{unit.down}"]
                if holding.division.pieces.role is Role.EXPERT:
                    yield path, (at(self.model, path), holding)

    def _by_rows(self, call: Hook, x: mx.array, indices: mx.array, *args: Any) -> mx.array:
        """Return a rank's pairs, span by span as it will meet the tokens."""
        flat = indices.reshape(-1, indices.shape[-1])
        found = mx.zeros((*flat.shape, x.shape[-1]))
        for start, stop in self._rows:
            numbers = mx.zeros((1, stop - start, x.shape[-1]))
            numbers[..., 0] = mx.arange(start, stop)
            found[start:stop] = call(numbers, flat[None, start:stop])[0]
        return found.reshape(*indices.shape, -1)

    def _look_up(self, path: str, holding: Holding, call: Hook, x: mx.array, indices: mx.array, *_: Any) -> mx.array:
        """Return the results of some pairs: x (n, D) begins with a token's number, indices (n, 1) count own experts."""
        chosen, results = self._record.pairs[path]
        tokens = np.array(x)[..., 0].astype(np.int64).reshape(-1)
        experts = np.array(holding.numbers)[np.array(indices).reshape(-1)]
        self.met[self._layer].update(experts.tolist())
        slots = (np.array(chosen).reshape(-1, chosen.shape[-1])[tokens] == experts[:, None]).argmax(axis=1)
        flat = results.reshape(-1, chosen.shape[-1], results.shape[-1])
        return flat[mx.array(tokens), mx.array(slots)][:, None]


def _are_close(some: mx.array, others: mx.array) -> bool:
    if some.shape != others.shape:
        return False
    return bool((mx.abs(some - others).max() <= _TOLERANCE * mx.abs(others).max()).item()) if some.size else True
