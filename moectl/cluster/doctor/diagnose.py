"""The order of `doctor`: all hosts at once, then hosts beside each other, then the connections between them.

It decides what is looked at, and when to stop waiting: what does not answer in time is a failure, not a hang. Nothing
is changed anywhere. `host`, `compare` and `pairs` judge what is seen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from moectl.cluster.deploy.deploy import wanted_versions
from moectl.cluster.deploy.wheel import hash_code
from moectl.cluster.doctor.compare import check_cluster
from moectl.cluster.doctor.finding import Finding, Level, at_host, fail, skip, worst
from moectl.cluster.doctor.host import Expected, Visit, visit_host
from moectl.cluster.doctor.pairs import Pair, face, judge_links, plan_neighbours, try_collective
from moectl.cluster.probe import Site, Tried, is_next, try_links
from moectl.errors import HostsError, MoectlError, VersionMismatch, unexpected
from moectl.hosts.connect import make_remote, run_at_once
from moectl.hosts.hostfile import Host, HostList
from moectl.hosts.thunderbolt import parse_ifconfig
from moectl.model.manifest import Manifest, read_manifest
from moectl.session.backend import choose_backend
from moectl.session.deployment import Deployment, find_deployment
from moectl.session.target import find_addresses, split_envs
from moectl.shards.prepare import newest_shards

HOST_S = 90.0  # for all checks of a host; each check has its own limit
LINKS_S = 60.0  # for all pairs, and MORE_LINKS_S for each host: broken connections wait for one another
MORE_LINKS_S = 10.0
COLLECTIVE_S = 90.0  # for one round of neighbours
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class HostReport:
    """The findings about one host."""

    host: Host
    rank: int
    findings: tuple[Finding, ...]


@dataclass(frozen=True, slots=True)
class PairReport:
    """The findings about the connection between two hosts."""

    a: Host
    b: Host
    findings: tuple[Finding, ...]


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All findings."""

    source: str  # where the list of hosts came from
    hosts: tuple[HostReport, ...]
    pairs: tuple[PairReport, ...] = ()
    cluster: tuple[Finding, ...] = ()

    @property
    def findings(self) -> tuple[Finding, ...]:
        lists = [*(host.findings for host in self.hosts), *(pair.findings for pair in self.pairs), self.cluster]
        return tuple(finding for findings in lists for finding in findings)

    def count(self, level: Level) -> int:
        return sum(finding.level is level for finding in self.findings)


@dataclass(slots=True)
class _Found:
    """Findings of pairs and of the cluster, as they come."""

    pairs: dict[Pair, list[Finding]] = field(default_factory=dict)
    cluster: list[Finding] = field(default_factory=list)


def choose_hosts(listed: HostList | None) -> tuple[HostList, Deployment | None]:
    """Return the hosts to check, and the deployment that they are of.

    The list in force, else the deployed hosts, else this machine alone. Raises StateError for a damaged record.
    """
    deployed = find_deployment()
    if listed is None:
        if deployed is None:
            return HostList((Host("localhost"),), source="this machine"), None
        hosts = tuple(rank.host for rank in deployed.ranks)
        return HostList(hosts, deployed.backend, deployed.envs, source="the current deployment"), deployed
    if deployed is None or [r.host.address for r in deployed.ranks] != [h.address for h in listed.hosts]:
        return listed, None
    return listed, deployed


def diagnose(
    where: HostList, deployed: Deployment | None, *, fast: bool = False, say: Say = lambda text: None
) -> Diagnosis:
    """Check every host, all hosts beside each other, and every pair; `fast` times no transfers and sums nothing."""
    expected = expect(where, deployed)
    visits = [Visit(host, rank, make_remote(host)) for rank, host in enumerate(where.hosts)]
    say(f"Looking at {', '.join(host.address for host in where.hosts)}")
    in_time = run_at_once([partial(_visit, visit, expected) for visit in visits], HOST_S)
    found = _Found()
    # A visit that is still under way may go on writing: what it has so far is what counts.
    reports = [_report(visit, done) for visit, done in zip(visits, in_time, strict=True)]
    try:
        found.cluster = check_cluster(where, visits)
        usable = [visit for visit, done in zip(visits, in_time, strict=True) if done and visit.is_reached]
        if len(where.hosts) > 1:
            _look_between(where, usable, found, fast=fast, say=say)
    finally:
        for visit, done in zip(visits, in_time, strict=True):
            if done:  # one that hangs in its login holds what closing it would wait for
                visit.remote.close()
    pairs = [
        PairReport(where.hosts[p.a], where.hosts[p.b], tuple(some))
        for p, some in sorted(found.pairs.items(), key=lambda item: (item[0].a, item[0].b))
    ]
    return Diagnosis(where.source, tuple(reports), tuple(pairs), tuple(found.cluster))


