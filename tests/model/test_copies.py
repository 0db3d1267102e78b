"""Copies of experts: every slot is used, every expert is somewhere, and the busy ones come first."""

from __future__ import annotations

from hypothesis import given, strategies as st

from moectl.model.placement import place_copies


@st.composite
def wishes(draw: st.DrawFn) -> tuple[list[int], int, list[float]]:
    """Draw slots per rank that can hold all of up to 16 experts, copies at most, and frequencies."""
    experts = draw(st.integers(1, 16))
    ranks = draw(st.integers(1, min(6, experts)))
    replicas = draw(st.integers(1, ranks))
    slots = [1] * ranks
    for _ in range(draw(st.integers(experts, experts * replicas)) - ranks):
        slots[draw(st.sampled_from([r for r in range(ranks) if slots[r] < experts]))] += 1
    frequencies = draw(st.lists(st.floats(0, 100), min_size=experts, max_size=experts))
    return slots, replicas, frequencies


@given(wishes())
def test_slots_are_filled_and_no_expert_is_missing(wish: tuple[list[int], int, list[float]]) -> None:
    slots, replicas, frequencies = wish
    held = place_copies(slots, replicas, frequencies)
    assert [len(experts) for experts in held] == slots
    for experts in held:
        assert list(experts) == sorted(set(experts))
    for expert in range(len(frequencies)):
        assert 1 <= sum(expert in experts for experts in held) <= replicas


def test_busy_experts_get_the_spare_slots() -> None:
    frequencies = [1.0] * 16
    frequencies[3] = frequencies[9] = 5.0
    held = place_copies([5, 4, 5, 4], 2, frequencies)
    assert [sum(e in experts for experts in held) for e in range(16)] == [2 if e in (3, 9) else 1 for e in range(16)]


def test_without_copies_busy_experts_are_kept_apart() -> None:
    held = place_copies([4] * 4, 1, [10.0, 9.0, 8.0, 7.0] + [1.0] * 12)
    assert [sum(e < 4 for e in experts) for experts in held] == [1, 1, 1, 1]
