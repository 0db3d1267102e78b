"""Measure what hosts do together: the links between them, and the speed of a model with the worker's own code.

`onhost.links` times TCP on the hosts, `engine.measure` times MLX. It takes some seconds, and every wait has a limit.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice

from moectl.engine.protocol import Done, RunOptions
from moectl.engine.request import Request
from moectl.errors import CommandFailed, MoectlError, Unreachable
from moectl.hosts.connect import map_at_once, run_at_once
from moectl.hosts.hardware import Hardware
from moectl.hosts.hostfile import Host
from moectl.hosts.onhost.prelude import parse_answer
from moectl.hosts.programs import end_process
from moectl.hosts.remote import Process, Remote, read_program
from moectl.planner.measured import Job, Matrix, Speed, read_speeds
from moectl.records import build
from moectl.session.session import RankSpec, Session

MEASURE = ("-m", "moectl.engine.measure")
LISTEN_S = 10.0
LINK_BUDGET_S = 0.4  # for the round trips of one pair, and half as much for its bandwidth
START_S = 60.0
SPEED_S = 120.0
PATIENCE = 6.0  # × a step's usual limit: no token tells of the weights that are made, and of ranks measured alone
MEMORY_PART = 0.10  # of what is free, for a measurement's weights
LEAST_MEMORY_BYTES = 1 << 28


@dataclass(frozen=True, slots=True)
class Site:
    """One host as a rank will use it: `python` is one that has moectl and mlx."""

    host: Host
    remote: Remote
    python: str
    addresses: tuple[str, ...]  # IPv4, for tensor traffic; the first one is measured
    env: Mapping[str, str] = field(default_factory=dict)  # of the worker


def memory_to_use(hardware: Sequence[Hardware]) -> int:
    """Return the bytes that a measurement's weights may take on every one of these hosts."""
    free = [h.memory_bytes - h.in_use_bytes for h in hardware if h.memory_bytes and h.in_use_bytes is not None]
    return max(LEAST_MEMORY_BYTES, int(MEMORY_PART * min(free, default=0)))


def measure_speed(
    sites: Sequence[Site],
    job: Job,
    *,
    backend: str = "ring",
    start_timeout_s: float = START_S,
    on_log: Callable[[str, str], None] = lambda host, line: None,
    on_made: Callable[[Session], None] = lambda session: None,
) -> tuple[Speed, ...]:
    """Run a job on all sites as one group, as workers run. Raises what a session raises.

    `on_made` gets the session before it starts: closing it ends the measurement.
    """
    ranks = [RankSpec(site.host, site.remote, (site.python, *MEASURE), "", site.addresses, site.env) for site in sites]
    limit_s = SPEED_S + len(job.placements) * 4 * job.budget_s
    options = RunOptions(start_timeout_s=start_timeout_s)
    made = Session(ranks, options, backend=backend, step_timeout_s=limit_s, patience=PATIENCE, on_log=on_log)
    on_made(made)
    with made as session:
        *_, done = session.generate(Request(1, job.to_json(), 1))
    assert isinstance(done, Done)
    return read_speeds(done.rest)


def is_next(here: int, there: int, count: int) -> bool:
    """Whether `there` is the rank that `here` dials in a ring of this many."""
    return there == (here + 1) % count


def choose_way(i: int, j: int, count: int, *, ring: bool) -> tuple[int, int]:
    """Return which of two sites (i < j) dials which: the later one, unless a ring does it the other way round."""
    return (i, j) if ring and count > 2 and is_next(i, j, count) else (j, i)


def measure_links(
    sites: Sequence[Site], *, ring: bool = False, budget_s: float = LINK_BUDGET_S
) -> tuple[Matrix, Matrix]:
    """Return (seconds per round trip, bytes per second from row to column) between all sites' first addresses.

    Pairs that share no host are measured at the same time. Raises Unreachable for a pair that is not connected. In a
    `ring` over TCP only neighbours need to be, each with the next: where every cable is a network of its own, no others
    are. A pair that is not connected gets the values of the slowest other pair.
    """
    count = len(sites)
    rtt = [[0.0] * count for _ in sites]
    bandwidth = [[0.0] * count for _ in sites]
    if count == 1:
        return ((0.0,),), ((0.0,),)
    secret = secrets.token_hex(16)
    with ExitStack() as held:
        ports = map_at_once(lambda site: held.enter_context(_listener(site, secret)), sites)
        lacking: list[tuple[int, int]] = []

        def dial(pair: tuple[int, int]) -> None:
            here, there = choose_way(*pair, count, ring=ring)
            try:
                found = _dial(sites[here], sites[there], ports[there], secret, budget_s)
            except Unreachable:
                if not ring or is_next(here, there, count):
                    raise
                lacking.append(pair)
                return
            rtt[here][there] = rtt[there][here] = found.rtt_s
            bandwidth[here][there], bandwidth[there][here] = found.out_bytes_s, found.in_bytes_s

        for pairs in plan_rounds(count):
            map_at_once(dial, pairs)
    for i, j in lacking:
        rtt[i][j] = rtt[j][i] = max(map(max, rtt))
        bandwidth[i][j] = bandwidth[j][i] = min(speed for row in bandwidth for speed in row if speed)
    return tuple(map(tuple, rtt)), tuple(map(tuple, bandwidth))


