"""Regions: what part of an array a file holds. Which rank owns which part is `moectl.model.ownership`'s business.

A parameter is divided along one axis, in pieces: experts, elements of a hidden dimension, or heads. Where a matrix is
two matrices one after the other (gate and up), each of these segments is divided alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import product

Span = tuple[int, int]  # half-open
Region = tuple[Span, ...]  # one span for each axis of a parameter


class Role(StrEnum):
    """What the pieces of a division are."""

    EXPERT = "expert"
    HIDDEN = "hidden"
    HEAD = "head"
    KV_HEAD = "kv head"


@dataclass(frozen=True, slots=True)
class Pieces:
    """What is shared out among ranks: `count` pieces, of which `grain` stay together.

    KV heads are shared out with the `heads` that use them, and `grain` counts these heads.
    """

    role: Role
    count: int
    grain: int = 1
    heads: int = 0  # of HEAD and KV_HEAD: how many heads there are,
    kv_heads: int = 0  # and how many KV heads


@dataclass(frozen=True, slots=True)
class Division:
    """How the arrays of a module are divided: along which axis of its weight, and how many elements make a piece."""

    axis: int  # 0 experts or heads, -2 rows, -1 columns
    pieces: Pieces
    width: int = 1
    segments: int = 1

    @property
    def total(self) -> int:
        """How many elements the axis has, of all segments."""
        return self.pieces.count * self.width * self.segments


def find_regions(
    name: str, shape: tuple[int, ...], division: Division, spans: Sequence[Span]
) -> tuple[list[Region], int]:
    """Return the regions of one array of a module that hold spans of pieces, and the axis that joins them.

    `name` is the array's name in its module. The length of its axis may be another than the weight's, where several
    elements are packed into one or share a scale. Raises ValueError where the span goes through one of these.
    """
    axis = division.axis % len(shape)
    if name == "bias" and division.axis == -2:
        axis = len(shape) - 1  # a bias has one number per row
    whole = tuple((0, length) for length in shape)
    if _is_undivided(name, division):
        return [whole], axis
    regions, count = [], division.pieces.count * division.width
    for segment, span in product(range(division.segments), spans):
        start, stop = ((segment * count + piece * division.width) * shape[axis] for piece in span)
        if start % division.total or stop % division.total:
            raise ValueError(f"a cut at {span} of {division.pieces.count} goes through a group of {name} {shape}")
        regions.append((*whole[:axis], (start // division.total, stop // division.total), *whole[axis + 1 :]))
    return regions, axis


def belongs_to_sum(name: str, division: Division) -> bool:
    """Whether an array is added after the columns of a matrix were summed: only one rank may add it."""
    return name == "bias" and division.axis == -1


def _is_undivided(name: str, division: Division) -> bool:
    # nvfp4's scale of a whole matrix (of each expert's, in a stack).
    return belongs_to_sum(name, division) or (name == "global_scale" and division.axis != 0)
