"""Let ranks on a CPU go the ways that they go on a Mac: modes for tests, and a worker in them.

`MOECTL_TEST_METAL` in a rank's environment holds the modes as JSON. `python -m tests.support.metal serve …` is moectl
with local ranks that obey it, and `lockstep_rank` obeys it, too. moectl itself does not read the variable.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

VARIABLE = "MOECTL_TEST_METAL"
WORKER = ("-m", "tests.support.metal", "moectl", "worker")  # words of a python; told from others by the last two
TIMED_OUT = 134  # SIGABRT's, as an error in a command buffer ends a process
TICK_S = 0.05
_ERROR = (
    "[METAL] Command buffer execution failed: Caused GPU Timeout Error "
    "(00000002:kIOGPUCommandBufferCallbackErrorTimeout)"
)


@dataclass(frozen=True)
class Modes:
    """What a rank does as on a Mac.

    `gpu`: sorted gathers by MLX, bfloat16 where no other type is asked for, nothing in numpy. `streams`: it computes on
    a CPU stream of its own, and collectives run on the default one. `watch_s`: it is ended as the GPU's watchdog would
    do it when the stream that computes has waited for so long; with `streams` only. `delays` are seconds by place
    (load, read, chunk, step) and rank, before the first time there. `trace` is a file to which each rank appends
    "RANK loaded", "RANK exchange" and "RANK timed out". `left_out` are protections to leave out: check, meet, alone.
    """

    gpu: bool = False
    streams: bool = False
    watch_s: float = 0.0
    delays: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    trace: str | None = None
    left_out: tuple[str, ...] = ()

    def env(self) -> dict[str, str]:
        """Return the variable that tells them to a rank."""
        return {VARIABLE: json.dumps(asdict(self))}


def install() -> None:
    """Go into the modes of this process's environment, before its model is made."""
    if VARIABLE not in os.environ:
        return
    modes = Modes(**json.loads(os.environ[VARIABLE]))
    if modes.gpu:
        _compute_as_on_gpu()
    if modes.streams:
        stream = _part_streams()
        if modes.watch_s:
            _watch(stream, modes.watch_s, modes.trace)
    _delay(modes.delays)
    _leave_out(modes.left_out)
    if modes.trace is not None:
        _trace(partial(_note, modes.trace))


def _compute_as_on_gpu() -> None:
    import mlx.core as mx

    from moectl.engine.network import experts

    experts.computes_on_gpu = lambda: True
    gather_mm = mx.gather_mm

    def gather(a: Any, b: Any, *args: Any, **kwargs: Any) -> Any:
        """MLX's CPU knows float32 only here, its GPU all types."""
        return gather_mm(a.astype(mx.float32), b.astype(mx.float32), *args, **kwargs).astype(a.dtype)

    mx.gather_mm = gather


def _part_streams() -> Any:
    """Compute on a new stream from now on, and leave the default one to collectives; return the new one."""
    import mlx.core as mx

    from moectl.engine.network import exchange

    theirs, ours = mx.default_stream(mx.cpu), mx.new_thread_unsafe_stream(mx.cpu)
    mx.set_default_stream(ours)
    importlib.import_module("mlx_lm.generate").generation_stream = ours  # type: ignore[attr-defined]
    for name in ("all_gather", "all_sum", "send", "recv"):
        setattr(mx.distributed, name, partial(getattr(mx.distributed, name), stream=theirs))
    exchange._backend_sum = mx.distributed.all_sum
    return ours


def _watch(stream: Any, limit_s: float, trace: str | None) -> None:
    """End this process when the stream has not got to new work for so long: an exchange holds it up.

    Counted in ticks of a thread: where the whole machine is short of time, that thread is, too.
    """
    import mlx.core as mx

    passed = 0

    def probe() -> None:
        nonlocal passed
        while True:
            mx.synchronize(stream)
            passed += 1
            time.sleep(TICK_S)

    def watch() -> None:
        seen, ticks = passed, 0
        while ticks * TICK_S < limit_s:
            time.sleep(TICK_S)
            seen, ticks = (passed, 0) if passed != seen else (seen, ticks + 1)
        if trace is not None:
            _note(trace, "timed out")
        os.write(2, f"{_ERROR}\n".encode())
        os._exit(TIMED_OUT)

    for target in (probe, watch):
        threading.Thread(target=target, daemon=True).start()


def _delay(delays: Mapping[str, Mapping[str, float]]) -> None:
    from moectl.engine.answer import Answer
    from moectl.engine.network import load

    generate: Any = importlib.import_module("mlx_lm.generate")  # a function has the name in the package
    places = {
        "load": (load, "load_rank"),
        "read": (Answer, "read"),
        "chunk": (generate.PromptProcessingBatch, "prompt"),
        "step": (generate.GenerationBatch, "_step"),
    }
    for place, by_rank in delays.items():
        left = dict(by_rank)
        _before(*places[place], lambda *_, left=left: time.sleep(left.pop(_rank(), 0.0)))


def _leave_out(protections: tuple[str, ...]) -> None:
    from moectl.engine.agreement import Agreement
    from moectl.engine.controller_link import ControllerLink
    from moectl.engine.network import exchange
    from moectl.engine.protocol import Check

    take = ControllerLink.take
    if "check" in protections:
        ControllerLink.take = lambda self, kind: None if kind is Check else take(self, kind)  # type: ignore[method-assign]
    if "meet" in protections:
        Agreement.meet = lambda self, stream: None  # type: ignore[method-assign]
    if "alone" in protections:
        exchange.run_alone = lambda exchange, x: exchange(x)


def _note(file: str, what: str) -> None:
    """Append what this rank does, in one write, so that the order of lines is that in time."""
    with Path(file).open("a") as lines:
        lines.write(f"{_rank()} {what}\n")


def _trace(note: Callable[[str], None]) -> None:
    import mlx.core as mx

    from moectl.engine.controller_link import ControllerLink
    from moectl.engine.protocol import Loaded

    _before(ControllerLink, "tell", lambda _, event: note("loaded") if isinstance(event, Loaded) else None)
    for name in ("all_gather", "send", "recv"):
        _before(mx.distributed, name, lambda *_, **__: note("exchange"))


def _before(owner: Any, name: str, act: Callable[..., None]) -> None:
    """Let a function do something before it is what it was."""
    real = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        act(*args)
        return real(*args, **kwargs)

    setattr(owner, name, call)


def _rank() -> str:
    return os.environ.get("MLX_RANK", "0")


def _main() -> None:
    """Be a worker in these modes, or moectl whose workers are."""
    if sys.argv[1:] == ["moectl", "worker"]:
        from moectl.engine import worker

        install()
        worker.main()
    else:
        from moectl.__main__ import main
        from moectl.session import target

        target.WORKER = WORKER  # type: ignore[assignment]
        main()


if __name__ == "__main__":
    _main()