def expect(where: HostList, deployed: Deployment | None) -> Expected:
    """Return what hosts should have: this machine's versions, and the shard set that is deployed or would be."""
    versions, code = None, None
    with contextlib.suppress(VersionMismatch):
        versions, code = wanted_versions(), hash_code()
    manifest: Manifest | None = None
    with contextlib.suppress(MoectlError):
        count = len(where.hosts)
        manifest = read_manifest(Path(deployed.shards)) if deployed else newest_shards(count)[1]
    is_file = where.source.endswith((".txt", ".json"))
    return Expected(
        versions,
        code,
        manifest,
        tuple(rank.python for rank in deployed.ranks) if deployed else (),
        among_others=len(where.hosts) > 1,
        deploy=f"moectl deploy {where.source}" if is_file else "moectl deploy",
    )


def _visit(visit: Visit, expected: Expected) -> None:
    try:
        visit_host(visit, expected)
    except Exception as error:  # a bug on one host must not hide the other hosts
        visit.findings.append(_bug(error))


def _report(visit: Visit, in_time: bool) -> HostReport:
    findings = tuple(visit.findings)
    if not in_time:
        fix = f"{at_host(visit.host, 'uptime')}: is it overloaded, asleep, or does its shell wait for something?"
        findings += (fail("time", f"no answer within {HOST_S:g} s", fix),)
    return HostReport(visit.host, visit.rank, findings)


def _bug(error: Exception) -> Finding:
    return fail("error", unexpected(error).message, "run again with MOECTL_DEBUG=1 and report it")


# Between hosts.


def _look_between(where: HostList, usable: Sequence[Visit], found: _Found, *, fast: bool, say: Say) -> None:
    ranks = {visit.rank for visit in usable}
    for rank, host in enumerate(where.hosts):
        if rank not in ranks:
            found.cluster.append(skip("links", f"links with {host.name}: it could not be looked at"))
    if len(usable) < 2:
        return
    with_python = [visit for visit in usable if visit.python]
    for visit in usable:
        if visit.python is None:
            found.cluster.append(skip("links", f"links with {visit.host.name}: it has no python"))
    sites = _find_sites(where, with_python, found)
    with_address = [visit for visit in with_python if visit.rank in sites]
    if len(sites) < 2:
        return
    say("Trying the links between them")
    _look_at_links(where, with_address, [sites[visit.rank] for visit in with_address], found, fast=fast)
    if not fast:
        say("Testing an all-reduce between neighbours")
        _add_up(where, {visit.rank: (visit, sites[visit.rank]) for visit in with_address}, found)


def _find_sites(where: HostList, visits: Sequence[Visit], found: _Found) -> dict[int, Site]:
    """Return the hosts by their rank as workers there would be reached; those without an address are left out."""
    env = split_envs(where.envs)
    sites: dict[int, Site] = {}

    def ask() -> None:
        left = list(visits)
        while left:
            try:
                addresses = find_addresses([v.host for v in left], [v.remote for v in left])
            except MoectlError as error:
                found.cluster.append(fail("address", str(error), error.hint))
                without = [visit for visit in left if error.host not in (visit.host.name, visit.host.address)]
                left = without if len(without) < len(left) else []
                continue
            for visit, own in zip(left, addresses, strict=True):
                sites[visit.rank] = Site(visit.host, visit.remote, visit.python or "", own, env)
            return

    if run_at_once([ask], LINKS_S)[0]:
        return sites
    found.cluster.append(fail("links", f"no answer within {LINKS_S:g} s", "run it again; look at the hosts' load"))
    return {}


