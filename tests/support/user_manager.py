"""A real `systemd --user` for tests, in namespaces of its own: a process tree, mounts and a group of its own.

There is no systemd as process 1 here, so it is given what it looks for: an empty /run/systemd/system, and a cgroup2 at
/sys/fs/cgroup. The namespaces see this machine's files, so units are found in the HOME that is given. Needs root.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SYSTEMD = Path("/lib/systemd/systemd")
_BEGIN = """
mount -t tmpfs none /run && mkdir -p /run/systemd/system && mount -t cgroup2 none /sys/fs/cgroup || exit 1
/lib/systemd/systemd --user &
wait
"""  # not as process 1, which it would take for the whole system's


@dataclass(frozen=True)
class UserManager:
    """A running user manager; `pid` is the first process of its namespaces, seen from outside."""

    pid: int
    environment: Mapping[str, str]

    def run(self, *argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command as a login of this user would."""
        inside = ["nsenter", "--target", str(self.pid), "--mount", "--pid", "--cgroup", "--"]
        return subprocess.run(
            [*inside, *argv], env=self.environment, capture_output=True, text=True, check=check, timeout=120
        )

    def show(self, unit: str, *names: str) -> dict[str, str]:
        """Return properties of a unit."""
        told = self.run("systemctl", "--user", "show", unit, *(f"--property={name}" for name in names)).stdout
        return dict(line.partition("=")[::2] for line in told.splitlines())

    def wait_for(self, unit: str, name: str, wanted: Sequence[str], limit_s: float = 120) -> str:
        """Wait until a property of a unit has one of these values, and return it."""
        deadline = time.monotonic() + limit_s
        while (found := self.show(unit, name).get(name, "")) not in wanted:
            assert time.monotonic() < deadline, f"{name} is {found}"
            time.sleep(0.2)
        return found


def why_not() -> str:
    """Return why no user manager can be started here; empty where one can."""
    if not SYSTEMD.exists() or shutil.which("systemctl") is None:
        return "systemd is not installed"
    if os.geteuid() != 0:
        return "namespaces for systemd --user need root"
    return ""


@contextlib.contextmanager
def run_user_manager(home: Path, **environment: str) -> Iterator[UserManager]:
    """Run a user manager whose HOME and XDG_RUNTIME_DIR are below `home`, until the block ends."""
    runtime = home / "run"
    runtime.mkdir(mode=0o700, exist_ok=True)
    names = {"PATH": os.environ["PATH"], "HOME": str(home), "XDG_RUNTIME_DIR": str(runtime), **environment}
    words = ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--cgroup", "--mount-proc", "sh", "-c", _BEGIN]
    with (home / "manager.log").open("wb") as log:
        parent = subprocess.Popen(words, env=names, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while not (runtime / "systemd" / "private").exists():
            assert parent.poll() is None, (home / "manager.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        child = int(Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()[0])
        yield UserManager(child, names)
    finally:
        parent.kill()  # with it go all processes of its namespace
        parent.wait()
