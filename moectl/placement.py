"""Decide which rank holds what: pure arithmetic on a geometry, no files, no network, no arrays.

A placement is a list of shares, one per rank, and each `--split` says of what: whole experts (`experts`), every
expert's hidden dimension (`hidden`), that and attention heads (`tensor`), or whole layers (`layers`). What is not
divided is on every rank, but for the head: one rank needs it, the one that samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moectl.errors import PlanError
from moectl.geometry import Geometry

SPLITS = ("experts", "hidden", "tensor", "layers")
Span = tuple[int, int]  # half-open: [start, stop)


@dataclass(frozen=True, slots=True)
class Placement:
    """What each rank holds of a model."""

    split: str
    # Per rank. experts: experts; hidden, tensor: units of `unit` hidden elements; layers: layers.
    shares: tuple[int, ...]
    unit: int  # elements per share: the quantisation group for hidden and tensor, else 1
    geometry: Geometry

    @property
    def world_size(self) -> int:
        return len(self.shares)

    def _span(self, rank: int) -> Span:
        start = sum(self.shares[:rank]) * self.unit
        return start, start + self.shares[rank] * self.unit

    def experts(self, rank: int) -> Span:
        """Return the span of expert numbers that a rank holds of each of its layers."""
        return self._span(rank) if self.split == "experts" else (0, self.geometry.n_experts)

    def hidden(self, rank: int) -> Span:
        """Return the span of every expert's hidden dimension that a rank holds, in elements."""
        return self._span(rank) if self.split in ("hidden", "tensor") else (0, self.geometry.ffn_hidden)

    def layers(self, rank: int) -> Span:
        """Return the span of layers that a rank computes (a part of)."""
        return self._span(rank) if self.split == "layers" else (0, self.geometry.n_layers)

    def kv_heads(self, rank: int) -> Span:
        """Return the span of KV heads that a rank holds of each of its layers, with their query heads and KV cache."""
        if self.split != "tensor":
            return 0, self.geometry.kv_n_heads
        each = self.geometry.kv_n_heads // self.world_size
        return rank * each, (rank + 1) * each

    def query_heads(self, rank: int) -> Span:
        """Return the span of query heads that attend to a rank's KV heads."""
        start, stop = self.kv_heads(rank)
        each = self.geometry.n_heads // self.geometry.kv_n_heads
        return start * each, stop * each

    def holds_embedding(self, rank: int) -> bool:
        """Whether a rank turns token ids into vectors itself."""
        return self.split != "layers" or rank == 0

    @property
    def head_rank(self) -> int:
        """The one rank with the head; it samples, and tells the others."""
        return self.world_size - 1 if self.split == "layers" else 0

    def holds_head(self, rank: int) -> bool:
        """Whether a rank turns vectors into logits."""
        return rank == self.head_rank


def make_placement(
    geometry: Geometry, split: str, nodes: int, *, shares: Sequence[int] | None = None, group_size: int | None = None
) -> Placement:
    """Place a model on `nodes` ranks, evenly unless `shares` says how.

    `shares` are experts per rank (`experts`), layers per rank (`layers`), or units of the hidden dimension per rank
    (`hidden` and `tensor`, where one unit is one quantisation group: 168 of 64 in DBRX); `tensor` always divides heads
    evenly. Raises PlanError when nodes or shares cannot work, with what would.
    """
    if split not in SPLITS:
        raise PlanError(f"unknown split {split!r}; it is one of {', '.join(SPLITS)}")
    total, unit, what = _units(geometry, split, group_size)
    if nodes < 1:
        raise PlanError(f"{nodes} nodes cannot hold a model; use 1 or more")
    if split == "tensor" and geometry.kv_n_heads % nodes:
        raise PlanError(
            f"{geometry.kv_n_heads} KV heads cannot be divided by {nodes} nodes; {_choice(tensor_nodes(geometry))}",
            hint="use another number of nodes, or --split hidden",
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


def _units(geometry: Geometry, split: str, group_size: int | None) -> tuple[int, int, str]:
    """Return how many units a split divides, the elements in one, and what they are."""
    if split == "experts":
        return geometry.n_experts, 1, "experts"
    if split == "layers":
        return geometry.n_layers, 1, "layers"
    unit = group_size or math.gcd(geometry.ffn_hidden, 64)
    if geometry.ffn_hidden % unit:
        raise PlanError(
            f"the hidden dimension {geometry.ffn_hidden} is not divisible by the group size {unit}",
            hint="choose another --q-group-size, or --split experts",
        )
    return geometry.ffn_hidden // unit, unit, f"units of {unit} hidden elements"


def tensor_nodes(geometry: Geometry, group_size: int = 1) -> list[int]:
    """Return the numbers of nodes that `tensor` can use: those that divide the KV heads and keep groups whole.

    Each rank has a slice of the columns of the attention's output projection, and quantisation groups run along these.
    """
    heads = range(1, geometry.kv_n_heads + 1)
    return [n for n in heads if geometry.kv_n_heads % n == 0 and geometry.d_model // n % group_size == 0]


def check_groups(placement: Placement, group_size: int) -> None:
    """Raise PlanError when a placement cuts through the quantisation groups of the attention's output projection."""
    nodes = tensor_nodes(placement.geometry, group_size)
    if placement.split == "tensor" and placement.world_size not in nodes:
        columns = placement.geometry.d_model // placement.world_size
        raise PlanError(
            f"each of {placement.world_size} nodes would have {columns} columns of the attention's output, "
            f"which are not whole groups of {group_size}; {_choice(nodes)}",
            hint="use another number of nodes, a smaller --q-group-size, or --split hidden",
        )


def _choice(nodes: Sequence[int]) -> str:
    if len(nodes) < 2:
        return f"only {nodes[0]} node works" if nodes else "no number of nodes works"
    return f"{', '.join(map(str, nodes[:-1]))} or {nodes[-1]} nodes work"
