"""Connections between hosts: TCP from the worker's python, how fast it is, and an all-reduce between two neighbours.

It judges what `probe` tried. Hosts that could not be looked at are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Address
from itertools import combinations

from moectl.cluster import probe
from moectl.cluster.doctor import errnos
from moectl.cluster.doctor.finding import Finding, fail, ok, skip, warn
from moectl.cluster.probe import Site, Tried
from moectl.errors import HostsError, HostUnfit, MoectlError
from moectl.hosts.thunderbolt import Interface
from moectl.model.placement import make_placement
from moectl.model.regions import Pieces, Role
from moectl.model.structure import Layer, Part, Structure
from moectl.planner.measured import Job
from moectl.session.backend import choose_backend

COLLECTIVE_START_S = 45.0
BUDGET_S = 1.0  # a busy machine needs a second for what takes an idle one some milliseconds
SLOW_PART = 1 / 3  # of the best pair's bandwidth
SLOW_RTT_S = 3e-3  # a switch adds less than 1 ms; Wi-Fi adds more than this
SLOW_BYTES_S = 50e6  # half a gigabit link
# A sum of 1 kB, since the latency is what counts; all else is as small as the model's rules allow.
_WIDTH, _HIDDEN, _VOCABULARY = 256, 128, 512
_CONFIG = {
    "model_type": "llama",
    "hidden_size": _WIDTH,
    "intermediate_size": _HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": _VOCABULARY,
    "rms_norm_eps": 1e-5,
}
_LAYER = Layer((Part(3 * _WIDTH * _HIDDEN, hidden=Pieces(Role.HIDDEN, _HIDDEN)),))
_STRUCTURE = Structure("llama", (_LAYER,), (0, 0), (), _WIDTH, _VOCABULARY, 2048)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two hosts, by their places in the list (a < b)."""

    a: int
    b: int


def judge_links(
    sites: Sequence[Site],
    tried: Sequence[Tried],
    *,
    mac: Callable[[int], bool],
    needed: Callable[[int, int], bool] = lambda here, there: True,
) -> dict[Pair, list[Finding]]:
    """Return the findings of each pair of sites; a way that is not among `tried` did not answer in time.

    `needed` says which ways there have to be: in a ring over cables of their own there are no others.
    """
    told = {(way.here, way.there): way for way in tried}
    best = max((min(way.out_bytes_s, way.in_bytes_s or 0.0) for way in tried if way.out_bytes_s), default=0.0)
    found = {}
    for a, b in combinations(range(len(sites)), 2):
        ways = [told.get(ends, Tried(*ends, why="no answer in time")) for ends in ((b, a), (a, b))]
        broken = [_judge_broken(sites, w, mac(w.here)) for w in ways if w.why and needed(w.here, w.there)]
        good = sorted((way for way in ways if not way.why), key=lambda way: way.out_bytes_s is None)
        if not broken and not good:
            broken = [skip("tcp", "not connected: they are not neighbours, and a ring needs no more")]
        found[Pair(a, b)] = broken or [_judge_speed(good[0], best)]
    return found


def face(site: Site, interfaces: Sequence[Interface], peer: Site) -> Site:
    """Return a site with the address that is in the same network as its peer's, where it has one."""
    theirs = [IPv4Address(ip) for ip in peer.addresses]
    near = [str(own.ip) for i in interfaces for own in i.ipv4 if any(ip in own.network for ip in theirs)]
    return replace(site, addresses=(near[0],)) if near and not {*near} & {*site.addresses} else site


def _judge_broken(sites: Sequence[Site], way: Tried, macos: bool) -> Finding:
    here, there = sites[way.here], sites[way.there]
    meaning = errnos.explain(way.errno, macos=macos, local=here.host.is_local)
    why = f"{way.why}{f' ({meaning.why})' if meaning else ''}"
    text = f"{here.host.name} cannot connect to {there.host.name} at {there.addresses[0]}: {why}"
    fix = meaning.fix if meaning else "check ip= of both hosts, the cable and any firewall"
    return fail("tcp", text, fix, errno=way.errno or None)


def _judge_speed(way: Tried, best: float) -> Finding:
    rtt_s = way.rtt_s or 0.0
    values = {"rtt_s": rtt_s, "out_bytes_s": way.out_bytes_s, "in_bytes_s": way.in_bytes_s}
    if way.out_bytes_s is None or way.in_bytes_s is None:
        text = f"{1e3 * rtt_s:.2f} ms"
    else:
        bytes_s = min(way.out_bytes_s, way.in_bytes_s)
        text = f"{8e-9 * bytes_s:.{1 if bytes_s > 125e6 else 2}f} Gb/s {1e3 * rtt_s:.2f} ms"
        if bytes_s < max(SLOW_BYTES_S, SLOW_PART * best):
            return warn("tcp", f"{text}: slow", "cable or switch port; ip= may name a slower interface", **values)
    if rtt_s > SLOW_RTT_S:
        return warn(
            "tcp", f"{text}: slow round trips", "is this Wi-Fi, or a VPN? Name a cable's address with ip=", **values
        )
    return ok("tcp", text, **values)


def plan_neighbours(count: int) -> list[list[Pair]]:
    """Return rounds of neighbours in rank order, also the last with the first; no host is twice in a round."""
    pairs = [Pair(i, i + 1) for i in range(count - 1)] + ([Pair(0, count - 1)] if count > 2 else [])
    rounds: list[list[Pair]] = []
    for pair in pairs:
        for some in rounds:
            if not {pair.a, pair.b} & {end for other in some for end in (other.a, other.b)}:
                some.append(pair)
                break
        else:
            rounds.append([pair])
    return rounds


def try_collective(sites: Sequence[Site], ranks: Sequence[int], backend: str, *, macos: bool) -> Finding:
    """Run an all-reduce over two hosts as workers would; `ranks` are their places in rdma= rows."""
    pair = [
        replace(site, host=replace(site.host, rdma=_pair_devices(site, ranks, place)))
        for place, site in enumerate(sites)
    ]
    job = Job((make_placement(_STRUCTURE, "hidden", 2),), _CONFIG, None, 1 << 28, 16, BUDGET_S)
    try:
        chosen = choose_backend(backend, [site.host for site in pair])
        [speed] = probe.measure_speed(pair, job, backend=chosen, start_timeout_s=COLLECTIVE_START_S)
    except HostsError as error:
        return fail("collective", error.message, error.hint)
    except MoectlError as error:
        if isinstance(error, HostUnfit):
            return fail("collective", f"two ranks cannot work together: {error}", error.hint)
        name = errnos.find_error(error.message, macos=macos)
        meaning = errnos.explain(name, macos=macos) if name else None
        why = f" ({meaning.why})" if meaning else ""
        return fail(
            "collective", f"two ranks cannot work together: {error}{why}", meaning.fix if meaning else error.hint
        )
    size, seconds = min(speed.collective_s.items())
    text = f"all-reduce over two ranks {1e6 * seconds:.0f} µs ({size} bytes, {chosen})"
    return ok("collective", text, collective_s=seconds, bytes=size, backend=chosen)


def _pair_devices(site: Site, ranks: Sequence[int], place: int) -> tuple[str | None, ...]:
    """Return the row of rdma= that is left when there are these two hosts only."""
    rdma = site.host.rdma
    if len(rdma) <= max(ranks):
        return ()
    return tuple(None if other == place else rdma[rank] for other, rank in enumerate(ranks))
