"""Which python of a host is taken, by the shell program itself: a Mac's tools and pythons are small scripts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moectl.errors import VersionMismatch
from moectl.hosts.programs import CANDIDATES, FIND, FITS, NO_PYTHON, explain_silence

SHOW = "import os; print(os.environ['SYSTEM_VERSION_COMPAT'])"


def write_script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def find(
    home: Path, *pythons: str, text: str = SHOW, oldest: str = "3.11", path: str = os.environ["PATH"]
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", FIND, "moectl", text, "", oldest, *pythons],
        env={"HOME": str(home), "PATH": path},
        capture_output=True,
        text=True,
    )


def test_programs_on_a_mac_hear_its_real_version(tmp_path: Path) -> None:
    """Without it macOS 26 is 16 to a python with an older SDK, and pip takes mlx for macOS 15, without RDMA."""
    assert find(tmp_path, sys.executable).stdout == "0\n"


def make_mac(directory: Path, *, tools: bool) -> str:
    """Return a PATH with a Mac's uname and xcode-select; with or without Apple's command line tools."""
    write_script(directory / "uname", "echo Darwin")
    write_script(directory / "xcode-select", f"exit {0 if tools else 2}")
    return f"{directory}:/usr/bin:/bin"


@pytest.mark.skipif(not Path("/usr/bin/python3").exists(), reason="needs a python in the place of Apple's")
@pytest.mark.parametrize("name", ["python3", "/usr/bin/python3"])
def test_the_program_that_opens_a_window_is_not_run(tmp_path: Path, name: str) -> None:
    text = "import sys; print(sys.executable)"
    bare = find(tmp_path, name, sys.executable, text=text, oldest="3.0", path=make_mac(tmp_path / "a", tools=False))
    assert bare.stdout == f"{sys.executable}\n"
    full = find(tmp_path, name, sys.executable, text=text, oldest="3.0", path=make_mac(tmp_path / "b", tools=True))
    assert full.stdout == "/usr/bin/python3\n"


@pytest.mark.parametrize("place", ["~/.pyenv/versions/*/bin/python3", "~/.local/bin/python3.15", "~/a b/python3"])
def test_pythons_of_a_user_are_found(tmp_path: Path, place: str) -> None:
    home = tmp_path / "home of ada"
    for name in ("3.9.1", "3.12.0"):
        target = home / place.removeprefix("~/").replace("*", name)
        write_script(target, f"echo 3.9.1; exit 0\n#{name}" if name == "3.9.1" else f'exec "{sys.executable}" "$@"')
    assert find(home, place).stdout == "0\n"


def test_a_name_with_a_star_is_a_name(tmp_path: Path) -> None:
    write_script(tmp_path / "other" / "python3", "echo fits")
    assert find(tmp_path, f"{tmp_path}/*/python3").returncode == NO_PYTHON


def test_candidates_are_where_macs_have_them() -> None:
    assert CANDIDATES[0] == "python3"
    for place in (
        "python3.15",
        "/opt/homebrew/bin/python3.12",
        "~/.local/bin/python3.13",
        "/opt/local/bin/python3.11",
        "~/.pyenv/versions/*/bin/python3",
        "~/miniforge3/bin/python3",
        "/Library/Frameworks/Python.framework/Versions/3.15/bin/python3",
    ):
        assert place in CANDIDATES
    assert CANDIDATES.index("/opt/homebrew/bin/python3") < CANDIDATES.index("/usr/local/bin/python3")  # that is Intel's


def test_a_python_for_intel_has_a_sentence_of_its_own(tmp_path: Path) -> None:
    rosetta = write_script(tmp_path / "python3", "echo 3.12.1 for Intel")
    done = find(tmp_path, str(rosetta))
    assert done.returncode == NO_PYTHON
    error = explain_silence("mac1", done.returncode, done.stderr.encode(), (3, 11))
    assert isinstance(error, VersionMismatch)
    assert str(error) == (
        "mac1: mlx runs on Apple silicon only, and there is no python 3.11 or newer for it "
        f"({rosetta} is 3.12.1 for Intel: it runs in Rosetta, or the Mac has an Intel processor)"
    )
    # What the hint says is done: a python for its own processor beside it.
    assert str(error.hint).startswith("install a python for Apple silicon there")
    assert find(tmp_path, str(rosetta), sys.executable).returncode == 0


@pytest.mark.parametrize(
    ("system", "machine", "said"),
    [("darwin", "arm64", "fits"), ("darwin", "x86_64", " for Intel"), ("linux", "x86_64", "fits")],
)
def test_what_a_python_says_of_itself(system: str, machine: str, said: str) -> None:
    patch = f"import os, sys, types; sys.platform = {system!r}\n"
    patch += f"os.uname = lambda: types.SimpleNamespace(machine={machine!r})\n"
    done = subprocess.run([sys.executable, "-c", patch + FITS, "3.11"], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith(said.strip())
