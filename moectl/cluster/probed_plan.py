"""Plan with measured hosts: ask them for their hardware, time their links and a shortened model, and plan with that.

The last result is kept, so that `bench` can compare. Hosts without moectl cannot run a model yet: they are asked for
their hardware, and their links are timed if they have a python.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from statistics import fmean

from moectl import files as disk
from moectl.cluster import probe
from moectl.cluster.probe import Site
from moectl.errors import HostsError, MoectlError, RemoteError
from moectl.hosts import survey
from moectl.hosts.connect import ROOT, connect, map_at_once
from moectl.hosts.hardware import Hardware
from moectl.hosts.hostfile import Host, HostList
from moectl.hosts.programs import find_python, list_pythons
from moectl.hosts.remote import Remote
from moectl.model.placement import Placement
from moectl.model.structure import Quantization
from moectl.paths import state_dir
from moectl.planner.calibration import Calibration, LinkCost
from moectl.planner.chips import find_chip
from moectl.planner.measured import Job, Matrix, MeasuredCluster, Speed, read_speeds
from moectl.planner.memory import Verdict
from moectl.planner.plan import Node, Plan, Question, candidates
from moectl.planner.questions import AnsweredPlan, PlanOptions, PlanTask, set_task
from moectl.planner.speed import Prediction, Rates, Work, predict_measured
from moectl.session.backend import RING_ONLY, choose_backend
from moectl.session.target import find_addresses, share_cores, split_envs
from moectl.shards.prepare import Wanted

BUDGET_S = 3.0  # for whole passes, in all
LEAST_BUDGET_S = 0.6  # for one placement
RECORD = "probe.json"
SCHEMA = "moectl.probe/1"
# Prints the first interpreter that has moectl: the one that `deploy` made, or the one that hosts.txt names.
_FIND_PYTHON = """
for p in "$1/env/bin/python" "$2"; do
  case $p in "~/"*) p=$HOME/${p#"~/"};; esac
  "$p" -c 'from importlib.metadata import version; version("moectl"); version("mlx")' 2>/dev/null || continue
  printf %s "$p"
  exit
done
"""
_FIND_WORKER = "ps -axo args= | grep '[m]oectl worker'"


def probe_cluster(
    source: str, wanted: Wanted, asked: PlanOptions, where: HostList, *, say: Callable[[str], None]
) -> tuple[AnsweredPlan, MeasuredCluster]:
    """Plan a model on hosts as they were found; what was measured replaces the constants.

    Raises what `plan_cluster` raises, and the first host's error.
    """
    if asked.chip is not None:
        find_chip(asked.chip)
    with _open_sites(where) as (sites, missing):
        hardware = survey.read_all_hardware([site.remote for site in sites])
        found = {host.name: own for host, own in zip(where.hosts, hardware, strict=True)}
        task = set_task(source, wanted, replace(asked, found=found), where.hosts)
        task.solve()  # what cannot be placed need not be measured
        rtt_s, bandwidth = _measure_links(sites, say, ring=_is_ring(where))
        speeds: tuple[Speed, ...] = ()
        if missing:
            say(f"{', '.join(missing)}: moectl is not there yet, so that speed is a guess from the chips table.")
        else:
            speeds = _measure_speeds(task, sites, hardware, where, say)
    measured = MeasuredCluster(hardware, rtt_s, bandwidth, speeds)
    task = replace(task, question=use(task.question, measured, stated_link=asked.link))
    if speeds:
        _record(task.question)
    return task.solve(), measured


def use(question: Question, measured: MeasuredCluster, *, stated_link: str | None = None) -> Question:
    """Return a question whose nodes, links and host overhead are what was measured, where it was.

    Without a run of the model, an exchange is assumed to take one round trip of the slowest pair at two nodes, and half
    a round trip more for each further node; a link that the owner stated stays as it is then.
    """
    if measured.speeds:
        return _use_speeds(question, measured.speeds)
    pairs = [(i, j) for i, row in enumerate(measured.rtt_s) for j in range(len(row)) if i != j]
    if not pairs or stated_link is not None:
        return question
    rtt_s = max(measured.rtt_s[i][j] for i, j in pairs)
    bytes_s = min(measured.bandwidth_bytes_s[i][j] for i, j in pairs)
    return replace(question, link=LinkCost("measured TCP", rtt_s, rtt_s / 2, bytes_s))


def _use_speeds(question: Question, speeds: tuple[Speed, ...]) -> Question:
    """Derive rates, links and the host's overhead per layer from what was measured, for the other splits."""
    first = speeds[0]  # every rank took part in it
    rates = [Rates(rank.bytes_s, rank.flops_s) for rank in first.ranks]
    if len({(node.memory.total, node.rates) for node in question.nodes}) == 1:
        # Hosts of one kind differ by noise, which should not make their shares uneven.
        rates = [Rates(fmean(r.bytes_s for r in rates), fmean(r.flops_s for r in rates))] * len(rates)
    nodes = tuple(
        _ask_metal(replace(node, rates=own), rank.working_set_bytes)
        for node, own, rank in zip(question.nodes, rates, first.ranks, strict=True)
    )
    exchanges = sorted(first.collective_s.items())
    collective_s = exchanges[0][1] if exchanges else 0.0
    work_s = max(rank.layer_s for rank in first.ranks)
    calibration = Calibration(
        "measured",
        memory_efficiency=1.0,
        compute_efficiency=1.0,
        layer_overhead_s=max(0.0, first.decode.layer_s - work_s - collective_s),
        launch_s=0.0,
        sync_s=0.0,
        agreement=True,
        links={},
    )
    link = _fit_link(exchanges, len(nodes)) if exchanges else question.link
    return replace(question, nodes=nodes, speeds=speeds, calibration=calibration, link=link)


def _ask_metal(node: Node, working_set_bytes: float) -> Node:
    """Return a node whose GPU's limit is what Metal says there, where it was only assumed."""
    if not node.assumed or not working_set_bytes:
        return node
    return replace(node, memory=replace(node.memory, working_set=round(working_set_bytes)), assumed="")


def _fit_link(exchanges: Sequence[tuple[int, float]], nodes: int) -> LinkCost:
    """Return the link that explains the times of a small and a large exchange; a node more costs half a latency."""
    (small, small_s), (large, large_s) = exchanges[0], exchanges[-1]
    bytes_s = (nodes - 1) * (large - small) / max(large_s - small_s, 1e-9) if large > small else 1e12
    latency_s = small_s / (1 + (nodes - 2) / 2)
    return LinkCost("measured", latency_s, latency_s / 2, max(bytes_s, 1.0))


def _is_ring(where: HostList) -> bool:
    """Whether tensors go round a ring by TCP; what is wrong with rdma= is told when it is used."""
    try:
        return choose_backend(where.backend, where.hosts) == "ring"
    except HostsError:
        return False


def _measure_links(sites: Sequence[Site], say: Callable[[str], None], *, ring: bool = False) -> tuple[Matrix, Matrix]:
    without = ", ".join(site.host.name for site in sites if not site.python)
    if without:
        say(f"{without}: no python was found there: links are assumed to be as --link says.")
        return (), ()
    try:
        return probe.measure_links(sites, ring=ring)
    except RemoteError as error:  # a host that cannot be reached is Unreachable and is raised
        say(f"{error}: links are assumed to be as --link says.")
        return (), ()


def _measure_speeds(
    task: PlanTask, sites: Sequence[Site], hardware: Sequence[Hardware], where: HostList, say: Callable[[str], None]
) -> tuple[Speed, ...]:
    """Measure each split that would fit, or the one that was asked for; nothing where workers use RDMA already."""
    backend = choose_backend(where.backend, where.hosts)
    if backend != "ring" and (busy := _find_busy(sites)):
        say(f"{', '.join(busy)}: a worker uses RDMA, so that speed is a guess; 'moectl stop' ends it.")
        return ()
    able = list_measurable(task, backend)
    job = Job(
        tuple(plan.placement for plan in able),
        dict(task.model.config),
        task.question.quantization,
        probe.memory_to_use(hardware) // max(Counter(host.name for host in where.hosts).values()),
        budget_s=max(LEAST_BUDGET_S, BUDGET_S / max(1, len(able))),
    )
    if not able:
        return ()
    return probe.measure_speed(sites, job, backend=backend)


def list_measurable(task: PlanTask, backend: str) -> list[Plan]:
    """Return the plans whose speed is measured over a backend: those that fit, or one that does not."""
    plans = [p for p in candidates(task.question, task.shares) if task.split in ("auto", p.split)]
    if backend != "ring":
        plans = [plan for plan in plans if plan.split not in RING_ONLY]
    return [plan for plan in plans if plan.verdict is not Verdict.TOO_MUCH] or plans[:1]


def _find_busy(sites: Sequence[Site]) -> list[str]:
    """Return the names of the hosts where a worker runs; an RDMA device has no room for a second group."""
    done = map_at_once(lambda site: site.remote.run(["sh", "-c", _FIND_WORKER], check=False), sites)
    return [site.host.name for site, found in zip(sites, done, strict=True) if found.stdout]


@contextlib.contextmanager
def _open_sites(where: HostList) -> Iterator[tuple[list[Site], list[str]]]:
    """Yield the hosts as their ranks would use them, and the names of those that have no moectl."""
    hosts = where.hosts
    with connect(hosts) as remotes:
        addresses = find_addresses(hosts, remotes)
        env = split_envs(where.envs) | (share_cores(len(hosts)) if all(host.is_local for host in hosts) else {})
        pythons = [_find_python(host, remote) for host, remote in zip(hosts, remotes, strict=True)]
        sites = [
            Site(host, remote, python or find_python(remote, list_pythons(host)), own, env)
            for host, remote, python, own in zip(hosts, remotes, pythons, addresses, strict=True)
        ]
        yield sites, [host.name for host, python in zip(hosts, pythons, strict=True) if not python]


def _find_python(host: Host, remote: Remote) -> str:
    """Return the interpreter that has moectl on this host, empty when there is none."""
    if host.is_local:
        return sys.executable
    done = remote.run(["sh", "-c", _FIND_PYTHON, "sh", host.dir or ROOT, host.python or ""], check=False)
    return done.stdout.decode("utf-8", "replace").strip()


# What `bench` compares with.


def _record(question: Question) -> None:
    document = {
        "schema": SCHEMA,
        "hosts": [node.host for node in question.nodes],
        "structure": asdict(question.structure),
        "quantization": question.quantization and asdict(question.quantization),
        "dtype_bytes": question.nodes[0].dtype_bytes,
        "speeds": [speed.to_json() for speed in question.speeds],
    }
    with contextlib.suppress(OSError, MoectlError):  # only a convenience
        disk.make_private_directory(state_dir())
        disk.write_whole(state_dir() / RECORD, json.dumps(document).encode())


def recall(
    hosts: Sequence[str],
    placement: Placement,
    quantization: Quantization | None,
    *,
    context: int,
    prompt_tokens: int,
) -> Prediction | None:
    """Return what the last `plan --probe` predicts for this model here; None if it measured something else."""
    try:
        record = json.loads((state_dir() / RECORD).read_text())
        same = {
            "schema": SCHEMA,
            "hosts": list(hosts),
            "structure": asdict(placement.structure),
            "quantization": quantization and asdict(quantization),
        }
        if {key: record[key] for key in same} != json.loads(json.dumps(same)):
            return None
        work = Work(placement, context, prompt_tokens, int(record["dtype_bytes"]))
        speeds = read_speeds(json.dumps(record["speeds"]))
    except (OSError, ValueError, TypeError, KeyError, RecursionError, MoectlError):
        return None
    return next((predict_measured(work, speed) for speed in speeds if speed.is_of(placement)), None)
