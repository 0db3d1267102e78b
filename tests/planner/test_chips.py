"""The table of chips: every row complete and sane, names found as people write them, the working set as published."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from moectl.errors import HostsError
from moectl.planner.chips import CHIPS, Chip, default_working_set_bytes, find_chip, installed_bytes

GIB = 1 << 30


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_rows_are_complete_and_sane(chip: Chip) -> None:
    assert chip.source
    assert 50 < chip.bandwidth_gb_s < 30_000
    assert 0 < chip.fp16_tflops < 10_000
    assert list(chip.memory_gib) == sorted(set(chip.memory_gib))
    assert (chip.price_usd is None) == (chip.price_of == "")
    assert chip.rdma == (chip.thunderbolt == 5)
    assert find_chip(chip.name) is find_chip(chip.name.upper().replace("-", " ")) is chip


def test_rdma_needs_thunderbolt_5() -> None:
    """Facts: M4 Pro and Max, M3 Ultra or later; not M2 Ultra, nor the base M4 mini."""
    can = {name for name, chip in CHIPS.items() if chip.rdma}
    assert {"m3-ultra", "m4-pro", "m4-max", "m5-max"} <= can
    assert not {"m2-ultra", "m4", "m1", "h100", "linux-cpu"} & can


@pytest.mark.parametrize("written", ["M2 Ultra", "Apple M2 Ultra", "m2_ultra", " m2-ULTRA "])
def test_names_as_people_write_them(written: str) -> None:
    assert find_chip(written).name == "m2-ultra"


def test_a_typing_error_gets_a_suggestion() -> None:
    with pytest.raises(HostsError, match=r"unknown chip 'm2-ulta'\. Did you mean 'm2-ultra'\?") as caught:
        find_chip("m2-ulta")
    assert "m4-max" in str(caught.value.hint)


@given(st.text(max_size=40))
def test_any_text_is_a_chip_or_refused(text: str) -> None:
    try:
        found = find_chip(text).name
    except HostsError as error:
        found = error.message
    assert "\n" not in found


@pytest.mark.parametrize(
    ("gib", "working_set"), [(16, 10.67), (32, 21.33), (64, 48), (96, 72), (128, 107.52), (192, 144)]
)
def test_working_sets_as_published(gib: int, working_set: float) -> None:
    assert default_working_set_bytes(gib * GIB) == int(working_set * GIB)


@given(st.integers(4 * GIB, 1024 * GIB))
def test_working_sets_stay_below_the_memory(memory: int) -> None:
    assert 0.6 * memory < default_working_set_bytes(memory) < 0.85 * memory


def test_a_stated_size_is_the_one_that_is_sold() -> None:
    assert installed_bytes(find_chip("m2-ultra"), 192 * 10**9) == 192 * GIB
    assert installed_bytes(find_chip("m2-ultra"), 120 * 10**9) == 120 * 10**9


def test_the_papers_prices() -> None:
    """arXiv 2506.23635: two Mac Studios cost 1/22 of the 8×H100 machine."""
    studio, dgx = CHIPS["m2-ultra"].price_usd, CHIPS["dgx-h100"].price_usd
    assert studio is not None
    assert dgx is not None
    assert dgx / (2 * studio) == pytest.approx(22, rel=0.05)
