"""Results as text for people and as JSON documents for scripts. It computes and prints nothing.

JSON: sizes in bytes, times in seconds, snake_case; fields may be added, never renamed.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from moectl.planner.memory import Verdict
from moectl.text import columns, size_text, table_text, time_text

if TYPE_CHECKING:
    from moectl.cluster.deploy.deploy import DeployResult
    from moectl.cluster.deploy.provision import HostResult
    from moectl.engine.protocol import Done
    from moectl.engine.request import Stats
    from moectl.hosts.hostfile import HostList
    from moectl.model.catalog import Model
    from moectl.planner.measured import Measured
    from moectl.planner.plan import NodePlan, Plan, Question
    from moectl.planner.what_if import Row
    from moectl.session.bench import Benchmark, Measured as Sample
    from moectl.shards.prepare import Made

# Barriers always cost something; parts that exceed an ordinary step by more than this say little about it.
DOUBTFUL_EXCESS = 0.1


def shard_text(made: Made, *, dry_run: bool) -> str:
    """Return one line about a shard set."""
    if dry_run:
        return f"Dry run: nothing was written. {size_text(made.bytes)} would be, in {made.directory}."
    return f"{size_text(made.bytes)} in {made.directory}, one shard for each of {made.placement.world_size} ranks."


def shard_json(made: Made, *, dry_run: bool) -> dict[str, Any]:
    """Return the document of `shard --json`."""
    return {
        "schema": "moectl.shard/1",
        "directory": str(made.directory),
        "split": made.placement.split,
        "shares": list(made.placement.shares),
        "replicas": made.placement.replicas,
        "bytes": made.bytes,
        "dry_run": dry_run,
    }


def deploy_text(result: DeployResult, *, dry_run: bool) -> str:
    """Return a line per host, or in a dry run the table of what would be copied."""
    if not dry_run:
        width = max(len(r.host.address) for r in result.results)
        return "\n".join(f"{r.host.address:{width}}  {_outcome(r)}" for r in result.results)
    header = ("HOST", "COPY", "KEEP", "FREE AFTER", "DESTINATION")
    lines = [
        (r.host.address, *map(size_text, (r.copied_bytes, r.kept_bytes, r.free_after_bytes)), r.directory)
        if r.error is None
        else (r.host.address, "-", "-", "-", "failed")
        for r in result.results
    ]
    total = sum(r.copied_bytes for r in result.succeeded)
    reasons = [f"{r.host.address}  {_outcome(r)}" for r in result.results if r.error is not None]
    summary = f"Dry run: nothing was copied. {size_text(total)} would be."
    return "\n".join([table_text(header, lines, right="bcd"), *reasons, summary])


def _outcome(result: HostResult) -> str:
    if result.error is not None:
        return f"failed  {result.error.message}"
    if not result.copied_bytes:
        return "ok      already there, verified"
    speed = size_text(result.copied_bytes / result.duration_s)
    relayed = f", {size_text(result.relayed_bytes)} of it from another host" if result.relayed_bytes else ""
    return f"ok      {size_text(result.copied_bytes)} in {time_text(result.duration_s)} ({speed}/s), verified{relayed}"


def deploy_json(result: DeployResult, name: str, *, dry_run: bool) -> dict[str, Any]:
    """Return the document of `deploy --json`."""
    hosts = [
        {
            "rank": r.rank,
            "host": r.host.address,
            "ok": r.ok,
            "error": None if r.error is None else r.error.message,
            "copied_bytes": r.copied_bytes,
            "kept_bytes": r.kept_bytes,
            "relayed_bytes": r.relayed_bytes,
            "duration_s": r.duration_s,
            "directory": r.directory,
        }
        for r in result.results
    ]
    return {"schema": "moectl.deploy/1", "name": name, "dry_run": dry_run, "hosts": hosts}


def hosts_json(found: HostList) -> dict[str, Any]:
    """Return the document of `hosts --json`: what the list says, nothing resolved."""
    hosts = [{"rank": rank, "host": host.address, **asdict(host)} for rank, host in enumerate(found.hosts)]
    rest = {"source": found.source, "backend": found.backend, "envs": list(found.envs)}
    return {"schema": "moectl.hosts/1", **rest, "hosts": hosts}


def run_json(text: str, done: Done) -> dict[str, Any]:
    """Return the document of `run --json`."""
    return {"schema": "moectl.run/1", "text": text, "finish_reason": done.finish_reason, "stats": asdict(done.stats)}


def stats_text(stats: Stats) -> str:
    """Return the line of `run --stats`; the first token's time belongs to the prompt."""
    prompt_speed = (stats.prompt_tokens - stats.cached_tokens) / stats.prompt_s if stats.prompt_s else 0.0
    decoded = max(stats.completion_tokens - 1, 0)
    speed = decoded / stats.decode_s if stats.decode_s else 0.0
    cached = f" ({stats.cached_tokens} cached)" if stats.cached_tokens else ""
    guessed = ""
    if stats.drafted_tokens:
        share = stats.accepted_tokens / stats.drafted_tokens
        guessed = f" ({stats.accepted_tokens} of {stats.drafted_tokens} guesses right, {share:.0%})"
    return (
        f"{stats.prompt_tokens} prompt tokens{cached} at {prompt_speed:.1f} tok/s · "
        f"{stats.completion_tokens} tokens{guessed} at {speed:.1f} tok/s · "
        f"first token {time_text(stats.ttft_s)} · peak {size_text(stats.peak_memory_bytes)}"
    )


