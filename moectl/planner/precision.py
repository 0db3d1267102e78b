"""The precision of a model that leaves the choice to moectl: the most bits per weight that fit. Pure."""

from __future__ import annotations

from collections.abc import Callable

from moectl.model.structure import Quantization
from moectl.planner.memory import Verdict
from moectl.planner.plan import Question, best_plan
from moectl.shards.prepare import Wanted

# What mlx-lm quantises well, in its usual groups. With 2 bits it rounds too much: only --q-bits asks for them.
_GROUP = 64
PRECISIONS = (None, *(Quantization(bits, _GROUP) for bits in (8, 6, 5, 4, 3)))  # None: 16 bits


def choose_precision(grade: Callable[[Quantization | None], Verdict]) -> tuple[Quantization | None, Verdict]:
    """Return the most bits that fit, else the most that are borderline, else the fewest; `grade` says what fits."""
    grades: dict[Quantization | None, Verdict] = {}
    for precision in PRECISIONS:
        grades[precision] = grade(precision)
        if grades[precision] is Verdict.FITS:
            return precision, Verdict.FITS
    best = min(grades, key=lambda precision: grades[precision])
    if grades[best] is Verdict.TOO_MUCH:
        best = PRECISIONS[-1]
    return best, grades[best]


def most_bits(question: Question, wanted: Wanted) -> tuple[Quantization | None, Verdict]:
    """Return the most bits per weight that fit the hosts. Raises PlanError where the model cannot be placed."""
    split = "experts" if wanted.replicas > 1 or wanted.routing is not None else wanted.split  # as make_plan
    return choose_precision(lambda precision: best_plan(question.quantised(precision), split, wanted.shares).verdict)


def choice_text(precision: Quantization | None, verdict: Verdict) -> str:
    """Return what to say of a precision that moectl chose; nothing where the model stays in 16 bits."""
    if precision is None:
        return ""
    if verdict is Verdict.TOO_MUCH:
        return f"{precision.bits} bits: the fewest that moectl chooses by itself"
    return f"{precision.bits} bits: the most that fit; --q-bits sets others"
