"""The placement: which rank holds what. Pure arithmetic on a geometry, without files, network or arrays.

There are four splits. `experts`: whole experts. `hidden`: a span of every expert's hidden dimension. Both replicate
attention, norms, router and embedding, and rank 0 has the head. `tensor` is `hidden` with divided attention heads and
their keys and values. `layers`: whole consecutive layers; the first rank has the embedding, the last one the head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moectl.errors import PlanError
from moectl.model.geometry import Geometry

Held = tuple[tuple[int, ...], ...]  # rank → numbers of the experts that it holds, ascending


SPLITS = ("experts", "hidden", "tensor", "layers")


@dataclass(frozen=True, slots=True)
class Placement:
    """What each rank holds; spans are half-open [start, stop)."""

    split: str
    shares: tuple[int, ...]  # per rank: experts, units of `unit` hidden elements, or layers
    unit: int  # elements per share: the quantisation group in `hidden` and `tensor`, else 1
    geometry: Geometry
    held: Held | None = None  # experts of each rank, where they have copies or are not placed in order

    @property
    def world_size(self) -> int:
        return len(self.shares)

    @property
    def head_rank(self) -> int:
        """The rank that has the head: it samples the tokens and leads the others."""
        return self.world_size - 1 if self.split == "layers" else 0

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
    geometry: Geometry,
    split: str,
    nodes: int,
    *,
    shares: Sequence[int] | None = None,
    group_size: int | None = None,
    replicas: int = 1,
    frequencies: Sequence[float] | None = None,
) -> Placement:
    """Place a model on `nodes` ranks: evenly, or by `shares`.

    `shares` are per rank: experts (`experts`), layers (`layers`), or units of the hidden dimension (`hidden` and
    `tensor`, where one unit is one quantisation group: 168 of 64 in DBRX). With `replicas`, `experts` gives each expert
    up to that many copies, and shares count copies: between one and `replicas` of each expert together. With
    `frequencies` (one number per expert: how often it is selected, in any unit) experts are placed so that ranks expect
    equal work, and the busiest get copies first. Raises PlanError when nodes or shares cannot work; it says what can.
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
    """Return the `experts` placement in which the ranks hold these experts. Raises PlanError when it is not valid."""
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
    """Raise PlanError unless these copies are possible."""
    if replicas < 1:
        raise PlanError(f"{replicas} copies of an expert are not possible; use 1 or more")
    if split != "experts" and replicas > 1:
        raise PlanError(f"only whole experts can have copies, and --split {split} has none", hint="--split experts")
    if split != "experts" and frequencies is not None:
        raise PlanError(f"only whole experts have places, and --split {split} has none", hint="--split experts")
    if replicas > nodes:
        raise PlanError(f"{replicas} copies of an expert need {replicas} nodes; there are {nodes}")
    if frequencies is not None and (
        len(frequencies) != geometry.n_experts or not all(math.isfinite(f) and f >= 0 for f in frequencies)
    ):
        raise PlanError(f"routing frequencies should be {geometry.n_experts} numbers, one per expert and none negative")


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


def place_copies(slots: Sequence[int], replicas: int, frequencies: Sequence[float]) -> Held:
    """Return the experts of each rank: `slots[rank]` of them, each expert on 1 to `replicas` ranks.

    `frequencies` says how often each expert is selected, in any unit. Where there are few slots, the busiest experts
    get copies first. Copies are placed so that ranks expect equal work, and so that two experts share as few ranks as
    possible: a rank that is busy with one expert can then leave the other to another rank. The slots have to add up to
    between one and `replicas` copies of each expert; no rank has more slots than there are experts.
    """
    copies = _count_copies(slots, replicas, frequencies)
    free, work = list(slots), [0.0] * len(slots)
    met = [[0] * len(slots) for _ in slots]  # how many experts two ranks have in common
    held: list[list[int]] = [[] for _ in slots]
    for expert in sorted(range(len(frequencies)), key=lambda e: (-copies[e], -frequencies[e], e)):
        share = frequencies[expert] / copies[expert]
        mine: list[int] = []
        for _ in range(copies[expert]):
            open_ranks = [r for r in range(len(slots)) if free[r] and r not in mine]
            # Filling the emptiest first always leaves room for the copies to come (Gale–Ryser); one copy fits anywhere.
            room = {r: -free[r] if copies[expert] > 1 else 0 for r in open_ranks}
            rank = min(open_ranks, key=lambda r: (room[r], work[r], sum(met[r][m] for m in mine), r))
            mine.append(rank)
            free[rank] -= 1
            work[rank] += share
            held[rank].append(expert)
        for a in mine:
            for b in mine:
                met[a][b] += a != b
    return tuple(tuple(sorted(experts)) for experts in held)


def _count_copies(slots: Sequence[int], replicas: int, frequencies: Sequence[float]) -> list[int]:
    """Return copies per expert: one each, the rest one by one to the expert whose copies have the most work."""
    copies = [1] * len(frequencies)
    for _ in range(sum(slots) - len(copies)):
        for expert in sorted(range(len(copies)), key=lambda e: (-frequencies[e] / copies[e], e)):
            if copies[expert] < replicas:
                copies[expert] += 1
                if _fit(copies, slots):
                    break
                copies[expert] -= 1
    return copies


def _fit(copies: Sequence[int], slots: Sequence[int]) -> bool:
    """Whether ranks with these slots can hold these copies, with no expert twice on one rank (Gale–Ryser)."""
    most = sorted(copies, reverse=True)
    return all(sum(most[:k]) <= sum(min(k, s) for s in slots) for k in range(1, len(most) + 1))
