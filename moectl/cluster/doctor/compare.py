"""Hosts compared with each other: equal systems, equal interpreters, and cables that go where rdma= says.

Pure: what was seen of each host in, findings out.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from moectl.cluster.doctor.finding import Finding, fail, fail_with, ok, warn
from moectl.cluster.doctor.host import Visit
from moectl.engine.environment import list_unwanted
from moectl.errors import HostsError
from moectl.hosts.hostfile import HostList, split_devices
from moectl.hosts.macos import RDMA_MACOS, refuse_rdma
from moectl.hosts.thunderbolt import Cable, find_cables
from moectl.session.backend import choose_backend
from moectl.session.target import split_envs
from moectl.text import count_text


def check_cluster(where: HostList, visits: Sequence[Visit]) -> list[Finding]:
    """Return all findings about hosts compared with each other; those that did not answer are left out."""
    if len(where.hosts) < 2:
        return []
    wants_rdma = any(device for host in where.hosts for device in host.rdma)
    found = [check_systems(visits, wants_rdma=wants_rdma), check_pythons(visits), check_packages(visits)]
    found += [check_variables(where), check_backend(where), *check_cables(where, visits)]
    return [finding for finding in found if finding is not None]


def check_systems(visits: Sequence[Visit], *, wants_rdma: bool = False) -> Finding | None:
    """Say whether all Macs run the same macOS, to the build: RDMA and Metal change with it."""
    versions = {v.host.name: v.survey.macos_version for v in visits if v.survey}
    # One that is too old for any RDMA is named by its own check.
    able = {name: version for name, version in versions.items() if version and version >= RDMA_MACOS}
    if wants_rdma and (refused := refuse_rdma(able)):
        return fail_with("systems", refused)
    told = {
        v.host.name: f"{v.survey.hardware.os_version} ({v.survey.build})"
        for v in visits
        if v.survey and v.survey.is_mac
    }
    if len(told) < 2:
        return None
    if len(set(told.values())) == 1:
        return ok("systems", f"all Macs run macOS {next(iter(told.values()))}")
    return warn("systems", f"macOS differs: {_by_value(told)}", "sudo softwareupdate -ia -R on those that are behind")


def check_pythons(visits: Sequence[Visit]) -> Finding | None:
    """Say whether all interpreters are of one minor version."""
    told = {v.host.name: "python " + ".".join(v.environment.version.split(".")[:2]) for v in visits if v.environment}
    if len(told) < 2:
        return None
    if len(set(told.values())) == 1:
        return ok("pythons", f"{next(iter(told.values()))} everywhere")
    fix = "install one python everywhere, or name it with python= in the hosts file; then moectl deploy"
    return warn("pythons", f"interpreters differ: {_by_value(told)}", fix)


def check_variables(where: HostList) -> Finding | None:
    """Say which variables of an MLX hostfile no worker gets."""
    unwanted = list_unwanted(split_envs(where.envs))
    if not unwanted:
        return None
    text = f"envs of the hosts file sets {', '.join(unwanted)}: moectl sets what the ranks need, and leaves it out"
    return warn("variables", text, "remove it from envs; MLX_METAL_FAST_SYNCH may hang a rank")


def check_packages(visits: Sequence[Visit]) -> Finding | None:
    """Say whether hosts have the same packages; those without moectl are left out."""
    told = {
        v.host.name: ", ".join(f"{name} {version}" for name, version in sorted(v.environment.packages.items()))
        for v in visits
        if v.environment and "moectl" in v.environment.packages
    }
    if len(told) < 2 or len(set(told.values())) == 1:
        return None
    return fail("packages", f"versions differ: {_by_value(told)}", "moectl deploy")


def check_backend(where: HostList) -> Finding | None:
    """Say what the rdma= rows make: a mesh, a ring, or neither."""
    hosts = where.hosts
    if not any(device for host in hosts for device in host.rdma):
        return ok("backend", "ring over TCP")
    try:
        backend = choose_backend(where.backend, hosts)
    except HostsError as error:
        return fail_with("backend", error)
    if backend != "ring" or where.backend == "ring":
        return ok("backend", {"jaccl": "RDMA mesh", "jaccl-ring": "RDMA ring"}.get(backend, "ring over TCP"))
    lacking = ", ".join(host.name for host in hosts if len(host.rdma) != len(hosts))
    text = f"rdma= is not complete for {lacking}: the ring over TCP is used"
    return warn("backend", text, "moectl setup writes rdma= of every host")


def check_cables(where: HostList, visits: Sequence[Visit]) -> list[Finding]:
    """Compare rdma= with the cables that the Macs themselves see; nothing where no two are cabled."""
    ports = [visit.survey.ports if visit.survey else () for visit in visits]
    cables = find_cables(ports)
    if not cables:
        return []
    found = [_check_shape(where, cables)]
    for rank, host in enumerate(where.hosts):
        devices = [(peer, device) for peer, entry in enumerate(host.rdma) for device in split_devices(entry)]
        for peer, device in devices:
            if peer == rank or peer >= len(where.hosts) or not (ports[rank] and ports[peer]):
                continue
            leads = _follow(cables, rank, device)
            if leads == peer:
                continue
            to = "no host of the list" if leads is None else where.hosts[leads].name
            text = f"{host.name}: {device} should lead to {where.hosts[peer].name}, it leads to {to}"
            found.append(fail("cables", text, "moectl setup writes rdma= as the cables are, or move the cable"))
    return found


def _check_shape(where: HostList, cables: Sequence[Cable]) -> Finding:
    count = len(where.hosts)
    joined = {(cable.a, cable.b) for cable in cables}
    every = set(combinations(range(count), 2))
    ring = {(min(a, b), max(a, b)) for a in range(count) if (b := (a + 1) % count) != a}
    text = count_text(len(cables), "Thunderbolt cable")
    if joined >= every:
        return ok("topology", f"Thunderbolt mesh, {text}", cables=len(cables))
    if joined >= ring:
        return ok("topology", f"Thunderbolt ring, {text}", cables=len(cables))
    a, b = min(ring - joined)
    names = f"{where.hosts[a].name} and {where.hosts[b].name}"
    fix = f"cable {names}, or list the hosts in the order of the cables (moectl setup proposes one)"
    return warn("topology", f"neither mesh nor ring: no cable between {names} ({text})", fix, cables=len(cables))


def _follow(cables: Sequence[Cable], rank: int, device: str) -> int | None:
    """Return the host at the other end of a device's cable."""
    name = device.removeprefix("rdma_")
    for cable in cables:
        for (place, port), (other, _) in (cable.ends, cable.ends[::-1]):
            if place == rank and port.interface == name:
                return other
    return None


def _by_value(told: dict[str, str]) -> str:
    """Return "26.2 on mac1, mac2; 26.1 on mac3"."""
    names: dict[str, list[str]] = {}
    for name, value in told.items():
        names.setdefault(value, []).append(name)
    return "; ".join(f"{value} on {', '.join(some)}" for value, some in names.items())
