"""Put placement, memory and speed together: which split, whether it fits, how fast, and what to do if it does not.

Pure: hosts and model come in as numbers (`nodes` makes them of hosts.txt), a `Plan` goes out; nothing is printed. Where
a host's speed is not known, there is no prediction, and what fits with the most room is chosen.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from moectl.errors import PlanError
from moectl.model.geometry import Geometry
from moectl.model.manifest import Quantization
from moectl.model.placement import Placement, make_placement
from moectl.planner.calibration import Calibration, LinkCost
from moectl.planner.measured import Speed
from moectl.planner.memory import COMFORTABLE, KV_STEP, Memory, Need, Verdict, judge, rank_need
from moectl.planner.speed import Prediction, Rates, Work, expected_busiest, predict, predict_measured

MOST_ADVISED = 16  # hosts
LOWER_BITS = (8, 6, 4, 3, 2)
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Node:
    """A host in numbers."""

    host: str
    memory: Memory
    rates: Rates | None  # None: its speed is not known
    dtype_bytes: int  # of the type it calculates in
    price: float | None = None  # USD
    is_mac: bool = True
    rdma: bool = True  # whether its Thunderbolt can do it, as far as is known


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of a plan."""

    geometry: Geometry
    quantization: Quantization | None
    nodes: tuple[Node, ...]  # in rank order
    link: LinkCost
    calibration: Calibration
    context: int = 4096
    concurrency: int = 1
    prompt_tokens: int = 512
    replicas: int = 1  # copies of each expert, at most; other splits have none
    frequencies: tuple[float, ...] | None = None  # how often each expert is selected, where that was measured
    speeds: tuple[Speed, ...] = ()  # of placements that were measured: these are not predicted from parts
    can_quantise: bool = False  # whether fewer bits may be advised

    @property
    def group_size(self) -> int | None:
        return self.quantization.group_size if self.quantization else None


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
    """An answer: who holds what, and what comes of it."""

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


def make_plan(question: Question, split: str = "auto", *, shares: Sequence[int] | None = None) -> Plan:
    """Answer a question for one split, or for the best: that which fits, and of those the fastest.

    Raises PlanError where no placement exists at all (too many nodes, shares that do not add up).
    """
    if question.context > question.geometry.max_seq_len:
        raise PlanError(
            f"a context of {question.context} tokens is beyond the model's {question.geometry.max_seq_len}",
            hint=f"--ctx {question.geometry.max_seq_len}",
        )
    if question.replicas > 1 or question.frequencies is not None:
        if split not in ("auto", "experts"):
            what = "copies" if question.replicas > 1 else "places of their own"
            raise PlanError(f"only whole experts can have {what}, and --split {split} has none", hint="--split experts")
        split = "experts"
    plan = _best(question, split, shares)
    advice = (*_advise_link(question), *_advise(question, plan))
    return dataclasses.replace(plan, why=_explain(question, split, plan), advice=advice)


def _best(question: Question, split: str, shares: Sequence[int] | None) -> Plan:
    if split != "auto":
        return _plan_split(question, split, shares)
    plans = list(candidates(question, shares))
    return min(plans, key=_badness)


def candidates(question: Question, shares: Sequence[int] | None = None) -> Iterator[Plan]:
    """Yield a plan without words for each split that has a placement. Raises PlanError when none has."""
    refusal: PlanError | None = None
    some = False
    for split in ("hidden", "tensor", "experts", "layers"):
        try:
            plan = _plan_split(question, split, shares)
        except PlanError as error:
            refusal = refusal or error
            continue
        some = True
        yield plan
    if not some and refusal is not None:
        raise refusal


def _badness(plan: Plan) -> tuple[float, ...]:
    if plan.verdict is Verdict.TOO_MUCH or plan.prediction is None:
        return plan.verdict, max(node.need.total / max(1, node.budget_bytes) for node in plan.nodes)
    return plan.verdict, -plan.prediction.decode_tok_s


