"""`moectl plan`: which host would hold what, whether it fits, and how fast it would be."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from moectl.cli import suggest
from moectl.cli.numbers import Tokens
from moectl.cli.options import DEFAULT_MODEL, Common, common, refuse_both, wanted_options, was_given
from moectl.cli.target import read_wanted
from moectl.cli.verb import flag, verb
from moectl.errors import UsageError
from moectl.text import parameters_text, size_text, table_text, time_text

if TYPE_CHECKING:
    from moectl.hosts.hostfile import HostList
    from moectl.model.catalog import CatalogModel
    from moectl.planner.measured import MeasuredCluster
    from moectl.planner.plan import NodePlan, Plan, Question
    from moectl.planner.questions import AnsweredPlan, PlanOptions
    from moectl.planner.what_if import Buyer, ClusterOffer

MOST_OFFERS = 10  # rows of --what-if


def plan_text(answer: AnsweredPlan, measured: MeasuredCluster | None = None) -> str:
    """Return the table of who would hold what, whether it fits, how fast it would be, and what was measured."""
    from moectl.planner.precision import choice_text

    question, plan = answer.question, answer.plan
    choice = choice_text(question.quantization, plan.verdict) if answer.chosen else ""
    lines = [
        model_text(answer.model, question),
        plan_table(question, plan),
        *_assumed_lines(question),
        _fit_text(plan),
        *([f"{choice}."] if choice else []),
        plan.why,
    ]
    if measured is not None:
        lines[-1:-1] = measured_lines(question, measured)
    if plan.prediction is not None:
        p = plan.prediction
        lines.append(
            f"Predicted: {p.decode_tok_s:.1f} tok/s · prompt {p.prefill_tok_s:.0f} tok/s · first token "
            f"{time_text(p.ttft_s)} after {question.prompt_tokens} tokens · {p.communication_share:.0%} communication "
            f"({p.collectives_per_token} exchanges per token over {question.link.name}, {question.calibration.name})"
        )
        if plan.tok_s_per_usd is not None:
            lines[-1] += f" · {plan.tok_s_per_usd * 1000:.2f} tok/s per 1000 USD"
    if plan.feasible:  # else they are the error's hint
        lines.extend(f"Advice: {advice}." for advice in plan.advice)
    return "\n".join(lines)


def _assumed_lines(question: Question) -> list[str]:
    """Return what is only assumed of hosts, each sentence once."""
    hosts: dict[str, dict[str, None]] = {}
    for node in question.nodes:
        if node.assumed:
            hosts.setdefault(node.assumed, {})[node.host] = None
    return [f"{', '.join(names)}: {assumed}." for assumed, names in hosts.items()]


def measured_lines(question: Question, measured: MeasuredCluster) -> list[str]:
    """Return what a probe found: links, and each split's speed where a shortened model ran."""
    names, lines = [node.host for node in question.nodes], []
    pairs = [(i, j) for i in range(len(measured.rtt_s)) for j in range(i)]
    if pairs:
        a, b = max(pairs, key=lambda pair: measured.rtt_s[pair[0]][pair[1]])
        c, d = min(pairs, key=lambda pair: measured.bandwidth_bytes_s[pair[0]][pair[1]])
        lines.append(
            f"Measured: slowest round trip {measured.rtt_s[a][b] * 1e6:.0f} µs ({names[b]}-{names[a]}), "
            f"narrowest link {measured.bandwidth_bytes_s[c][d] * 8e-9:.1f} Gb/s ({names[d]}-{names[c]})"
        )
    for speed in measured.speeds:
        decode_s = speed.decode.total_s(question.structure.n_layers)
        rates = ", ".join(f"{rank.bytes_s / 1e9:.1f}" for rank in speed.ranks)
        lines.append(f"Measured: {speed.split} {1 / decode_s:.1f} tok/s; weights read at {rates} GB/s")
    return lines


def model_text(model: CatalogModel, question: Question) -> str:
    """Return a model in one line."""
    structure = model.structure
    experts = ""
    if structure.n_experts:
        experts = f"{structure.n_experts} experts, {structure.top_k} used per token · "
    quantization = question.quantization
    precision = "bf16" if quantization is None else f"{quantization.bits}-bit {quantization.mode}"
    return (
        f"{model.name} · {parameters_text(structure.parameters)} parameters, "
        f"{parameters_text(structure.active_parameters)} active · {structure.n_layers} layers · {experts}{precision}"
    )


def plan_table(question: Question, plan: Plan) -> str:
    """Return a row per rank."""
    header = ("RANK", "HOST", "HOLDS", "WEIGHTS", f"KV {question.context}", "NEED", "USABLE", "HEADROOM")
    rows = [_plan_row(plan, rank, node) for rank, node in enumerate(plan.nodes)]
    return table_text(header, rows, right="adefgh")


