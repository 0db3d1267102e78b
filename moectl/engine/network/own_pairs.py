"""Run the (token, expert) pairs of a rank that holds whole experts, and leave the others' to other ranks.

Where an expert has copies, its pairs are shared out among the ranks that have one: each rank knows all choices and
comes to the same shares, so nothing is exchanged for it.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np

from moectl.model.balance import Shares, share_out
from moectl.model.ownership import Held
from moectl.shards.look.hooks import Hook

_Numbers = np.ndarray[Any, np.dtype[np.int64]]


class OwnPairs:
    """A hook of a unit whose stack is of a rank's own experts, in the order of their numbers.

    `count` is how many experts there are in all, `held` the experts of all ranks where some have copies.
    """

    def __init__(self, count: int, numbers: Collection[int], rank: int, held: Held | None = None) -> None:
        self._rank = rank
        self._place = np.full(count, -1)  # in the stack, by expert
        self._place[list(numbers)] = np.arange(len(numbers))
        owners = tuple(tuple(r for r, mine in enumerate(held or ()) if expert in mine) for expert in range(count))
        self._owners = owners if any(len(ranks) > 1 for ranks in owners) else None

    def __call__(self, call: Hook, x: mx.array, indices: mx.array) -> mx.array:
        """Return the results of this rank's pairs and zeros for the others', (…, K, D); it evaluates `indices`."""
        places = self.choose(indices)
        token, slot = np.nonzero(places >= 0)
        rows = x.reshape(-1, x.shape[-1])
        out = mx.zeros((*places.shape, rows.shape[-1]), x.dtype)
        if token.size:
            mine = mx.array(places[token, slot].astype(np.uint32))
            tokens, slots = mx.array(token.astype(np.uint32)), mx.array(slot.astype(np.uint32))
            y = call(rows[tokens], mine[:, None])[:, 0]
            out = out.at[tokens, slots].add(y.astype(x.dtype))
        return out.reshape(*indices.shape, rows.shape[-1])

    def choose(self, indices: mx.array) -> _Numbers:
        """Return for each pair (T, K) the place of its expert in the stack, -1 where other ranks compute it."""
        chosen = np.array(indices).astype(np.int64).reshape(-1, indices.shape[-1])
        places = self._place[chosen]
        if self._owners is not None:
            experts, counts = np.unique(chosen, return_counts=True)
            shares = _share_out(tuple(zip(experts.tolist(), counts.tolist(), strict=True)), self._owners)
            for expert in (e for e, share in shares.items() if self._rank in share):
                token, slot = np.nonzero(chosen == expert)  # dealt out in the order of tokens, by rank
                start = sum(n for rank, n in shares[expert].items() if rank < self._rank)
                theirs = np.ones(token.size, dtype=bool)
                theirs[start : start + shares[expert][self._rank]] = False
                places[token[theirs], slot[theirs]] = -1
        return places


@lru_cache(maxsize=4096)  # one token has 1820 choices of 4 experts of 16, and each would take 70 µs per layer
def _share_out(counts: tuple[tuple[int, int], ...], owners: tuple[tuple[int, ...], ...]) -> Shares:
    return share_out(dict(counts), owners)
