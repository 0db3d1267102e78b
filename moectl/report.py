"""Results as text for people and as JSON documents for scripts. It computes and prints nothing.

JSON: sizes in bytes, times in seconds, snake_case; fields may be added, never renamed.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from moectl.console import columns, size_text, table_text, time_text

if TYPE_CHECKING:
    from moectl.bench import Benchmark, Measured
    from moectl.cluster import DeployResult
    from moectl.leash import Done
    from moectl.prepare import Made
    from moectl.provision import HostResult
    from moectl.request import Stats

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
    return f"ok      {size_text(result.copied_bytes)} in {time_text(result.duration_s)} ({speed}/s), verified"


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
            "duration_s": r.duration_s,
            "directory": r.directory,
        }
        for r in result.results
    ]
    return {"schema": "moectl.deploy/1", "name": name, "dry_run": dry_run, "hosts": hosts}


def run_json(text: str, done: Done) -> dict[str, Any]:
    """Return the document of `run --json`."""
    return {"schema": "moectl.run/1", "text": text, "finish_reason": done.finish_reason, "stats": asdict(done.stats)}


def stats_text(stats: Stats) -> str:
    """Return the line of `run --stats`; the first token's time belongs to the prompt."""
    prompt_speed = stats.prompt_tokens / stats.prompt_s if stats.prompt_s else 0.0
    decoded = max(stats.completion_tokens - 1, 0)
    speed = decoded / stats.decode_s if stats.decode_s else 0.0
    return (
        f"{stats.prompt_tokens} prompt tokens at {prompt_speed:.1f} tok/s · "
        f"{stats.completion_tokens} tokens at {speed:.1f} tok/s · "
        f"first token {time_text(stats.ttft_s)} · peak {size_text(stats.peak_memory_bytes)}"
    )


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


def _measured_json(measured: Measured) -> dict[str, float | None]:
    return {"mean": measured.mean, "sd": measured.sd}
