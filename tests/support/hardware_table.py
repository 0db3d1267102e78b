"""Write the table of clusters in the guide "cluster" from what `plan` says: `python -m tests.support.hardware_table`.

A test compares the guide with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from moectl.hosts.hostfile import Host
from moectl.model.catalog import MODELS
from moectl.model.structure import Quantization
from moectl.planner.calibration import DEFAULT, find_link
from moectl.planner.chips import CHIPS
from moectl.planner.memory import Verdict
from moectl.planner.nodes import make_node
from moectl.planner.plan import Plan, Question, best_plan

GUIDE = Path(__file__).parent.parent.parent / "moectl" / "guide" / "cluster.md"
BEGIN, END = "<!-- hardware -->\n", "<!-- /hardware -->\n"
MODEL = "databricks/dbrx-instruct"
MOST = 8
HEAD = ("machine", "chip", "memory", "Thunderbolt", "fewest", "link", "predicted")
MACHINES = (
    ("Mac Studio", "m3-ultra", 256),
    ("Mac Studio", "m3-ultra", 96),
    ("Mac Studio", "m2-ultra", 192),
    ("Mac Studio", "m2-ultra", 64),
    ("MacBook Pro", "m5-max", 128),
    ("MacBook Pro", "m5-max", 64),
    ("Mac Studio, MacBook Pro", "m4-max", 128),
    ("Mac Studio, MacBook Pro", "m4-max", 64),
    ("MacBook Pro", "m5-pro", 64),
    ("Mac mini, MacBook Pro", "m4-pro", 64),
    ("Mac mini", "m4-pro", 48),
    ("Mac mini", "m4-pro", 24),
    ("MacBook Pro", "m5", 32),
    ("Mac mini", "m4", 32),
    ("DGX Spark", "gb10", 128),
)


def find_fewest(chip: str, memory_gib: int, link: str) -> Plan:
    """Return the plan with the fewest hosts of a kind that hold the model at 4 bits."""
    model = MODELS[MODEL].quantised(Quantization(4, 64))
    node = make_node(Host("host", chip=chip, memory_bytes=memory_gib << 30), DEFAULT)
    for count in range(1, MOST + 1):
        question = Question(model.structure, model.quantization, (node,) * count, find_link(DEFAULT, link), DEFAULT)
        plan = best_plan(question)
        if plan.feasible:
            return plan
    raise AssertionError(f"{MOST} × {chip} with {memory_gib} GiB are too few")


def draw() -> str:
    """Return the table."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in _rows())


def _rows() -> Iterator[tuple[str, ...]]:
    yield HEAD
    yield ("---",) * len(HEAD)
    for machine, name, memory_gib in MACHINES:
        chip = CHIPS[name]
        link, cable = ("rdma", "5: RDMA") if chip.rdma else ("tb-tcp", "4: TCP") if chip.thunderbolt else ("10gbe", "–")
        plan = find_fewest(name, memory_gib, link)
        assert plan.prediction is not None
        count = len(plan.nodes)
        fewest = f"{count}, borderline" if plan.verdict is Verdict.BORDERLINE else str(count)
        speed = f"{plan.prediction.decode_tok_s:.1f} tok/s"
        yield machine, name, f"{memory_gib}GB", cable, fewest, link if count > 1 else "–", speed


def main() -> None:
    """Write the table into the guide."""
    before, _, rest = GUIDE.read_text(encoding="utf-8").partition(BEGIN)
    GUIDE.write_text(before + BEGIN + draw() + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