def _plan_split(question: Question, split: str, shares: Sequence[int] | None) -> Plan:
    return plan_placement(question, _place(question, split, shares))


def plan_placement(question: Question, placement: Placement) -> Plan:
    """Return what a placement needs and how fast it would be, without words."""
    nodes = tuple(
        NodePlan(node.host, _need(question, placement, rank), node.memory.budget)
        for rank, node in enumerate(question.nodes)
    )
    prediction = _predict(question, placement)
    prices = [node.price for node in question.nodes if node.price]
    per_usd = None
    if prediction and len(prices) == len(question.nodes):
        per_usd = prediction.decode_tok_s / sum(prices)
    return Plan(placement, nodes, prediction, per_usd)


def _need(question: Question, placement: Placement, rank: int, context: int | None = None) -> Need:
    return rank_need(
        placement,
        question.quantization,
        rank,
        context=question.context if context is None else context,
        concurrency=question.concurrency,
        dtype_bytes=question.nodes[rank].dtype_bytes,
    )


def _predict(question: Question, placement: Placement) -> Prediction | None:
    work = Work(
        placement, question.quantization, question.context, question.prompt_tokens, question.nodes[0].dtype_bytes
    )
    for speed in question.speeds:
        if speed.is_of(placement):
            return predict_measured(work, speed)
    rates = [node.rates for node in question.nodes if node.rates is not None]
    if len(rates) != len(question.nodes):
        return None
    return predict(work, rates, question.link, question.calibration)


# Shares.


def _place(question: Question, split: str, shares: Sequence[int] | None) -> Placement:
    nodes = len(question.nodes)
    make = partial(make_placement, question.geometry, split, nodes, group_size=question.group_size)
    if split == "experts":
        make = partial(make, replicas=question.replicas, frequencies=question.frequencies)
    even = make(shares=shares)
    if split == "tensor" and question.quantization is not None:
        first, last = even.heads(0)
        width, group = (last - first) * question.geometry.head_dim, question.quantization.group_size
        if width % group:
            raise PlanError(
                f"a tensor split over {nodes} nodes leaves {width} columns of attention to each: "
                f"not whole groups of {group}",
                hint="--split hidden, fewer nodes, or a smaller --q-group-size",
            )
    if shares is not None or split == "tensor" or nodes == 1 or _all_alike(question.nodes):
        return even
    total = sum(even.shares)
    weights = [_weight(node, split) for node in question.nodes]
    for limit in (COMFORTABLE, 1.0):
        divided = spread(total, weights, [_most(question, even, rank, limit) for rank in range(nodes)])
        if divided is not None:
            return make(shares=divided)
    return make(shares=spread(total, weights, [_limit(even)] * nodes))


def _limit(even: Placement) -> int:
    """Return the largest share that there can be: no rank needs an expert twice."""
    return even.geometry.n_experts if even.split == "experts" else sum(even.shares)


def _all_alike(nodes: Sequence[Node]) -> bool:
    return len({(n.memory, n.rates, n.dtype_bytes) for n in nodes}) == 1


def _weight(node: Node, split: str) -> float:
    """Return what a node's share is in proportion to: memory in a pipeline, bandwidth where all work at once."""
    if split == "layers" or node.rates is None:
        return max(1, node.memory.budget)
    return node.rates.bytes_s


def _most(question: Question, even: Placement, rank: int, limit: float) -> int:
    """Return the largest share that a node can hold within `limit` of its budget."""

    def fits(share: int) -> bool:
        shares = tuple(share if r == rank else s for r, s in enumerate(even.shares))
        changed = dataclasses.replace(even, shares=shares, held=None)
        return _need(question, changed, rank).total <= limit * question.nodes[rank].memory.budget

    return _last(fits, _limit(even))


