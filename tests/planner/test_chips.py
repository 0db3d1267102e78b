"""The table of chips: every row complete and sane, names found as people write them, the working set as published."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from moectl.errors import HostsError
from moectl.planner.chips import (
    CHIPS,
    PRICES,
    Chip,
    Price,
    default_working_set_bytes,
    find_chip,
    find_price,
    find_reading,
    installed_bytes,
)

GIB = 1 << 30


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_rows_are_complete_and_sane(chip: Chip) -> None:
    assert chip.source
    assert 50 < chip.bandwidth_gb_s < 30_000
    assert 0 < chip.fp16_tflops < 10_000
    assert list(chip.memory_gib) == sorted(set(chip.memory_gib))
    assert chip.rdma == (chip.thunderbolt == 5)
    assert find_chip(chip.name) is find_chip(chip.name.upper().replace("-", " ")) is chip


@pytest.mark.parametrize("price", PRICES, ids=lambda price: f"{price.chip}-{price.memory_gib}")
def test_each_price_is_of_a_machine_that_is_sold(price: Price) -> None:
    assert price.source
    assert price.machine
    assert price.memory_gib in CHIPS[price.chip].memory_gib
    assert find_price(CHIPS[price.chip], price.memory_gib * GIB) == price.usd


def test_a_size_of_memory_without_a_price_has_none() -> None:
    """One price per chip made a Mac Studio with 256 GB as expensive as one with 512 GB."""
    assert find_price(CHIPS["m3-ultra"], 256 * GIB) is None
    assert find_price(CHIPS["gb10"], 127600748 * 1024) == 3999  # as Linux counts it
    assert find_price(CHIPS["dgx-h100"], 640 * 10**9) == 289_000


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
    ("macos", "gib", "working_set"),
    [
        (26, 128, 107.52),
        (26, 64, 51.84),
        (26, 16, 11.84),
        (15, 128, 96),
        (15, 64, 48),
        (14, 64, 48),
        (15, 16, 10.67),
        (15, 192, 144),
        (None, 128, 96),  # the smaller one
        (None, 64, 48),
        (None, 192, 144),  # the only one
    ],
)
def test_working_sets_as_they_were_read(macos: int | None, gib: int, working_set: float) -> None:
    assert default_working_set_bytes(gib * GIB, macos) == find_reading(gib * GIB, macos) == int(working_set * GIB)


@pytest.mark.parametrize(
    ("macos", "gib", "working_set"),
    [(26, 36, 24), (26, 96, 72), (26, 192, 144), (26, 256, 192), (26, 512, 384), (27, 128, 96), (None, 24, 16)],
)
def test_without_a_reading_the_rule_of_thumb_holds(macos: int | None, gib: int, working_set: float) -> None:
    assert find_reading(gib * GIB, macos) is None
    assert default_working_set_bytes(gib * GIB, macos) == working_set * GIB


@given(st.integers(4 * GIB, 1024 * GIB), st.sampled_from([None, 14, 15, 26, 27]))
def test_working_sets_stay_below_the_memory(memory: int, macos: int | None) -> None:
    assert 0.6 * memory < default_working_set_bytes(memory, macos) < 0.85 * memory


def test_a_stated_size_is_the_one_that_is_sold() -> None:
    assert installed_bytes(find_chip("m2-ultra"), 192 * 10**9) == 192 * GIB
    assert installed_bytes(find_chip("m2-ultra"), 120 * 10**9) == 120 * 10**9


def test_the_papers_prices() -> None:
    """arXiv 2506.23635: two Mac Studios cost 1/22 of the 8×H100 machine."""
    studio, dgx = (find_price(CHIPS[name], gib * GIB) for name, gib in (("m2-ultra", 192), ("dgx-h100", 640)))
    assert studio is not None
    assert dgx is not None
    assert dgx / (2 * studio) == pytest.approx(22, rel=0.05)
