"""The service under launchd: an agent of the user, started at login, or a daemon of the system, started at boot.

Sources: launchd.plist(5), launchctl(1). An agent needs a login at the screen. A daemon runs as the user, before anyone
logs in; only root can install it. With FileVault nothing starts before the disk is unlocked. launchd sends SIGTERM to
the process that it started alone, so that has to be moectl: `caffeinate` around it would get it instead. A session
starts its own (`keep_awake`).
"""

from __future__ import annotations

import contextlib
import getpass
import os
import plistlib
import re
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moectl.cluster.service.job import ENDING_S, RETRY_S, ServiceJob, Standing, prepare_log, said, tool
from moectl.cluster.setup.run import Sudo
from moectl.errors import CommandFailed, StateError
from moectl.files import make_private_directory, write_whole
from moectl.hosts.onhost.workers import parse_elapsed
from moectl.hosts.remote import Completed, LocalRemote
from moectl.paths import state_dir

LABEL = "moectl.serve"
DAEMONS = Path("/Library/LaunchDaemons")
# launchd's own PATH has neither Homebrew's nor MacPorts' programs; an ssh configuration may name one.
_PATH = "/opt/homebrew/bin:/usr/local/bin:/opt/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
_LOOK_S = 0.2


@dataclass
class Launchd:
    """The Mac's launchd; `sudo` is for what only root may do."""

    sudo: Sudo = field(default_factory=Sudo)
    name = "launchd"

    def path(self, at: str) -> Path:
        directory = DAEMONS if at == "boot" else Path.home() / "Library" / "LaunchAgents"
        return directory / f"{LABEL}.plist"

    def render(self, job: ServiceJob) -> bytes:
        """Return the property list."""
        # In one shell, so that both are read as they are typed; exec, so that signals reach moectl.
        line = f"{shlex.join(job.again)}; exec {shlex.join(job.serve)}"
        home = str(Path.home())
        content: dict[str, Any] = {
            "Label": LABEL,
            "ProgramArguments": ["/bin/sh", "-c", line],
            "EnvironmentVariables": {"HOME": home, "PATH": _PATH, **job.environment},
            "WorkingDirectory": "/",
            "RunAtLoad": True,
            "KeepAlive": {"SuccessfulExit": False},
            "ThrottleInterval": RETRY_S,
            "ExitTimeOut": ENDING_S,
            "ProcessType": "Interactive",  # otherwise launchd may slow it down
            "StandardOutPath": job.log,
            "StandardErrorPath": job.log,
        }
        if job.at == "boot":
            content["UserName"] = getpass.getuser()
        return plistlib.dumps(content, sort_keys=False)

    def needs_root(self, at: str) -> bool:
        return at == "boot"

    def refuse(self, at: str) -> None:
        if os.geteuid() == 0:
            raise StateError(
                "as root, the service would look for keys and models in root's home",
                hint="run it as yourself, without sudo: it asks for what it needs",
            )

    def install(self, job: ServiceJob) -> str:
        prepare_log(job)
        path = staged = self.path(job.at)
        if job.at == "boot":
            staged = staged_path()
        before = path.read_bytes() if path.exists() else None
        try:
            make_private_directory(staged.parent)
        except OSError as error:
            raise StateError(f"cannot make {staged.parent}: {error.strerror}") from None
        write_whole(staged, self.render(job))
        self._leave(job.at)
        try:
            if job.at == "boot":
                self._run(job.at, install_command(path))
            elif not self._can_start():
                return "It starts at the next login at this Mac's screen: launchd starts no agent over SSH before that."
            self._run(job.at, ["launchctl", "enable", self._target(job.at)])
            self._run(job.at, ["launchctl", "bootstrap", self._domain(job.at), str(path)])
        except CommandFailed:
            if job.at != "boot":
                _put_back(path, before)
            raise
        return ""

    def start(self, at: str) -> None:
        if self._told(at) is None:
            self._run(at, ["launchctl", "bootstrap", self._domain(at), str(self.path(at))])
        else:
            self._run(at, ["launchctl", "kickstart", self._target(at)])

    def stop(self, at: str) -> None:
        self._leave(at)

    def remove(self, at: str) -> None:
        self._leave(at)
        if at == "boot":
            self._run(at, ["rm", "-f", str(self.path(at))])
            staged_path().unlink(missing_ok=True)
        else:
            self.path(at).unlink(missing_ok=True)

    def look(self, at: str) -> Standing:
        found = read_standing(self._told(at), self._is_enabled(at))
        if found.pid is None:
            return found
        with contextlib.suppress(ValueError):  # it may have ended meanwhile
            text = tool("ps", "-o", "etime=", "-p", str(found.pid)).stdout.decode("ascii", "replace")
            return replace(found, up_s=parse_elapsed(text))
        return found

    def _told(self, at: str) -> str | None:
        """Return what launchd tells of the job; None where it does not know it."""
        done = tool("launchctl", "print", self._target(at))
        return done.stdout.decode("utf-8", "replace") if done.code == 0 else None

    def _is_enabled(self, at: str) -> bool:
        done = tool("launchctl", "print-disabled", self._domain(at))
        told = done.stdout.decode("utf-8", "replace")
        return re.search(rf'"{re.escape(LABEL)}" => (disabled|true)', told) is None

    def _leave(self, at: str) -> None:
        """Let launchd forget the job, and wait until its process has ended. Raises CommandFailed."""
        if self._told(at) is None:
            return
        done = self._try(at, ["launchctl", "bootout", self._target(at)])
        deadline = time.monotonic() + ENDING_S
        while self._told(at) is not None:
            if time.monotonic() > deadline:
                raise CommandFailed(f"launchctl bootout failed: {said(done)}")
            time.sleep(_LOOK_S)

    def _can_start(self) -> bool:
        """Whether the user is logged in at the screen: otherwise there is no domain for agents."""
        return tool("launchctl", "print", self._domain("login")).code == 0

    def _domain(self, at: str) -> str:
        return "system" if at == "boot" else f"gui/{os.getuid()}"

    def _target(self, at: str) -> str:
        return f"{self._domain(at)}/{LABEL}"

    def _try(self, at: str, argv: Sequence[str]) -> Completed:
        return self.sudo.run(LocalRemote(), argv) if at == "boot" else tool(*argv)

    def _run(self, at: str, argv: Sequence[str]) -> None:
        done = self._try(at, argv)
        if done.code != 0:
            raise CommandFailed(f"{'sudo ' * (at == 'boot')}{shlex.join(argv)} failed: {said(done)}")


