"""What the hint of a measurement that cannot be made says is done, and then it is planned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from moectl.cli.app import cli
from moectl.cluster.probe import measure_speed
from moectl.errors import PlanError
from moectl.model.placement import make_placement
from moectl.planner.measured import Job
from tests.cluster.test_probe import CONFIG, TINY, sites

DEMO = Path(__file__).parent.parent.parent / "moectl/demo/moectl-demo"


def test_what_cannot_be_measured_is_planned_without_the_flag_as_the_hint_says() -> None:
    unknown = {key: value for key, value in CONFIG.items() if key != "n_layers"}  # it cannot be shortened
    with pytest.raises(PlanError) as caught:
        measure_speed(sites(1), Job((make_placement(TINY, "hidden", 1),), unknown, None, 1 << 30, 16, 1.0))
    assert caught.value.hint == "plan without --probe"
    result = CliRunner().invoke(cli, ["plan", str(DEMO), "--local", "1", "--json"])
    assert json.loads(result.stdout)["schema"] == "moectl.plan/1"
