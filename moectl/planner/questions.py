"""From the user's question to a plan: the model by name, the hosts by their keys, the flags, and results of probes.

It joins `shards.prepare`, `nodes` and `plan`, and has the check by which all verbs refuse a model that does not fit,
before they change anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from moectl.errors import HostsError, MoectlError, PlanError
from moectl.hosts.hardware import Hardware
from moectl.hosts.hostfile import Host, parse_size
from moectl.hosts.remote import Remote
from moectl.model.catalog import MODELS, CatalogModel
from moectl.model.manifest import Manifest
from moectl.model.placement import Placement
from moectl.model.structure import Quantization
from moectl.planner.advice import make_plan, refusal
from moectl.planner.calibration import CALIBRATIONS, find_link
from moectl.planner.memory import METAL_DTYPE_BYTES, Verdict, judge
from moectl.planner.nodes import Defaults, default_link, make_node
from moectl.planner.plan import Node, Plan, Question
from moectl.planner.precision import choice_text, choose_precision, most_bits
from moectl.planner.this_machine import CONTEXT, least_need, own_dtype_bytes, own_memory, too_large
from moectl.planner.what_if import Buyer, ClusterOffer, list_offers
from moectl.shards import prepare
from moectl.shards.prepare import (
    ChooseBits,
    Place,
    Wanted,
    choose_quantization,
    describe_model,
    find_frequencies,
)

PROMPT = 512  # tokens


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """The user's settings for a plan; None leaves the choice to moectl."""

    ctx: int | None = None  # CONTEXT, or the model's own if that is less
    concurrency: int = 1
    prompt_tokens: int | None = None  # PROMPT, or the context if that is less
    chip: str | None = None
    memory: str | None = None
    link: str | None = None
    calibration: str = "default"
    found: Mapping[str, Hardware] = field(default_factory=dict)  # results of probes, by the host's name

    @property
    def defaults(self) -> Defaults:
        """The chip and memory of hosts without their own. Raises HostsError."""
        return Defaults(self.chip, None if self.memory is None else parse_size(self.memory))


@dataclass(frozen=True, slots=True)
class AnsweredPlan:
    """A plan with its model and its question; `chosen`: moectl chose the precision."""

    model: CatalogModel
    question: Question
    plan: Plan
    chosen: bool = False


@dataclass(frozen=True, slots=True)
class PlanTask:
    """A question, with the split and the shares that are given."""

    model: CatalogModel
    question: Question
    split: str
    shares: tuple[int | float, ...] | None
    chosen: bool = False

    def solve(self) -> AnsweredPlan:
        """Make the plan. Raises PlanError where nothing can be placed."""
        plan = make_plan(self.question, self.split, shares=self.shares)
        return AnsweredPlan(self.model, self.question, plan, self.chosen)


def plan_cluster(source: str, wanted: Wanted, asked: PlanOptions, hosts: Sequence[Host]) -> AnsweredPlan:
    """Plan a model on these hosts. Raises PlanError where nothing can be placed, and what `set_task` raises."""
    return set_task(source, wanted, asked, hosts).solve()


def set_task(source: str, wanted: Wanted, asked: PlanOptions, hosts: Sequence[Host]) -> PlanTask:
    """Return the question of a model on these hosts.

    A shard set is planned as it is cut, unless `wanted` has another split. Where `wanted` leaves the precision of a
    model in 16 bits open, it gets the most bits that fit. Raises HostsError where a host's chip or
    memory is not known, and what opening a checkpoint raises.
    """
    model, manifest = describe_model(source)
    question = ask(model.quantised(choose_quantization(wanted, model.quantization)), asked, hosts)
    question = replace(question, can_quantise=model.quantization is None)
    question = replace(question, replicas=wanted.replicas, frequencies=find_frequencies(wanted, model.structure))
    if manifest is not None and wanted.split == "auto" and manifest.world_size == len(hosts) and wanted.replicas == 1:
        question = replace(question, replicas=manifest.placement.replicas)
        return PlanTask(model, question, manifest.split, manifest.shares)
    chosen = manifest is None and wanted.leaves_precision and question.can_quantise
    if chosen:
        question = question.quantised(most_bits(question, wanted)[0])
    return PlanTask(model, question, wanted.split, wanted.shares, chosen)


def ask(model: CatalogModel, asked: PlanOptions, hosts: Sequence[Host]) -> Question:
    """Put a question about a model on these hosts."""
    calibration = CALIBRATIONS[asked.calibration]
    context = find_context(model, asked)
    names = [host.name for host in hosts]
    nodes = tuple(
        make_node(h, calibration, asked.defaults, asked.found.get(h.name), ranks=names.count(h.name)) for h in hosts
    )
    return Question(
        model.structure,
        model.quantization,
        nodes,
        find_link(calibration, asked.link or default_link(hosts)),
        calibration,
        context=context,
        concurrency=asked.concurrency,
        prompt_tokens=find_prompt(asked, context),
    )


