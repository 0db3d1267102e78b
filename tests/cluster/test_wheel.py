"""The wheel that `deploy` sends: the running moectl, whole, the same bytes each time, and pip takes it."""

from __future__ import annotations

import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import moectl
from moectl.cluster.deploy.wheel import download_command, pack_wheel
from moectl.errors import VersionMismatch


def test_the_wheel_holds_what_runs_here_and_pip_takes_it(tmp_path: Path) -> None:
    wheel = pack_wheel(tmp_path)
    assert wheel.name == f"moectl-{moectl.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {"moectl/__init__.py", "moectl/hosts/onhost/files.py", "moectl/model/__init__.py"} <= names
    assert not [n for n in names if "__pycache__" in n]
    # pip checks tag, metadata and RECORD, and unpacks it as it would on a host.
    target = tmp_path / "target"
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(wheel)], check=True, capture_output=True)
    said = subprocess.run(
        [sys.executable, "-S", "-c", "import moectl; print(moectl.__version__, moectl.__file__)"],
        cwd=target,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert said == [moectl.__version__, str(target / "moectl" / "__init__.py")]
    assert (target / "bin" / "moectl").exists()


def test_the_download_command_names_what_is_needed_and_works() -> None:
    command = shlex.split(download_command("some where", {"moectl": "1", "mlx": "0.1", "mlx-lm": "0.2"}))
    assert command[:5] == ["pip", "download", "--only-binary=:all:", "-d", "some where"]
    assert command[5:7] == ["mlx==0.1", "mlx-lm==0.2"]
    names = {Requirement(word).name for word in command[5:]}
    assert {"mlx", "mlx-lm", "click", "paramiko", "huggingface-hub", "safetensors", "tqdm"} <= names
    assert not {"moectl", "pytest"} & names


def test_equal_packages_give_equal_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "moectl"
    (package / "demo").mkdir(parents=True)
    (package / "__init__.py").write_text("x = 1\n")
    (package / "demo" / "weights.bin").write_bytes(bytes(1000))
    monkeypatch.setattr(moectl, "__file__", str(package / "__init__.py"))
    for name in "ab":
        (tmp_path / name).mkdir()
    first = pack_wheel(tmp_path / "a").read_bytes()
    assert pack_wheel(tmp_path / "b").read_bytes() == first
    (package / "__init__.py").write_text("x = 2\n")
    assert pack_wheel(tmp_path / "b").read_bytes() != first


def test_a_version_that_was_not_installed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moectl, "__version__", "99.0")
    with pytest.raises(VersionMismatch, match=r"this moectl is 99\.0, but was installed as"):
        pack_wheel(tmp_path)
