"""One host, check by check: its login, its system, its software, and whether its rank fits.

It changes nothing there. After a check that fails, those that need it are left out. A Mac's settings are judged in
`macos`, several hosts beside each other in `compare`, the ways between them in `pairs`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from moectl.cluster.deploy.provision import PACKAGES, survey_environment
from moectl.cluster.deploy.task import FileSurvey
from moectl.cluster.doctor.finding import Finding, Level, at_host, fail, fail_with, ok, skip, warn
from moectl.cluster.doctor.login import check_locale, check_login, check_sshd_limits
from moectl.cluster.doctor.macos import check_firewall, check_mac, check_mlx
from moectl.errors import MoectlError, VersionMismatch
from moectl.hosts.hostfile import Host
from moectl.hosts.macos import explain_missing_rdma
from moectl.hosts.refusals import room_text
from moectl.hosts.remote import Remote
from moectl.hosts.survey import Survey, parse_sshd, survey_host
from moectl.model.manifest import Manifest
from moectl.planner.chips import find_chip
from moectl.planner.memory import Verdict, judge
from moectl.planner.questions import PlanOptions, known_node
from moectl.planner.this_machine import least_need
from moectl.text import format_gb

ENVIRONMENT_BYTES = 1_500_000_000  # python packages of a deployment, on the safe side
LEAST_FREE_BYTES = 50_000_000  # logs, records
_GIB = 1 << 30
_COUNT = """
import os, sys
print(sum(os.lstat(os.path.join(place, name)).st_size for place, _, names in os.walk(sys.argv[1]) for name in names))
"""
_HAS_JACCL = "import mlx.core as mx; print(mx.distributed.is_available('jaccl'))"


@dataclass(frozen=True, slots=True)
class Expected:
    """What hosts are compared with."""

    versions: Mapping[str, str] | None = None  # this machine's; None where it lacks a package
    code: str | None = None  # hash of this machine's moectl
    manifest: Manifest | None = None  # of the shard set that they have, or will have
    pythons: tuple[str, ...] = ()  # of the deployment, by rank; empty where nothing is deployed
    among_others: bool = False
    deploy: str = "moectl deploy"  # what mends an environment


@dataclass(slots=True)
class Visit:
    """What was seen of a host so far; a visit that is cut short keeps it."""

    host: Host
    rank: int
    remote: Remote
    findings: list[Finding] = field(default_factory=list)
    is_reached: bool = False
    survey: Survey | None = None
    environment: FileSurvey | None = None
    is_ready: bool = False  # a worker could start there

    @property
    def python(self) -> str | None:
        return self.environment.python if self.environment else None


def visit_host(visit: Visit, expected: Expected) -> None:
    """Do all checks of one host; whatever it tells becomes a finding, nothing is raised."""
    for check in (_reach, _look_at_system, _look_at_software, _look_at_firewall):
        try:
            check(visit, expected)
        except MoectlError as error:
            visit.findings.append(fail_with(check.__name__.removeprefix("_look_at_").removeprefix("_"), error))
        if not visit.is_reached:
            return


def _reach(visit: Visit, expected: Expected) -> None:
    visit.is_reached = visit.host.is_local or check_login(visit.host, visit.remote, visit.findings)


def _look_at_system(visit: Visit, expected: Expected) -> None:
    survey = visit.survey = survey_host(visit.remote)
    host, sections = visit.host, survey.sections
    visit.findings += check_locale(host, sections.get("locale", ""))
    if not host.is_local:
        visit.findings += check_sshd_limits(parse_sshd(sections.get("sshd", "")))
    if survey.is_mac:
        visit.findings += check_mac(host, survey, among_others=expected.among_others)
    else:
        visit.findings.append(ok("system", survey.hardware.os_version or "Linux", version=survey.hardware.os_version))
    visit.findings += check_addresses(host, survey)
    visit.findings.append(check_memory(host, visit.rank, survey, expected.manifest))


def _look_at_software(visit: Visit, expected: Expected) -> None:
    host, rank = visit.host, visit.rank
    deployed = expected.pythons[rank] if rank < len(expected.pythons) else ""
    try:
        found = survey_environment(visit.remote, replace(host, python=deployed) if deployed else host)
    except VersionMismatch as error:
        broken = fail("python", f"{deployed} does not start: {error.message}", expected.deploy)
        visit.findings.append(broken if deployed else fail_with("python", error))
        return
    visit.environment = found
    visit.findings.append(ok("python", f"python {found.version}", version=found.version, path=found.python))
    versions = check_versions(found, expected, deployed=bool(deployed))
    visit.findings.append(versions)
    visit.is_ready = versions.level is Level.OK
    if visit.survey and "mlx" in found.packages:
        visit.findings += check_rdma_of_mlx(visit.remote, host, visit.survey, found, expected.deploy)
    there = count_shards(visit.remote, found, expected.manifest)
    if deployed and expected.manifest is not None:
        visit.findings.append(check_shards(rank, there, expected.manifest, expected.deploy))
    visit.findings.append(check_disk(host, rank, found, expected.manifest, there))


def _look_at_firewall(visit: Visit, expected: Expected) -> None:
    if visit.survey and visit.survey.is_mac and expected.among_others:
        executable = visit.environment.executable if visit.environment else None
        found = check_firewall(visit.host, visit.survey.sections.get("firewall", ""), executable)
        visit.findings += [found] if found else []


# System.


def check_addresses(host: Host, survey: Survey) -> list[Finding]:
    """Say which addresses of ip= are not the host's."""
    own = survey.addresses
    wrong = [address for address in host.ips if own and address not in own]
    if not wrong:
        return []
    listed = ", ".join(address for address in own if not address.startswith("127.")) or "none"
    text = f"ip={','.join(wrong)} is not its own address (it has {listed})"
    return [fail("address", text, "mend ip= in the hosts file; ifconfig's addresses are gone after a restart")]