def plan_text(model: Model, question: Question, plan: Plan, measured: Measured | None = None) -> str:
    """Return the table of who would hold what, whether it fits, how fast it would be, and what was measured."""
    lines = [model_text(model, question), plan_table(question, plan), _fit_text(plan), plan.why]
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


def measured_lines(question: Question, measured: Measured) -> list[str]:
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
        decode_s = speed.decode.total_s(question.geometry.n_layers)
        rates = ", ".join(f"{rank.bytes_s / 1e9:.1f}" for rank in speed.ranks)
        lines.append(f"Measured: {speed.split} {1 / decode_s:.1f} tok/s; weights read at {rates} GB/s")
    return lines


def model_text(model: Model, question: Question) -> str:
    """Return a model in one line."""
    g = model.geometry
    quantization = question.quantization
    precision = "bf16" if quantization is None else f"{quantization.bits}-bit {quantization.mode}"
    return (
        f"{model.name} · {_count_text(g.parameters)} parameters, {_count_text(g.active_parameters)} active · "
        f"{g.n_layers} layers · {g.n_experts} experts, {g.top_k} used per token · {precision}"
    )


def _count_text(count: int) -> str:
    return f"{count / 1e9:.0f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"


def plan_table(question: Question, plan: Plan) -> str:
    """Return a row per rank."""
    header = ("RANK", "HOST", _HELD[plan.split], "WEIGHTS", f"KV {question.context}", "NEED", "USABLE", "HEADROOM")
    rows = [_plan_row(plan, rank, node) for rank, node in enumerate(plan.nodes)]
    return table_text(header, rows, right="adefgh")


_HELD = {"experts": "EXPERTS", "hidden": "HIDDEN", "tensor": "HIDDEN", "layers": "LAYERS"}


def _plan_row(plan: Plan, rank: int, node: NodePlan) -> tuple[str, ...]:
    need = node.need
    sizes = (need.weights, need.kv, need.total, node.budget_bytes)
    left = node.budget_bytes - need.total
    headroom = size_text(left) if left >= 0 else f"-{size_text(-left)}"
    return (str(rank), node.host, _held_text(plan, rank), *map(size_text, sizes), headroom)


