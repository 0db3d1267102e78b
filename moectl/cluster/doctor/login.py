"""Whether SSH reaches a host, and what its login shell, its sshd and its clock are like."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import time
from collections.abc import Mapping

from moectl.cluster.doctor.finding import Finding, Level, at_host, fail, fail_with, ok, skip, warn, worst
from moectl.errors import CommandFailed, MoectlError
from moectl.hosts.connect import run_at_once
from moectl.hosts.hostfile import Host
from moectl.hosts.login_shell import describe_quiet
from moectl.hosts.programs import end_process
from moectl.hosts.remote import Process, Remote
from moectl.hosts.ssh.config import SSHSettings, read_ssh_settings
from moectl.text import count_text

PING_S = 15.0  # for a login shell to run `true`
PINGS = 5
SESSIONS = 2  # that moectl holds on one connection at once
SKEW_S = 60.0


def check_login(host: Host, remote: Remote, findings: list[Finding]) -> bool:
    """Log in and add what is found; return whether the host can be asked anything else."""
    with contextlib.suppress(MoectlError):
        findings += check_agent(read_ssh_settings(host.name, user=host.user, port=host.port))
    try:
        done = remote.run(["true"], timeout_s=PING_S)
    except CommandFailed as error:
        fix = f"{at_host(host, 'true')} should say nothing and end at once: look at its shell's startup files"
        why = error.message.removeprefix("its login shell does not run commands: ")
        findings.append(fail("shell", f"its login shell does not run a command: {why}", fix))
        return False
    except MoectlError as error:
        findings.append(fail_with("ssh", error))
        return False
    sessions = check_sessions(host, remote)
    findings += sessions
    if worst(sessions) is Level.FAIL:
        return False  # a further session may be refused as well
    findings += check_noise(host, done.noise + done.stdout, done.stderr, _ask_shell(remote))
    findings.append(check_clock(remote))
    return True


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
        return [ok("agent", f"agent with {count_text(count, 'key')}", keys=count)]
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
            end_process(process, PING_S)
    return [ok("ssh", f"ssh {1e3 * seconds:.1f} ms", latency_s=seconds)]


def _ping(process: Process) -> float:
    """Return the median seconds of some round trips. Raises OSError, TimeoutError."""
    seconds: list[float] = []

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

    if not run_at_once([ping], PING_S)[0]:
        raise TimeoutError(f"no echo within {PING_S:g} s")
    if len(seconds) < PINGS:
        raise ConnectionError("it closed the session")
    return statistics.median(seconds)


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


def check_sshd_limits(limits: Mapping[str, str]) -> list[Finding]:
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