def _last(holds: Callable[[int], bool], highest: int) -> int:
    """Return the largest n from 1 to `highest` for which `holds`, 0 when there is none; it holds below if at n."""
    low, high = 0, highest
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def spread(total: int, weights: Sequence[float], limits: Sequence[int]) -> tuple[int, ...] | None:
    """Divide `total` units in proportion to `weights`, at least 1 to each and to none more than its limit.

    Returns None when that cannot be: what a full one cannot take goes to the others.
    """
    if sum(limits) < total or min(limits) < 1 or total < len(limits):
        return None
    shares = [1] * len(limits)
    for _ in range(total - len(shares)):
        open_ = (i for i in range(len(shares)) if shares[i] < limits[i])
        shares[min(open_, key=lambda i: ((shares[i] + 1) / weights[i], i))] += 1
    return tuple(shares)


# Words.


def _explain(question: Question, asked: str, plan: Plan) -> str:
    """Say in one line why this split."""
    if len(question.nodes) == 1:
        return f"{plan.split}: one node holds everything"
    others = {p.split: p for p in candidates(question) if p.split != plan.split}
    if asked != "auto":
        return f"{plan.split}: as asked{_faster(plan, others)}"
    return f"{plan.split}: {_reason(question, plan, others)}"


def _faster(plan: Plan, others: dict[str, Plan]) -> str:
    able = [p for p in others.values() if p.verdict <= plan.verdict and p.prediction]
    best = max(able, key=lambda p: p.prediction.decode_tok_s if p.prediction else 0.0, default=None)
    if best is None or best.prediction is None or plan.prediction is None:
        return ""
    ratio = best.prediction.decode_tok_s / plan.prediction.decode_tok_s
    return f"; {best.split} would be {ratio:.2f}× as fast" if ratio > 1.005 else "; it is the fastest that fits"


def _reason(question: Question, plan: Plan, others: dict[str, Plan]) -> str:
    if plan.verdict is not Verdict.TOO_MUCH and all(p.verdict > plan.verdict for p in others.values()):
        return "the only split that fits" + (" well" if any(p.feasible for p in others.values()) else "")
    if plan.verdict is Verdict.TOO_MUCH:
        return "needs the least memory, and still too much"
    if plan.split == "hidden":
        return f"balanced at batch 1{_experts_are_slower(question, others)}"
    if plan.split == "tensor":
        return "two all-reduces per layer cost less on this link than computing all of attention on every node"
    if plan.split == "layers":
        return "the fastest that fits: on this link an exchange per layer costs more than it saves"
    return "the fastest that fits"


def _experts_are_slower(question: Question, others: dict[str, Plan]) -> str:
    if "experts" not in others:
        return ""
    geometry = question.geometry
    busiest = expected_busiest(others["experts"].placement.shares, geometry.top_k)
    return f"; experts would be {busiest * len(question.nodes) / geometry.top_k:.2f}× slower in the experts"


# Advice.


def _advise(question: Question, plan: Plan) -> Iterator[str]:
    if plan.verdict is Verdict.FITS:
        yield from _advise_fewer(question, plan)
        return
    yield from _advise_split(question, plan)
    yield from _advise_context(question, plan)
    yield from _advise_concurrency(question, plan)
    yield from _advise_bits(question, plan)
    yield from _advise_nodes(question, plan)
    yield from _advise_limits(question, plan)


def _advise_link(question: Question) -> Iterator[str]:
    slow = [node.host for node in question.nodes if not node.rdma]
    if question.link.name == "rdma" and slow and len(question.nodes) > 1:
        yield f"RDMA needs Thunderbolt 5, which {', '.join(slow)} {'has' if len(slow) == 1 else 'have'} not: use tb-tcp"


def _advise_fewer(question: Question, plan: Plan) -> Iterator[str]:
    """Say when one of the nodes alone would do."""
    if len(question.nodes) == 1:
        return
    for node in question.nodes:
        alone = _plan_split(dataclasses.replace(question, nodes=(node,)), "hidden", None)
        if alone.verdict is Verdict.FITS:
            speed = ""
            if alone.prediction and plan.prediction:
                ratio = alone.prediction.decode_tok_s / plan.prediction.decode_tok_s
                speed = f", at {ratio:.2f}× the speed of all {len(question.nodes)}"
            yield f"one node is enough: {node.host} alone holds it{speed}"
            return


