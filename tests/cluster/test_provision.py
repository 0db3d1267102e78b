"""What a failed step of an environment's installation says: the lines of pip and of venv that give the reason."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from moectl.cluster.deploy.environment import _list_steps, reason_of
from moectl.cluster.deploy.provision import _find_python, inspect_host
from moectl.cluster.deploy.task import HostTask
from moectl.errors import VersionMismatch
from moectl.hosts.hostfile import Host
from moectl.hosts.macos import explain_missing_rdma
from moectl.hosts.onhost import deploy
from moectl.hosts.remote import LocalRemote
from moectl.model.manifest import FileEntry
from tests.cluster.test_host import environment

NO_MATCH = """\
WARNING: Retrying (Retry(total=0)) after connection broken: Name or service not known: /simple/mlx/
ERROR: Could not find a version that satisfies the requirement mlx==0.32.4 (from versions: none)
ERROR: No matching distribution found for mlx==0.32.4

[notice] A new release of pip is available: 24.0 -> 25.3
[notice] To update, run: pip install --upgrade pip
"""
DEBIAN = """\
The virtual environment was not created successfully because ensurepip is not
available.  On Debian/Ubuntu systems, you need to install the python3-venv
package using the following command.

    apt install python3.11-venv

You may need to use sudo with that command.  After installing the python3-venv
package, recreate your virtual environment.

Failing command: /home/ada/.moectl/env/bin/python3
"""


def test_pips_reason_is_shown_and_not_its_notices() -> None:
    assert reason_of(NO_MATCH) == (
        "Could not find a version that satisfies the requirement mlx==0.32.4 (from versions: none); "
        "No matching distribution found for mlx==0.32.4"
    )


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("", ""),
        (DEBIAN, "The virtual environment was not created successfully because ensurepip is not available"),
        ("[notice] To update, run: pip install --upgrade pip", ""),
        ("/v/bin/python: No module named pip\n", "/v/bin/python: No module named pip"),
        ("error: externally-managed-environment\n\n× This environment\n", "externally-managed-environment"),
        (
            "WARNING: one\nOSError: [Errno 28] No space left on device\n[notice] new\n",
            "OSError: [Errno 28] No space left on device",
        ),
        ("Error: [Errno 13] Permission denied: '/x'", "[Errno 13] Permission denied: '/x'"),
        ("\n".join(f"ERROR: line {i} {'x' * 200}" for i in range(9)), None),
    ],
)
def test_the_reason_is_short_and_comes_from_what_was_said(said: str, reason: str | None) -> None:
    found = reason_of(said)
    assert found == reason if reason is not None else found.startswith("line 0 ")
    assert len(found) <= 400


def test_a_step_that_fails_tells_what_it_printed_on_either_stream(tmp_path: Path) -> None:
    """Debian's venv says on stdout that ensurepip is missing, and how to get it."""
    program = "print('ensurepip is not available: apt install python3.11-venv'); raise SystemExit(1)"
    request = {
        "lock": str(tmp_path / "lock"),
        "stamp": [str(tmp_path / "stamp"), ""],
        "steps": [[sys.executable, "-c", program]],
    }
    with pytest.raises(deploy.StepFailed) as failed:
        deploy.install(request)
    assert "ensurepip is not available: apt install" in failed.value.args[2]


def task(*wheels: str) -> HostTask:
    entries = {Path(name): FileEntry(1, "x") for name in ("moectl-1-py3-none-any.whl", *wheels)}
    return HostTask(0, Host("mac1"), Path(), "tiny", {}, {"mlx": "2"}, "c", entries, dry_run=False, verify=False)


def test_an_mlx_for_an_older_macos_is_replaced_as_the_hint_says() -> None:
    """pip takes an equal version for an equal wheel, so the environment is made again."""
    hint = explain_missing_rdma("macosx_15_0_arm64", (26, 2), "mac1").hint
    assert str(hint).startswith("moectl deploy, which installs the one for macOS 26")
    right = environment(stamp=task().stamp, macos="26.2", wheel="macosx_26_0_arm64")
    old = environment(stamp=task().stamp, macos="26.2", wheel="macosx_15_0_arm64")
    assert (_find_python(task(), right), _find_python(task(), old)) == ("/r/env/bin/python", "")
    assert ("venv" in _list_steps(task(), right), "venv" in _list_steps(task(), old)) == (False, True)


def test_an_mlx_that_cannot_be_replaced_is_left_alone() -> None:
    house = ("mlx_metal-2-py3-none-macosx_15_0_arm64.whl", "requirements.txt")
    for found in (
        environment(stamp=task(*house).stamp, macos="26.2", wheel="macosx_15_0_arm64"),  # the wheelhouse has no other
        environment(stamp=task(*house).stamp, macos="15.7", wheel="macosx_15_0_arm64"),
        environment(stamp=task(*house).stamp, wheel="manylinux_2_35_x86_64"),
    ):
        assert _find_python(task(*house), found) == "/r/env/bin/python"
    newer = task("mlx_metal-2-py3-none-macosx_26_0_arm64.whl", "requirements.txt")
    old = environment(stamp=newer.stamp, macos="16.2", wheel="macosx_15_0_arm64")
    assert _find_python(newer, old) == ""


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ({"macos": "13.6"}, "it has macOS 13.6, and mlx needs 14 or newer"),
        ({"glibc": "2.31"}, "its C library is glibc 2.31, and mlx's wheels need 2.35 or newer"),
    ],
)
def test_a_system_that_mlx_has_no_wheels_for_is_refused(
    monkeypatch: pytest.MonkeyPatch, told: dict[str, str], why: str
) -> None:
    monkeypatch.setattr("moectl.cluster.deploy.provision._survey", lambda remote, task: environment(**told))
    with pytest.raises(VersionMismatch) as refused:
        inspect_host(task(), LocalRemote("mac1"))
    assert str(refused.value) == f"mac1: {why}"
    # An mlx that was built there does not need pip's.
    own = replace(task(), host=Host("mac1", python="/p"), versions=environment().packages)
    monkeypatch.setattr("moectl.cluster.deploy.provision._survey", lambda remote, task: environment(env=False, **told))
    assert inspect_host(own, LocalRemote("mac1")).result.python == "/p"


def test_the_program_that_a_firewall_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A framework's python, as those of python.org and Homebrew are, starts another program."""
    link = tmp_path / "env" / "bin" / "python"
    link.parent.mkdir(parents=True)
    link.symlink_to(sys.executable)
    real = str(Path(sys.executable).resolve())
    monkeypatch.setattr(sys, "executable", str(link))
    assert deploy._find_executable() == real
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path / "3.12"))
    monkeypatch.setattr("sysconfig.get_config_var", lambda name: "Python")
    inner = tmp_path / "3.12" / "Resources" / "Python.app" / "Contents" / "MacOS" / "Python"
    inner.parent.mkdir(parents=True)
    inner.touch()
    assert deploy._find_executable() == str(inner)


def test_the_wheel_of_an_environment_is_found_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "lib" / "python3.12" / "site-packages" / "mlx_metal-0.32.4.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mlx-metal\nVersion: 0.32.4\n")
    (info / "WHEEL").write_text("Wheel-Version: 1.0\nTag: py3-none-macosx_15_0_arm64\n")
    monkeypatch.setattr(sys, "path", [])
    assert deploy._find_wheel(str(tmp_path)) == "macosx_15_0_arm64"
    assert deploy._find_wheel(str(tmp_path / "none")) == ""
