"""Clusters to buy: the plan of a model for each chip, link, precision and number of nodes. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moectl.errors import HostsError, PlanError
from moectl.hosts.hostfile import Host
from moectl.model.catalog import CatalogModel
from moectl.model.structure import Quantization
from moectl.planner.calibration import LINKS, Calibration, find_link
from moectl.planner.chips import CHIPS, Chip, find_chip
from moectl.planner.nodes import Defaults, make_node
from moectl.planner.plan import Plan, Question, best_plan

COUNTS = (1, 2, 3, 4, 8)
BITS = (4, 8, 16)
# The paper's machine, and current ones.
MACHINES = (
    ("m2-ultra", 192),
    ("m3-ultra", 96),
    ("m3-ultra", 256),
    ("m3-ultra", 512),
    ("m4-max", 128),
    ("m4-pro", 64),
    ("m4", 32),
    ("m5-max", 128),
    ("m5-pro", 64),
    ("m5", 32),
    ("gb10", 128),
)
GROUP = 64


@dataclass(frozen=True, slots=True)
class WhatIfRow:
    """One chip with one link at one precision: number of nodes → its best plan, None where no split exists."""

    chip: str
    memory_gib: int
    link: str
    bits: int
    cells: tuple[tuple[int, Plan | None], ...]


def what_if(
    model: CatalogModel,
    calibration: Calibration,
    *,
    context: int,
    prompt_tokens: int,
    fixed: bool = False,
    chip: str | None = None,
    link: str | None = None,
) -> Iterator[WhatIfRow]:
    """Yield the table row by row: with `fixed` only for the model's own precision, with `chip` or `link` only for it.

    Raises HostsError for a chip that is not in the table.
    """
    if chip is not None and find_chip(chip).name not in {name for name, _ in MACHINES}:
        names = ", ".join(dict.fromkeys(name for name, _ in MACHINES))
        raise HostsError(
            f"the table has no {chip}; it has {names}", hint="moectl plan --hosts a,b --chip … asks for any"
        )
    own = model.quantization
    choices = [own] if fixed or own else [None if bits == 16 else Quantization(bits, GROUP) for bits in BITS]
    for name, memory_gib in MACHINES:
        if chip is not None and find_chip(chip).name != name:
            continue
        for quantization in choices:
            for kind in (kind for kind in _links(CHIPS[name]) if link in (None, kind)):
                host = Host("mac", chip=name, memory_bytes=memory_gib << 30)
                node = make_node(host, calibration, Defaults())
                asked = (
                    Question(
                        model.quantised(quantization).structure,
                        quantization,
                        (node,) * count,
                        find_link(calibration, kind),
                        calibration,
                        context=context,
                        prompt_tokens=prompt_tokens,
                    )
                    for count in COUNTS
                )
                cells = tuple((len(question.nodes), _try_plan(question)) for question in asked)
                if any(plan is not None and plan.feasible for _, plan in cells):
                    yield WhatIfRow(name, memory_gib, kind, quantization.bits if quantization else 16, cells)


def _links(chip: Chip) -> list[str]:
    skipped = {"1gbe"} | (set() if chip.rdma else {"rdma"}) | (set() if chip.thunderbolt else {"tb-tcp"})
    return [link for link in LINKS if link not in skipped]


def _try_plan(question: Question) -> Plan | None:
    try:
        return best_plan(question)
    except PlanError:
        return None
