"""How many tokens of a prompt the stages of a pipeline read at a time. In the other splits ranks work side by side.

While a chunk of one prompt goes through all stages, nothing else does: other answers wait, and so does a request to
cancel. On a Mac there is an end to that: what its GPU waits for has to come within about 5 s. So the whole way of a
chunk, as the planner predicts it, has to be well below.
"""

from __future__ import annotations

import sys

from moectl.engine.protocol import PREFILL_STEP
from moectl.hosts.hardware import apple_chip
from moectl.hosts.hostfile import Host
from moectl.model.placement import Placement
from moectl.planner.calibration import DEFAULT
from moectl.planner.chips import CHIPS
from moectl.planner.nodes import make_node
from moectl.planner.speed import Work, predict
from moectl.planner.this_machine import SYSCTL, ask_tool

WAY_S = 2.0  # of a chunk through all stages at most: predictions may be off by two
LEAST_STEP = 32  # tokens; all weights are read for a chunk, however short
_ANY_BYTES = 64 << 30  # a node has a memory, which does not matter for its speed


def own_chip() -> str | None:
    """Return this Mac's chip by its name in the planner's table; None for what is not there, and on other systems."""
    if sys.platform != "darwin":
        return None
    chip = apple_chip(ask_tool(SYSCTL, "-n", "machdep.cpu.brand_string"))
    return chip if chip in CHIPS else None


def choose_prefill_step(placement: Placement, chip: str | None) -> int | None:
    """Return how many tokens stages of this chip may read at a time; None where there is no limit, or none is known.

    Every rank asks for its own chip, and the smallest number counts: so it is as if all had the slowest one.
    """
    if placement.split != "layers" or placement.world_size == 1 or chip is None:
        return None
    rates = make_node(Host("here", chip=chip, memory_bytes=_ANY_BYTES), DEFAULT).rates
    assert rates is not None  # of a chip in the table
    step = PREFILL_STEP
    while step > LEAST_STEP:
        work = Work(placement, context=step, prompt_tokens=step)
        if predict(work, [rates] * placement.world_size, DEFAULT.links["10gbe"], DEFAULT).ttft_s <= WAY_S:
            break
        step //= 2
    return step