def check_memory(host: Host, rank: int, survey: Survey, manifest: Manifest | None) -> Finding:
    """Compare what the host can give with what its rank needs, where a shard set says what that is."""
    hardware = survey.hardware
    if hardware.memory_bytes is None:
        return skip("memory", "it did not tell its memory")
    what = _chip_text(survey)
    used = max(0, (hardware.in_use_bytes or 0) - survey.workers_bytes)
    if survey.workers_bytes and survey.is_mac:
        used = 0  # a worker's wired memory is not in what ps tells
    values = {"memory_bytes": hardware.memory_bytes, "in_use_bytes": hardware.in_use_bytes}
    node = known_node(host, PlanOptions(found={host.name: replace(hardware, in_use_bytes=used)}))
    if manifest is None or node is None or rank >= manifest.world_size:
        return ok("memory", f"{what}, {(hardware.in_use_bytes or 0) / _GIB:.1f} GiB in use", **values)
    need = least_need(manifest.placement, [rank], node.dtype_bytes)
    budget = node.memory.budget
    sizes = f"{what}; {manifest.name} needs {need / 1e9:.1f} GB of {budget / 1e9:.1f} GB usable"
    values |= {"need_bytes": need, "usable_bytes": budget}
    match judge(need, budget):
        case Verdict.FITS:
            return ok("memory", sizes, **values)
        case Verdict.BORDERLINE:
            return warn("memory", f"{sizes}: tight", f"close other programs on {host.name}", **values)
    fix = f"close other programs on {host.name}, or cut another split: moectl plan"
    return fail("memory", f"{sizes}: it does not fit", fix, **values)


def _chip_text(survey: Survey) -> str:
    hardware = survey.hardware
    memory = f"{(hardware.memory_bytes or 0) / _GIB:.0f} GiB"
    if hardware.chip in (None, "linux-cpu"):
        return f"{hardware.cores or '?'} cores, {memory}"
    try:
        return f"{find_chip(hardware.chip or '').title} {memory}"
    except MoectlError:
        return f"{hardware.chip} {memory}"


# Software.