def _held_text(plan: Plan, rank: int) -> str:
    placement = plan.placement
    if placement.split in ("hidden", "tensor"):
        return f"{placement.shares[rank]}/{sum(placement.shares)}"
    if placement.split == "layers":
        first, last = placement.layers(rank)
        return f"{first}-{last - 1}"
    numbers = placement.experts_of(rank)
    if placement.held is not None:
        return f"{len(numbers)}/{placement.geometry.n_experts}"
    return f"{numbers[0]}-{numbers[-1]}"


def _fit_text(plan: Plan) -> str:
    total = size_text(sum(node.need.weights for node in plan.nodes))
    if plan.verdict is Verdict.FITS:
        return f"Fits. {total} of weights in total."
    worst = max(plan.nodes, key=lambda node: node.need.total / max(1, node.budget_bytes))
    share = f"{worst.need.total / max(1, worst.budget_bytes):.0%}"
    if plan.verdict is Verdict.BORDERLINE:
        return f"Borderline: {worst.host} would use {share} of what it can give. {total} of weights in total."
    return f"Does not fit: {worst.host} would need {share} of what it can give. {total} of weights in total."


def plan_json(model: Model, question: Question, plan: Plan, measured: Measured | None = None) -> dict[str, Any]:
    """Return the document of `plan --json`."""
    p = plan.prediction
    quantization = question.quantization
    return {
        "schema": "moectl.plan/1",
        "model": model.name,
        "q_bits": quantization.bits if quantization else 16,
        "layers": question.geometry.n_layers,
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
            }
            for node in plan.nodes
        ],
        "prediction": None if p is None else {**asdict(p), "tok_s_per_usd": plan.tok_s_per_usd},
        "advice": list(plan.advice),
        "why": plan.why,
        "measured": None if measured is None else asdict(measured),
    }


def what_if_text(model: Model, rows: list[Row]) -> str:
    """Return predicted tok/s of clusters that one could buy, with the split that gives it."""
    counts = [count for count, _ in rows[0].cells]
    header = ("CHIP", "MEMORY", "LINK", "BITS", *(f"{count} NODE{'S' * (count > 1)}" for count in counts))
    lines = [
        (row.chip, f"{row.memory_gib} GB", row.link, str(row.bits), *(_cell_text(plan) for _, plan in row.cells))
        for row in rows
    ]
    note = "tok/s, predicted, of one answer at a time; ~ borderline memory, - does not fit."
    return "\n".join([table_text(header, lines, right="bdefghi"), note])


def _cell_text(plan: Plan | None) -> str:
    if plan is None or plan.prediction is None or not plan.feasible:
        return "-"
    mark = "~" if plan.verdict is Verdict.BORDERLINE else ""
    split = "" if plan.placement.world_size == 1 else f" {plan.split}"
    return f"{mark}{plan.prediction.decode_tok_s:.1f}{split}"


def what_if_json(model: Model, rows: list[Row]) -> dict[str, Any]:
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


def bench_text(result: Benchmark, *, width: int | None = None) -> str:
    """Return the tables of `bench`; the split of a token's time is that of the rank that computes longest."""
    width = width or columns()
    lines = [_speed_table(result, width), _token_line(result)]
    excess = -result.slowest.other_s / result.step_s
    if excess > DOUBTFUL_EXCESS:
        lines.append(f"the parts exceed a step by {excess:.0%}: busy machine or tiny model")
    header = ("RANK", "HOST", "COMPUTE", "ALL-REDUCE", "OTHER", "PEAK", "EXPERTS")
    rows = [
        (
            str(r.rank),
            r.host,
            *(f"{1e3 * seconds:.1f} ms" for seconds in (r.compute_s, r.all_reduce_s, r.other_s)),
            size_text(r.peak_memory_bytes),
            f"{r.own_experts:.2f}",
        )
        for r in result.ranks
    ]
    lines.append(table_text(header, rows, right="acdefg", width=width))
    if result.imbalance is not None and len(result.ranks) > 1:
        lines.append(f"busiest rank: {result.busiest_experts:.2f} experts per layer, {result.imbalance:.2f}× the mean")
    each = [frequency for layer in result.routing.frequencies for frequency in layer]
    even = result.routing.top_k / len(result.routing.counts[0])
    lines.append(f"experts work on {min(each):.0%} to {max(each):.0%} of a layer's tokens (even: {even:.0%})")
    return "\n".join(lines)


