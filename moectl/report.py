"""Results as text for people and as JSON documents for scripts. It computes and prints nothing.

JSON: sizes in bytes, times in seconds, snake_case; fields may be added, never renamed.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from moectl.console import size_text, table_text, time_text

if TYPE_CHECKING:
    from moectl.cluster import DeployResult
    from moectl.leash import Done
    from moectl.prepare import Made
    from moectl.provision import HostResult
    from moectl.request import Stats


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
