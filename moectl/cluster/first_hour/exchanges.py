"""Steps about exchanges between ranks: their time by backend and size, and gathering against the backend's sum."""

from __future__ import annotations

import math
from collections.abc import Sequence

from moectl.cluster.first_hour.stage import Stage, time_exchange
from moectl.cluster.first_hour.step import NOTHING, Data, HourStep, Judgement, milliseconds
from moectl.engine.exchange_times import ExchangeJob
from moectl.engine.network.exchange import GATHER_BELOW_BYTES
from moectl.errors import HostsError, MoectlError, Stalled
from moectl.planner.calibration import DEFAULT

BACKENDS = ("ring", "jaccl", "jaccl-ring")
TOKEN_BYTES = 12288  # one token's vector of DBRX in 16 bits
PROMPT_BYTES = 512 * TOKEN_BYTES
SIZES = (256, 4096, TOKEN_BYTES, 32768, 65536, 262144, 1 << 20, PROMPT_BYTES)
QUICK_SIZES = (256, TOKEN_BYTES, 65536)
GATHER_SIZES = (4096, TOKEN_BYTES, 32768, 65536, 131072, 262144, 1 << 20, PROMPT_BYTES)
QUICK_GATHER_SIZES = (TOKEN_BYTES, 65536)
TOLERANCE = 2.0


def alone(stage: Stage) -> str:
    """Return why nothing is exchanged here."""
    return "" if stage.size > 1 else "there is one rank only"


def measure_exchanges(stage: Stage) -> Data:
    """Return the seconds of the backend's sum by backend and bytes, and why a backend or a size has none."""
    found: Data = {"ranks": stage.size, "seconds": {}, "absent": {}, "broken": {}}
    for backend in BACKENDS:
        kind = backend.partition("-")[0]
        lacking = [str(rank) for rank, facts in enumerate(stage.facts) if kind not in facts.backends]
        if lacking:
            found["absent"][backend] = f"MLX has no {kind} on rank {', '.join(lacking)}"
            continue
        try:
            times, why = _time_sizes(stage, backend, QUICK_SIZES if stage.quick else SIZES, ("reduce",))
        except HostsError as error:
            found["absent"][backend] = error.message
            continue
        if times:
            found["seconds"][backend] = {size: ways["reduce"] for size, ways in times.items()}
        if why:
            found["broken"][backend] = why
        if stage.is_late:
            break
    return found


def _time_sizes(
    stage: Stage, backend: str, sizes: Sequence[int], ways: tuple[str, ...]
) -> tuple[dict[str, dict[str, float]], str]:
    """Return the seconds by bytes and way, and why it broke off; "" where it did not."""
    times: dict[str, dict[str, float]] = {}
    try:
        with stage.open_exchanges(backend) as session:
            for number, size in enumerate(sizes, 1):
                times[str(size)] = time_exchange(session, number, ExchangeJob(size, ways, stage.dtype))
    except HostsError:
        raise
    except MoectlError as error:
        return times, "it took too long" if stage.is_late else str(error)
    return times, ""


def judge_exchanges(data: Data) -> Judgement:
    """Compare the time of one token's vector with what plans assume."""
    more = max(0, data["ranks"] - 2)
    parts, slow = [], []
    for backend, times in data["seconds"].items():
        if str(TOKEN_BYTES) not in times:
            continue
        link = DEFAULT.links["10gbe" if backend == "ring" else "rdma"]
        seconds = times[str(TOKEN_BYTES)]
        parts.append(f"{backend} {milliseconds(seconds)}")
        if seconds > TOLERANCE * (link.latency_s + more * link.per_node_s):
            slow.append(backend)
    came = f"{', '.join(parts) or 'no backend gave a time'} for {TOKEN_BYTES} bytes"
    if data["broken"]:
        came += f"; broke off: {', '.join(f'{backend} ({why})' for backend, why in data['broken'].items())}"
    return Judgement(
        bool(parts) and not slow and not data["broken"],
        came,
        f"run 'moectl doctor': {' and '.join(slow)} may use a slow link" if slow else NOTHING,
        "put these times into the calibration",
    )


def measure_gather(stage: Stage) -> Data:
    """Return the seconds of both ways by bytes, over the backend that the workers use."""
    backend, sizes = stage.choose_backend(), QUICK_GATHER_SIZES if stage.quick else GATHER_SIZES
    times, why = _time_sizes(stage, backend, sizes, ("gather", "reduce"))
    if not times:
        raise Stalled(why)
    return {"ranks": stage.size, "backend": backend, "seconds": times, "broken": why}


def judge_gather(data: Data) -> Judgement:
    """Find up to which size gathering is faster, and compare with moectl's border."""
    sizes = sorted(map(int, data["seconds"]))

    def cost(border: int) -> float:
        ways = {size: "gather" if size <= border else "reduce" for size in sizes}
        return sum(math.log(max(data["seconds"][str(size)][way], 1e-9)) for size, way in ways.items())

    best = min((0, *sizes), key=cost)  # one size that is off by noise moves it little
    wanted = max((size for size in sizes if size <= GATHER_BELOW_BYTES), default=0)
    faster = f"gathering is faster up to {best} bytes" if best else "the backend's sum is faster at every size"
    came = f"{faster} ({data['backend']}, {data['ranks']} ranks)"
    if data["broken"]:
        came += f"; broke off after {sizes[-1]} bytes: {data['broken']}"
    border = f"set GATHER_BELOW_BYTES to {best} for {data['backend']} and {data['ranks']} ranks"
    return Judgement(best == wanted and not data["broken"], came, developers=NOTHING if best == wanted else border)


EXCHANGE = HourStep(
    "exchange",
    "How long does an exchange take, by backend and size?",
    300,
    f"{TOKEN_BYTES} bytes take on two ranks 0.020 to 0.031 ms over RDMA, 0.15 to 0.3 ms over TCP on Thunderbolt, 0.5 "
    "to 0.7 ms on 10 GbE; at most twice that",
    "the calibration 'default': published ranges; nothing was measured on a Mac",
    measure_exchanges,
    judge_exchanges,
    alone,
)
GATHER = HourStep(
    "gather",
    "Is gathering and adding up on each rank faster than the backend's sum?",
    180,
    f"gathering is faster up to {GATHER_BELOW_BYTES} bytes, the backend's sum above",
    "hops of the ring: N-1 against 2(N-1); JACCL's sum has one phase up to 32 KiB (mlx 0.32.4)",
    measure_gather,
    judge_gather,
    alone,
)