def _speed_table(result: Benchmark, width: int) -> str:
    predicted = result.predicted
    header = ["", "TOK/S", "± SD"]
    prompt, generate = (
        [name, f"{speed.mean:.1f}", "-" if speed.sd is None else f"{speed.sd:.1f}"]
        for name, speed in (("prompt", result.prefill_tok_s), ("generate", result.decode_tok_s))
    )
    if predicted:
        header.append("PREDICTED")
        prompt.append(f"{predicted.prefill_tok_s:.1f}")
        generate.append(f"{predicted.decode_tok_s:.1f}")
    header.append("FIRST TOKEN")
    prompt.append("")
    generate.append(_duration_text(result.ttft_s.mean))
    if predicted:
        header.append("PREDICTED")
        prompt.append("")
        generate.append(_duration_text(predicted.ttft_s))
    lines = table_text(header, [prompt, generate], right="bcdefg", width=width).split("\n")
    trials = len(result.trials)
    hosts = len(dict.fromkeys(rank.host for rank in result.ranks))
    where = (
        f"{hosts} hosts"
        if hosts == len(result.ranks) > 1
        else f"{len(result.ranks)} rank{'s'[: len(result.ranks) > 1]}"
    )
    note = (
        f"({trials} trial{'s'[: trials > 1]}, {result.prompt_tokens} prompt + {result.generation_tokens} generated, "
        f"{where}, {_precision_text(result.model.bits)})"
    )
    if len(lines[0]) + 4 + len(note) <= width:
        lines[0] += "    " + note
    else:
        lines.append(note)
    return "\n".join(lines)


def _token_line(result: Benchmark) -> str:
    rank, step_ms = result.slowest, 1e3 * result.step_s
    digits = 0 if step_ms >= 20 else 1 if step_ms >= 2 else 2
    total, compute, all_reduce = (round(x, digits) for x in (step_ms, 1e3 * rank.compute_s, 1e3 * rank.all_reduce_s))
    other = round(total - compute - all_reduce, digits)  # so that what is shown adds up
    rest = f"+ {other:.{digits}f} other" if other >= 0 else f"- {-other:.{digits}f} hidden"
    return f"per token {total:.{digits}f} ms = {compute:.{digits}f} compute + {all_reduce:.{digits}f} all-reduce {rest}"


def _precision_text(bits: int | None) -> str:
    return "bf16" if bits is None else f"{bits} bits"


def _duration_text(seconds: float) -> str:
    return f"{1e3 * seconds:.0f} ms" if seconds < 1 else time_text(seconds)


def bench_json(result: Benchmark) -> dict[str, Any]:
    """Return the document of `bench --json`; speeds are in tokens per second, `ranks` in rank order."""
    predicted = result.predicted
    return {
        "schema": "moectl.bench/1",
        "model": result.name,
        "split": result.model.split,
        "bits": result.model.bits,
        "prompt_tokens": result.prompt_tokens,
        "generation_tokens": result.generation_tokens,
        "prefill_tok_s": _measured_json(result.prefill_tok_s),
        "decode_tok_s": _measured_json(result.decode_tok_s),
        "ttft_s": _measured_json(result.ttft_s),
        "trials": [asdict(trial) for trial in result.trials],
        "step_s": result.step_s,
        "communication_share": result.communication_share,
        "ranks": [asdict(rank) for rank in result.ranks],
        "busiest_experts": result.busiest_experts,
        "imbalance": result.imbalance,
        "routing": {
            "tokens": result.routing.tokens,
            "top_k": result.routing.top_k,
            "counts": [list(layer) for layer in result.routing.counts],
        },
        "predicted": None if predicted is None else asdict(predicted),
    }


def _measured_json(measured: Sample) -> dict[str, float | None]:
    return {"mean": measured.mean, "sd": measured.sd}
