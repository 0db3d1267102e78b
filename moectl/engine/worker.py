"""The process on a host, one per rank: a link to the controller (stdin and stdout) and a part of the model.

It opens no port but those for tensor traffic and writes no file but its log. End of file, silence, or any error ends
the process, within the time that `ending` says: after a broken exchange a call into the backend may never return.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moectl import errors
from moectl.engine.backend_errors import explain_backend
from moectl.engine.controller_link import ControllerLink
from moectl.engine.ending import LinkEnded, end_with_link, exit_now, limit_end
from moectl.engine.environment import keep_awake, prepare_environment
from moectl.engine.gpu_memory import keeps_memory, limit_memory, release, settle, working_set_bytes
from moectl.engine.group import open_group
from moectl.engine.isolation import isolated
from moectl.engine.protocol import (
    LINK_LOST,
    PREFILL_STEP,
    Check,
    Done,
    Event,
    Fatal,
    Load,
    Loaded,
    Prefilled,
    Ready,
    Refused,
    Start,
    Token,
)
from moectl.errors import MoectlError, to_json
from moectl.hosts.onhost.workers import mark_running
from moectl.shards.source.hub_environment import HUB_VARIABLES

if TYPE_CHECKING:
    from moectl.engine.engine import Engine
    from moectl.model.manifest import Manifest

_FORMAT = logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%dT%H:%M:%S%z")
_log = logging.getLogger("moectl.worker")


def main() -> None:
    """Serve the controller on stdin and stdout until it is done or gone; always ends the process."""
    run(_serve)


def run(serve: Callable[[ControllerLink], None]) -> None:
    """Give `serve` the link on stdin and stdout, tell the controller how it failed, and end the process."""
    os.umask(0o077)  # its log and the backend's files are for its user alone
    # Libraries may print, which would break the protocol: the link gets the real stdout, they get the log.
    up = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    _log.setLevel(logging.INFO)
    console = logging.StreamHandler(sys.stderr)
    console.setFormatter(_FORMAT)
    _log.addHandler(console)
    logging.raiseExceptions = False  # a log that cannot be written is no failure
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the controller handles Ctrl-C: it cancels, then ends the link
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ["HF_HUB_OFFLINE"] = "1"  # a worker reads its shard set and nothing else
    for name in HUB_VARIABLES:  # huggingface_hub is imported, and fails at some values
        os.environ.pop(name, None)
    for name in prepare_environment(os.environ):
        _log.warning("the variable %s is not used: moectl sets what the ranks need", name)
    keep_awake()
    link = ControllerLink(sys.stdin.buffer, up, on_end=end_with_link)
    try:
        serve(link)
        reason, code = "done", 0
    except LinkEnded as end:
        limit_end()
        settle()
        reason, code = str(end), LINK_LOST
    except BaseException as error:  # tell any failure, and end before anything can hang
        if not isinstance(error, MoectlError):
            _log.exception("unexpected")
        link.tell(describe_failure(error))
        reason, code = str(error), 1
        limit_end()
        if not keeps_memory():
            exit_now(reason, code=code)
    release()  # not before: the frames that hold the model go with the exception
    exit_now(reason, code=code)


def describe_failure(error: BaseException) -> Fatal:
    """Return what the controller is told of an error that ends a worker."""
    if isinstance(error, MoectlError):
        guilty = error.rank if isinstance(error, errors.RanksDisagree) else None
        return Fatal(to_json(error), guilty)
    if isinstance(error, RuntimeError) and (known := explain_backend(str(error))) is not None:
        return Fatal(to_json(known))
    return Fatal(to_json(MoectlError(f"unexpected {type(error).__name__}: {error}")))


def _serve(link: ControllerLink) -> None:
    start: Start = link.take(Start)
    if start.log:
        _log_to(Path(start.log).expanduser())
    _log.info("rank %d of %d starts on %s", start.rank, start.world_size, start.shards)
    from moectl.engine.prefill_step import choose_prefill_step, own_chip
    from moectl.model.manifest import read_manifest, refuse_links_outside
    from moectl.planner.this_machine import check_own_memory, count_kv_tokens

    directory = Path(start.shards).expanduser()
    manifest = read_manifest(directory)
    refuse_links_outside(directory)  # the tokenizer is read from there too
    if manifest.world_size != start.world_size:
        raise errors.NotDeployed(
            f"{directory} is cut for {manifest.world_size} ranks, not {start.world_size}", hint="moectl deploy"
        )
    _check_wishes(start, manifest)
    if sys.platform != "darwin" and not start.run.force:  # before any rank here has taken memory
        check_own_memory(manifest, start.rank, ranks_here=start.ranks_here)
    group = open_group(
        link,
        start,
        kv_tokens=count_kv_tokens(manifest, start.rank, ranks_here=start.ranks_here),
        split=manifest.placement.split,
        prefill_step=choose_prefill_step(manifest.placement, own_chip()),
    )
    load: Load = link.take(Load)
    gpu = working_set_bytes()  # imports mlx: not before the group's environment is set
    if gpu is not None and not start.run.force:
        check_own_memory(manifest, start.rank, ranks_here=start.ranks_here, working_set_bytes=gpu)
    from moectl.engine.network.exchange import seam

    with seam():
        _run(link, start, load, manifest, group)


def _check_wishes(start: Start, manifest: Manifest) -> None:
    """Raise UsageError for what this model or this split cannot do."""
    if start.run.paranoia and manifest.placement.split == "layers":
        raise errors.UsageError(
            "--paranoia compares what all ranks compute, and with --split layers each computes its own layers",
            hint="leave it out: the canary at the start checks them",
        )
    if start.run.speculate and not manifest.structure.can_trim:
        raise errors.UsageError(
            f"--speculate takes wrong tokens back, and what a {manifest.structure.model_type} model keeps of earlier"
            " tokens cannot be taken back",
            hint="leave --speculate out",
        )


def _run(link: ControllerLink, start: Start, load: Load, manifest: Manifest, group: Any) -> None:
    """Load this rank's part, check it, and answer until the controller is done."""
    import mlx.core as mx

    begin, directory, structure = time.perf_counter(), Path(start.shards).expanduser(), manifest.structure
    from moectl.engine.caches import count_row_tokens
    from moectl.engine.engine import Engine
    from moectl.engine.network.load import load_rank
    from moectl.planner.this_machine import CONTEXT, need_of_tokens, own_dtype_bytes
    from moectl.shards.chat.tokenizer import open_tokenizer
    from moectl.shards.source.checkpoint import read_sampling
    from moectl.shards.verified import check_files

    if start.run.load_delays_s:
        _log.info("loads %g s late, as asked", start.run.load_delays_s[start.rank])
        time.sleep(start.run.load_delays_s[start.rank])
    link.memory_bytes = mx.get_active_memory  # from here on, so that who waits for the model sees how far it is
    check_files(directory, manifest, start.rank)  # in the phase that may take long: some files may have to be hashed
    dtype = getattr(mx, start.run.dtype) if start.run.dtype else None
    model = load_rank(directory, manifest, start.rank, group, dtype=dtype)
    if start.run.agree_routing:
        from moectl.engine.network.routing import follow_first_rank
        from moectl.shards.look.skeleton import make_skeleton

        follow_first_rank(model, make_skeleton(manifest.config), group)
    tokenizer = open_tokenizer(directory)
    engine = Engine(
        model,
        tokenizer,
        rank=start.rank,
        head_rank=manifest.placement.head_rank,
        placement=manifest.placement,
        group=group,
        vocab_size=structure.vocab_size,
        max_seq_len=structure.context,
        prefill_step=start.run.prefill_step or load.prefill_step or PREFILL_STEP,
        kv_tokens=load.kv_tokens,
        cache_tokens=start.run.cache_tokens,
        speculate=start.run.speculate,
        check_every=start.run.paranoia,
        trimmable=structure.can_trim,
        batchable=structure.can_batch,
        row_tokens=count_row_tokens(structure),
    )
    tokens = load.kv_tokens or CONTEXT
    limit_memory(need_of_tokens(manifest, start.rank, tokens, own_dtype_bytes()), ranks_here=start.ranks_here)
    _log.info("loaded in %.1f s, %.1f GB in use", time.perf_counter() - begin, mx.get_active_memory() / 1e9)
    bits = manifest.quantization.bits if manifest.quantization else None
    ready = Ready(
        manifest.placement.split,
        bits,
        structure.vocab_size,
        structure.context,
        structure.top_k,
        sampling=read_sampling(directory),
        tools=tokenizer.tells_tools,
        thinks=tokenizer.thinks,
    )
    link.tell(Loaded())
    link.take(Check)  # no exchange before it: other ranks may still load
    link.tell(_check_results(ready, model, manifest, start))
    for event in engine.serve(link.orders):
        if isinstance(event, Done):
            _log.info("request %d: %s after %d tokens", event.id, event.finish_reason, event.stats.completion_tokens)
        _tell(link, engine, event)


