"""The placement: which rank holds what of a model. Pure arithmetic on its structure, without files or arrays.

There are four splits. `experts`: whole experts. `hidden`: a span of every unit's hidden dimension. Both replicate
attention, norms, routers and the embedding, and rank 0 has the head. `tensor` is `hidden` with divided attention heads
and their keys and values. `layers`: whole consecutive layers; the first rank has the embedding, the last one the head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moectl.errors import PlanError
from moectl.model.ownership import Held, Holding, hold, own, own_layers, share_out
from moectl.model.regions import Division, Pieces, Role, Span
from moectl.model.structure import Outer, Part, Structure

SPLITS = ("experts", "hidden", "tensor", "layers")


@dataclass(frozen=True, slots=True)
class Placement:
    """Who holds what: shares are any positive numbers, one per rank, and are rounded for each part of the model."""

    split: str
    shares: tuple[int | float, ...]
    structure: Structure
    held: Held | None = None  # experts of each rank, where they have copies or are not placed in order

    @property
    def world_size(self) -> int:
        return len(self.shares)

    @property
    def head_rank(self) -> int:
        """The rank that has the head: it samples the tokens and leads the others."""
        return self.world_size - 1 if self.split == "layers" else 0

    def layers(self, rank: int) -> Span:
        """Return the span of layers that a rank holds."""
        count = self.structure.n_layers
        return own_layers(count, self.shares)[rank] if self.split == "layers" else (0, count)

    def hold(self, divisions: Mapping[str, Division], rank: int) -> dict[str, Holding]:
        """Return what a rank has of each divided module; what is not there is whole on every rank."""
        return hold(divisions, self.shares, rank, self.held)

    def fraction(self, part: Part, rank: int) -> float:
        """Return how much of a part of a layer a rank holds, 1 = all of it, where it holds the layer."""
        pieces = part.pieces(self.split)
        return 1.0 if pieces is None else self.fraction_of(pieces, rank)

    def fraction_of(self, pieces: Pieces, rank: int) -> float:
        """Return how much of the pieces a rank holds."""
        if pieces.role is Role.EXPERT and self.held is not None:
            return len(self.held[rank]) / pieces.count
        if pieces.role in (Role.HEAD, Role.KV_HEAD) and not self.divides_heads:
            return 1.0
        spans = own(pieces, self.shares)
        return 1.0 if spans is None else (spans[rank][1] - spans[rank][0]) / pieces.count

    @property
    def divides_heads(self) -> bool:
        """Whether attention is divided: in all layers or in none."""
        heads = {part.heads for kind in self.structure.kinds for part in kind.parts if part.heads is not None}
        return self.split == "tensor" and all(own(pieces, self.shares) is not None for pieces in heads)

    def experts_of(self, rank: int) -> tuple[int, ...]:
        """Return the numbers of the experts that a rank holds (a part of) in each of its layers, ascending."""
        if self.held is not None:
            return self.held[rank]
        count = self.structure.n_experts
        if self.split != "experts":
            return tuple(range(count))
        return tuple(range(*share_out(count, 1, self.shares)[rank]))

    @property
    def owners(self) -> tuple[tuple[int, ...], ...]:
        """The ranks that hold (a part of) each expert, in rank order."""
        held = [set(self.experts_of(rank)) for rank in range(self.world_size)]
        return tuple(
            tuple(rank for rank, numbers in enumerate(held) if expert in numbers)
            for expert in range(self.structure.n_experts)
        )

    @property
    def replicas(self) -> int:
        """The most copies that an expert has."""
        return 1 if self.held is None else max(map(len, self.owners))

    def holds_outer(self, outer: Outer, rank: int) -> bool:
        """Whether a rank has these arrays, which are in no layer."""
        if not (outer.first or outer.last) or not self.structure.has_line:
            return True
        is_first = self.split != "layers" or rank == 0
        return (outer.first and is_first) or (outer.last and rank == self.head_rank)


def make_placement(
    structure: Structure,
    split: str,
    nodes: int,
    *,
    shares: Sequence[float] | None = None,
    replicas: int = 1,
    frequencies: Sequence[float] | None = None,
) -> Placement:
    """Place a model on `nodes` ranks: evenly, or in proportion to `shares`.

    With `replicas`, `experts` gives each expert up to that many copies. With `frequencies` (one number per expert: how
    often it is selected, in any unit) experts are placed so that ranks expect equal work, and the busiest get copies
    first. Raises PlanError when the model, nodes or shares cannot work; it says what can.
    """
    if nodes < 1:
        raise PlanError(f"{nodes} nodes cannot hold a model; use 1 or more")
    if split not in SPLITS:
        raise PlanError(f"unknown split {split!r}; it is one of {', '.join(SPLITS)}")
    if nodes > 1 and split in structure.refused:
        able = [name for name in SPLITS if name not in structure.refused]
        raise PlanError(
            f"a {structure.model_type} model cannot be split by {split}: {structure.refused[split]}",
            hint=f"use --split {' or --split '.join(able)}" if able else "it runs on one host only",
        )
    _check_copies(structure, split, nodes, replicas, frequencies)
    given = tuple(shares) if shares is not None else (1,) * nodes
    if len(given) != nodes:
        raise PlanError(f"{len(given)} shares were given for {nodes} nodes; give one per node")
    if not all(math.isfinite(share) and share > 0 for share in given):
        raise PlanError(f"shares {','.join(map(str, given))} should be numbers above 0, such as 2,1,1")
    _check_pieces(structure, split, given)
    held = None
    if split == "experts" and (replicas > 1 or frequencies is not None):
        held = place_copies(
            _count_slots(structure, given, replicas), replicas, frequencies or [1.0] * structure.n_experts
        )
    return Placement(split, given, structure, held)


def _check_pieces(structure: Structure, split: str, shares: Sequence[float]) -> None:
    """Raise PlanError unless each rank can get something."""
    nodes = len(shares)
    if split == "layers":
        own_layers(structure.n_layers, shares)
        return
    pieces = [found for part in structure.parts if (found := part.pieces(split)) is not None]
    most = max((found.count // found.grain for found in pieces if found.role is not Role.KV_HEAD), default=nodes)
    what = {"experts": "experts"}.get(split, "parts that can be divided")
    if nodes > most:
        raise PlanError(f"{nodes} nodes are too many: the model has {most} {what}, so at most {most} nodes")
    heads = {found for found in pieces if found.role in (Role.HEAD, Role.KV_HEAD)}
    if nodes > 1 and any(own(found, shares) is None for found in heads):
        able = [n for n in range(1, 17) if all(own(found, [1] * n) is not None for found in heads)]
        raise PlanError(
            f"the attention's heads cannot be divided by {nodes} nodes; a tensor split works on {_either(able)}",
            hint="--split hidden works on any number of nodes",
        )


def _count_slots(structure: Structure, shares: Sequence[float], replicas: int) -> list[int]:
    """Return how many experts each rank has room for, copies included, and no expert twice."""
    count = structure.n_experts
    slots = [min(count, stop - start) for start, stop in share_out(count * replicas, 1, shares, least=1)]
    rest = max(count - sum(slots), 0)
    for rank in range(len(slots)):
        more = min(rest, count - slots[rank])
        slots[rank], rest = slots[rank] + more, rest - more
    return slots


def _check_copies(
    structure: Structure, split: str, nodes: int, replicas: int, frequencies: Sequence[float] | None
) -> None:
    """Raise PlanError unless these copies are possible."""
    count = structure.n_experts
    if replicas < 1:
        raise PlanError(f"{replicas} copies of an expert are not possible; use 1 or more")
    if split != "experts" and replicas > 1:
        raise PlanError(f"only whole experts can have copies, and --split {split} has none", hint="--split experts")
    if split != "experts" and frequencies is not None:
        raise PlanError(f"only whole experts have places, and --split {split} has none", hint="--split experts")
    if replicas > nodes:
        raise PlanError(f"{replicas} copies of an expert need {replicas} nodes; there are {nodes}")
    if (replicas > 1 or frequencies is not None) and len({stack.experts for stack in structure.stacks}) > 1:
        raise PlanError("layers of this model have different numbers of experts: they cannot have copies or places")
    if frequencies is not None and (
        len(frequencies) != count or not all(math.isfinite(f) and f >= 0 for f in frequencies)
    ):
        raise PlanError(f"routing frequencies should be {count} numbers, one per expert and none negative")


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
