"""`moectl plan`: which host would hold what, whether it fits, and how fast it would be."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from moectl.cli import suggest
from moectl.cli.options import DEFAULT_MODEL, Common, Tokens, common, refuse_both, wanted_options, was_given
from moectl.cli.target import read_wanted
from moectl.cli.verb import flag, verb
from moectl.text import parameters_text, size_text, table_text, time_text

if TYPE_CHECKING:
    from moectl.hosts.hostfile import HostList
    from moectl.model.catalog import CatalogModel
    from moectl.planner.measured import MeasuredCluster
    from moectl.planner.plan import NodePlan, Plan, Question
    from moectl.planner.questions import AnsweredPlan, PlanOptions
    from moectl.planner.what_if import WhatIfRow


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


def what_if_text(rows: list[WhatIfRow]) -> str:
    """Return predicted tok/s of clusters that you could buy, with the split that gives it."""
    counts = [count for count, _ in rows[0].cells]
    header = ("CHIP", "MEMORY", "LINK", "BITS", *(f"{count} NODE{'S' * (count > 1)}" for count in counts))
    lines = [
        (row.chip, f"{row.memory_gib} GB", row.link, str(row.bits), *(_cell_text(plan) for _, plan in row.cells))
        for row in rows
    ]
    note = "Predicted tok/s of one answer at a time; ~ memory is borderline, - does not fit."
    return "\n".join([table_text(header, lines, right="bdefghi"), note])


def _cell_text(plan: Plan | None) -> str:
    from moectl.planner.memory import Verdict

    if plan is None or plan.prediction is None or not plan.feasible:
        return "-"
    mark = "~" if plan.verdict is Verdict.BORDERLINE else ""
    split = "" if plan.placement.world_size == 1 else f" {plan.split}"
    return f"{mark}{plan.prediction.decode_tok_s:.1f}{split}"


def what_if_json(model: CatalogModel, rows: list[WhatIfRow]) -> dict[str, Any]:
    """Return the document of `plan --what-if --json`."""
    return {
        "schema": "moectl.what-if/1",
        "model": model.name,
        "rows": [
            {
                "chip": row.chip,
                "memory_gib": row.memory_gib,
                "link": row.link,
                "q_bits": row.bits,
                "nodes": count,
                "feasible": plan is not None and plan.feasible,
                "split": None if plan is None else plan.split,
                "decode_tok_s": None if plan is None or plan.prediction is None else plan.prediction.decode_tok_s,
                "tok_s_per_usd": None if plan is None else plan.tok_s_per_usd,
            }
            for row in rows
            for count, plan in row.cells
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
@click.option("--probe", is_flag=True, help="Ask the hosts over SSH and measure them; this takes about 10 seconds.")
@click.option("--what-if", is_flag=True, help="Show the speed of clusters that you could buy; needs no hosts.")
@common
def plan(common: Common, model: str, **options: Any) -> None:
    """Show which host would hold what, whether it fits, and how fast it would be.

    It downloads no weights and sends no files. It knows published models by their names (see moectl models), others by
    their headers, and hosts by their keys in hosts.txt, by --chip and --memory, or by what they answer with --probe.

    \b
    Examples:
      moectl plan --hosts mac1,mac2 --chip m2-ultra --memory 192GB
      moectl plan moonshotai/Kimi-K2-Instruct --q-bits 4 --link rdma --hostfile hosts.txt
      moectl plan --what-if
    """
    from moectl.planner.advice import refusal
    from moectl.planner.questions import plan_cluster, plan_purchase

    asked, wanted = _asked(options), read_wanted(options)
    if options["what_if"]:
        names = ("split", "shares", "memory", "probe", "local", "routing_stats")
        given = {f"--{name.replace('_', '-')}": options[name] not in (None, False, "auto") for name in names}
        given |= {"--replicas": options["replicas"] > 1, "--hosts": common.hosts is not None}
        refuse_both({"--what-if": True}, given)
        priced, rows = plan_purchase(model, wanted, asked)
        common.print(what_if_text(rows), what_if_json(priced, rows))
        return
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
