"""Decide which rank holds what: pure arithmetic on a geometry, no files, no network, no arrays.

A placement is a list of shares, one per rank, and each `--split` says of what: whole experts (`experts`, of which there
may be copies), every expert's hidden dimension (`hidden`), that and attention heads (`tensor`), or whole layers
(`layers`). What is not divided is on every rank, but for the head: one rank needs it, the one that samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moectl.copies import Held, place_copies
from moectl.errors import PlanError
from moectl.geometry import Geometry

SPLITS = ("experts", "hidden", "tensor", "layers")
Span = tuple[int, int]  # half-open: [start, stop)


@dataclass(frozen=True, slots=True)
class Placement:
    """What each rank holds of a model."""

    split: str
    # Per rank. experts: experts, copies included; hidden, tensor: units of `unit` hidden elements; layers: layers.
    shares: tuple[int, ...]
    unit: int  # elements per share: the quantisation group for hidden and tensor, else 1
    geometry: Geometry
    held: Held | None = None  # experts of each rank, where they have copies or are not placed in order

    @property
    def world_size(self) -> int:
        return len(self.shares)

    def _span(self, rank: int) -> Span:
        start = sum(self.shares[:rank]) * self.unit
        return start, start + self.shares[rank] * self.unit

    def experts_of(self, rank: int) -> tuple[int, ...]:
        """Return the numbers of the experts that a rank holds (a part of) in each of its layers, ascending."""
        if self.held is not None:
            return self.held[rank]
        return tuple(range(*(self._span(rank) if self.split == "experts" else (0, self.geometry.n_experts))))

    @property
    def owners(self) -> tuple[tuple[int, ...], ...]:
        """The ranks that hold (a part of) each expert, in rank order."""
        held = [set(self.experts_of(rank)) for rank in range(self.world_size)]
        return tuple(
            tuple(rank for rank, numbers in enumerate(held) if expert in numbers)
            for expert in range(self.geometry.n_experts)
        )

    @property
    def replicas(self) -> int:
        """The most copies that an expert has."""
        return 1 if self.held is None else max(map(len, self.owners))

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
    geometry: Geometry,
    split: str,
    nodes: int,
    *,
    shares: Sequence[int] | None = None,
    group_size: int | None = None,
    replicas: int = 1,
    frequencies: Sequence[float] | None = None,
) -> Placement:
    """Place a model on `nodes` ranks, evenly unless `shares` says how.

    `shares` are experts per rank (`experts`), layers per rank (`layers`), or units of the hidden dimension per rank
    (`hidden` and `tensor`, where one unit is one quantisation group: 168 of 64 in DBRX); `tensor` always divides heads
    evenly. With `replicas`, `experts` gives each expert up to that many copies, and shares count copies: between one
    and `replicas` of each expert together. With `frequencies` (one number per expert: how often it is selected, in any
    unit) experts are placed so that ranks expect equal work, and the busiest get copies first. Raises PlanError when
    nodes or shares cannot work, with what would.
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
    _check_copies(geometry, split, nodes, replicas, frequencies)
    if shares is None:
        base, extra = divmod(total * replicas, nodes)
        shares = [base + (rank < extra) for rank in range(nodes)]
    if len(shares) != nodes:
        raise PlanError(f"{len(shares)} shares were given for {nodes} nodes; give one per node")
    if not (1 <= min(shares) <= max(shares) <= total <= sum(shares) <= total * replicas):
        together = f"{total}" if replicas == 1 else f"{total} to {total * replicas}"
        each = "1 or more" if replicas == 1 else f"1 to {total}"
        raise PlanError(
            f"shares {','.join(map(str, shares))} add up to {sum(shares)}; each must be {each} and together "
            f"{together} ({what})"
        )
    held = None
    if replicas > 1 or frequencies is not None:
        held = place_copies(shares, replicas, frequencies or [1.0] * total)
    return Placement(split, tuple(shares), unit, geometry, held)


def place_experts(geometry: Geometry, held: Held) -> Placement:
    """Return the `experts` placement in which these ranks hold these experts. Raises PlanError when it is none."""
    numbers = [e for experts in held for e in experts]
    in_order = all(experts and list(experts) == sorted(set(experts)) for experts in held)
    if not in_order or set(numbers) != set(range(geometry.n_experts)):
        raise PlanError(
            f"the ranks' experts should be {geometry.n_experts} numbers from 0, each on one rank or more, and in order"
        )
    return Placement("experts", tuple(map(len, held)), 1, geometry, held)


def _check_copies(
    geometry: Geometry, split: str, nodes: int, replicas: int, frequencies: Sequence[float] | None
) -> None:
    """Raise PlanError unless these copies can be had."""
    if replicas < 1:
        raise PlanError(f"{replicas} copies of an expert cannot be; use 1 or more")
    if split != "experts" and (replicas > 1 or frequencies is not None):
        raise PlanError(f"only whole experts can have copies, and --split {split} has none", hint="--split experts")
    if replicas > nodes:
        raise PlanError(f"{replicas} copies of an expert need {replicas} nodes; there are {nodes}")
    if frequencies is not None and (
        len(frequencies) != geometry.n_experts or not all(math.isfinite(f) and f >= 0 for f in frequencies)
    ):
        raise PlanError(f"routing frequencies should be {geometry.n_experts} numbers, one per expert and none negative")


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
