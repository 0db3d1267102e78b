"""Decide which rank holds what: pure arithmetic on a geometry, no files, no network, no arrays.

Four ways to split. `experts`: whole experts; `hidden`: a span of every expert's hidden dimension; both replicate
attention, norms, router and embedding, and rank 0 has the head. `tensor`: as `hidden`, and attention heads and their
keys and values are divided too. `layers`: consecutive layers, whole; the first rank has the embedding, the last one the
head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moectl.errors import PlanError
from moectl.geometry import Geometry

SPLITS = ("experts", "hidden", "tensor", "layers")


@dataclass(frozen=True, slots=True)
class Placement:
    """What each rank holds; spans are half-open [start, stop)."""

    split: str
    shares: tuple[int, ...]  # per rank: experts, units of `unit` hidden elements, or layers
    unit: int  # elements per share: the quantisation group in `hidden` and `tensor`, else 1
    geometry: Geometry

    @property
    def world_size(self) -> int:
        return len(self.shares)

    @property
    def head_rank(self) -> int:
        """The rank that has the head, samples, and so leads the others."""
        return self.world_size - 1 if self.split == "layers" else 0

    def experts(self, rank: int) -> tuple[int, int]:
        """Return the span of expert numbers that a rank holds."""
        return self._span(rank) if self.split == "experts" else (0, self.geometry.n_experts)

    def hidden(self, rank: int) -> tuple[int, int]:
        """Return the span of every expert's hidden dimension that a rank holds, in elements."""
        return self._span(rank) if self.split in ("hidden", "tensor") else (0, self.geometry.ffn_hidden)

    def layers(self, rank: int) -> tuple[int, int]:
        """Return the span of layers that a rank holds."""
        return self._span(rank) if self.split == "layers" else (0, self.geometry.n_layers)

    def kv_heads(self, rank: int) -> tuple[int, int]:
        """Return the span of KV heads that a rank holds, with the query heads that belong to them."""
        count = self.geometry.kv_n_heads
        each = count // self.world_size
        return (rank * each, (rank + 1) * each) if self.split == "tensor" else (0, count)

    def heads(self, rank: int) -> tuple[int, int]:
        """Return the span of query heads that a rank holds."""
        first, last = self.kv_heads(rank)
        per_kv = self.geometry.n_heads // self.geometry.kv_n_heads
        return first * per_kv, last * per_kv

    def holds_embedding(self, rank: int) -> bool:
        """Whether a rank turns tokens into vectors."""
        return self.split != "layers" or rank == 0

    def holds_head(self, rank: int) -> bool:
        """Whether a rank turns vectors into logits."""
        return rank == self.head_rank

    def _span(self, rank: int) -> tuple[int, int]:
        start = sum(self.shares[:rank]) * self.unit
        return start, start + self.shares[rank] * self.unit


def make_placement(
    geometry: Geometry, split: str, nodes: int, *, shares: Sequence[int] | None = None, group_size: int | None = None
) -> Placement:
    """Place a model on `nodes` ranks, evenly unless `shares` says how.

    `shares` are per rank: experts (`experts`), layers (`layers`), or units of the hidden dimension (`hidden` and
    `tensor`, where one unit is one quantisation group: 168 of 64 in DBRX). Raises PlanError when nodes or shares cannot
    work, with what would.
    """
    if nodes < 1:
        raise PlanError(f"{nodes} nodes cannot hold a model; use 1 or more")
    total, unit, what = _divisible(geometry, split, group_size)
    if split == "tensor" and geometry.kv_n_heads % nodes:
        able = [n for n in range(1, geometry.kv_n_heads + 1) if geometry.kv_n_heads % n == 0]
        raise PlanError(
            f"{geometry.kv_n_heads} KV heads cannot be divided by {nodes} nodes; "
            f"a tensor split works on {_either(able)}",
            hint="--split hidden works on any number of nodes",
        )
    if nodes > total:
        raise PlanError(f"{nodes} nodes are too many: the model has {total} {what}, so at most {total} nodes")
    if shares is None:
        base, extra = divmod(total, nodes)
        shares = [base + (rank < extra) for rank in range(nodes)]
    if len(shares) != nodes:
        raise PlanError(f"{len(shares)} shares were given for {nodes} nodes; give one per node")
    if min(shares) < 1 or sum(shares) != total:
        raise PlanError(
            f"shares {','.join(map(str, shares))} add up to {sum(shares)}; each must be 1 or more and together "
            f"{total} ({what})"
        )
    return Placement(split, tuple(shares), unit, geometry)


def _divisible(geometry: Geometry, split: str, group_size: int | None) -> tuple[int, int, str]:
    """Return what a split divides: how many units, elements per unit, and their name."""
    if split == "experts":
        return geometry.n_experts, 1, "experts"
    if split == "layers":
        return geometry.n_layers, 1, "layers"
    if split not in SPLITS:
        raise PlanError(f"unknown split {split!r}; it is one of {', '.join(SPLITS)}")
    unit = group_size or math.gcd(geometry.ffn_hidden, 64)
    if geometry.ffn_hidden % unit:
        raise PlanError(
            f"the hidden dimension {geometry.ffn_hidden} is not divisible by the group size {unit}",
            hint="choose another --q-group-size, or --split experts",
        )
    return geometry.ffn_hidden // unit, unit, f"units of {unit} hidden elements"


def _either(numbers: Sequence[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last
