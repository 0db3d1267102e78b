"""`moectl bench`: measure prefill and decode speed, and where a token's time goes."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moectl import errors
from moectl.cli.numbers import Numbers
from moectl.cli.options import FILE, Common, common, refuse_both, target_options
from moectl.cli.target import choose_target, run_options
from moectl.cli.terminal import log_printer
from moectl.cli.verb import flag, verb
from moectl.text import columns, size_text, table_text, time_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moectl.session.bench import Benchmark, MeanDeviation, Predicted
    from moectl.session.target import Target

# The parts, measured apart, may exceed an ordinary step. By more than this, they say little about it.
DOUBTFUL_EXCESS = 0.1


def bench_text(result: Benchmark, *, width: int | None = None) -> str:
    """Return the tables of `bench`; the split of a token's time is that of the rank that computes longest."""
    width = width or columns()
    lines = [_speed_table(result, width), _token_line(result)]
    excess = result.slowest.overlap_s / result.step_s
    if excess > DOUBTFUL_EXCESS:
        lines.append(f"the parts alone take {excess:.0%} longer: busy machine or tiny model")
    header = ("RANK", "HOST", "COMPUTE", "ALL-REDUCE", "OTHER", "PEAK", "EXPERTS")
    rows = [
        (
            str(r.rank),
            r.host,
            *(f"{1e3 * seconds:.1f} ms" for seconds in (r.compute_s, r.all_reduce_s, r.other_s)),
            size_text(r.peak_memory_bytes),
            "-" if result.routing is None else f"{r.own_experts:.2f}",
        )
        for r in result.ranks
    ]
    lines.append(table_text(header, rows, right="acdefg", width=width))
    if result.imbalance is not None and len(result.ranks) > 1:
        lines.append(f"busiest rank: {result.busiest_experts:.2f} experts per layer, {result.imbalance:.2f}× the mean")
    if result.routing is not None:
        each = [frequency for layer in result.routing.frequencies for frequency in layer]
        even = result.routing.top_k / len(result.routing.overall)
        lines.append(f"experts work on {min(each):.0%} to {max(each):.0%} of a layer's tokens (even: {even:.0%})")
    return "\n".join(lines)