@dataclass(frozen=True, slots=True)
class Tried:
    """The result of a connection from one site (by its place) to another: seconds, bytes per second, or why not."""

    here: int
    there: int
    rtt_s: float | None = None
    out_bytes_s: float | None = None
    in_bytes_s: float | None = None
    why: str = ""
    errno: str = ""  # its name, "EHOSTUNREACH"


def try_links(
    sites: Sequence[Site],
    on_tried: Callable[[Tried], None],
    *,
    transfers: bool,
    ring: bool = False,
    budget_s: float = LINK_BUDGET_S,
) -> None:
    """Connect all sites with each other, both ways, and tell the result of each way; a failure raises nothing.

    One site of a pair (see `choose_way`) also times `transfers` in both directions. Pairs that share no host are tried
    at the same time.
    """
    secret = secrets.token_hex(16)
    with ExitStack() as held:

        def listen(site: Site) -> int | MoectlError:
            try:
                return held.enter_context(_listener(site, secret))
            except MoectlError as error:
                return error

        ports = map_at_once(listen, sites)

        def try_one(here: int, there: int, timed: bool) -> Tried:
            port = ports[there]
            if not isinstance(port, int):
                return Tried(here, there, why=f"{sites[there].host.name}: {port.message}")
            try:
                found = _ask_dialler(sites[here], sites[there], port, secret, budget_s, transfers=timed)
            except MoectlError as error:
                return Tried(here, there, why=error.message)
            if found.error:
                return Tried(here, there, why=found.error, errno=found.errno)
            return Tried(here, there, found.rtt_s, found.out_bytes_s or None, found.in_bytes_s or None)

        def try_both(pair: tuple[int, int]) -> None:
            here, there = choose_way(*pair, len(sites), ring=ring)
            ways = [(here, there, transfers), (there, here, False)]
            # A way that fails takes its time: wait for both at once, unless one would slow the other's transfers.
            for some in [[way] for way in ways] if transfers else [ways]:
                map_at_once(lambda way: on_tried(try_one(*way)), some)

        for pairs in plan_rounds(len(sites)):
            map_at_once(try_both, pairs)


def plan_rounds(count: int) -> list[list[tuple[int, int]]]:
    """Return rounds of pairs (i < j), every pair once, as in a tournament: no place is twice in a round."""
    places: list[int | None] = [*range(count), *([None] if count % 2 else [])]
    half = len(places) // 2
    rounds = []
    for _ in range(len(places) - 1):
        faced = zip(places[:half], reversed(places[half:]), strict=True)
        rounds.append([(min(a, b), max(a, b)) for a, b in faced if a is not None and b is not None])
        places.insert(1, places.pop())
    return rounds


@contextmanager
def _listener(site: Site, secret: str) -> Iterator[int]:
    """Run the listening end on a host's address; yields its port."""
    process = site.remote.start([site.python, "-c", read_program("links"), "listen"])
    try:
        request = {"address": site.addresses[0], "secret": secret, "limit_s": 120.0}
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
        yield _read_answer(site, process).port
    except OSError:
        raise CommandFailed("its python ended before it listened", host=site.remote.name) from None
    finally:
        end_process(process, LISTEN_S)


@dataclass(frozen=True, slots=True)
class _Answer:
    """What `onhost.links` tells."""

    port: int = 0
    rtt_s: float = 0.0
    out_bytes_s: float = 0.0
    in_bytes_s: float = 0.0
    error: str = ""
    errno: str = ""


def _read_answer(site: Site, process: Process) -> _Answer:
    """Return a running process's answer, within `LISTEN_S`."""
    found: list[_Answer] = []
    answers = (answer for line in process.stdout if (answer := _parse(line)))
    run_at_once([lambda: found.extend(islice(answers, 1))], LISTEN_S)
    if not found:
        raise CommandFailed(f"its python did not listen on {site.addresses[0]}", host=site.remote.name)
    if found[0].error:
        raise CommandFailed(
            f"cannot listen on {site.addresses[0]}: {found[0].error}",
            host=site.remote.name,
            hint="give this host's own address with ip=",
        )
    return found[0]


def _dial(here: Site, there: Site, port: int, secret: str, budget_s: float) -> _Answer:
    answer = _ask_dialler(here, there, port, secret, budget_s)
    if answer.error or min(answer.out_bytes_s, answer.in_bytes_s) <= 0:
        raise Unreachable(
            f"no TCP connection to {there.host.name} at {there.addresses[0]}: {answer.error or 'no data arrived'}",
            host=here.host.name,
            hint="check ip= of both hosts, the cable and any firewall",
        )
    return answer


def _ask_dialler(
    here: Site, there: Site, port: int, secret: str, budget_s: float, *, transfers: bool = True
) -> _Answer:
    """Run the end that connects; a host that says nothing answers with the error "no answer"."""
    limit_s = LISTEN_S + 2 * budget_s
    request = {"address": there.addresses[0], "port": port, "secret": secret, "budget_s": budget_s, "limit_s": limit_s}
    done = here.remote.run(
        [here.python, "-c", read_program("links"), "dial"],
        stdin=json.dumps({**request, "transfers": transfers}).encode() + b"\n",
        timeout_s=limit_s + LISTEN_S,
        check=False,
        hold_stdin=True,
    )
    lines = done.stdout.split(b"\n")
    return next((answer for line in lines if (answer := _parse(line))), _Answer(error="no answer"))


def _parse(line: bytes) -> _Answer | None:
    answer = parse_answer(line)
    try:
        return None if answer is None else build(_Answer, answer)
    except ValueError:
        return None
