"""A plan in words: why this split, what would help where it does not fit, and the error that refuses it. Pure."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

from moectl.errors import PlanError
from moectl.model.structure import Quantization
from moectl.planner.memory import COMFORTABLE, KV_STEP, Verdict, judge, most_that_fits
from moectl.planner.plan import Plan, Question, best_plan, candidates, find_need, plan_placement
from moectl.planner.speed import expected_busiest

MOST_ADVISED = 16  # hosts
LOWER_BITS = (8, 6, 4, 3, 2)
_MIB = 1 << 20


def make_plan(question: Question, split: str = "auto", *, shares: Sequence[float] | None = None) -> Plan:
    """Answer a question for one split, or for the best, with reasons and advice. Raises what `best_plan` raises."""
    if question.replicas > 1 or question.frequencies is not None:
        if split not in ("auto", "experts"):
            what = "copies" if question.replicas > 1 else "places of their own"
            raise PlanError(f"only whole experts can have {what}, and --split {split} has none", hint="--split experts")
        split = "experts"
    plan = best_plan(question, split, shares)
    return dataclasses.replace(plan, why=_explain(question, split, plan), advice=tuple(_advise(question, plan)))


def refusal(plan: Plan) -> PlanError:
    """Return the error for a plan that does not fit: the node that lacks most, how much it lacks, what would help."""
    worst = max(plan.nodes, key=lambda node: node.need.total - node.budget_bytes)
    missing = worst.need.total - worst.budget_bytes
    return PlanError(
        f"the model does not fit: {worst.host} needs {worst.need.total / 1e9:.1f} GB, "
        f"{worst.budget_bytes / 1e9:.1f} GB is usable ({missing / 1e9:.1f} GB too little)",
        hint="what would help: " + "; ".join(plan.advice) if plan.advice else "use more or larger hosts",
    )


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
    placement, top_k = others["experts"].placement, question.structure.top_k
    held = [len(placement.experts_of(rank)) for rank in range(placement.world_size)]
    busiest = expected_busiest(held, top_k)
    return f"; experts would be {busiest * len(question.nodes) / top_k:.2f}× slower in the experts"


def _advise(question: Question, plan: Plan) -> Iterator[str]:
    yield from _advise_link(question)
    if plan.verdict is Verdict.FITS:
        yield from _advise_one_node(question, plan)
        return
    yield from _advise_split(question, plan)
    yield from _advise_context(question, plan)
    yield from _advise_concurrency(question, plan)
    yield from _advise_bits(question, plan)
    yield from _advise_nodes(question)
    yield from _advise_limits(question, plan)


def _advise_link(question: Question) -> Iterator[str]:
    slow = [node.host for node in question.nodes if not node.rdma]
    if question.link.name == "rdma" and slow and len(question.nodes) > 1:
        yield f"RDMA needs Thunderbolt 5, which is missing on {', '.join(slow)}: use tb-tcp"


def _advise_one_node(question: Question, plan: Plan) -> Iterator[str]:
    """Say when one of the nodes can hold the model alone."""
    if len(question.nodes) == 1:
        return
    for node in question.nodes:
        alone = best_plan(dataclasses.replace(question, nodes=(node,)), "hidden")
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
            yield f"--split {other.split} {_grade(other)}"


def _grade(plan: Plan) -> str:
    return "fits" if plan.verdict is Verdict.FITS else "is borderline"


def _advise_context(question: Question, plan: Plan) -> Iterator[str]:
    def fits(steps: int) -> bool:
        return all(
            judge(find_need(question, plan.placement, rank, steps * KV_STEP).total, node.budget_bytes) is Verdict.FITS
            for rank, node in enumerate(plan.nodes)
        )

    steps = most_that_fits(fits, (question.context - 1) // KV_STEP)
    if steps:
        yield f"--ctx {steps * KV_STEP} fits"


def _advise_concurrency(question: Question, plan: Plan) -> Iterator[str]:
    def fits(count: int) -> bool:
        fewer = dataclasses.replace(question, concurrency=count)
        return plan_placement(fewer, plan.placement).verdict is Verdict.FITS

    if question.concurrency > 1 and (most := most_that_fits(fits, question.concurrency - 1)):
        yield f"--concurrency {most} fits"


def _advise_bits(question: Question, plan: Plan) -> Iterator[str]:
    if not question.can_quantise:
        return
    now = question.quantization.bits if question.quantization else 16
    for bits in LOWER_BITS:
        if bits < now:
            smaller = question.quantised(Quantization(bits, 64))
            best = best_plan(smaller)
            if best.verdict < plan.verdict:
                weights = max(node.need.weights for node in best.nodes)
                yield f"--q-bits {bits} --split {best.split} {_grade(best)} ({weights / 1e9:.1f} GB per node)"
                if best.verdict is Verdict.FITS:
                    return


def _advise_nodes(question: Question) -> Iterator[str]:
    like, nodes = question.nodes[-1], question.nodes
    while len(nodes) < MOST_ADVISED:
        nodes = (*nodes, dataclasses.replace(like, host=f"{like.host}+{len(nodes)}"))
        best = best_plan(dataclasses.replace(question, nodes=nodes))
        if best.verdict is Verdict.FITS:
            yield f"{len(nodes)} hosts like {like.host} fit with --split {best.split}"
            return


def _advise_limits(question: Question, plan: Plan) -> Iterator[str]:
    """Say for each node with too little memory which limit to raise, or how much to free."""
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
