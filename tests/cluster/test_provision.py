"""What a failed step of an environment's installation says: the lines of pip and of venv that give the reason."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from moectl.cluster.deploy.environment import reason_of
from moectl.hosts.onhost import deploy

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
