"""The rules of the house, kept by a test: which module may import what, and that arrows point one way."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "moectl"
NODE = {
    "engine",
    "answer",
    "speculation",
    "prompt",
    "sampling",
    "prompt_cache",
    "worker",
    "profile",
    "measure",
    "quantize",
    "demo.train",
}  # and everything in model/

# Library → modules that may import it at all; "model" stands for the whole subpackage.
ONLY_IN: dict[str, set[str]] = {
    "click": {"__main__", "cli", "cli_prepare", "cli_use", "cli_target", "flags"},
    "tqdm": {"console"},
    "paramiko": {"ssh", "ssh_connect", "ssh_login"},
    "huggingface_hub": {"hub"},
    "mlx": NODE | {"model"},
    "mlx_lm": NODE | {"model"},
    "numpy": NODE | {"model"},
    "transformers": {"demo.train"},
    "tokenizers": {"demo.train"},
    "safetensors": {"layouts", "demo.train"},
    "matplotlib": {"plot"},
    "starlette": {"server"},
    "uvicorn": {"server"},
    "prometheus_client": {"metrics"},
    "prompt_toolkit": {"lineedit"},
}
# Of those, the ones whose import waits until a function needs it.
INSIDE_FUNCTIONS = {("tqdm", "console"), ("huggingface_hub", "hub"), ("matplotlib", "plot")}

# From the face down; a module imports only from rooms further down or from its own.
ROOMS = (
    {"__main__"},
    {"cli"},
    {"cli_prepare", "cli_use"},
    {"cli_target"},
    {"flags"},
    {"answerer"},
    {"chat"},
    {"report", "lineedit", "transcript"},
    {"console", "config"},
    {"attach"},
    {"controller", "probing", "client", "background"},
    {"launch", "planning", "bench", "plot", "probe"},
    {"server"},
    {"api", "metrics", "sockets"},
    {"serving"},
    {"prepare", "session", "cluster", "whatif"},
    {"nodes"},
    {"plan"},
    {"speed"},
    {"calibration"},
    {"catalog"},
    {"provision"},
    {"measure"},
    {"worker"},
    {"engine"},
    {"speculation"},
    {"answer"},
    {"sampling", "prompt", "prompt_cache", "admission", "stop_text", "lookup"},
    {"profile"},
    {"model", "quantize"},
    {"ssh", "shards"},
    {"pipeline"},
    {"sources", "stamp"},
    {"ssh_connect"},
    {"ssh_login"},
    {"ssh_config", "remote", "backend", "deployment", "wheel", "journal", "recipe", "node", "links"},
    {"checkpoint"},
    {"hub"},
    {"layouts"},
    {"machine"},
    {"budget"},
    {"measured"},
    {"leash", "manifest", "routing"},
    {"placement", "copies", "balance", "chips", "hosts", "request", "settings", "demo", "paths", "disk"},
    {"geometry", "hardware"},
    {"errors"},
    {""},
)


def modules() -> list[str]:
    return sorted(str(p.relative_to(PACKAGE).with_suffix("")).replace("/", ".") for p in PACKAGE.rglob("*.py"))


def room(module: str) -> str:
    module = module.removesuffix(".__init__").removesuffix("__init__")
    return "model" if module.startswith("model") else module


def imports(module: str) -> list[tuple[str, bool]]:
    """Return (imported name, whether at the top level) of a module; type-checking imports do not count."""
    tree = ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text())
    found: list[tuple[str, bool]] = []

    def visit(node: ast.AST, top: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.Import):
            found.extend((alias.name, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} uses a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found.extend((name, top) for name in names)
        for child in ast.iter_child_nodes(node):
            visit(child, top and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))

    visit(tree, True)
    return found


@pytest.mark.parametrize("module", modules())
def test_libraries_stay_in_their_modules(module: str) -> None:
    for name, top in imports(module):
        library = name.split(".")[0]
        if library in ONLY_IN:
            assert room(module) in ONLY_IN[library], f"{module} imports {library}"
            assert not (top and (library, module) in INSIDE_FUNCTIONS), f"{module} imports {library} at the top"


@pytest.mark.parametrize("module", modules())
def test_nothing_points_up(module: str) -> None:
    levels = {name: level for level, names in enumerate(ROOMS) for name in names}
    if module == "demo.train":
        return  # a program of its own
    assert room(module) in levels, f"{module} has no room yet: add it to ROOMS"
    here = levels[room(module)]
    for name, _ in imports(module):
        if name.startswith("moectl."):
            parts = name.removeprefix("moectl.").split(".")
            target = parts[0] if parts[0] in levels else ""
            assert levels[target] >= here, f"{module} imports {name}, which is above it"


@pytest.mark.parametrize("module", modules())
def test_modules_say_what_they_are(module: str) -> None:
    text = ast.get_docstring(ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text()))
    assert text, module
    assert text.split("\n\n")[0].endswith("."), module


def loaded_by(code: str) -> set[str]:
    program = f"import sys\n{code}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return set(done.stdout.splitlines()[-1].split())


HEAVY = {
    "mlx",
    "mlx_lm",
    "numpy",
    "transformers",
    "torch",
    "paramiko",
    "huggingface_hub",
    "tqdm",
    "asyncio",
    "matplotlib",
    "prompt_toolkit",
}


def test_the_command_line_loads_click_only() -> None:
    assert not loaded_by("import moectl.cli") & HEAVY
    code = "import moectl.cli\ntry: moectl.cli.cli(['run', '--help'])\nexcept SystemExit: pass"
    assert not loaded_by(code) & HEAVY


def test_a_chat_loads_the_line_editor_only_when_it_begins() -> None:
    assert not loaded_by("import moectl.chat") & HEAVY


@pytest.mark.parametrize("module", ["moectl.session", "moectl.launch", "moectl.prepare", "moectl.hosts"])
def test_the_operators_side_never_loads_mlx(module: str) -> None:
    assert not loaded_by(f"import {module}") & {"mlx", "mlx_lm", "numpy", "transformers", "torch"}


@pytest.mark.parametrize("module", ["moectl.api", "moectl.serving", "moectl.sockets"])
def test_what_is_pure_of_serving_loads_no_http_library(module: str) -> None:
    assert not loaded_by(f"import {module}") & {"starlette", "uvicorn", "prometheus_client", "asyncio"}
