"""Tokens of a prompt that the stages of a pipeline read at a time: a chunk's whole way stays well below 5 s."""

from __future__ import annotations

import pytest

from moectl.engine.prefill_step import LEAST_STEP, WAY_S, choose_prefill_step, own_chip
from moectl.engine.protocol import PREFILL_STEP
from moectl.model.placement import Placement, make_placement
from moectl.planner.chips import CHIPS
from tests.support.structures import dbrx


def pipeline(ranks: int = 4) -> Placement:
    return make_placement(dbrx(), "layers", ranks)


def test_slower_chips_read_fewer_tokens_at_a_time() -> None:
    steps = {chip: choose_prefill_step(pipeline(), chip) or 0 for chip in ("m1", "m1-max", "m2-ultra", "h200")}
    assert LEAST_STEP <= steps["m1"] < steps["m1-max"] < steps["m2-ultra"] <= steps["h200"] == PREFILL_STEP


@pytest.mark.parametrize("chip", CHIPS)
def test_every_chip_of_the_table_has_a_step(chip: str) -> None:
    step = choose_prefill_step(pipeline(), chip)
    assert step is not None
    assert LEAST_STEP <= step <= PREFILL_STEP
    assert WAY_S < 5 / 2  # what macOS gives its GPU, with room for a wrong prediction


def test_other_splits_and_unknown_chips_have_no_limit() -> None:
    assert choose_prefill_step(make_placement(dbrx(), "hidden", 2), "m1") is None
    assert choose_prefill_step(pipeline(1), "m1") is None
    assert choose_prefill_step(pipeline(), None) is None


def test_a_macs_chip_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []
    said = ["Apple M2 Ultra", "Apple M99", ""]

    def ask(*argv: str) -> str:
        asked.append(argv)
        return said[len(asked) - 1]

    monkeypatch.setattr("moectl.engine.prefill_step.ask_tool", ask)
    assert own_chip() is None  # this machine is none
    assert not asked
    monkeypatch.setattr("moectl.engine.prefill_step.sys.platform", "darwin")
    assert own_chip() == "m2-ultra"
    assert asked == [("/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string")]
    assert own_chip() is None
    assert own_chip() is None  # the tool said nothing
