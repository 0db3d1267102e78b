"""sdist and wheel as `python -m build` makes them: what is in them, and what an environment has that installed one.

The environment is fresh but for moectl's dependencies, which it borrows from this one: no network is needed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import moectl
from moectl.hosts.onhost.deploy import list_package

ROOT = Path(moectl.__file__).parent.parent
MOST_BYTES = 10_000_000
SHARE = {  # in the tree → below the prefix, where man and the shells look
    "completions/moectl.bash": "share/bash-completion/completions/moectl",
    "completions/_moectl": "share/zsh/site-functions/_moectl",
    "completions/moectl.fish": "share/fish/vendor_completions.d/moectl.fish",
}


def shared_files() -> dict[str, bytes]:
    """Return what is installed below the prefix: path → content."""
    pages = {f"share/{page.relative_to(ROOT)}": page.read_bytes() for page in (ROOT / "man").rglob("*.[157]")}
    return pages | {target: (ROOT / source).read_bytes() for source, target in SHARE.items()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Build (sdist, wheel) from this tree; the wheel is made of the sdist."""
    out = tmp_path_factory.mktemp("dist")
    argv = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(argv, check=True, capture_output=True)
    [sdist], [wheel] = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def prefix(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into an environment of its own, which has this one's packages behind its own."""
    prefix = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(prefix)], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(prefix), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(built[1])], check=True, capture_output=True)
    [packages] = prefix.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return prefix


def run(prefix: Path, *argv: str, **environment: str) -> str:
    """Run a command as a person would who has activated the environment; return what it says."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MANPATH")}
    env |= {"PATH": f"{prefix / 'bin'}{os.pathsep}{env['PATH']}", **environment}
    done = subprocess.run(argv, env=env, cwd=prefix, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_the_package_and_what_belongs_to_it(built: tuple[Path, Path]) -> None:
    wheel = built[1]
    assert wheel.name == f"moectl-{moectl.__version__}-py3-none-any.whl"
    assert wheel.stat().st_size <= MOST_BYTES
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    info, data = f"moectl-{moectl.__version__}.dist-info/", f"moectl-{moectl.__version__}.data/data/"
    package = {str(Path(path).relative_to(ROOT)) for path in list_package(str(ROOT / "moectl"))}
    assert "moectl/demo/moectl-demo/model.safetensors" in package
    assert {name for name in files if not name.startswith((info, data))} == package
    assert {name.removeprefix(data): text for name, text in files.items() if name.startswith(data)} == shared_files()
    fields = files[f"{info}METADATA"].decode()
    assert re.search(r"^Requires-Python: >=3\.11$", fields, re.MULTILINE)
    assert f"{info}licenses/LICENSE" in files


def test_the_sdist_can_be_tested_and_documented(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml", ".ci/run", "tests/conftest.py"} <= names
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("*.[pt][yx]*") if "__" not in str(path)} <= {
        name for name in names if name.startswith("tests/")
    }
    assert not [name for name in names if "__pycache__" in name or name.endswith((".pyc", ".log"))]


def test_the_version_is_written_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"]
    assert "version" not in project["project"]
    places = [
        path
        for path in map(Path, list_package(str(ROOT / "moectl")))
        if path.suffix == ".py" and re.search(rf'"{re.escape(moectl.__version__)}"', path.read_text())
    ]
    assert places == [ROOT / "moectl" / "__init__.py"]


def test_an_installed_moectl_says_its_versions(prefix: Path) -> None:
    python = f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    said = [f"moectl {moectl.__version__}", *(f"{name} {metadata.version(name)}" for name in ("mlx", "mlx-lm"))]
    assert run(prefix, "moectl", "--version").split("\n") == [*said, f"Python {python}", ""]
    assert "Usage: moectl" in run(prefix, "python", "-m", "moectl", "--help")
    where = run(prefix, "python", "-c", "import moectl; print(moectl.__file__)").strip()
    assert Path(where).is_relative_to(prefix)


def test_shells_and_man_find_what_was_installed(prefix: Path, tmp_path: Path) -> None:
    assert {name: (prefix / name).read_bytes() for name in shared_files()} == shared_files()
    share = prefix / "share"
    tab = f'source "{share}/bash-completion/completions/moectl"; complete -p moectl'
    assert "-F _moectl" in run(prefix, "bash", "-c", tab)
    if shutil.which("zsh") is None or shutil.which("fish") is None:
        pytest.skip("zsh or fish is not installed")
    compinit = f"fpath=({share}/zsh/site-functions $fpath); autoload -U compinit; compinit -D -u"
    assert run(prefix, "zsh", "-fc", f"{compinit}; print $_comps[moectl]").strip() == "_moectl"
    found = run(prefix, "fish", "-c", "complete -C 'moectl stat'", XDG_DATA_DIRS=str(share), HOME=str(tmp_path))
    assert found.split("\t")[0] == "status"
    if shutil.which("manpath") is None:
        pytest.skip("man-db is not installed")
    assert run(prefix, "manpath", "-q").strip().split(":")[0] == str(share / "man")


@pytest.mark.long
def test_an_installed_moectl_answers(prefix: Path) -> None:
    assert "several machines" in run(prefix, "moectl", "run", "What is expert parallelism?")
    assert run(prefix, "moectl", "stop") == "Nothing is running.\n"
