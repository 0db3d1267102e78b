"""The service under systemd, as a unit of the user's own manager: it needs no root.

Sources: systemd.unit(5), systemd.service(5), systemd.exec(5), loginctl(1). A user's manager starts at the first login,
and ends with the last session; where the user lingers, it starts at boot and stays.
"""

from __future__ import annotations

import getpass
import os
import re
import time
from pathlib import Path

from moectl.cluster.service.job import ENDING_S, RETRY_S, ServiceJob, Standing, prepare_log, said, tool
from moectl.errors import CommandFailed, StateError
from moectl.files import make_private_directory, write_whole
from moectl.hosts.remote import NOT_FOUND

UNIT = "moectl.service"
# 2 and 4: flags, hosts or a plan that cannot work. A host that is away ends `serve` with 5: that is tried again.
_LASTING = "2 4"
_STATES = {
    "active": "running",
    "reloading": "running",
    "activating": "starting",
    "deactivating": "running",
    "failed": "failed",
}
_SHOWN = (
    "ActiveState",
    "SubState",
    "UnitFileState",
    "MainPID",
    "ExecMainStartTimestampMonotonic",
    "ExecMainExitTimestampMonotonic",
    "ExecMainStatus",
    "ExecMainCode",
    "NRestarts",
)
_SIGNALLED = ("2", "3")  # CLD_KILLED, CLD_DUMPED


class Systemd:
    """The user's systemd."""

    name = "systemd"

    def path(self, at: str) -> Path:
        base = os.environ.get("XDG_CONFIG_HOME") or ""
        home = Path(base) if Path(base).is_absolute() else Path.home() / ".config"
        return home / "systemd" / "user" / UNIT

    def render(self, job: ServiceJob) -> bytes:
        """Return the unit."""
        log = job.log.replace("%", "%%")
        lines = [
            "[Unit]",
            "Description=moectl serve",
            "Documentation=man:moectl-service(1)",
            "StartLimitIntervalSec=0",
            "",
            "[Service]",
            "Type=exec",
            "WorkingDirectory=/",
            *(f"Environment={quote(f'{name}={value}', command=False)}" for name, value in job.environment.items()),
            f"ExecStartPre=-{command(job.again)}",
            f"ExecStart={command(job.serve)}",
            f"StandardOutput=append:{log}",
            f"StandardError=append:{log}",
            "TimeoutStartSec=300",
            "KillMode=mixed",  # moectl ends its workers itself
            "KillSignal=SIGINT",
            f"TimeoutStopSec={ENDING_S}",
            "SuccessExitStatus=130 143",
            "Restart=on-failure",
            f"RestartSec={RETRY_S}",
            f"RestartPreventExitStatus={_LASTING}",
            "",
            "[Install]",
            "WantedBy=default.target",
            "",
        ]
        return "\n".join(lines).encode()

    def needs_root(self, at: str) -> bool:
        return False

    def refuse(self, at: str) -> None:
        done = tool("systemctl", "--user", "show", "--property=Version")
        if done.code == NOT_FOUND:
            raise StateError(
                "there is no systemd on this machine",
                hint="let its own init run what 'moectl service install --dry-run' shows as ExecStart",
            )
        if done.code != 0:
            raise StateError(
                f"this login has no systemd of its own: {said(done)}",
                hint="log in at the machine or by ssh; su and sudo start none",
            )
        if at == "boot" and not _lingers():
            done = tool("loginctl", "enable-linger")
            if done.code != 0:
                raise StateError(
                    f"services of this user cannot start at boot: {said(done)}",
                    hint=f"sudo loginctl enable-linger {getpass.getuser()}, then the same again; or --at login",
                )

    def install(self, job: ServiceJob) -> str:
        path = self.path(job.at)
        prepare_log(job)
        before = path.read_bytes() if path.exists() else None
        try:
            make_private_directory(path.parent)
        except OSError as error:
            raise StateError(f"cannot make {path.parent}: {error.strerror}") from None
        write_whole(path, self.render(job))
        try:
            _systemctl("daemon-reload")
            _systemctl("enable", UNIT)
            _systemctl("restart", "--no-block", UNIT)
        except CommandFailed:
            _put_back(path, before)
            raise
        if job.at == "login" and _lingers():
            return "This user lingers (loginctl), so it starts at boot already."
        return ""

    def start(self, at: str) -> None:
        _systemctl("start", "--no-block", UNIT)

    def stop(self, at: str) -> None:
        _systemctl("stop", UNIT)

    def remove(self, at: str) -> None:
        _systemctl("disable", "--now", UNIT)
        self.path(at).unlink(missing_ok=True)
        _systemctl("daemon-reload")
        tool("systemctl", "--user", "reset-failed", UNIT)  # fails where it had not failed

    def look(self, at: str) -> Standing:
        done = tool("systemctl", "--user", "show", UNIT, *(f"--property={name}" for name in _SHOWN))
        if done.code != 0:
            self.refuse("login")
            raise CommandFailed(f"systemctl: {said(done)}")
        return read_standing(done.stdout.decode("utf-8", "replace"), time.clock_gettime(time.CLOCK_MONOTONIC))


def read_standing(text: str, now_s: float) -> Standing:
    """Return how a unit stands, from what `systemctl show` prints."""
    told = dict(line.partition("=")[::2] for line in text.splitlines())
    state = _STATES.get(told.get("ActiveState", ""), "stopped")
    if told.get("SubState") == "auto-restart":
        state = "waiting"
    pid = int(told.get("MainPID") or 0) or None
    began_s = int(told.get("ExecMainStartTimestampMonotonic") or 0) / 1e6
    ended = int(told.get("ExecMainExitTimestampMonotonic") or 0) > 0
    code = int(told.get("ExecMainStatus") or 0)
    if told.get("ExecMainCode") in _SIGNALLED:
        code += 128
    return Standing(
        state,
        enabled=told.get("UnitFileState") == "enabled",
        pid=pid,
        up_s=now_s - began_s if pid and began_s else None,
        exit_code=code if ended and pid is None else None,
        starts=int(told.get("NRestarts") or 0) + 1,
    )


def command(words: tuple[str, ...]) -> str:
    """Return a command as a unit's line wants it."""
    return " ".join(quote(word) for word in words)


def quote(word: str, *, command: bool = True) -> str:
    """Return a word as systemd reads it back: quotes and escapes of C, `%` doubled, and in a command `$` doubled."""
    text = word.replace("%", "%%")
    if command:
        text = text.replace("$", "$$")
    if re.fullmatch(r"[\w@%+=:,./$-]+", text, re.ASCII):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
    return f'"{escaped}"'


def _lingers() -> bool:
    done = tool("loginctl", "show-user", getpass.getuser(), "--property=Linger")
    return done.code == 0 and done.stdout.strip() == b"Linger=yes"


def _systemctl(*words: str) -> None:
    done = tool("systemctl", "--user", *words)
    if done.code != 0:
        raise CommandFailed(f"systemctl --user {' '.join(words)} failed: {said(done)}")


def _put_back(path: Path, before: bytes | None) -> None:
    """Undo an installation that failed."""
    if before is None:
        path.unlink(missing_ok=True)
    else:
        write_whole(path, before)
    tool("systemctl", "--user", "daemon-reload")
