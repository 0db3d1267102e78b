"""MLX's and mlx-lm's wheels still have what moectl relies on: variables, parts of messages, names that it imports."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import pytest

from tests.conftest import pytest_report_header
from tests.support.relied_on import (
    LINUX,
    MACS,
    NAMES,
    find_missing,
    list_symbols,
    list_used,
    read_directory,
    read_wheels,
)

PACKAGES = ("mlx", "mlx-metal")
DOWNLOAD = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:")


CI = Path(__file__).parent.parent / ".ci"


def _texts_of(wheel: str) -> list[str]:
    return [name.text for name in NAMES if wheel in name.wheels]


def test_moectl_has_no_name_that_is_not_listed() -> None:
    """tests/support/relied_on.py is the one list."""
    known = {name.text for name in NAMES} | {name.text.partition("]")[0] + "]" for name in NAMES if name.text[0] == "["}
    assert {(module, name) for module, name in list_used() if name not in known} == set()
    assert ("session.backend", "MLX_RANK") in set(list_used())


@pytest.mark.skipif(sys.platform != "linux", reason="another system has other wheels")
def test_the_installed_mlx_has_the_names() -> None:
    assert find_missing(read_directory(Path(mx.__file__).parent), _texts_of(LINUX)) == set()


def test_each_name_that_is_imported_is_there() -> None:
    assert {"mlx.core.distributed.init", "mlx_lm.generate.BatchGenerator"} <= list_symbols()
    assert [symbol for symbol in sorted(list_symbols()) if not _exists(symbol)] == []


def test_a_name_that_has_gone_is_found() -> None:
    assert find_missing([b"..MLX_RANK..", b"[ring] lost"], ["MLX_RANK", "[ring]", "MLX_HOSTFILE"]) == {"MLX_HOSTFILE"}
    assert not _exists("mlx.core.distributed.no_such_thing")
    assert not _exists("mlx_lm.no_such_module.Thing")


def test_a_run_says_which_versions_it_tried() -> None:
    said = pytest_report_header()
    assert f"mlx {version('mlx')}, mlx-lm {version('mlx-lm')}," in said


@pytest.mark.parametrize("name", ["run", "newest"])
def test_the_scripts_of_the_ci_are_sound(name: str) -> None:
    script = CI / name
    assert os.access(script, os.X_OK)
    for tests in re.findall(r"\btests/\S+\.py", script.read_text()):
        assert (CI.parent / tests).is_file()
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.long
@pytest.mark.parametrize("wheel", MACS)
def test_the_wheels_for_macs_have_the_names(wheel: str, tmp_path: Path) -> None:
    wanted = [f"{package}=={version('mlx')}" for package in PACKAGES]
    words = ("--platform", wheel, "--python-version", "3.11", "--dest", str(tmp_path))
    done = subprocess.run([*DOWNLOAD, *words, *wanted], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the wheels for {wheel} cannot be had: {done.stderr.strip()[-200:]}")
    assert find_missing(read_wheels(tmp_path), _texts_of(wheel)) == set()
    # Their type stubs say what mlx.core has on a Mac.
    last = {symbol.rpartition(".")[2] for symbol in list_symbols() if symbol.startswith("mlx.core.")}
    assert find_missing(read_wheels(tmp_path), last) == set()


def _exists(symbol: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one."""
    parts = symbol.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        return all((found := getattr(found, part, None)) is not None for part in parts[length:])
    return False
