"""What the hint of a plan that does not fit says is planned, and then it fits."""

from __future__ import annotations

import re

from moectl.planner.advice import make_plan, refusal
from tests.planner.test_plan import ask, mac


def test_what_would_help_does() -> None:
    nodes = [mac(name, 24) for name in "abcd"]
    hint = refusal(make_plan(ask(*nodes))).hint or ""
    assert hint.startswith("what would help: ")
    bits = re.search(r"--q-bits (\d)", hint)
    assert bits is not None
    assert make_plan(ask(*nodes, bits=int(bits[1]))).feasible
