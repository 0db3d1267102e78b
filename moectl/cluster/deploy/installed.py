"""How this machine's moectl was installed, which command upgrades it, and whether there is a newer one.

pipx and uv leave a file of theirs in the environment that they made; pip records in direct_url.json what did not come
from an index (PEP 610). moectl runs the tool that installed it, and installs nothing by itself.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlsplit

import moectl
from moectl.cluster.deploy.environment import reason_of
from moectl.errors import CommandFailed, StateError
from moectl.hosts.remote import Completed, LocalRemote

LOOK_S = 120.0
UPGRADE_S = 3600.0
_ALONE = "moectl upgrade --hosts-only needs no internet: it brings hosts to this machine's version"
MODULE = (sys.executable, "-P", "-m", "moectl")  # -P: not the source tree in which a person may be
_UV_CHANGE = re.compile(r"^ \+ moectl==(\S+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Installation:
    """The tool that installed moectl, and its commands: to upgrade, and to say what that would bring."""

    tool: str  # "pipx", "uv tool", "uv", "pip"
    upgrade: tuple[str, ...]
    look: tuple[str, ...]

    def find_newer(self) -> str | None:
        """Return the version that an upgrade would bring; None where this is the newest. Raises CommandFailed."""
        done = LocalRemote().run(self.look, check=False, timeout_s=LOOK_S)
        if done.code != 0:
            raise CommandFailed(f"{self.look[0]} could not look for a newer moectl: {_reason(done)}", hint=_ALONE)
        text = done.stdout.decode("utf-8", "replace")
        if "--report" not in self.look:
            match = _UV_CHANGE.search(text + done.stderr.decode("utf-8", "replace"))
            return match[1] if match else None
        try:
            found = [str(one["metadata"]["version"]) for one in json.loads(text)["install"]]
        except (ValueError, KeyError, TypeError):
            raise CommandFailed("pip's report cannot be read", hint="upgrade pip itself") from None
        return found[0] if found else None

    def run(self) -> str:
        """Upgrade; return the version that is installed now. Raises CommandFailed."""
        back = f"{shlex.join(_reinstall(self.tool))} brings back the one before"
        done = LocalRemote().run(self.upgrade, check=False, timeout_s=UPGRADE_S)
        if done.code != 0:
            raise CommandFailed(f"{shlex.join(self.upgrade)} failed: {_reason(done)}", hint=_ALONE)
        done = LocalRemote().run([*MODULE, "version", "--json"], check=False, timeout_s=LOOK_S)
        try:
            return str(json.loads(done.stdout)["versions"]["moectl"])
        except (ValueError, KeyError, TypeError):
            raise CommandFailed(f"the new moectl does not start: {_reason(done)}", hint=back) from None


def find_installation(prefix: Path | None = None) -> Installation:
    """Return how the moectl of this environment was installed.

    Raises StateError where no tool could upgrade it, with the line that does.
    """
    prefix = prefix or Path(sys.prefix)
    tool = _find_tool(prefix)
    _refuse_source(tool)
    python = sys.executable
    asks = ("--no-input", "--disable-pip-version-check", "--retries", "1", "--timeout", "15")
    pip = (python, "-m", "pip", "install", *asks, "--upgrade")
    by_pip = (*pip, "--dry-run", "--quiet", "--no-deps", "--report", "-", "moectl")
    uv = (_program("uv"), "pip", "install", "--python", python, "--upgrade")
    by_uv = (*uv, "--dry-run", "--no-deps", "moectl")
    match tool:
        case "pipx":
            # pipx may make environments by uv, and these have no pip.
            look = by_uv if importlib.util.find_spec("pip") is None else by_pip
            return Installation(tool, (_program("pipx"), "upgrade", "moectl"), look)
        case "uv tool":
            return Installation(tool, (_program("uv"), "tool", "upgrade", "moectl"), by_uv)
        case "uv":
            return Installation(tool, (*uv, "moectl"), by_uv)
    if prefix == Path(sys.base_prefix) and (Path(sysconfig.get_path("stdlib")) / "EXTERNALLY-MANAGED").exists():
        raise StateError(
            f"{python} belongs to the system, which does not let pip change it",
            hint="pipx install moectl, or uv tool install moectl",
        )
    return Installation(tool, (*pip, "moectl"), by_pip)


def _find_tool(prefix: Path) -> str:
    if (prefix / "pipx_metadata.json").is_file():
        return "pipx"
    if (prefix / "uv-receipt.toml").is_file():
        return "uv tool"
    if importlib.util.find_spec("pip") is not None:
        return "pip"
    if shutil.which("uv"):
        return "uv"
    raise StateError(f"{sys.executable} has no pip, and there is no uv", hint=f"{sys.executable} -m ensurepip")


def _program(name: str) -> str:
    return shutil.which(name) or name


def _reinstall(tool: str) -> tuple[str, ...]:
    """Return the command that installs the version that runs now."""
    this = f"moectl=={moectl.__version__}"
    match tool:
        case "pipx" | "uv tool":
            return (*tool.split(), "install", "--force", this)
        case "uv":
            return ("uv", "pip", "install", "--python", sys.executable, this)
    return (sys.executable, "-m", "pip", "install", this)


def _refuse_source(tool: str) -> None:
    """Raise StateError for a moectl that did not come from an index: no tool knows where its newer one is."""
    try:
        text = metadata.distribution("moectl").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        tree = Path(moectl.__file__).parent.parent
        raise StateError(
            f"this moectl was not installed: it runs from {tree}",
            hint=f"git -C {tree} pull, then moectl upgrade --hosts-only",
        ) from None
    if text is None:
        return
    try:
        told = json.loads(text)
        url = str(told["url"])
    except (ValueError, KeyError, TypeError):
        return
    source = unquote(urlsplit(url).path) if url.startswith("file://") else url
    install = {"pipx": "pipx install --force", "uv tool": "uv tool install --force", "uv": "uv pip install"}.get(
        tool, f"{sys.executable} -m pip install"
    )
    if "dir_info" in told:
        editable = bool(told["dir_info"].get("editable"))
        how = "an editable installation of" if editable else "installed from"
        first = f"git -C {source} pull && {install} {'-e ' * editable}{source}"
    else:
        how = "installed from"
        version = told.get("vcs_info", {}).get("vcs")
        first = f"{install} {f'{version}+{url}' if version else 'the newer file'}"
    raise StateError(f"this moectl is {how} {source}", hint=f"{first}, then moectl upgrade --hosts-only")


def _reason(done: Completed) -> str:
    return reason_of((done.stderr or done.stdout).decode("utf-8", "replace")) or f"exit code {done.code}"
