"""Random faults on four hosts under load; longer with --chaos-minutes, differently with --chaos-seed."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.support.netns import Cluster
from tests.system.chaos import run_chaos
from tests.system.chaos_faults import FAULTS, draw_acts
from tests.system.chaos_load import Outcome, Question, judge

EXACT = Question("completions", {}, "one two three", "length", 3)


@pytest.mark.netns
def test_every_answer_is_exact_or_ends_with_one_clear_error(
    netns: Cluster, tmp_path: Path, pytestconfig: pytest.Config, capsys: pytest.CaptureFixture[str]
) -> None:
    minutes, seed = pytestconfig.getoption("chaos_minutes"), pytestconfig.getoption("chaos_seed")
    report = run_chaos(netns, tmp_path, seconds=minutes * 60, seed=seed)
    with capsys.disabled():
        print(f"\n{report.write()}")  # noqa: T201 - whoever runs it for an hour wants to see what happened
    assert report.acts > 0
    assert any(outcome.kind == "exact" for outcome in report.outcomes)
    assert not report.violations, report.violations


def test_a_seed_is_a_schedule_in_which_nothing_is_forgotten() -> None:
    acts = [list(itertools.islice(draw_acts(seed), 40)) for seed in (1, 1, 2)]
    assert acts[0] == acts[1] != acts[2]
    drawn = [strike.fault.name for act in acts[0] for strike in act]
    assert set(drawn[: len(FAULTS)]) == {fault.name for fault in FAULTS}
    for act in acts[0]:
        for strike in act:
            low, high = strike.fault.hold_s
            assert low <= strike.draw.hold_s <= high
            assert strike.draw.rank != strike.draw.other


def ended(kind: str, text: str = "", **more: object) -> Outcome:
    outcome = Outcome(EXACT, 10.0, 12.0, kind, text)
    for name, value in more.items():
        setattr(outcome, name, value)
    return outcome


@pytest.mark.parametrize(
    "outcome",
    [
        ended("exact", "one two three", finish_reason="length", tokens=3),
        ended("error", "one two", errors=1, message="node2: rank 2: the worker was killed"),
        ended("left", "one"),
    ],
)
def test_what_is_in_order(outcome: Outcome) -> None:
    assert judge(outcome, []) == ""


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        (ended("exact", "one two two three", finish_reason="length", tokens=4), "undisturbed it is"),  # repeated
        (ended("exact", "one three", finish_reason="length", tokens=2), "undisturbed it is"),  # missing
        (ended("exact", "one two", finish_reason="length", tokens=2), "undisturbed it is"),  # short
        (ended("error", "one lie", errors=1, message="node2: gone"), "the answer reads"),
        (ended("error", "one", errors=2, message="node2: gone"), "2 errors"),
        (ended("error", "one", errors=1, message="something failed"), "names neither"),
        (ended("error", "one", errors=1, message="node2: KeyError (a bug in moectl)"), "no clear one"),
        (ended("ended", "one"), "without its last word"),
        (ended("hung", "one"), "hung"),
    ],
)
def test_what_is_a_violation(outcome: Outcome, reason: str) -> None:
    assert reason in judge(outcome, [])