def _plan_row(plan: Plan, rank: int, node: NodePlan) -> tuple[str, ...]:
    need = node.need
    sizes = (need.weights, need.kv, need.total, node.budget_bytes)
    left = node.budget_bytes - need.total
    headroom = size_text(left) if left >= 0 else f"-{size_text(-left)}"
    return (str(rank), node.host, _held_text(plan, rank), *map(size_text, sizes), headroom)


def _held_text(plan: Plan, rank: int) -> str:
    placement = plan.placement
    if placement.split in ("hidden", "tensor"):
        return f"{placement.shares[rank] / sum(placement.shares):.0%}"
    if placement.split == "layers":
        first, last = placement.layers(rank)
        return f"layers {first}-{last - 1}"
    numbers = placement.experts_of(rank)
    if placement.held is not None:
        return f"{len(numbers)}/{placement.structure.n_experts} experts"
    return f"experts {numbers[0]}-{numbers[-1]}" if numbers else "no expert"


def _fit_text(plan: Plan) -> str:
    from moectl.planner.memory import Verdict

    total = size_text(sum(node.need.weights for node in plan.nodes))
    if plan.verdict is Verdict.FITS:
        return f"Fits. {total} of weights in total."
    worst = max(plan.nodes, key=lambda node: node.need.total / max(1, node.budget_bytes))
    share = f"{worst.need.total / max(1, worst.budget_bytes):.0%}"
    if plan.verdict is Verdict.BORDERLINE:
        return f"Borderline: {worst.host} would use {share} of what it can give. {total} of weights in total."
    return f"Does not fit: {worst.host} would need {share} of what it can give. {total} of weights in total."


def plan_json(answer: AnsweredPlan, measured: MeasuredCluster | None = None) -> dict[str, Any]:
    """Return the document of `plan --json`."""
    question, plan = answer.question, answer.plan
    p = plan.prediction
    quantization = question.quantization
    return {
        "schema": "moectl.plan/1",
        "model": answer.model.name,
        "q_bits": quantization.bits if quantization else 16,
        "q_bits_chosen": answer.chosen,
        "layers": question.structure.n_layers,
        "context": question.context,
        "feasible": plan.feasible,
        "verdict": plan.verdict.name.lower(),
        "split": plan.split,
        "shares": list(plan.placement.shares),
        "link": question.link.name,
        "calibration": question.calibration.name,
        "nodes": [
            {
                "host": node.host,
                "weights_bytes": node.need.weights,
                "kv_bytes": node.need.kv,
                "need_bytes": node.need.total,
                "budget_bytes": node.budget_bytes,
                "assumed": asked.assumed or None,
            }
            for node, asked in zip(plan.nodes, question.nodes, strict=True)
        ],
        "prediction": None if p is None else {**asdict(p), "tok_s_per_usd": plan.tok_s_per_usd},
        "advice": list(plan.advice),
        "why": plan.why,
        "measured": None if measured is None else asdict(measured),
    }


def what_if_text(offers: list[ClusterOffer], buyer: Buyer) -> str:
    """Return the clusters that you could buy, with their predicted speed."""
    from moectl.planner.memory import Verdict

    header = ("NODES", "CHIP", "MEMORY", "LINK", "SPLIT", "BITS", "TOK/S", "PRICE", "TOK/S PER 1000 USD")
    lines = [
        (
            str(offer.count),
            offer.chip,
            f"{offer.memory_gib} GB",
            offer.link if offer.count > 1 else "-",
            offer.plan.split if offer.count > 1 else "-",
            str(offer.bits),
            f"{'~' if offer.plan.verdict is Verdict.BORDERLINE else ''}{offer.tok_s:.1f}",
            "-" if offer.usd is None else f"{offer.usd:,.0f} USD",
            "-" if offer.usd is None else f"{1000 * offer.tok_s / offer.usd:.2f}",
        )
        for offer in (offers if buyer.every else offers[:MOST_OFFERS])
    ]
    which = "all that hold it"
    if not buyer.every:
        which = "for each machine the fewest that hold it" if buyer.usd is None else "for each machine the fastest"
        if buyer.usd is None and buyer.tok_s is not None:
            which = "for each machine the fewest that are so fast"
    notes = [
        f"Sorted: {buyer.order}; {which}. Predicted tok/s of one answer at a time; ~ memory is borderline.",
        "Prices are those at the launch; - is not known. --budget USD, --min-tok-s N and --all show others.",
    ]
    return "\n".join([table_text(header, lines, right="acfghi"), *notes])


def what_if_json(model: CatalogModel, offers: list[ClusterOffer], buyer: Buyer) -> dict[str, Any]:
    """Return the document of `plan --what-if --json`."""
    return {
        "schema": "moectl.what-if/1",
        "model": model.name,
        "order": buyer.order,
        "rows": [
            {
                "chip": offer.chip,
                "memory_gib": offer.memory_gib,
                "link": offer.link,
                "q_bits": offer.bits,
                "nodes": offer.count,
                "feasible": True,
                "split": offer.plan.split,
                "decode_tok_s": offer.tok_s,
                "usd": offer.usd,
                "tok_s_per_usd": offer.plan.tok_s_per_usd,
            }
            for offer in (offers if buyer.every else offers[:MOST_OFFERS])
        ],
    }


