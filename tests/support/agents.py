"""Agents of others, installed by npm: where they are, how each is told of a server, how it is asked once.

MOECTL_TEST_AGENTS names a directory that keeps them between runs: together they have about 1.5 GB.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.scripted_caller import Calls

_INSTALL_S = 900
_ANSWER_S = 240
ASKED = {"command": "echo one-two > made.txt"}  # what the model lets an agent's shell do
CALLS: Calls = {
    "exec_command": [("exec_command", {"cmd": ASKED["command"]})],  # codex
    "Bash": [("Bash", {**ASKED, "description": "Bash"})],  # Claude Code, cn
    "run_shell_command": [("run_shell_command", {**ASKED, "description": "", "is_background": False})],  # qwen
    "bash": [("bash", {**ASKED, "description": "bash"})],  # opencode, pi
}


def install(packages: Sequence[str], fallback: Path) -> Path:
    """Return where npm has installed packages, each NAME@VERSION; skips the test where it cannot.

    They are kept where MOECTL_TEST_AGENTS says, else in `fallback`.
    """
    if shutil.which("npm") is None:
        pytest.skip(f"{' and '.join(packages)} need node and npm")
    name = "_".join(packages).replace("@", "_").replace("/", "_")
    place = Path(os.environ.get("MOECTL_TEST_AGENTS") or fallback) / name
    if not all((place / "node_modules" / package.rpartition("@")[0]).exists() for package in packages):
        place.mkdir(parents=True, exist_ok=True)
        command = ["npm", "install", "--prefix", str(place), "--no-audit", "--no-fund", *packages]
        done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=_INSTALL_S, check=False)
        if done.returncode != 0:
            pytest.skip(f"{' and '.join(packages)} cannot be installed: {done.stderr[-500:]}")
    return place


@dataclass(frozen=True, slots=True)
class Agent:
    """A package of npm and how it is run; in texts, @URL@ is the server and @MODEL@ the model."""

    package: str
    version: str
    command: Sequence[str]  # before the question
    environment: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)  # below its home, which is also where it works

    def install(self, fallback: Path) -> Path:
        """Return its program; skips the test where it cannot be installed."""
        place = install([f"{self.package}@{self.version}"], fallback)
        return place / "node_modules" / ".bin" / self.command[0]

    def ask(self, program: Path, home: Path, url: str, model: str, question: str) -> str:
        """Let it answer once, with nothing of this user's; return what it wrote."""

        def fill(text: str) -> str:
            return text.replace("@URL@", url).replace("@MODEL@", model)

        home.mkdir()
        for name, text in self.files.items():
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).write_text(fill(text))
        subprocess.run(["git", "init", "-q", str(home)], check=True)
        environment = {name: fill(text) for name, text in self.environment.items()}
        done = subprocess.run(
            [str(program), *map(fill, self.command[1:]), question],
            cwd=home,
            env={"HOME": str(home), "PATH": os.environ["PATH"], "NO_COLOR": "1", **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_ANSWER_S,
            check=False,
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout


_CODEX = {
    "model_provider": "m",
    "model_providers.m.name": '"m"',
    "model_providers.m.base_url": '"@URL@"',
    "model_providers.m.wire_api": '"responses"',
}
_OPENCODE = {
    "provider": {
        "m": {
            "npm": "@ai-sdk/openai-compatible",
            "options": {"baseURL": "@URL@"},
            "models": {"@MODEL@": {"name": "@MODEL@"}},
        }
    }
}
_PI = {
    "providers": {
        "m": {
            "baseUrl": "@URL@",
            "api": "openai-completions",
            "apiKey": "x",
            "models": [{"id": "@MODEL@", "name": "@MODEL@"}],
        }
    }
}
_CN = """name: m
version: 0.0.1
schema: v1
models:
  - {name: @MODEL@, provider: openai, model: @MODEL@, apiBase: @URL@, apiKey: x, roles: [chat]}
"""

AGENTS = {
    "claude": Agent(
        "@anthropic-ai/claude-code",
        "2.1.332",
        ["claude", "--model", "@MODEL@", "--allowedTools=Bash", "-p"],
        {"ANTHROPIC_BASE_URL": "@URL@", "ANTHROPIC_API_KEY": "x"},
    ),
    "codex": Agent(
        "@openai/codex",
        "0.171.0",
        [
            *("codex", "exec", "--skip-git-repo-check", "--sandbox", "danger-full-access"),
            *(part for name, value in _CODEX.items() for part in ("-c", f"{name}={value}")),
            *("-m", "@MODEL@"),
        ],
    ),
    "opencode": Agent(
        "opencode-ai",
        "1.18.33",
        ["opencode", "run", "--model", "m/@MODEL@"],
        files={"opencode.json": json.dumps(_OPENCODE)},
    ),
    "pi": Agent(
        "@mariozechner/pi-coding-agent",
        "0.73.1",
        ["pi", "--provider", "m", "--model", "@MODEL@", "-p"],
        files={".pi/agent/models.json": json.dumps(_PI)},
    ),
    "cn": Agent("@continuedev/cli", "1.5.47", ["cn", "-p", "--auto", "--config", "cn.yaml"], files={"cn.yaml": _CN}),
    "qwen": Agent(
        "@qwen-code/qwen-code",
        "0.24.4",
        ["qwen", "--auth-type", "openai", "-y", "-p"],
        {"OPENAI_BASE_URL": "@URL@", "OPENAI_API_KEY": "x", "OPENAI_MODEL": "@MODEL@"},
    ),
}
