"""Plans without words: for each split a placement, what it needs of each host, and how fast it would be.

Pure: hosts and model come in as numbers (`nodes` makes them from hosts.txt), a `Plan` goes out. Where the speed of a
host is not known, there is no prediction, and the plan that leaves the most room is the best.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from moectl.errors import PlanError
from moectl.model.placement import Placement, make_placement
from moectl.model.regions import Role
from moectl.model.structure import Quantization, Structure
from moectl.planner.calibration import Calibration, LinkCost
from moectl.planner.measured import Speed
from moectl.planner.memory import COMFORTABLE, Memory, Need, Verdict, judge, most_that_fits, rank_need
from moectl.planner.speed import Prediction, Rates, Work, predict, predict_measured

_MOST_UNITS = 168  # into which the hidden dimension is shared out: enough for any two hosts
_LEAST_SHARE = 1e-6


@dataclass(frozen=True, slots=True)
class Node:
    """A host in numbers."""

    host: str
    memory: Memory
    rates: Rates | None  # None: its speed is not known
    dtype_bytes: int  # of the type it calculates in
    price: float | None = None  # USD
    is_mac: bool = True
    rdma: bool = True  # whether its Thunderbolt can do it; True where that is not known
    assumed: str = ""  # what is not known of its memory, in a sentence without its name


@dataclass(frozen=True, slots=True)
class Question:
    """A model, the hosts and the use that a plan is for."""

    structure: Structure
    quantization: Quantization | None  # of most of its weights
    nodes: tuple[Node, ...]  # in rank order
    link: LinkCost
    calibration: Calibration
    context: int = 4096
    concurrency: int = 1
    prompt_tokens: int = 512
    replicas: int = 1  # copies of each expert, at most; used by `experts` only
    frequencies: tuple[float, ...] | None = None  # how often each expert is selected, where that was measured
    speeds: tuple[Speed, ...] = ()  # of the placements that were measured
    can_quantise: bool = False  # whether to advise fewer bits

    def quantised(self, quantization: Quantization | None) -> Question:
        """Return the same question about the model with another precision."""
        structure = self.structure.quantised(quantization, over=self.quantization)
        return dataclasses.replace(self, structure=structure, quantization=quantization)


@dataclass(frozen=True, slots=True)
class NodePlan:
    """What one host would hold, in bytes."""

    host: str
    need: Need
    budget_bytes: int

    @property
    def verdict(self) -> Verdict:
        return judge(self.need.total, self.budget_bytes)


@dataclass(frozen=True, slots=True)
class Plan:
    """The answer to a question: who holds what, whether it fits, and how fast it would be."""

    placement: Placement
    nodes: tuple[NodePlan, ...]
    prediction: Prediction | None
    tok_s_per_usd: float | None
    why: str = ""
    advice: tuple[str, ...] = ()

    @property
    def split(self) -> str:
        return self.placement.split

    @property
    def verdict(self) -> Verdict:
        return max(node.verdict for node in self.nodes)

    @property
    def feasible(self) -> bool:
        return self.verdict is not Verdict.TOO_MUCH


def best_plan(question: Question, split: str = "auto", shares: Sequence[float] | None = None) -> Plan:
    """Return the plan for one split, or for `auto` the best of all: it fits, and of those that fit it is the fastest.

    Raises PlanError where no placement exists (too many hosts, wrong shares).
    """
    if split != "auto":
        return plan_placement(question, _place(question, split, shares))
    return min(candidates(question, shares), key=_badness)


def candidates(question: Question, shares: Sequence[float] | None = None) -> list[Plan]:
    """Return a plan for each split that has a placement. Raises PlanError when none has."""
    plans, refusals = [], []
    for split in ("hidden", "tensor", "experts", "layers"):
        try:
            plans.append(best_plan(question, split, shares))
        except PlanError as error:
            refusals.append(error)
    if not plans:
        raise refusals[0]
    return plans


def _badness(plan: Plan) -> tuple[float, ...]:
    if plan.verdict is Verdict.TOO_MUCH or plan.prediction is None:
        return plan.verdict, max(node.need.total / max(1, node.budget_bytes) for node in plan.nodes)
    return plan.verdict, -plan.prediction.decode_tok_s


def plan_placement(question: Question, placement: Placement) -> Plan:
    """Return what a placement needs and how fast it would be."""
    nodes = tuple(
        NodePlan(node.host, find_need(question, placement, rank), node.memory.budget)
        for rank, node in enumerate(question.nodes)
    )
    prediction = _predict(question, placement)
    prices = [node.price for node in question.nodes if node.price]
    per_usd = None
    if prediction and len(prices) == len(question.nodes):
        per_usd = prediction.decode_tok_s / sum(prices)
    return Plan(placement, nodes, prediction, per_usd)


def find_need(question: Question, placement: Placement, rank: int, context: int | None = None) -> Need:
    """Return what a rank needs, with another context than the question's where one is given."""
    return rank_need(
        placement,
        rank,
        context=question.context if context is None else context,
        concurrency=question.concurrency,
        dtype_bytes=question.nodes[rank].dtype_bytes,
    )


