"""One host's ladder: can it be reached, what does its shell say, is the software right, does the model fit.

It looks at one host and changes nothing there; a rung that fails leaves out those that stand on it. What a Mac's own
settings mean is `macos`'s. Several hosts compared with each other are `doctor_cluster`'s, ways between them
`doctor_pairs`'s.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from moectl.cluster.deploy.provision import PACKAGES, survey_environment
from moectl.cluster.doctor.finding import Finding, Level, at_host, fail, fail_with, ok, skip, warn, worst
from moectl.cluster.doctor.macos import check_mac
from moectl.errors import CommandFailed, MoectlError, VersionMismatch
from moectl.hosts.hostfile import Host
from moectl.hosts.login_shell import describe_quiet
from moectl.hosts.refusals import room_text
from moectl.hosts.remote import Process, Remote
from moectl.hosts.ssh.config import SSHSettings, read_ssh_settings
from moectl.hosts.survey import Survey, parse_sshd, survey_host
from moectl.model.manifest import Manifest
from moectl.planner.chips import find_chip
from moectl.planner.memory import Verdict, judge
from moectl.planner.questions import PlanOptions, known_node
from moectl.planner.this_machine import least_need
from moectl.text import format_gb

PING_S = 15.0  # for a login shell to run `true`
PINGS = 5
SESSIONS = 2  # that moectl holds on one connection at once
ENVIRONMENT_BYTES = 1_500_000_000  # python packages of a deployment, on the safe side
LEAST_FREE_BYTES = 50_000_000  # logs, records
SKEW_S = 60.0
_GIB = 1 << 30
_COUNT = """
import os, sys
print(sum(os.lstat(os.path.join(place, name)).st_size for place, _, names in os.walk(sys.argv[1]) for name in names))
"""


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
    """What was seen of a host so far; a visit that is cut short keeps what it has."""

    host: Host
    rank: int
    remote: Remote
    findings: list[Finding] = field(default_factory=list)
    is_reached: bool = False
    survey: Survey | None = None
    environment: Mapping[str, Any] | None = None  # see `node.survey`
    is_ready: bool = False  # a worker could start there

    @property
    def python(self) -> str | None:
        return str(self.environment["python"]) if self.environment else None


def visit_host(visit: Visit, expected: Expected) -> None:
    """Climb the ladder of one host; everything that it tells is a finding, nothing is raised."""
    for climb in (_reach, _look_at_system, _look_at_software):
        try:
            climb(visit, expected)
        except MoectlError as error:
            visit.findings.append(fail_with(climb.__name__.removeprefix("_look_at_").removeprefix("_"), error))
        if not visit.is_reached:
            return


def _reach(visit: Visit, expected: Expected) -> None:
    host, remote = visit.host, visit.remote
    if host.is_local:
        visit.is_reached = True
        return
    with contextlib.suppress(MoectlError):
        visit.findings += check_agent(read_ssh_settings(host.name, user=host.user, port=host.port))
    try:
        done = remote.run(["true"], timeout_s=PING_S)
    except CommandFailed as error:
        fix = f"{at_host(host, 'true')} should say nothing and end at once: look at its shell's startup files"
        why = error.message.removeprefix("its login shell does not run commands: ")
        visit.findings.append(fail("shell", f"its login shell does not run a command: {why}", fix))
        return
    except MoectlError as error:
        visit.findings.append(fail_with("ssh", error))
        return
    sessions = check_sessions(host, remote)
    visit.findings += [*sessions, *check_noise(host, done.noise + done.stdout, done.stderr, _ask_shell(remote))]
    visit.is_reached = worst(sessions) is not Level.FAIL
    if visit.is_reached:
        visit.findings.append(check_clock(remote))


def _look_at_system(visit: Visit, expected: Expected) -> None:
    survey = visit.survey = survey_host(visit.remote)
    host, sections = visit.host, survey.sections
    visit.findings += check_locale(host, sections.get("locale", ""))
    if not host.is_local:
        visit.findings += check_sshd_limits(host, parse_sshd(sections.get("sshd", "")))
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
    visit.findings.append(ok("python", f"python {found['version']}", version=found["version"], path=found["python"]))
    versions = check_versions(found, expected, deployed=bool(deployed))
    visit.findings.append(versions)
    visit.is_ready = versions.level is Level.OK
    there = count_shards(visit.remote, found, expected.manifest)
    if deployed and expected.manifest is not None:
        visit.findings.append(check_shards(rank, there, expected.manifest, expected.deploy))
    visit.findings.append(check_disk(host, rank, found, expected.manifest, there))


# SSH.


def check_agent(settings: SSHSettings) -> list[Finding]:
    """Say whether the agent that ssh would ask is there; nothing where none is configured."""
    if settings.agent is None:
        return []
    try:
        done = subprocess.run(
            ["ssh-add", "-l"],
            env={**os.environ, "SSH_AUTH_SOCK": settings.agent},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PING_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return [warn("agent", f"ssh-add does not answer: {error}", "ssh-add -l")]
    if done.returncode == 0:
        count = len(done.stdout.splitlines())
        return [ok("agent", f"agent with {count} key{'s' * (count != 1)}", keys=count)]
    if done.returncode == 1:
        return [ok("agent", "agent without keys", keys=0)]
    fix = "eval $(ssh-agent) && ssh-add, or unset SSH_AUTH_SOCK"
    return [warn("agent", f"the agent at {settings.agent} does not answer", fix)]


def check_sessions(host: Host, remote: Remote) -> list[Finding]:
    """Open as many sessions as moectl holds at once, and time round trips through one of them."""
    opened: list[Process] = []
    try:
        for _ in range(SESSIONS):
            opened.append(remote.start(["cat"]))
        seconds = _ping(opened[0])
    except CommandFailed as error:
        fix = f"set MaxSessions 10 in its /etc/ssh/sshd_config ({SESSIONS} are needed), then restart sshd"
        return [fail("sessions", f"{error.message} after {len(opened)}", fix)]
    except (OSError, TimeoutError) as error:
        return [fail("ssh", f"the connection broke: {error}", at_host(host, "true"))]
    finally:
        for process in opened:
            _end(process)
    return [ok("ssh", f"ssh {1e3 * seconds:.1f} ms", latency_s=seconds)]


def _ping(process: Process) -> float:
    """Return the median seconds of some round trips. Raises OSError, TimeoutError."""
    seconds: list[float] = []
    done = threading.Event()

    def ping() -> None:
        with contextlib.suppress(OSError):
            for turn in range(PINGS):
                start = time.perf_counter()
                process.stdin.write(b"moectl-ping %d\n" % turn)
                process.stdin.flush()
                while (line := process.stdout.readline()) and b"moectl-ping %d\n" % turn not in line:
                    pass  # what its shell said first
                if not line:
                    break
                seconds.append(time.perf_counter() - start)
        done.set()

    threading.Thread(target=ping, daemon=True).start()
    if not done.wait(PING_S):
        raise TimeoutError(f"no echo within {PING_S:g} s")
    if len(seconds) < PINGS:
        raise ConnectionError("it closed the session")
    return statistics.median(seconds)


def _end(process: Process) -> None:
    """End a `cat` by its stdin: killing it would drop the connection."""
    for close in (process.stdin.close, lambda: process.wait(PING_S), process.close):
        with contextlib.suppress(OSError, TimeoutError, MoectlError):
            close()


def _ask_shell(remote: Remote) -> str:
    """Return the path of the account's login shell, as sshd tells it; empty where it does not."""
    return remote.run(["printenv", "SHELL"], timeout_s=PING_S, check=False).stdout.decode("utf-8", "replace").strip()