def staged_path() -> Path:
    """Return where the daemon's property list lies until root puts it in its place."""
    return state_dir() / f"{LABEL}.plist"


def install_command(path: Path) -> list[str]:
    """Return what root runs to put the property list in its place; launchd wants it to be root's and wheel's."""
    return ["install", "-m", "644", "-o", "0", "-g", "0", str(staged_path()), str(path)]


def root_commands(action: str) -> list[list[str]]:
    """Return what root has to run to install, start or remove the daemon, as it would be typed."""
    path = DAEMONS / f"{LABEL}.plist"
    bootstrap = ["launchctl", "bootstrap", "system", str(path)]
    bootout = ["launchctl", "bootout", f"system/{LABEL}"]
    match action:
        case "install":
            return [install_command(path), ["launchctl", "enable", f"system/{LABEL}"], bootstrap]
        case "remove":
            return [bootout, ["rm", "-f", str(path)]]
        case _:
            return [bootstrap]


def read_standing(text: str | None, enabled: bool) -> Standing:
    """Return how a job stands, from what `launchctl print` prints; None where launchd does not know it."""
    if text is None:
        return Standing("stopped", enabled)

    def find(pattern: str) -> str | None:
        match = re.search(rf"^\s*{pattern}", text, re.MULTILINE)
        return match[1] if match else None

    pid, code, runs = find(r"pid = (\d+)$"), find(r"last exit code = (\d+)"), find(r"runs = (\d+)$")
    signalled = find(r"last terminating signal = .*?(\d+)$")
    ended = 128 + int(signalled) if signalled else int(code) if code else None
    state = "running" if pid else "waiting" if ended else "stopped"
    return Standing(
        state, enabled, int(pid) if pid else None, exit_code=None if pid else ended, starts=int(runs) if runs else None
    )


def _put_back(path: Path, before: bytes | None) -> None:
    """Undo an installation that failed."""
    if before is None:
        path.unlink(missing_ok=True)
    else:
        write_whole(path, before)
