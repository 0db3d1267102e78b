"""Steps with the target's own workers: a rank that loads late, and the first token after idle minutes."""

from __future__ import annotations

import statistics
import time

from moectl.cluster.first_hour.exchanges import alone
from moectl.cluster.first_hour.stage import Stage, answer
from moectl.cluster.first_hour.step import NOTHING, Data, HourStep, Judgement, milliseconds
from moectl.errors import MoectlError
from moectl.text import size_text, time_text

LOAD_DELAY_S = 10.0  # twice the GPU's limit
IDLE_S = 300.0
_WARM = 4  # answers before the idle time; the first one warms up
SLOWER = 2.0  # than a warm first token, and
SLOWER_S = 0.1  # so much more
LITTLE_BYTES = 4e9  # of weights on a rank: macOS may leave fewer alone


def measure_skew(stage: Stage) -> Data:
    """Let the last rank load later than the others, and ask for an answer."""
    delay_s = stage.scale(LOAD_DELAY_S)
    begin = time.monotonic()
    found: Data = {"ranks": stage.size, "delay_s": delay_s, "survived": False}
    try:
        with stage.open_workers(load_delays_s=(0.0,) * (stage.size - 1) + (delay_s,)) as session:
            found["ready_s"] = time.monotonic() - begin
            found["first_token_s"] = answer(session, 1).ttft_s
        found["survived"] = True
    except MoectlError as error:
        if stage.is_late:
            raise
        found |= {"error": str(error), "kind": type(error).__name__}
    return found


def judge_skew(data: Data) -> Judgement:
    """Say whether the ranks that waited are still there."""
    late = f"{data['delay_s']:.3g} s"
    if data["survived"]:
        return Judgement(True, f"all ranks answer although one loaded {late} later")
    return Judgement(
        False,
        f"a load that took {late} longer ended the start: {data['error']}",
        "start again: the second time files come from memory and all ranks load alike",
        "a rank waits for another one's load inside a command buffer: see which exchange comes before Check",
    )


def measure_idle(stage: Stage) -> Data:
    """Time the first token of some answers, let the model rest, and time it again."""
    idle_s = stage.scale(IDLE_S)
    with stage.open_workers() as session:
        warm = [answer(session, number).ttft_s for number in range(1, _WARM + 1)][1:]
        stage.wait(idle_s)
        cold_s, again_s = (answer(session, number).ttft_s for number in range(_WARM + 1, _WARM + 3))
        held = list(session.memory_bytes)
    return {
        "ranks": stage.size,
        "idle_s": idle_s,
        "warm_s": statistics.median(warm),
        "after_idle_s": cold_s,
        "again_s": again_s,
        "held_bytes": held,
    }


def judge_idle(data: Data) -> Judgement:
    """Compare the first token after the rest with a warm one."""
    warm_s, cold_s = data["warm_s"], data["after_idle_s"]
    came = f"{milliseconds(cold_s)} after {time_text(data['idle_s'])} of rest, {milliseconds(warm_s)} warm"
    held = max(data["held_bytes"])
    if held < LITTLE_BYTES:
        came += f" (only {size_text(held)} of weights on a rank)"
    if cold_s <= SLOWER * warm_s + SLOWER_S:
        small = "deploy the model that you want to use and run this again" if held < LITTLE_BYTES else NOTHING
        return Judgement(True, came, small)
    return Judgement(
        False,
        came,
        "the first answer after a pause is slow; a short question every minute keeps the model ready",
        "macOS unwires idle weights although MLX_METAL_RESIDENCY_REFRESH_INTERVAL_MS is set: see what is set there",
    )


SKEW = HourStep(
    "load skew",
    f"Do all ranks survive that one loads {LOAD_DELAY_S:g} s later?",
    600,
    "all do: none waits on the GPU for another one's load; a command buffer that waits about 5 s is killed",
    "mlx-examples#1200, mlx#3830, exo#1620: reported by others",
    measure_skew,
    judge_skew,
    alone,
)
IDLE = HourStep(
    "idle",
    f"How long does the first token take after {IDLE_S / 60:g} idle minutes?",
    720,
    f"it takes at most {SLOWER:g} times a warm first token and {SLOWER_S:g} s",
    "llama.cpp#10119, #17766: macOS 26 unwires idle weights after about 1 s; mlx-metal 0.32.4 can refresh them",
    measure_idle,
    judge_idle,
)