def _tell(link: ControllerLink, engine: Engine, event: Event) -> None:
    """Send an event; an answer whose event cannot be encoded ends with an error."""
    if not isinstance(event, Prefilled | Token | Done | Refused):
        link.tell(event)
        return
    failures: list[MoectlError] = []
    with isolated(event.id, failures.append):
        link.tell(event)
    for error in failures:
        engine.fail(event.id)
        link.tell(Refused.make(event.id, error))


def _check_results(ready: Ready, model: Any, manifest: Manifest, start: Start) -> Ready:
    """Return `ready` with the result of the canary, where there is one."""
    if manifest.canary is None or not start.run.canary:
        return ready
    from moectl.engine.network.canary_check import check

    found = check(model, manifest.canary, manifest.placement, rank=start.rank)
    _log.info("canary: off by %.2g at most", found.verdict.worst)
    return replace(
        ready,
        checked=True,
        deviation=min(found.verdict.worst, sys.float_info.max),  # JSON has no infinity
        wrong_at=found.verdict.wrong_at,
        token_s=found.token_s,
        step_s=found.step_s,
    )


def _log_to(path: Path) -> None:
    """Keep a copy of the log on this host, two files of 1 MB at most; without one if it cannot be written."""
    from logging.handlers import RotatingFileHandler

    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handler = RotatingFileHandler(path, maxBytes=1_000_000, backupCount=1, encoding="utf-8")
    except OSError as error:
        _log.warning("no log file: %s", error)
        return
    handler.setFormatter(_FORMAT)
    _log.addHandler(handler)
    mark_running(str(path))