def _predict(question: Question, placement: Placement) -> Prediction | None:
    work = Work(placement, question.context, question.prompt_tokens, question.nodes[0].dtype_bytes)
    for speed in question.speeds:
        if speed.is_of(placement):
            return predict_measured(work, speed)
    rates = [node.rates for node in question.nodes if node.rates is not None]
    if len(rates) != len(question.nodes):
        return None
    return predict(work, rates, question.link, question.calibration)


def _place(question: Question, split: str, shares: Sequence[float] | None) -> Placement:
    nodes = len(question.nodes)
    make = partial(make_placement, question.structure, split, nodes)
    if split == "experts":
        make = partial(make, replicas=question.replicas, frequencies=question.frequencies)
    even = make(shares=shares)
    alike = len({(node.memory, node.rates, node.dtype_bytes) for node in question.nodes}) == 1
    if shares is not None or split == "tensor" or alike:
        return even
    total, most = _count_units(question, split)
    weights = [_weight(node, split) for node in question.nodes]
    for limit in (COMFORTABLE, 1.0):
        divided = spread(total, weights, [_most(question, split, rank, total, most, limit) for rank in range(nodes)])
        if divided is not None:
            return make(shares=divided)
    return make(shares=spread(total, weights, [most] * nodes))


def _count_units(question: Question, split: str) -> tuple[int, int]:
    """Return into how many equal units a split divides a model, copies included, and how many one node can have."""
    structure = question.structure
    if split == "layers":
        return structure.n_layers, structure.n_layers - len(question.nodes) + 1
    if split == "experts":  # no node holds an expert twice
        return structure.n_experts * question.replicas, structure.n_experts
    found = [pieces for part in structure.parts if (pieces := part.pieces(split)) is not None]
    units = max(pieces.count // pieces.grain for pieces in found if pieces.role is Role.HIDDEN)
    units = min(units, _MOST_UNITS)
    return units, units


def _weight(node: Node, split: str) -> float:
    """Return the number to which a node's share is proportional: its bandwidth, or in a pipeline its memory."""
    if split == "layers" or node.rates is None:
        return max(1, node.memory.budget)
    return node.rates.bytes_s


def _most(question: Question, split: str, rank: int, total: int, most: int, limit: float) -> int:
    """Return the largest share of `total` that a node can hold within `limit` of its budget."""
    others = len(question.nodes) - 1

    def fits(share: int) -> bool:
        rest = max((total - share) / others, _LEAST_SHARE)
        shares = tuple(float(share) if r == rank else rest for r in range(others + 1))
        held = tuple(tuple(range(share * (r == rank))) for r in range(others + 1)) if split == "experts" else None
        placement = Placement(split, shares, question.structure, held)
        return find_need(question, placement, rank).total <= limit * question.nodes[rank].memory.budget

    return most_that_fits(fits, most)


def spread(total: int, weights: Sequence[float], limits: Sequence[int]) -> tuple[int, ...] | None:
    """Divide `total` units in proportion to `weights`: at least 1 to each, and to each no more than its limit.

    What is above a limit goes to the others. Returns None when the limits do not allow it.
    """
    if sum(limits) < total or min(limits) < 1 or total < len(limits):
        return None
    shares = [1] * len(limits)
    for _ in range(total - len(shares)):
        below = (i for i in range(len(shares)) if shares[i] < limits[i])
        shares[min(below, key=lambda i: ((shares[i] + 1) / weights[i], i))] += 1
    return tuple(shares)