@verb("Prepare")
@click.argument("model", default=DEFAULT_MODEL, shell_complete=suggest.models)
@click.option("--ctx", type=Tokens(), metavar="N", help="Tokens of context: 8192, 32k (default: 4096).")
@flag("--concurrency", rare=True, type=click.IntRange(1), default=1, show_default=True, help="Answers at once.")
@click.option(
    "-p",
    "--prompt-tokens",
    type=click.IntRange(1),
    help="Tokens of the prompt (default: 512).",
)
@wanted_options
@click.option(
    "--chip", metavar="NAME", shell_complete=suggest.chips, help="Chip of hosts without chip=, such as m2-ultra."
)
@click.option("--memory", metavar="SIZE", help="Memory of hosts without memory=, such as 192GB.")
@click.option(
    "--link",
    metavar="NAME",
    shell_complete=suggest.links,
    help="Link between hosts: rdma, tb-tcp, 10gbe (default without rdma=) or 1gbe.",
)
@flag(
    "--calibration",
    rare=True,
    type=click.Choice(["default", "paper", "paper-naive", "peers"]),
    default="default",
    show_default=True,
    help="Constants of the prediction: moectl's, those of arXiv 2506.23635, or what exo reaches on clusters of Macs.",
)
@click.option("--local", type=click.IntRange(1), metavar="N", help="Plan N ranks on this machine (implies --probe).")
@click.option("--probe", is_flag=True, help="Ask the hosts over SSH and measure them (10 s).")
@click.option("--what-if", is_flag=True, help="Show ten clusters that you could buy; needs no hosts.")
@click.option("--budget", type=click.FloatRange(1), metavar="USD", help="For --what-if: at most this price.")
@click.option("--min-tok-s", type=click.FloatRange(0), metavar="N", help="For --what-if: at least this speed.")
@click.option("--all", "every", is_flag=True, help="For --what-if: all clusters, links and bits.")
@common
def plan(common: Common, model: str, **options: Any) -> None:
    """Show which host would hold what, whether it fits, and how fast it would be.

    It downloads no weights and sends no files. It knows published models by name (see moectl models), others by their
    headers; and hosts by hosts.txt, by --chip and --memory, or by what they answer with --probe.

    \b
    Examples:
      moectl plan --hosts mac1,mac2 --chip m2-ultra --memory 192GB
      moectl plan moonshotai/Kimi-K2-Instruct --q-bits 4 --link rdma --hostfile hosts.txt
      moectl plan --what-if --budget 8000
    """
    from moectl.planner.advice import refusal
    from moectl.planner.questions import plan_cluster, plan_purchase
    from moectl.planner.what_if import Buyer

    asked, wanted = _asked(options), read_wanted(options)
    buyer = Buyer(options["budget"], options["min_tok_s"], options["every"])
    if options["what_if"]:
        names = ("split", "shares", "memory", "probe", "local", "routing_stats")
        given = {f"--{name.replace('_', '-')}": options[name] not in (None, False, "auto") for name in names}
        given |= {"--replicas": options["replicas"] > 1, "--hosts": common.hosts is not None}
        refuse_both({"--what-if": True}, given)
        priced, offers = plan_purchase(model, wanted, asked, buyer)
        common.print(what_if_text(offers, buyer), what_if_json(priced, offers, buyer))
        return
    if buyer != Buyer():
        raise UsageError("--budget, --min-tok-s and --all are for --what-if", hint="add --what-if")
    if options["local"] and model == DEFAULT_MODEL and not was_given("model"):
        from moectl.demo import demo_dir

        model = str(demo_dir())  # as run and bench do
    where, measured = _where(common, options["local"]), None
    if options["probe"] or options["local"]:
        from moectl.cluster.probed_plan import probe_cluster

        answer, measured = probe_cluster(model, wanted, asked, where, say=common.say)
    else:
        answer = plan_cluster(model, wanted, asked, where.hosts)
    common.print(plan_text(answer, measured), plan_json(answer, measured))
    if not answer.plan.feasible:
        raise refusal(answer.plan)


def _where(common: Common, local: int | None) -> HostList:
    """Return the hosts of a plan: those in force, or this many ranks on this machine."""
    from moectl.hosts.hostfile import Host, HostList

    if local is None:
        return common.require_hosts()
    refuse_both({"--local": local}, {"--hosts": common.hosts, "--hostfile": common.hostfile})
    return HostList((Host("localhost"),) * local)


def _asked(options: dict[str, Any]) -> PlanOptions:
    from moectl.planner.questions import PlanOptions

    return PlanOptions(
        **{k: options[k] for k in ("ctx", "concurrency", "prompt_tokens", "chip", "memory", "link", "calibration")}
    )