def plan_purchase(
    source: str, wanted: Wanted, asked: PlanOptions, buyer: Buyer
) -> tuple[CatalogModel, list[ClusterOffer]]:
    """Return the clusters to buy for a model. Raises PlanError where none is as the buyer wants it."""
    model, _ = describe_model(source)
    quantization = choose_quantization(wanted, model.quantization)
    context = find_context(model, asked)
    if asked.link is not None:
        find_link(CALIBRATIONS[asked.calibration], asked.link)
    offers = list(
        list_offers(
            model.quantised(quantization) if wanted.bits else model,
            CALIBRATIONS[asked.calibration],
            context=context,
            prompt_tokens=find_prompt(asked, context),
            fixed=wanted.bits is not None,
            every=buyer.every,
            chip=asked.chip,
            link=asked.link,
        )
    )
    if not offers:
        raise PlanError(f"none of these clusters holds {model.name}", hint="moectl plan --what-if shows all")
    chosen = buyer.choose(offers)
    if not chosen:
        fastest, cheapest = max(offer.tok_s for offer in offers), min((o.usd for o in offers if o.usd), default=0)
        raise PlanError(
            f"none of these clusters is so cheap and so fast: {cheapest:.0f} USD is the lowest price, "
            f"{fastest:.1f} tok/s the highest speed",
            hint="moectl plan --what-if shows all",
        )
    return model, chosen


def find_context(model: CatalogModel, asked: PlanOptions) -> int:
    """Return the tokens of context to plan for. Raises PlanError beyond the model's."""
    longest = model.structure.context
    if asked.ctx is not None and asked.ctx > longest:
        raise PlanError(f"a context of {asked.ctx} tokens is beyond the model's {longest}", hint=f"--ctx {longest}")
    return asked.ctx or min(CONTEXT, longest)


def find_prompt(asked: PlanOptions, context: int) -> int:
    """Return the tokens of the prompt to plan for. Raises PlanError beyond the context."""
    if asked.prompt_tokens is not None and asked.prompt_tokens > context:
        raise PlanError(
            f"a prompt of {asked.prompt_tokens} tokens is beyond the context of {context}",
            hint=f"--ctx {asked.prompt_tokens} or more, as far as the model goes",
        )
    return asked.prompt_tokens or min(PROMPT, context)


def place_on(
    hosts: Sequence[Host],
    asked: PlanOptions,
    *,
    force: bool,
    say: Callable[[str], None],
    remotes: Sequence[Remote] | None = None,
) -> Place:
    """Return what chooses a placement on these hosts and refuses one that they cannot hold (see `prepare.shard`).

    Where every host's chip and memory are known, `auto` is what the plan finds fastest. Hosts without memory= are asked
    first where there are `remotes`.
    """
    nodes = [known_node(host, asked) for host in hosts]

    def place(model: CatalogModel, wanted: Wanted) -> Placement:
        count = wanted.nodes or len(wanted.shares or hosts)
        if None in nodes or count != len(nodes):
            placement = prepare.place(model, wanted)
            known = ask_hosts(hosts, nodes, remotes) if remotes and not force else nodes
            check_fit(model.name, placement, known[:count], force=force, warn=say)
            return placement
        frequencies = find_frequencies(wanted, model.structure)
        question = replace(ask(model, asked, hosts), replicas=wanted.replicas, frequencies=frequencies)
        plan = make_plan(question, wanted.split, shares=wanted.shares)
        if not (plan.feasible or force):
            raise refusal(plan)
        say(plan.why)
        check_fit(model.name, plan.placement, nodes, force=force, warn=say)
        return plan.placement

    return place


def choose_bits_on(
    hosts: Sequence[Host], asked: PlanOptions, *, say: Callable[[str], None], remotes: Sequence[Remote] | None = None
) -> ChooseBits:
    """Return what chooses the most bits that these hosts can hold; where one is not known, the model stays as it is.

    Hosts without memory= are asked first where there are `remotes`.
    """

    def choose(model: CatalogModel, wanted: Wanted) -> Wanted:
        count = wanted.nodes or len(wanted.shares or hosts)
        known = [known_node(host, asked) for host in hosts]
        if remotes:
            known = ask_hosts(hosts, known, remotes)
        nodes = tuple(node for node in known[:count] if node is not None)
        if len(nodes) < count:
            return wanted
        question = replace(ask(model, asked, ()), nodes=nodes, replicas=wanted.replicas)
        question = replace(question, frequencies=find_frequencies(wanted, model.structure))
        return _with_bits(wanted, *most_bits(question, wanted), say)

    return choose


def choose_bits_here(say: Callable[[str], None]) -> ChooseBits:
    """Return what chooses the most bits with which this machine can hold all ranks."""

    def choose(model: CatalogModel, wanted: Wanted) -> Wanted:
        node = own_node()
        if node is None:
            return wanted

        def grade(precision: Quantization | None) -> Verdict:
            placement = prepare.place(model.quantised(precision), wanted)
            return judge(least_need(placement, range(placement.world_size), node.dtype_bytes), node.memory.budget)

        return _with_bits(wanted, *choose_precision(grade), say)

    return choose