def _look_at_links(
    where: HostList, visits: Sequence[Visit], sites: Sequence[Site], found: _Found, *, fast: bool
) -> None:
    tried: list[Tried] = []
    ring = _backend(where) == "ring"

    def needed(here: int, there: int) -> bool:
        return not ring or is_next(visits[here].rank, visits[there].rank, len(where.hosts))

    run_at_once(
        [partial(try_links, sites, tried.append, transfers=not fast, ring=ring)], LINKS_S + MORE_LINKS_S * len(sites)
    )
    # What is still being tried may go on adding to the list.
    judged = judge_links(sites, list(tried), mac=lambda place: _is_mac(visits[place]), needed=needed)
    for pair, findings in judged.items():
        found.pairs[Pair(visits[pair.a].rank, visits[pair.b].rank)] = findings


def _add_up(where: HostList, by_rank: dict[int, tuple[Visit, Site]], found: _Found) -> None:
    """Run an all-reduce over each two neighbours that are ready for it; pairs that share no host run at once."""
    backend = _backend(where)
    for pairs in plan_neighbours(len(where.hosts)):
        tasks = []
        for pair in pairs:
            findings = found.pairs.get(pair)
            if findings is None:
                continue  # one of them could not be looked at, which is a finding already
            why = _why_not(pair, by_rank, findings, backend)
            if why:
                findings.append(skip("collective", f"no all-reduce was tried: {why}"))
                continue
            tasks.append((pair, partial(_sum_over, pair, by_rank, backend, findings)))
        done = run_at_once([task for _, task in tasks], COLLECTIVE_S)
        for (pair, _), in_time in zip(tasks, done, strict=True):
            if not in_time:
                fix = "moectl doctor --fast leaves it out; look at the hosts' load"
                found.pairs[pair] = [
                    *found.pairs[pair],
                    fail("collective", f"no all-reduce within {COLLECTIVE_S:g} s", fix),
                ]


def _backend(where: HostList) -> str:
    """Return the backend of the whole group; where rdma= is wrong, which is a finding already, TCP is tried."""
    try:
        return choose_backend(where.backend, where.hosts)
    except HostsError:
        return "ring"


def _why_not(pair: Pair, by_rank: dict[int, tuple[Visit, Site]], findings: Sequence[Finding], backend: str) -> str:
    if worst(findings) is Level.FAIL:
        return "they cannot reach each other"
    visits = [by_rank[rank][0] for rank in (pair.a, pair.b)]
    if unready := [visit.host.name for visit in visits if not visit.is_ready]:
        return f"moectl is not ready on {', '.join(unready)}"
    # An RDMA device has queue pairs and memory regions for one group; a second one would fail, or disturb the first.
    busy = [visit.host.name for visit in visits if visit.survey and visit.survey.has_workers]
    if busy and backend != "ring":
        return f"a worker on {', '.join(busy)} uses RDMA; 'moectl stop' ends it"
    return ""


def _sum_over(pair: Pair, by_rank: dict[int, tuple[Visit, Site]], backend: str, findings: list[Finding]) -> None:
    ends = (pair.a, pair.b)
    macos = any(_is_mac(by_rank[rank][0]) for rank in ends)
    try:
        # Two neighbours of a ring are a mesh of two.
        chosen = "jaccl" if backend == "jaccl-ring" else backend
        sites = [_face(by_rank[one], by_rank[other]) for one, other in (ends, ends[::-1])]
        findings.append(try_collective(sites, ends, chosen, macos=macos))
    except Exception as error:
        findings.append(_bug(error))


def _face(one: tuple[Visit, Site], other: tuple[Visit, Site]) -> Site:
    """Return a site as its peer reaches it: in a ring over cables of their own, ip= is that of another cable."""
    survey = one[0].survey
    interfaces = parse_ifconfig(survey.sections.get("ifconfig", "")) if survey else ()
    return face(one[1], interfaces, other[1])


def _is_mac(visit: Visit) -> bool:
    return visit.survey is not None and visit.survey.is_mac
