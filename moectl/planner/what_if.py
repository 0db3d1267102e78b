"""Clusters to buy: which machines hold a model, how fast and for how much, in the order that a buyer asks. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from moectl.errors import HostsError, PlanError
from moectl.hosts.hostfile import Host
from moectl.model.catalog import CatalogModel
from moectl.model.structure import Quantization
from moectl.planner.calibration import Calibration, find_link
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
PLAIN_BITS = 16


@dataclass(frozen=True, slots=True)
class ClusterOffer:
    """A cluster of equal machines that holds the model, and its plan; `usd` is None where the price is not known."""

    chip: str
    memory_gib: int
    count: int
    link: str
    bits: int
    plan: Plan
    usd: float | None

    @property
    def tok_s(self) -> float:
        return self.plan.prediction.decode_tok_s if self.plan.prediction else 0.0


def list_offers(
    model: CatalogModel,
    calibration: Calibration,
    *,
    context: int,
    prompt_tokens: int,
    fixed: bool = False,
    every: bool = False,
    chip: str | None = None,
    link: str | None = None,
) -> Iterator[ClusterOffer]:
    """Yield the clusters that hold a model: at 4 bits, or with `fixed` at the model's own; over their fastest link.

    With `every` at 4, 8 and 16 bits and over every link; with `chip` or `link` only with these. Raises HostsError for a
    chip that is not in the table.
    """
    if chip is not None and find_chip(chip).name not in {name for name, _ in MACHINES}:
        names = ", ".join(dict.fromkeys(name for name, _ in MACHINES))
        raise HostsError(
            f"the table has no {chip}; it has {names}", hint="moectl plan --hosts a,b --chip … asks for any"
        )
    own = model.quantization
    bits = BITS if every else BITS[:1]
    choices = [own] if fixed or own else [None if n == PLAIN_BITS else Quantization(n, GROUP) for n in bits]
    for name, memory_gib in MACHINES:
        if chip is not None and find_chip(chip).name != name:
            continue
        node = make_node(Host("mac", chip=name, memory_bytes=memory_gib << 30), calibration, Defaults())
        kinds = [kind for kind in _links(CHIPS[name]) if link in (None, kind)]
        for quantization in choices:
            for kind in kinds if every else kinds[:1]:
                for count in COUNTS:
                    question = Question(
                        model.quantised(quantization).structure,
                        quantization,
                        (node,) * count,
                        find_link(calibration, kind),
                        calibration,
                        context=context,
                        prompt_tokens=prompt_tokens,
                    )
                    plan = _try_plan(question)
                    if plan is not None and plan.feasible:
                        usd = None if node.price is None else node.price * count
                        bits_ = quantization.bits if quantization else PLAIN_BITS
                        yield ClusterOffer(name, memory_gib, count, kind, bits_, plan, usd)


@dataclass(frozen=True, slots=True)
class Buyer:
    """What a buyer asks: the price at most, in USD, and the speed at least."""

    usd: float | None = None
    tok_s: float | None = None
    every: bool = False  # all clusters, and not the best of each machine

    @property
    def order(self) -> str:
        """How offers are sorted, in words."""
        return "cheapest first" if self.tok_s is not None and self.usd is None else "fastest first"

    def choose(self, offers: Iterable[ClusterOffer]) -> list[ClusterOffer]:
        """Return what the buyer wants to see, sorted.

        One cluster of each machine: with a budget the fastest, with a speed the cheapest, else the smallest.
        """
        able = [offer for offer in offers if self._takes(offer)]
        if not self.every:
            best: dict[tuple[str, int], ClusterOffer] = {}
            for offer in sorted(able, key=self._preference):
                best.setdefault((offer.chip, offer.memory_gib), offer)
            able = list(best.values())
        return sorted(able, key=_cheapest if self.order == "cheapest first" else _fastest)

    def _takes(self, offer: ClusterOffer) -> bool:
        dear = self.usd is not None and (offer.usd is None or offer.usd > self.usd)
        return not dear and offer.tok_s >= (self.tok_s or 0.0)

    def _preference(self, offer: ClusterOffer) -> tuple[float, ...]:
        if self.usd is not None:
            return _fastest(offer)
        return offer.count, *_fastest(offer)


def _fastest(offer: ClusterOffer) -> tuple[float, ...]:
    return -offer.tok_s, offer.usd or math.inf


def _cheapest(offer: ClusterOffer) -> tuple[float, ...]:
    return offer.usd or math.inf, -offer.tok_s


def _links(chip: Chip) -> list[str]:
    """Return the links that a machine with this chip can have, fastest first."""
    return [*(["rdma"] if chip.rdma else []), *(["tb-tcp"] if chip.thunderbolt else []), "10gbe"]


def _try_plan(question: Question) -> Plan | None:
    try:
        return best_plan(question)
    except PlanError:
        return None