def _with_bits(wanted: Wanted, precision: Quantization | None, verdict: Verdict, say: Callable[[str], None]) -> Wanted:
    if precision is None:
        return wanted
    if verdict is not Verdict.TOO_MUCH:  # else a refusal follows
        say(f"{choice_text(precision, verdict)}.")
    return replace(wanted, bits=precision.bits)


def refuse_early(source: str, wanted: Wanted, hosts: Sequence[Host]) -> None:
    """Refuse a model that is known by name and that these hosts cannot hold, before its files are looked for."""
    if source not in MODELS or Path(source).is_dir() or None in [known_node(host, PlanOptions()) for host in hosts]:
        return
    plan = plan_cluster(source, wanted, PlanOptions(), hosts).plan
    if not plan.feasible:
        raise refusal(plan)


def place_here(force: bool, say: Callable[[str], None]) -> Place:
    """Return what places all ranks on this machine and refuses what it cannot hold (see `prepare.shard`)."""

    def place(model: CatalogModel, wanted: Wanted) -> Placement:
        placement = prepare.place(model, wanted)
        nodes = [own_node()] * placement.world_size
        check_fit(model.name, placement, nodes, force=force, warn=say)
        return placement

    return place


def own_node() -> Node | None:
    """Return this machine as a node without a known speed; None where its memory cannot be asked.

    As if nothing ran here: a controller may hold this very model already. Workers look again before they load.
    """
    memory, dtype_bytes = own_memory(), own_dtype_bytes()
    if memory is None:
        return None
    return Node("this machine", replace(memory, in_use=0), None, dtype_bytes, is_mac=dtype_bytes == METAL_DTYPE_BYTES)


def check_here(manifest: Manifest, *, force: bool, say: Callable[[str], None]) -> None:
    """Refuse a shard set whose ranks this machine cannot hold together. Raises PlanError."""
    nodes = [own_node()] * manifest.world_size
    check_fit(manifest.name, manifest.placement, nodes, force=force, warn=say)


def check_fit(
    name: str,
    placement: Placement,
    nodes: Sequence[Node | None],
    *,
    force: bool,
    warn: Callable[[str], None],
) -> None:
    """Refuse a placement that some host cannot hold; one host may hold several ranks.

    `nodes` are by rank, None where nothing is known of a host. Raises PlanError; with `force` it only warns, as it does
    where memory is tight.
    """
    for node, ranks in _by_host(nodes):
        need = least_need(placement, ranks, node.dtype_bytes)
        budget = node.memory.budget
        verdict = judge(need, budget)
        sizes = f"{node.host} needs {need / 1e9:.1f} GB, {budget / 1e9:.1f} GB is usable"
        if verdict is Verdict.TOO_MUCH and not force:
            raise too_large(name, sizes, need - budget)
        if verdict is not Verdict.FITS:
            what = "macOS swaps and may panic" if node.is_mac else "it swaps"
            warn(f"Warning: {sizes}: close other programs there, or {what}")


def check_hosts(
    hosts: Sequence[Host],
    manifest: Manifest,
    *,
    force: bool,
    warn: Callable[[str], None],
    remotes: Sequence[Remote] | None = None,
) -> None:
    """Refuse a shard set that some of its hosts cannot hold; with `remotes`, hosts without memory= are asked.

    A host that does not answer is left to the command that follows, which names it.
    """
    if len(hosts) == manifest.world_size:
        nodes = [known_node(host, PlanOptions()) for host in hosts]
        if remotes and not force:
            nodes = ask_hosts(hosts, nodes, remotes)
        check_fit(manifest.name, manifest.placement, nodes, force=force, warn=warn)


def ask_hosts(hosts: Sequence[Host], nodes: Sequence[Node | None], remotes: Sequence[Remote]) -> list[Node | None]:
    """Ask those hosts of which nothing is known yet, all at once."""
    from moectl.hosts.connect import map_at_once

    return map_at_once(lambda rank: nodes[rank] or ask_host(hosts[rank], remotes[rank]), range(len(hosts)))


def ask_host(host: Host, remote: Remote) -> Node | None:
    """Ask a host over SSH what it is made of; None when it does not say."""
    from moectl.hosts.survey import read_hardware

    with suppress(MoectlError):
        return known_node(host, PlanOptions(found={host.name: read_hardware(remote)}))
    return None


def _by_host(nodes: Sequence[Node | None]) -> list[tuple[Node, list[int]]]:
    held: dict[str, tuple[Node, list[int]]] = {}
    for rank, node in enumerate(nodes):
        if node is not None:
            held.setdefault(node.host, (node, []))[1].append(rank)
    return list(held.values())


def known_node(host: Host, asked: PlanOptions) -> Node | None:
    """Return a host as a node, None when its chip or memory is not known."""
    try:
        return make_node(host, CALIBRATIONS[asked.calibration], asked.defaults, asked.found.get(host.name))
    except HostsError:
        return None
