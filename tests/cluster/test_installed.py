"""How this machine's moectl was installed: which tool upgrades it, and what is refused with which line."""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
import sys
from importlib import metadata
from pathlib import Path

import pytest

import moectl
from moectl.cluster.deploy.installed import Installation, find_installation
from moectl.errors import CommandFailed, StateError
from tests.support.mac_tools import write_script

UV_SAYS = """\
Using Python 3.11.7 environment at: /v
Resolved 1 package in 2ms
Would download 1 package
Would uninstall 1 package
Would install 1 package
 - moectl==0.1.0
 + moectl==0.2.0
"""


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What direct_url.json of this moectl holds, where the test gives it."""
    files: dict[str, str] = {}

    class Told:
        def read_text(self, name: str) -> str | None:
            return files.get(name)

    monkeypatch.setattr(metadata, "distribution", lambda name: Told())
    return files


@pytest.mark.parametrize(
    ("mark", "tool", "command"),
    [
        ("pipx_metadata.json", "pipx", "pipx upgrade moectl"),
        ("uv-receipt.toml", "uv tool", "uv tool upgrade moectl"),
        ("pyvenv.cfg", "pip", f"{sys.executable} -m pip install"),
    ],
)
def test_what_installed_it_upgrades_it(
    told: dict[str, str], mark: str, tool: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nothing")
    (tmp_path / mark).touch()
    found = find_installation(tmp_path)
    assert (found.tool, shlex.join(found.upgrade).startswith(command)) == (tool, True)


def test_an_environment_of_uv_has_no_pip(told: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pip" else find_spec(name))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StateError, match="has no pip, and there is no uv") as caught:
        find_installation(tmp_path)
    assert caught.value.hint == f"{sys.executable} -m ensurepip"
    write_script(tmp_path / "uv", f"cat <<'E'\n{UV_SAYS}E\n")
    found = find_installation(tmp_path)
    assert found.upgrade == (f"{tmp_path}/uv", "pip", "install", "--python", sys.executable, "--upgrade", "moectl")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert found.find_newer() == "0.2.0"
    (tmp_path / "pipx_metadata.json").touch()  # made by pipx, which used uv
    assert "--report" not in find_installation(tmp_path).look


GIT, DIR = "git+https://example.org/moectl", "/src/moectl"


@pytest.mark.parametrize(
    ("url", "says", "does"),
    [
        ({"url": f"file://{DIR}", "dir_info": {"editable": True}}, "an editable installation of", f"install -e {DIR}"),
        ({"url": f"file://{DIR}", "dir_info": {}}, "installed from", f"git -C {DIR} pull && "),
        ({"url": GIT[4:], "vcs_info": {"vcs": "git", "commit_id": "1"}}, "installed from", f"install {GIT}, then"),
        ({"url": "file:///w/moectl-1-py3-none-any.whl", "archive_info": {}}, "installed from", "the newer file, then"),
    ],
    ids=["editable", "directory", "git", "wheel"],
)
def test_what_came_from_no_index_is_refused_with_the_line_that_upgrades_it(
    told: dict[str, str], url: dict[str, object], says: str, does: str
) -> None:
    told["direct_url.json"] = json.dumps(url)
    with pytest.raises(StateError, match=says) as caught:
        find_installation()
    assert caught.value.hint is not None
    assert does in caught.value.hint
    assert caught.value.hint.endswith(", then moectl upgrade --hosts-only")


def test_a_source_tree_that_was_never_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(metadata, "distribution", missing)
    with pytest.raises(StateError, match="was not installed: it runs from") as caught:
        find_installation()
    tree = Path(moectl.__file__).parent.parent
    assert caught.value.hint == f"git -C {tree} pull, then moectl upgrade --hosts-only"


def test_a_python_of_the_system(told: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sysconfig

    (tmp_path / "EXTERNALLY-MANAGED").touch()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(StateError, match="belongs to the system") as caught:
        find_installation(Path(sys.base_prefix))
    assert caught.value.hint == "pipx install moectl, or uv tool install moectl"


def test_without_an_index_it_says_so(tmp_path: Path) -> None:
    """And names what needs none."""
    write_script(tmp_path / "pip", "echo 'ERROR: No matching distribution found for moectl' >&2; exit 1\n")
    found = Installation("pip", (str(tmp_path / "pip"),), (str(tmp_path / "pip"), "--report"))
    with pytest.raises(CommandFailed, match="could not look for a newer moectl: No matching distribution") as caught:
        found.find_newer()
    assert (
        caught.value.hint == "moectl upgrade --hosts-only needs no internet: it brings hosts to this machine's version"
    )
    with pytest.raises(CommandFailed, match="pip failed: No matching distribution"):
        found.run()
    write_script(tmp_path / "pip", "echo '{}'\n")
    with pytest.raises(CommandFailed, match="pip's report cannot be read"):
        found.find_newer()


def test_a_new_one_that_does_not_start_is_told_with_the_way_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = shutil.which("true") or "true"
    write_script(tmp_path / "python", "echo 'ImportError: no module' >&2; exit 1\n")
    monkeypatch.setattr("moectl.cluster.deploy.installed.MODULE", (str(tmp_path / "python"),))
    for tool, back in (("pipx", "pipx install --force"), ("uv", "uv pip install"), ("pip", "-m pip install")):
        with pytest.raises(CommandFailed, match="the new moectl does not start: ImportError") as caught:
            Installation(tool, (true,), (true,)).run()
        assert caught.value.hint is not None
        assert back in caught.value.hint
        assert caught.value.hint.endswith(f"moectl=={moectl.__version__} brings back the one before")
