"""What the hint of a measurement that would take too long says is done, and then it is planned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from moectl.cli.app import cli
from moectl.cluster.probe import measure_speed
from moectl.errors import PlanError
from moectl.model.placement import make_placement
from tests.cluster.test_probe import CONFIG, TINY, make_job, sites

DEMO = Path(__file__).parent.parent.parent / "moectl/demo/moectl-demo"


def test_what_takes_too_long_to_measure_is_planned_without_the_flag_as_the_hint_says() -> None:
    with pytest.raises(PlanError) as caught:
        measure_speed(sites(1), make_job(CONFIG, make_placement(TINY, "hidden", 1), budget_s=1e-12))
    assert caught.value.hint == "plan without --probe"
    result = CliRunner().invoke(cli, ["plan", str(DEMO), "--local", "1", "--json"])
    assert json.loads(result.stdout)["schema"] == "moectl.plan/1"