def _speed_table(result: Benchmark, width: int) -> str:
    predicted = result.predicted
    speeds = (result.prefill_tok_s, result.decode_tok_s)
    table = [
        ("", "prompt", "generate"),
        ("TOK/S", *(f"{speed.mean:.1f}" for speed in speeds)),
        ("± SD", *("-" if speed.sd is None else f"{speed.sd:.1f}" for speed in speeds)),
        ("FIRST TOKEN", "", _duration_text(result.ttft_s.mean)),
    ]
    if predicted:
        table.insert(3, ("PREDICTED", f"{predicted.prefill_tok_s:.1f}", f"{predicted.decode_tok_s:.1f}"))
        table.append(("PREDICTED", "", _duration_text(predicted.ttft_s)))
    header, *rows = zip(*table, strict=True)
    lines = table_text(header, rows, right="bcdefg", width=width).split("\n")
    trials = len(result.trials)
    hosts, ranks = len({rank.host for rank in result.ranks}), len(result.ranks)
    where = f"{hosts} hosts" if hosts == ranks > 1 else f"{ranks} rank{'s' * (ranks > 1)}"
    precision = "bf16" if result.model.bits is None else f"{result.model.bits} bits"
    note = (
        f"({trials} trial{'s' * (trials > 1)}, {result.prompt_tokens} prompt + {result.generation_tokens} generated, "
        f"{where}, {precision})"
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
    # So that what is shown adds up.
    all_reduce = min(all_reduce, round(total - compute, digits))
    other = round(total - compute - all_reduce, digits)
    parts = ((compute, "compute"), (all_reduce, "all-reduce"), (other, "other"))
    return f"per token {total:.{digits}f} ms = {' + '.join(f'{part:.{digits}f} {name}' for part, name in parts)}"


def _row(result: Benchmark) -> dict[str, str]:
    """Return one measurement in a line, for `several_text`."""
    precision = "bf16" if result.model.bits is None else f"{result.model.bits} bits"

    def speed(measured: MeanDeviation) -> str:
        return f"{measured.mean:.2f}" + ("" if measured.sd is None else f" ± {measured.sd:.2f}")

    return {
        "model": result.name,
        "ranks": str(len(result.ranks)),
        "split": result.model.split,
        "bits": precision,
        "prompt": str(result.prompt_tokens),
        "generate": str(result.generation_tokens),
        "prompt t/s": speed(result.prefill_tok_s),
        "generate t/s": speed(result.decode_tok_s),
        "first token s": f"{result.ttft_s.mean:.3f}",
    }


def several_text(results: Sequence[Benchmark], form: str) -> str:
    """Return a row per measurement: as a table, as Markdown (`md`), or as CSV (`csv`)."""
    rows = [_row(result) for result in results]
    header = list(rows[0])
    lines = [list(row.values()) for row in rows]
    if form == "csv":
        import csv
        import io

        written = io.StringIO()
        csv.writer(written, lineterminator="\n").writerows([header, *lines])
        return written.getvalue().rstrip("\n")
    if form == "md":
        rule = ["---" if name in ("model", "split", "bits") else "---:" for name in header]
        return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *lines))
    del header[0]  # the model, which is named once
    shown = table_text([name.upper() for name in header], [line[1:] for line in lines], right="adefgh")
    return f"{results[0].name}\n{shown}"


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
        "prefill_tok_s": asdict(result.prefill_tok_s),
        "decode_tok_s": asdict(result.decode_tok_s),
        "ttft_s": asdict(result.ttft_s),
        "trials": [asdict(trial) for trial in result.trials],
        "step_s": result.step_s,
        "communication_share": result.communication_share,
        "ranks": [asdict(rank) for rank in result.ranks],
        "busiest_experts": result.busiest_experts,
        "imbalance": result.imbalance,
        "routing": result.routing and {name: getattr(result.routing, name) for name in ("tokens", "top_k", "counts")},
        "predicted": None if predicted is None else asdict(predicted),
    }