def check_noise(host: Host, stdout: bytes, stderr: bytes, shell: str = "") -> list[Finding]:
    """Say what its login shell prints around a command that is silent."""
    said = (stdout + stderr).decode("utf-8", "replace").strip()
    if not said:
        return []
    line = said.split("\n")[0].strip()
    where = "stdout" if stdout.strip() else "stderr"
    fix = describe_quiet(shell)
    if "locale" in line.lower():
        fix = _locale_fix(host)
    return [warn("noise", f"its shell prints on {where} without a terminal: {line[:60]!r}", fix)]


def check_locale(host: Host, text: str) -> list[Finding]:
    """Say what `locale` complains of: variables that ssh sent and the host does not know."""
    complaint = next((line for line in text.split("\n") if "annot set" in line), None)
    return [] if complaint is None else [warn("locale", complaint.strip()[:100], _locale_fix(host))]


def _locale_fix(host: Host) -> str:
    return f"ssh sends this machine's locale: put 'SetEnv LC_ALL=C' under 'Host {host.name}' in ~/.ssh/config"


def check_sshd_limits(host: Host, limits: Mapping[str, str]) -> list[Finding]:
    """Say which limits of its sshd are tight; files that may not be read say nothing."""
    found = []
    sessions = limits.get("maxsessions", "")
    if sessions.isdigit() and int(sessions) < SESSIONS:
        fix = "set MaxSessions 10 in its /etc/ssh/sshd_config, then restart sshd"
        found.append(warn("sshd_limits", f"MaxSessions {sessions}: {SESSIONS} are needed on one connection", fix))
    startups = limits.get("maxstartups", "").split(":")[0]
    if startups.isdigit() and int(startups) < 3:
        fix = "set MaxStartups 10:30:100 in its /etc/ssh/sshd_config, then restart sshd"
        found.append(warn("sshd_limits", f"MaxStartups {startups}: logins that come together may be refused", fix))
    return found


