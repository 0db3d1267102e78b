"""Caches of single rows, of any kind that mlx-lm has: kept for later, or run where its generator takes one row only."""

from __future__ import annotations

import copy
import math
from functools import cache
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, KVCache

from moectl.model.structure import Structure
from moectl.shards.look.caches import list_parts

_MOST_STATES = 16  # entries of the prompt cache, where a context takes no memory


def pack(caches: list[Any]) -> None:
    """Let a row's caches hold its own numbers only, and begin to compute them.

    Without the room to grow, and without the other rows of the batch that they were in.
    """
    for part in (part for whole in caches for part in list_parts(whole)):
        if type(part) is KVCache and part.keys is not None:
            part.keys, part.values = map(mx.contiguous, part.keys_and_values())
        elif isinstance(part, ArraysCache):
            part.cache = [None if array is None else array * 1 for array in part.cache]  # else a view of all rows
    mx.async_eval([whole.state for whole in caches])  # type: ignore[no-untyped-call]


def forget(caches: list[Any], count: int) -> None:
    """Let caches forget their last tokens. Raises RuntimeError where one cannot: mlx-lm's own function is silent."""
    for part in (part for whole in caches for part in list_parts(whole)):
        if not part.empty() and part.trim(count) != count:
            raise RuntimeError(f"a {type(part).__name__} cannot forget {count} tokens")


def make_one_row(caches: list[Any]) -> list[Any]:
    """Let mlx-lm's generator take caches that it has no batch for, one row at a time; return the caches."""
    for whole in caches:
        kind: Any = type(whole)
        if not isinstance(whole, _OneRow):
            whole.__class__ = _add_one_row(kind)
    return caches


def count_row_tokens(structure: Structure) -> int:
    """Return as many tokens as take the memory that a row takes whatever its length."""
    sizes = [size for layer in structure.layers for size in layer.caches]
    # Elements of 16 bits; the others are twice as large.
    fixed, per_token = sum(size.fixed + 2 * size.floats for size in sizes), sum(size.per_token for size in sizes)
    if not fixed:
        return 0
    return math.ceil(fixed / per_token) if per_token else structure.context // _MOST_STATES


class _OneRow:
    """What the generator asks of a batch, for a batch of one row."""

    def merge(self, caches: list[Any]) -> Any:
        (row,) = caches
        return row

    def extract(self, index: int) -> Any:
        return copy.deepcopy(self)

    def filter(self, indices: list[int]) -> None:
        pass

    def prepare(self, **kwargs: Any) -> None:
        pass

    def finalize(self) -> None:
        pass


@cache
def _add_one_row(base: Any) -> Any:
    return type(base.__name__, (_OneRow, base), {"__module__": base.__module__})