@verb("Use", old={"-n": "--num-trials"})
@click.option(
    "-p",
    "--prompt-tokens",
    type=Numbers(1),
    default="512",
    show_default=True,
    help="Tokens of the prompt, or several: 32,64.",
)
@click.option(
    "-g",
    "--generation-tokens",
    type=Numbers(2),
    default="128",
    show_default=True,
    help="Tokens to generate, or several.",
)
@click.option(
    "-r",
    "--num-trials",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    help="Trials; the table shows their mean.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "md", "csv"]),
    default="table",
    show_default=True,
    help="Print Markdown or CSV.",
)
@flag(
    "--plan",
    rare=True,
    type=FILE,
    metavar="FILE",
    help="Show beside it the prediction that 'plan --json' wrote to this file.",
)
@click.option("--plot", type=FILE, metavar="FILE.svg", help="Draw the results (needs moectl[plot]).")
@flag(
    "--compare",
    rare=True,
    type=FILE,
    multiple=True,
    metavar="FILE",
    help="For --plot: draw this result of 'bench --json' too (repeatable).",
)
@flag(
    "--routing-stats", rare=True, type=FILE, metavar="FILE", help="Write to this file how often each expert was chosen."
)
@target_options
@common
def bench(
    common: Common, form: str, plan: Path | None, plot: Path | None, compare: tuple[Path, ...], **options: Any
) -> None:
    """Measure prompt and generation speed, and where the time goes.

    Prompts are random tokens. After the trials every rank times the parts of some decode steps: computing, all-reduce
    (with the wait for the slowest rank), and the rest. Lists of lengths measure each of them with each.

    \b
    Examples:
      moectl bench
      moectl bench --local 2 -p 128 -g 32 --json > two.json
      moectl bench -p 512,4096 -g 128 --format md
      moectl bench --local 4 --plot ranks.svg --compare two.json
    """
    from moectl import files as disk
    from moectl.cli import plot as plotting
    from moectl.model import routing
    from moectl.server import attach
    from moectl.session import bench as benchmark, target as launch

    if options["routing_stats"]:
        disk.check_destination(options["routing_stats"])
    if plot:
        plotting.check_plot(plot)
    elif compare:
        raise errors.UsageError("--compare is for --plot", hint="add --plot FILE.svg")
    lengths = list(itertools.product(options["prompt_tokens"], options["generation_tokens"]))
    one = {f"--{name}": value for name, value in (("plan", plan), ("plot", plot))}
    refuse_both({"several lengths": len(lengths) > 1}, {**one, "--routing-stats": options["routing_stats"]})
    refuse_both({"--json": common.json}, {"--format": form != "table"})
    earlier = plotting.read_documents(compare)
    target = choose_target(common, options)
    if attach.is_loaded(target):
        raise errors.StateError(
            f"{target.name} is loaded by a controller: measuring beside it would load it twice", hint="moectl stop"
        )
    trials, ids = options["num_trials"], itertools.count(1)

    def on_trial(number: int, trial: benchmark.Trial) -> None:
        speeds = f"prompt {trial.prefill_tok_s:.1f} tok/s, generate {trial.decode_tok_s:.1f} tok/s"
        common.say(f"trial {number} of {trials}: {speeds}")

    with launch.open_session(target, run_options(options), on_log=log_printer(common)) as session:
        if options["routing_stats"] and not session.model.top_k:
            raise errors.UsageError(
                f"{target.name} has no experts: there are no choices to count", hint="leave --routing-stats out"
            )
        results = [
            benchmark.bench(
                session,
                target.name,
                prompt_tokens=prompt,
                generation_tokens=generated,
                trials=trials,
                ids=ids,
                seed=seed,
                predicted=_predicted(target, plan, prompt, generated),
                on_trial=on_trial,
            )
            for seed, (prompt, generated) in enumerate(lengths)
        ]
    result, documents = results[0], list(map(bench_json, results))
    if len(results) > 1 or form != "table":
        common.print(several_text(results, form), {"schema": "moectl.benches/1", "results": documents})
    else:
        common.print(bench_text(result), documents[0])
    if options["routing_stats"] and result.routing is not None:
        routing.write_routing(options["routing_stats"], result.routing)
    if plot:
        plotting.write_plot(plot, [*earlier, *documents])


def _predicted(target: Target, plan: Path | None, prompt: int, generated: int) -> Predicted | None:
    """Return what a plan expects of these trials: the one given, else the last `plan --probe` of these hosts."""
    from moectl.cluster import probed_plan
    from moectl.model.manifest import read_manifest
    from moectl.session import target as launch
    from moectl.session.bench import Predicted, read_prediction

    manifest = None
    if isinstance(target, launch.Local):
        manifest, hosts = target.manifest, list(target.addresses)
    else:
        hosts = [rank.host.name for rank in target.ranks]
        with contextlib.suppress(errors.MoectlError):  # the copy on this machine may be gone
            manifest = read_manifest(Path(target.shards))
    if plan is not None:
        bits = manifest.quantization.bits if manifest and manifest.quantization else None
        return read_prediction(plan, manifest.placement if manifest else None, bits, prompt_tokens=prompt)
    if manifest is None:
        return None
    context = prompt + generated // 2
    found = probed_plan.recall(hosts, manifest.placement, manifest.quantization, context=context, prompt_tokens=prompt)
    if found is None:
        return None
    return Predicted(found.decode_tok_s, found.prefill_tok_s, found.ttft_s, found.communication_share)
