"""Divide the selected (token, expert) pairs among the ranks that hold copies of the expert.

The ranks exchange nothing for it: every rank knows the routing, computes the same shares, and does its own. It works on
counts, without arrays or weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Shares = dict[int, dict[int, int]]  # expert → rank → how many of the expert's pairs the rank computes


def share_out(counts: Mapping[int, int], owners: Sequence[Sequence[int]]) -> Shares:
    """Return how many pairs of each expert each rank computes, so that the busiest rank has as few as possible.

    `counts` are pairs per selected expert, `owners` the ranks that hold each expert. Equal arguments give equal shares
    everywhere: each expert goes to its least loaded owners, ties to the lowest rank. Then work moves along chains of
    owners away from the busiest rank while that helps (optimal semi-matching: Harvey et al., 2003).
    """
    loads = dict.fromkeys(sorted({rank for ranks in owners for rank in ranks}), 0)
    # Experts with few owners first: the others can then use the ranks that are left.
    order = sorted(counts, key=lambda e: (len(owners[e]), e))
    shares = {expert: _fill(counts[expert], owners[expert], loads) for expert in order}
    while _relieve(shares, owners, loads):
        pass
    return shares


def _fill(count: int, ranks: Sequence[int], loads: dict[int, int]) -> dict[int, int]:
    """Give each pair to the least loaded rank, computed for all pairs at once; return the pairs of each rank."""
    order = sorted(ranks, key=lambda r: (loads[r], r))
    before = dict(loads)
    for width, rank in enumerate(order, 1):
        low = order[:width]  # all filled up to this rank's load by now
        room = (loads[order[width]] - loads[rank]) * width if width < len(order) else count
        each, rest = divmod(min(count, room), width)
        for place, r in enumerate(sorted(low)):
            loads[r] += each + (place < rest)
        count -= min(count, room)
        if not count:
            break
    return {r: loads[r] - before[r] for r in ranks}


def _relieve(shares: Shares, owners: Sequence[Sequence[int]], loads: dict[int, int]) -> bool:
    """Move pairs from one of the busiest ranks along a chain of owners to one with at least two fewer, if possible."""
    busiest = max(loads.values())
    for start in (r for r in loads if loads[r] == busiest):
        came_from = _reach(start, shares, owners)
        end = min(came_from, key=lambda r: (loads[r], r))
        if loads[end] > busiest - 2:
            continue
        chain = []
        rank = end
        while rank != start:
            expert, before = came_from[rank]
            chain.append((expert, before, rank))
            rank = before
        amount = min((busiest - loads[end]) // 2, *(shares[e][giver] for e, giver, _ in chain))
        for expert, giver, taker in chain:
            shares[expert][giver] -= amount
            shares[expert][taker] += amount
        loads[start] -= amount
        loads[end] += amount
        return True
    return False


def _reach(start: int, shares: Shares, owners: Sequence[Sequence[int]]) -> dict[int, tuple[int, int]]:
    """Return the ranks to which work of `start` can be moved, each with (expert, rank before) of the shortest chain."""
    came_from = {start: (-1, start)}
    queue = [start]
    for rank in queue:
        for expert in sorted(e for e, share in shares.items() if share.get(rank)):
            for other in owners[expert]:
                if other not in came_from:
                    came_from[other] = (expert, rank)
                    queue.append(other)
    return came_from
