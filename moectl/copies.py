"""Choose which ranks hold which experts when experts have several copies, or are not equally busy.

It decides once, before a model is cut; who computes what with these copies is decided per step, in `balance`.
"""

from __future__ import annotations

from collections.abc import Sequence

Held = tuple[tuple[int, ...], ...]  # rank → numbers of the experts that it holds, ascending


def place_copies(slots: Sequence[int], replicas: int, frequencies: Sequence[float]) -> Held:
    """Return the experts of each rank: `slots[rank]` of them, each expert on 1 to `replicas` ranks.

    `frequencies` says how often each expert is selected, in any unit. Where slots are short, the busiest experts get
    copies first. Copies are spread so that ranks expect equal work, and so that two experts share as few ranks as can
    be: a rank that is busy with one can then leave the other to somebody else. The slots have to add up to between one
    and `replicas` copies of each expert, none of them more than there are experts.
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
    """Return copies per expert: one each, the rest one by one to the expert whose copies have most to do."""
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
    """Whether ranks with so many slots can hold these copies, no rank two of one expert (Gale–Ryser)."""
    most = sorted(copies, reverse=True)
    return all(sum(most[:k]) <= sum(min(k, s) for s in slots) for k in range(1, len(most) + 1))
