"""What part of which array belongs to a span of pieces."""

from __future__ import annotations

import math

import pytest

from moectl.model.regions import Division, Pieces, Region, Role, Span, belongs_to_sum, find_regions

HIDDEN = Pieces(Role.HIDDEN, 128, 64)


@pytest.mark.parametrize(
    ("name", "shape", "division", "spans", "regions", "axis"),
    [
        ("weight", (128, 32), Division(-2, HIDDEN), (64, 128), [((64, 128), (0, 32))], 0),
        ("bias", (128,), Division(-2, HIDDEN), (64, 128), [((64, 128),)], 0),
        ("bias", (8, 128), Division(-2, HIDDEN), (0, 64), [((0, 8), (0, 64))], 1),  # of a stack
        ("weight", (8, 128, 32), Division(-2, HIDDEN), (0, 64), [((0, 8), (0, 64), (0, 32))], 1),
        ("weight", (32, 16), Division(-1, HIDDEN), (64, 128), [((0, 32), (8, 16))], 1),  # 8 values in each
        ("scales", (32, 2), Division(-1, HIDDEN), (64, 128), [((0, 32), (1, 2))], 1),
        ("weight", (256, 4), Division(-2, HIDDEN, segments=2), (0, 64), [((0, 64), (0, 4)), ((128, 192), (0, 4))], 0),
        ("weight", (256, 4), Division(-2, HIDDEN, width=2), (0, 64), [((0, 128), (0, 4))], 0),  # in turns
        ("weight", (4, 8, 8), Division(0, Pieces(Role.EXPERT, 4)), (1, 3), [((1, 3), (0, 8), (0, 8))], 0),
        (
            "weight",
            (4, 8, 8),
            Division(0, Pieces(Role.EXPERT, 4)),
            [(0, 1), (2, 4)],  # experts that do not follow one another
            [((0, 1), (0, 8), (0, 8)), ((2, 4), (0, 8), (0, 8))],
            0,
        ),
        ("global_scale", (8,), Division(-2, HIDDEN), (0, 64), [((0, 8),)], 0),  # one for each expert
        ("global_scale", (4,), Division(0, Pieces(Role.EXPERT, 4)), (1, 3), [((1, 3),)], 0),
    ],
)
def test_regions_of_a_span(
    name: str,
    shape: tuple[int, ...],
    division: Division,
    spans: list[Span] | Span,
    regions: list[Region],
    axis: int,
) -> None:
    several = spans if isinstance(spans, list) else [spans]
    assert find_regions(name, shape, division, several) == (regions, axis)


def test_a_cut_through_a_group_is_refused() -> None:
    with pytest.raises(ValueError, match="goes through a group of scales"):
        find_regions("scales", (32, 2), Division(-1, HIDDEN), [(0, 32)])


def test_what_is_added_after_the_sum_is_whole() -> None:
    columns = Division(-1, HIDDEN)
    assert belongs_to_sum("bias", columns)
    assert not belongs_to_sum("bias", Division(0, Pieces(Role.EXPERT, 4)))
    assert find_regions("bias", (8, 32), columns, [(0, 64)]) == ([((0, 8), (0, 32))], 1)


def test_values_of_all_ranks_are_those_of_the_whole() -> None:
    division = Division(-2, HIDDEN, segments=2)
    parts = [find_regions("weight", (256, 4), division, [span])[0] for span in ((0, 64), (64, 128))]
    assert sum(math.prod(stop - start for start, stop in region) for part in parts for region in part) == 256 * 4
