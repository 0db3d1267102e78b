"""Which rank owns which pieces: the one place that turns shares into spans.

Shares are any positive numbers, one per rank; they are fractions of the whole. Each set of pieces is rounded to its own
grain, so a rank may own nothing of a small one. It always owns a head where heads are divided: its cache counts tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from moectl.errors import PlanError
from moectl.model.regions import Division, Pieces, Role, Span

Shares = Sequence[float]
Held = tuple[tuple[int, ...], ...]  # rank → numbers of the experts that it holds, ascending


@dataclass(frozen=True, slots=True)
class Holding:
    """What one rank has of the arrays of a module."""

    division: Division
    spans: tuple[Span, ...]  # of pieces, ascending
    adds: bool  # it is the rank that adds what is added once

    @property
    def span(self) -> Span:
        """The span of pieces, where they are consecutive."""
        (span,) = self.spans
        return span

    @property
    def numbers(self) -> list[int]:
        """The numbers of all pieces."""
        return [number for span in self.spans for number in range(*span)]

    @property
    def is_empty(self) -> bool:
        return all(start == stop for start, stop in self.spans)


def hold(divisions: Mapping[str, Division], shares: Shares, rank: int, held: Held | None = None) -> dict[str, Holding]:
    """Return what a rank has of each divided module; what is not there is whole on every rank.

    Attention is divided in all layers or in none: some layers take keys and values of others. `held` says which experts
    the ranks have, where they are not consecutive or have copies.
    """
    owned = {path: own(division.pieces, shares) for path, division in divisions.items()}
    leave = any(spans is None for spans in owned.values())
    holdings: dict[str, Holding] = {}
    for path, spans in owned.items():
        role = divisions[path].pieces.role
        if role is Role.EXPERT and held is not None:
            holdings[path] = Holding(divisions[path], find_runs(held[rank]), rank == 0)
        elif spans is not None and not (leave and role in (Role.HEAD, Role.KV_HEAD)):
            holdings[path] = Holding(divisions[path], (spans[rank],), rank == first_owner(spans))
    return holdings


def find_runs(numbers: Sequence[int]) -> tuple[Span, ...]:
    """Return ascending numbers as spans."""
    ends = [i for i in range(1, len(numbers)) if numbers[i] != numbers[i - 1] + 1]
    return tuple((numbers[a], numbers[b - 1] + 1) for a, b in pairwise([0, *ends, len(numbers)]))


def find_holding(holdings: Mapping[str, Holding], parameter: str) -> Holding | None:
    """Return what a rank has of a parameter; None: all of it. A division is of a module or of one array."""
    return holdings.get(parameter) or holdings.get(parameter.rpartition(".")[0])


def own(pieces: Pieces, shares: Shares) -> tuple[Span, ...] | None:
    """Return the span of pieces of each rank; None where they cannot be divided: each rank has to have them all.

    The spans of KV heads overlap where there are more ranks than KV heads.
    """
    return _own(pieces, tuple(shares))


@lru_cache(maxsize=4096)
def _own(pieces: Pieces, shares: Shares) -> tuple[Span, ...] | None:
    if pieces.role in (Role.EXPERT, Role.HIDDEN):
        return share_out(pieces.count, pieces.grain, shares)
    heads = _own_heads(pieces, shares)
    if heads is None or pieces.role is Role.HEAD:
        return heads
    ratio = pieces.heads // pieces.kv_heads
    return tuple((start // ratio, -(-stop // ratio)) for start, stop in heads)


def own_layers(count: int, shares: Shares) -> tuple[Span, ...]:
    """Return the span of layers of each rank of a pipeline, at least one each. Raises PlanError."""
    if count < len(shares):
        raise PlanError(
            f"{count} layers cannot be given to {len(shares)} nodes: each needs one",
            hint=f"use {count} nodes or fewer, or another split",
        )
    return share_out(count, 1, shares, least=1)


def first_owner(spans: Sequence[Span]) -> int:
    """Return the first rank that owns anything: it adds what is added once."""
    return next(rank for rank, (start, stop) in enumerate(spans) if start < stop)


def normalise(shares: Shares) -> tuple[float, ...]:
    """Return shares as parts of 1."""
    total = math.fsum(shares)
    return tuple(round(share / total, 9) for share in shares)


def share_out(count: int, grain: int, shares: Shares, *, least: int = 0) -> tuple[Span, ...]:
    """Divide `count` into consecutive spans of whole grains, each of at least `least` grains."""
    grains, ranks = count // grain, len(shares)
    ends, done, total = [0], 0.0, math.fsum(shares)
    for rank, share in enumerate(shares, start=1):
        done += share
        end = math.floor(done / total * grains + 0.5)
        ends.append(min(max(end, ends[-1] + least), grains - (ranks - rank) * least))
    places = [end * grain for end in ends[:-1]] + [count]
    return tuple(pairwise(places))


def _own_heads(pieces: Pieces, shares: Shares) -> tuple[Span, ...] | None:
    ranks, ratio = len(shares), pieces.heads // pieces.kv_heads
    together = math.lcm(ratio, pieces.grain)
    if pieces.heads % together == 0 and pieces.heads // together >= ranks:
        return share_out(pieces.heads, together, shares, least=1)
    each = ranks // pieces.kv_heads  # ranks that share a KV head
    if ranks % pieces.kv_heads or ratio % pieces.grain or ratio // pieces.grain < each:
        return None
    spans: list[Span] = []
    for kv_head in range(pieces.kv_heads):
        first = kv_head * ratio
        part = share_out(ratio, pieces.grain, shares[kv_head * each : (kv_head + 1) * each], least=1)
        spans += [(first + start, first + stop) for start, stop in part]
    return tuple(spans)
