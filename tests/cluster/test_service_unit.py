"""The service under systemd: its unit, checked by systemd's own programs, and how `systemctl show` is read."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moectl.cluster.service.job import ServiceJob, Standing
from moectl.cluster.service.systemd import UNIT, Systemd, quote, read_standing
from tests.support.user_manager import run_user_manager, why_not

ODD = ("a b", 'say "hi"', "50%", "$HOME", "back\\slash", "ünïcode", "it's", "a;b", "-", "", "#x", "%h")


def make_job(tmp_path: Path, program: tuple[str, ...] = ("/usr/bin/env",), words: tuple[str, ...] = ()) -> ServiceJob:
    return ServiceJob(
        "login", program, words, {"HF_HOME": f"{tmp_path}/a b%"}, f"{tmp_path}/lo g%/x.log", "http://127.0.0.1:1/v1"
    )


def test_systemd_finds_no_fault_in_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / UNIT
    unit.write_bytes(Systemd().render(make_job(tmp_path, words=ODD)))
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path)}
    done = subprocess.run(
        ["systemd-analyze", "--user", "verify", "--man=no", str(unit)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, [line for line in done.stderr.splitlines() if UNIT in line]) == (0, [])
    unit.write_text(unit.read_text().replace("KillMode=mixed", "KillMode=mixxed"))
    done = subprocess.run(
        ["systemd-analyze", "--user", "verify", "--man=no", str(unit)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "mixxed" in done.stderr  # it does look


@pytest.mark.skipif(bool(why_not()), reason=why_not() or "it runs")
def test_systemd_reads_the_words_as_they_were_given(tmp_path: Path) -> None:
    """By a real `systemd --user`: the words of the command, the environment, the log, the step before."""
    program = tmp_path / "moectl prog%"
    program.write_text(
        f"#!{sys.executable}\nimport os, sys\nprint(sys.argv[1:], os.environ['HF_HOME'], os.getcwd(), flush=True)\n"
        "sys.exit(3 if sys.argv[1] == 'setup' else 0)\n"
    )
    program.chmod(0o755)
    job = make_job(tmp_path, (str(program),), ODD)
    Path(job.log).parent.mkdir()
    unit = tmp_path / ".config/systemd/user" / UNIT
    unit.parent.mkdir(parents=True)
    unit.write_bytes(Systemd().render(job))
    with run_user_manager(tmp_path) as manager:
        manager.run("systemctl", "--user", "start", UNIT)
        manager.wait_for(UNIT, "ActiveState", ["inactive"])
    again, serve = Path(job.log).read_text().splitlines()
    environment = f"{tmp_path}/a b% /"
    assert again == f"['setup', '--again', '--quiet'] {environment}"  # and that it fails does not matter
    assert serve == f"{['serve', *ODD]!r} {environment}"


def test_a_plain_word_stays_as_it_is() -> None:
    assert quote("/opt/venv/bin/moectl") == "/opt/venv/bin/moectl"
    assert quote("HF_HOME=/a$b", command=False) == "HF_HOME=/a$b"
    assert quote("") == '""'


@pytest.mark.parametrize(
    ("told", "standing"),
    [
        (
            "ActiveState=active\nSubState=running\nUnitFileState=enabled\nMainPID=12\n"
            "ExecMainStartTimestampMonotonic=2000000\nExecMainExitTimestampMonotonic=0\nExecMainStatus=0\nNRestarts=2",
            Standing("running", True, 12, 8.0, None, 3),
        ),
        (
            "ActiveState=activating\nSubState=auto-restart\nUnitFileState=enabled\nMainPID=0\nExecMainStatus=5\n"
            "ExecMainStartTimestampMonotonic=2000000\nExecMainExitTimestampMonotonic=3000000\nExecMainCode=1",
            Standing("waiting", True, None, None, 5, 1),
        ),
        (
            "ActiveState=failed\nSubState=failed\nUnitFileState=disabled\nMainPID=0\nExecMainStatus=9\n"
            "ExecMainStartTimestampMonotonic=2000000\nExecMainExitTimestampMonotonic=3000000\nExecMainCode=2",
            Standing("failed", False, None, None, 137, 1),
        ),
        ("ActiveState=inactive\nSubState=dead\nUnitFileState=\nMainPID=0", Standing("stopped", False, starts=1)),
    ],
    ids=["running", "waiting", "killed", "unknown"],
)
def test_how_a_unit_stands(told: str, standing: Standing) -> None:
    assert read_standing(told, 10.0) == standing