def check_versions(found: FileSurvey, expected: Expected, *, deployed: bool) -> Finding:
    """Compare its packages with this machine's: ranks that differ would disagree."""
    packages = found.packages
    text = " · ".join(f"{name} {packages[name]}" for name in PACKAGES if name in packages)
    values = {"packages": packages}
    missing = [name for name in PACKAGES if name not in packages]
    if missing:
        what = f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed for {found.python}"
        if deployed:
            return fail("versions", what, expected.deploy, **values)
        return warn("versions", "moectl is not there yet", expected.deploy, **values)
    if expected.versions is None:
        return ok("versions", text, **values)
    wrong = [
        f"{name} {packages[name]} here is {wanted} on this machine"
        for name, wanted in expected.versions.items()
        if packages[name] != wanted
    ]
    if wrong:
        return fail("versions", ", ".join(wrong), expected.deploy, **values)
    if found.code != expected.code:
        text = f"moectl {packages['moectl']} here has other code than on this machine"
        return fail("versions", text, expected.deploy, **values)
    return ok("versions", text, **values)


def check_rdma_of_mlx(remote: Remote, host: Host, survey: Survey, found: FileSurvey, deploy: str) -> list[Finding]:
    """Say whether a Mac's mlx can do RDMA; nothing where it can, or need not."""
    if not survey.is_mac:
        return []
    older = check_mlx(found.wheel, survey.macos_version, deploy, wants_rdma=any(host.rdma))
    if older or not any(host.rdma):
        return [older] if older else []
    done = remote.run([found.python, "-c", _HAS_JACCL], check=False)
    if done.stdout.split()[-1:] != [b"False"]:
        return []
    missing = explain_missing_rdma(found.wheel, survey.macos_version, host.name)
    return [fail_with("mlx", missing)]


def count_shards(remote: Remote, found: FileSurvey, manifest: Manifest | None) -> int:
    """Return the bytes of a shard set that are on the host, whole or in part."""
    if manifest is None:
        return 0
    directory = f"{found.root}/shards/{manifest.name}"
    done = remote.run([found.python, "-c", _COUNT, directory], check=False)
    word = (done.stdout.split() or [b""])[-1]
    return int(word) if word.isdigit() else 0


def check_shards(rank: int, there: int, manifest: Manifest, deploy: str) -> Finding:
    """Say whether a rank's files are there, by their size; `deploy --verify` reads them."""
    total = _rank_bytes(manifest, rank)
    if there < total:
        sizes = f"{format_gb(there)} of {format_gb(total)}"
        return fail("shards", f"{manifest.name} is not complete: {sizes} are there", deploy, bytes=there)
    return ok("shards", f"{manifest.name} {format_gb(total)}", bytes=there)


def check_disk(host: Host, rank: int, found: FileSurvey, manifest: Manifest | None, there: int) -> Finding:
    """Compare what its disk has left with what is still to be copied there."""
    free, root = found.free, found.root
    values = {"free_bytes": free}
    if not found.writable:
        return fail("disk", f"cannot write to {root}: permission denied", f"give {host.name} another dir=", **values)
    needed = 0 if found.packages.get("mlx-lm") else ENVIRONMENT_BYTES
    if manifest is not None:
        needed += max(0, _rank_bytes(manifest, rank) - there)
    values |= {"needed_bytes": needed}
    fix = f"free space on {host.name}: {at_host(host, f'du -sh {root}/shards/*')}"
    least = max(needed, LEAST_FREE_BYTES)
    if free < least:
        return fail("disk", f"{room_text(free, least)} in {root}", fix, **values)
    if free < needed + ENVIRONMENT_BYTES:
        text = f"{format_gb(free)} free in {root}, {format_gb(needed)} needed: tight"
        return warn("disk", text, fix, **values)
    return ok("disk", f"{format_gb(free)} free", **values)


def _rank_bytes(manifest: Manifest, rank: int) -> int:
    return sum(entry.bytes for entry in manifest.files_of(rank).values()) if rank < manifest.world_size else 0
