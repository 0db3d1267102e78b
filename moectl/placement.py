"""Decide which rank holds what: pure arithmetic on a geometry, no files, no network, no arrays.

A placement is a list of contiguous spans, one per rank: of experts (`experts`) or of every expert's hidden dimension
(`hidden`). Attention, norms, router, embedding and head are on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moectl.errors import PlanError
from moectl.geometry import Geometry

SPLITS = ("experts", "hidden")


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
        return self._span(rank) if self.split == "hidden" else (0, self.geometry.ffn_hidden)


def make_placement(
    geometry: Geometry, split: str, nodes: int, *, shares: Sequence[int] | None = None, group_size: int | None = None
) -> Placement:
    """Place the experts on `nodes` ranks, evenly unless `shares` says how.

    `shares` are experts per rank (`experts`) or units of the hidden dimension per rank (`hidden`, where one unit is one
    quantisation group: 168 of 64 in DBRX). Raises PlanError when nodes or shares cannot work, with what would.
    """
    if split not in SPLITS:
        raise PlanError(f"unknown split {split!r}; it is one of {', '.join(SPLITS)}")
    if split == "experts":
        total, unit, what = geometry.n_experts, 1, "experts"
    else:
        unit = group_size or math.gcd(geometry.ffn_hidden, 64)
        if geometry.ffn_hidden % unit:
            raise PlanError(
                f"the hidden dimension {geometry.ffn_hidden} is not divisible by the group size {unit}",
                hint="choose another --q-group-size, or --split experts",
            )
        total, what = geometry.ffn_hidden // unit, f"units of {unit} hidden elements"
    if nodes < 1:
        raise PlanError(f"{nodes} nodes cannot hold a model; use 1 or more")
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
