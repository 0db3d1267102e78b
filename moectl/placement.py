"""Decide which rank holds what: pure arithmetic on a geometry, no files, no network, no arrays.

PLACEHOLDER for the branch that brings the real one.
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
    """What each rank holds of every layer's experts; spans are half-open [start, stop)."""

    split: str
    shares: tuple[int, ...]  # experts: experts per rank; hidden: units of `unit` hidden elements per rank
    unit: int  # elements per share: 1 for experts, the quantisation group for hidden
    geometry: Geometry

    @property
    def world_size(self) -> int:
        return len(self.shares)

    def _span(self, rank: int) -> tuple[int, int]:
        start = sum(self.shares[:rank]) * self.unit
        return start, start + self.shares[rank] * self.unit

    def experts(self, rank: int) -> tuple[int, int]:
        """Return the span of expert numbers that a rank holds."""
        return self._span(rank) if self.split == "experts" else (0, self.geometry.n_experts)

    def hidden(self, rank: int) -> tuple[int, int]:
        """Return the span of every expert's hidden dimension that a rank holds, in elements."""
        return self._span(rank) if self.split in ("hidden", "tensor") else (0, self.geometry.ffn_hidden)

    def layers(self, rank: int) -> tuple[int, int]:
        return self._span(rank) if self.split == "layers" else (0, self.geometry.n_layers)

    def kv_heads(self, rank: int) -> tuple[int, int]:
        each = self.geometry.kv_n_heads // self.world_size
        return (rank * each, (rank + 1) * each) if self.split == "tensor" else (0, self.geometry.kv_n_heads)

    def holds_embedding(self, rank: int) -> bool:
        return self.split != "layers" or rank == 0

    def holds_head(self, rank: int) -> bool:
        return rank == (self.world_size - 1 if self.split == "layers" else 0)


def make_placement(
    geometry: Geometry, split: str, nodes: int, *, shares: Sequence[int] | None = None, group_size: int | None = None
) -> Placement:
    if split not in SPLITS:
        raise PlanError(f"unknown split {split!r}; it is one of {', '.join(SPLITS)}")
    if split == "experts":
        total, unit, what = geometry.n_experts, 1, "experts"
    elif split == "layers":
        total, unit, what = geometry.n_layers, 1, "layers"
    else:
        unit = group_size or math.gcd(geometry.ffn_hidden, 64)
        total, what = geometry.ffn_hidden // unit, f"units of {unit} hidden elements"
    if split == "tensor" and geometry.kv_n_heads % nodes:
        fits = [n for n in range(1, geometry.kv_n_heads + 1) if geometry.kv_n_heads % n == 0]
        raise PlanError(f"{geometry.kv_n_heads} KV heads cannot be divided by {nodes}; {fits} work")
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
