"""`moectl service` under a real `systemd --user`: installed, serving, failing, stopped, started again, removed."""

from __future__ import annotations

import json
import signal
import socket
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from moectl.cluster.service.systemd import UNIT
from tests.support.user_manager import UserManager, run_user_manager, why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "it runs")
MOECTL = [sys.executable, "-m", "moectl"]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def status(manager: UserManager) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(manager.run(*MOECTL, "service", "status", "--json").stdout)
    return told


def wait_until_served(url: str, limit_s: float = 120) -> None:
    deadline = time.monotonic() + limit_s
    while True:
        try:
            with urllib.request.urlopen(f"{url}/models", timeout=5) as reply:
                assert json.load(reply)["data"]
                return
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.2)


def test_a_service_from_its_installation_to_its_removal(tmp_path: Path) -> None:
    unit = tmp_path / ".config/systemd/user" / UNIT
    port = free_port()
    install = (*MOECTL, "service", "install", "--demo", "--local", "1", "--port", str(port))
    with run_user_manager(tmp_path) as manager:
        assert manager.run(*MOECTL, "service", "status").stdout == "No service is installed.\n"
        shown = manager.run(*install, "--dry-run").stdout
        assert f"serve --port {port} --demo --local 1\n" in shown
        assert not unit.exists()

        done = manager.run(*install)
        assert f"Installed in {unit}. It loads now, and then serves http://127.0.0.1:{port}/v1." in done.stdout
        assert f"ExecStart={unit.read_text().partition('ExecStart=')[2]}" in shown
        wait_until_served(f"http://127.0.0.1:{port}/v1")
        found = status(manager)
        assert (found["state"], found["enabled"], found["as_written"], found["starts"]) == ("running", True, True, 1)
        assert found["pid"] > 0
        assert found["up_s"] > 0
        assert (
            f"Serving moectl-demo, a toy: http://127.0.0.1:{port}/v1"
            in manager.run(*MOECTL, "logs", "controller").stdout
        )
        assert Path(found["log"]).stat().st_mode & 0o077 == 0

        assert "nothing has changed" in manager.run(*install).stdout
        other = manager.run(*install, "--max-restarts", "2", check=False)
        assert (other.returncode, "use --yes to replace it" in other.stderr) == (2, True)
        assert "+ExecStart=" in other.stderr
        assert status(manager)["pid"] == found["pid"]

        manager.run(*MOECTL, "stop", "--now")  # systemd does not start it again
        manager.wait_for(UNIT, "ActiveState", ["inactive"])
        told = manager.run(*MOECTL, "service", "status").stdout
        assert "To start it, moectl service start" in told
        manager.run(*MOECTL, "service", "start")
        assert manager.wait_for(UNIT, "ActiveState", ["activating", "active"])

        done = manager.run(*MOECTL, "service", "remove")
        assert f"The service has ended, and {unit} is removed." in done.stdout
        assert not unit.exists()
        assert manager.show(UNIT, "LoadState", "ActiveState") == {"LoadState": "not-found", "ActiveState": "inactive"}
        assert manager.run(*MOECTL, "service", "remove").stdout == "No service is installed.\n"


def test_what_does_not_mend_itself_is_not_started_again(tmp_path: Path) -> None:
    """Its key file is gone after a while: `serve` ends with 2."""
    key = tmp_path / "key"
    key.write_text("a-key\n")
    with run_user_manager(tmp_path) as manager:
        manager.run(*MOECTL, "service", "install", "--demo", "--local", "1", "--api-key-file", str(key))
        manager.run("systemctl", "--user", "stop", UNIT)
        key.unlink()
        manager.run(*MOECTL, "service", "start")
        manager.wait_for(UNIT, "ActiveState", ["failed"])
        told = manager.run(*MOECTL, "service", "status").stdout
        assert "It ended with 2 (usage)." in told
        assert f"Its last words: Error: {key} cannot be read" in told
        assert "To start it, mend that, then: moectl service start" in told
        key.write_text("a-key\n")
        manager.run(*MOECTL, "service", "start")
        manager.wait_for(UNIT, "ActiveState", ["active"])


@pytest.mark.long
def test_a_service_that_is_killed_comes_again(tmp_path: Path) -> None:
    port = free_port()
    drop_in = tmp_path / ".config/systemd/user" / f"{UNIT}.d" / "soon.conf"
    drop_in.parent.mkdir(parents=True)
    drop_in.write_text("[Service]\nRestartSec=100ms\n")
    with run_user_manager(tmp_path) as manager:
        manager.run(*MOECTL, "service", "install", "--demo", "--local", "1", "--port", str(port))
        wait_until_served(f"http://127.0.0.1:{port}/v1")
        first = status(manager)["pid"]
        manager.run("kill", f"-{signal.SIGKILL.value}", str(first))
        manager.wait_for(UNIT, "NRestarts", ["1"])
        wait_until_served(f"http://127.0.0.1:{port}/v1")
        found = status(manager)
        assert (found["state"], found["starts"]) == ("running", 2)
        assert found["pid"] != first