def check_clock(remote: Remote) -> Finding:
    """Compare its clock with this machine's, for who reads logs; moectl does not depend on it."""
    before = time.time()
    try:
        words = remote.run(["date", "+%s"], timeout_s=PING_S, check=False).stdout.split()
        there = float(words[-1])
    except (MoectlError, ValueError, IndexError):
        return skip("clock", "its clock could not be read")
    after = time.time()
    skew_s = there + 0.5 - (before + after) / 2  # `date` cuts the second off
    if abs(skew_s) <= 1 + (after - before):
        return ok("clock", "clock right", skew_s=round(skew_s, 1))
    way = "ahead" if skew_s > 0 else "behind"
    aside = " (times in its logs will not line up; nothing else)" if abs(skew_s) > SKEW_S else ""
    return ok("clock", f"clock {abs(skew_s):.0f} s {way}{aside}", skew_s=round(skew_s, 1))


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
    need = least_need(manifest.placement, manifest.quantization, [rank], node.dtype_bytes)
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


def check_versions(found: Mapping[str, Any], expected: Expected, *, deployed: bool) -> Finding:
    """Compare its packages with this machine's: ranks that differ would disagree."""
    packages: Mapping[str, str] = found["packages"]
    text = " · ".join(f"{name} {packages[name]}" for name in PACKAGES if name in packages)
    values = {"packages": dict(packages)}
    missing = [name for name in PACKAGES if name not in packages]
    if missing:
        what = f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed for {found['python']}"
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
    if found["code"] != expected.code:
        text = f"moectl {packages['moectl']} here has other code than on this machine"
        return fail("versions", text, expected.deploy, **values)
    return ok("versions", text, **values)


def count_shards(remote: Remote, found: Mapping[str, Any], manifest: Manifest | None) -> int:
    """Return the bytes of a shard set that are on the host, whole or in part."""
    if manifest is None:
        return 0
    directory = f"{found['root']}/shards/{manifest.name}"
    done = remote.run([str(found["python"]), "-c", _COUNT, directory], check=False)
    word = (done.stdout.split() or [b""])[-1]
    return int(word) if word.isdigit() else 0


def check_shards(rank: int, there: int, manifest: Manifest, deploy: str) -> Finding:
    """Say whether a rank's files are there, by their size; `deploy --verify` reads them."""
    total = _rank_bytes(manifest, rank)
    if there < total:
        sizes = f"{format_gb(there)} of {format_gb(total)}"
        return fail("shards", f"{manifest.name} is not complete: {sizes} are there", deploy, bytes=there)
    return ok("shards", f"{manifest.name} {format_gb(total)}", bytes=there)


def check_disk(host: Host, rank: int, found: Mapping[str, Any], manifest: Manifest | None, there: int) -> Finding:
    """Compare what its disk has left with what is still to be copied there."""
    free, root = int(found["free"]), str(found["root"])
    values = {"free_bytes": free}
    if not found["writable"]:
        return fail("disk", f"cannot write to {root}: permission denied", f"give {host.name} another dir=", **values)
    needed = 0 if found["packages"].get("mlx-lm") else ENVIRONMENT_BYTES
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