def _advise_split(question: Question, plan: Plan) -> Iterator[str]:
    for other in candidates(question):
        if other.verdict < plan.verdict:
            yield f"--split {other.split}{' fits' if other.verdict is Verdict.FITS else ' is borderline'}"


def _advise_context(question: Question, plan: Plan) -> Iterator[str]:
    def fits(steps: int) -> bool:
        return all(
            judge(_need(question, plan.placement, rank, steps * KV_STEP).total, node.budget_bytes) is Verdict.FITS
            for rank, node in enumerate(plan.nodes)
        )

    steps = _last(fits, (question.context - 1) // KV_STEP)
    if steps:
        yield f"--ctx {steps * KV_STEP} fits"


def _advise_concurrency(question: Question, plan: Plan) -> Iterator[str]:
    def fits(count: int) -> bool:
        fewer = dataclasses.replace(question, concurrency=count)
        return plan_placement(fewer, plan.placement).verdict is Verdict.FITS

    if question.concurrency > 1 and (most := _last(fits, question.concurrency - 1)):
        yield f"--concurrency {most} fits"


def _advise_bits(question: Question, plan: Plan) -> Iterator[str]:
    if not question.can_quantise:
        return
    now = question.quantization.bits if question.quantization else 16
    for bits in LOWER_BITS:
        if bits < now:
            smaller = dataclasses.replace(question, quantization=Quantization(bits, 64))
            best = _best(smaller, "auto", None)
            if best.verdict < plan.verdict:
                weights = max(node.need.weights for node in best.nodes)
                grade = "fits" if best.verdict is Verdict.FITS else "is borderline"
                yield f"--q-bits {bits} --split {best.split} {grade} ({weights / 1e9:.1f} GB per node)"
                if best.verdict is Verdict.FITS:
                    return


def _advise_nodes(question: Question, plan: Plan) -> Iterator[str]:
    like = question.nodes[-1]
    for count in range(len(question.nodes) + 1, MOST_ADVISED + 1):
        added = tuple(
            dataclasses.replace(like, host=f"{like.host}+{i}") for i in range(1, count - len(question.nodes) + 1)
        )
        best = _best(dataclasses.replace(question, nodes=question.nodes + added), "auto", None)
        if best.verdict is Verdict.FITS:
            yield f"{count} hosts like {like.host} fit with --split {best.split}"
            return


def _advise_limits(question: Question, plan: Plan) -> Iterator[str]:
    """Say which limit to raise or what to free on each node that is short."""
    for node, held in zip(question.nodes, plan.nodes, strict=True):
        if held.verdict is Verdict.FITS:
            continue
        memory = node.memory
        wanted = math.ceil(held.need.total / COMFORTABLE)
        room = dataclasses.replace(memory, working_set=None).budget
        if node.is_mac and memory.working_set is not None and memory.working_set < wanted and held.need.total <= room:
            limit = math.ceil(min(wanted, room) / _MIB)
            yield f"on {held.host}: sudo sysctl iogpu.wired_limit_mb={limit}"
        if memory.in_use and dataclasses.replace(memory, in_use=0).budget > memory.budget:
            yield f"on {held.host}: close programs, {memory.in_use / 1e9:.1f} GB are in use and would be swapped out"


def refusal(plan: Plan) -> PlanError:
    """Return the error for a plan that does not fit: the worst node, its missing bytes, and what would fit."""
    worst = max(plan.nodes, key=lambda node: node.need.total - node.budget_bytes)
    missing = worst.need.total - worst.budget_bytes
    return PlanError(
        f"the model does not fit: {worst.host} needs {worst.need.total / 1e9:.1f} GB, "
        f"{worst.budget_bytes / 1e9:.1f} GB is usable ({missing / 1e9:.1f} GB too little)",
        hint="what would help: " + "; ".join(plan.advice) if plan.advice else "use more or larger hosts",
    )
