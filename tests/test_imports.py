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
    "click": {
        "__main__",
        "cli",
        "cli_check",
        "cli_help",
        "cli_observe",
        "cli_prepare",
        "cli_setup",
        "cli_use",
        "cli_target",
        "flags",
        "verb",
        "suggest",
        "completion",
        "manual",
    },
    "tqdm": {"console"},
    "paramiko": {"ssh", "ssh_connect", "ssh_login", "ssh_identity", "ssh_trust", "ssh_algorithms", "ssh_proxy"},
    "huggingface_hub": {"hub", "hub_errors"},
    "mlx": NODE | {"model"},
    "mlx_lm": NODE | {"model", "chat_template"},
    "numpy": NODE | {"model"},
    "transformers": {"demo.train", "chat_template"},
    "tokenizers": {"demo.train", "tokenizer", "token_text", "chat_template", "measure"},
    "safetensors": {"layouts", "demo.train"},
    "matplotlib": {"plot"},
    "starlette": {"server", "doors"},
    "uvicorn": {"server"},
    "prometheus_client": {"metrics"},
    "prompt_toolkit": {"lineedit"},
    "rich": {"cli_help"},
    "markdown_it": {"markdown"},
    "packaging": {"wheelhouse"},
}
# Of those, the ones whose import waits until a function needs it.
INSIDE_FUNCTIONS = {
    ("tqdm", "console"),
    ("huggingface_hub", "hub"),
    ("huggingface_hub", "hub_errors"),
    ("matplotlib", "plot"),
    ("mlx_lm", "chat_template"),
    ("transformers", "chat_template"),
    ("matplotlib", "plot"),
    ("rich", "cli_help"),
    ("markdown_it", "markdown"),
}

# From the face down; a module imports only from rooms further down or from its own.
ROOMS = (
    {"__main__"},
    {"cli"},
    {"cli_check", "cli_help", "cli_observe", "cli_prepare", "cli_setup", "cli_use"},
    {"cli_target"},
    {"flags", "manual", "completion"},
    {"verb", "suggest", "markdown"},
    {"guides", "roff"},
    {"answerer"},
    {"chat"},
    {"report", "doctor_report", "setup_report", "report_observe", "lineedit", "transcript"},
    {"console", "config", "live"},
    {"logs", "listing", "status", "uninstall"},
    {"attach"},
    {"controller", "probing", "client", "background", "doctor", "feed", "setup_run"},
    {"doctor_cluster", "doctor_pairs", "setup_plan"},
    {"doctor_host", "setup_machine"},
    {"macos"},
    {"survey"},
    {"remedy"},
    {"launch", "planning", "bench", "plot", "probe"},
    {"server", "restart", "resumed", "keep_alive"},
    {"doors"},
    {"api", "metrics", "sockets"},
    {"fields", "visitors"},
    {"serving"},
    {"prepare", "session", "cluster", "whatif"},
    {"fleet", "tether"},
    {"nodes"},
    {"plan"},
    {"speed"},
    {"calibration"},
    {"catalog"},
    {"wheelhouse"},
    {"programs", "traffic"},
    {"provision"},
    {"push"},
    {"chain", "handover"},
    {"measure"},
    {"worker"},
    {"engine"},
    {"speculation"},
    {"answer"},
    {"sampling", "prompt", "prompt_cache", "admission", "stop_text", "lookup", "unseen"},
    {"tokenizer"},
    {"chat_template", "token_text"},
    {"isolation"},
    {"profile"},
    {"model", "quantize"},
    {"ssh", "shards", "tokenizer_files"},
    {"pipeline"},
    {"sources", "stamp"},
    {"ssh_connect"},
    {"ssh_login", "ssh_algorithms", "ssh_proxy"},
    {"ssh_identity", "ssh_trust"},
    {
        "ssh_config",
        "remote",
        "backend",
        "deployment",
        "setup_record",
        "wheel",
        "journal",
        "recipe",
        "relay",
        "links",
    },
    {"logs", "workers", "clear", "platform", "throughput", "ssh_keywords"},
    {"checkpoint"},
    {"hub"},
    {"hub_errors"},
    {"layouts"},
    {"machine", "findings", "errnos"},
    {"budget"},
    {"measured"},
    {"leash", "manifest", "routing", "vigil"},
    {"node"},
    {
        "canary",
        "topology",
        "placement",
        "copies",
        "balance",
        "chips",
        "hosts",
        "request",
        "settings",
        "demo",
        "paths",
        "disk",
    },
    {"geometry", "hardware", "thunderbolt", "cache_layout", "hub_environment", "login_shell", "ring_file"},
    {"rope"},
    {"config_keys"},
    {"errors", "parsed"},
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
    assert not loaded_by("import moectl.__main__") & HEAVY
    code = "import moectl.__main__\ntry: moectl.__main__.cli(['run', '--help'])\nexcept SystemExit: pass"
    assert not loaded_by(code) & HEAVY


def run_and_load(words: list[str], **environment: str) -> set[str]:
    """Return what is loaded at the end of a run of moectl, beyond click and what comes with the interpreter."""
    code = f"""
import atexit, os, sys, click
before = set(sys.modules)
atexit.register(lambda: print("LOADED", *(set(sys.modules) - before)))
sys.argv = ["moectl", *{words!r}]
os.environ.update({environment!r})
from moectl.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    loaded = {name.split(".")[0] for name in done.stdout.partition("LOADED ")[2].split()}
    assert "moectl" in loaded
    return loaded


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["--version"], ["completion", "zsh"]], ids=" ".join)
def test_help_and_version_load_no_library_but_click(words: list[str]) -> None:
    assert run_and_load(words) - sys.stdlib_module_names <= {"click", "moectl"}


@pytest.mark.parametrize("line", ["moectl ", "moectl run --", "moectl deploy --only ", "moectl run --model "])
def test_a_tab_press_loads_no_library_but_click(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hosts.txt").write_text("mac1\nmac2\n")
    loaded = run_and_load([], _MOECTL_COMPLETE="zsh_complete", COMP_LINE=line)
    assert loaded - sys.stdlib_module_names <= {"click", "moectl"}
    assert not loaded & {"asyncio", "concurrent", "multiprocessing", "subprocess"}  # nobody is asked


def test_a_chat_loads_the_line_editor_only_when_it_begins() -> None:
    assert not loaded_by("import moectl.cli.chat.chat") & HEAVY


@pytest.mark.parametrize(
    "module", ["moectl.session.session", "moectl.session.target", "moectl.shards.prepare", "moectl.hosts.hostfile"]
)
def test_the_operators_side_never_loads_mlx(module: str) -> None:
    assert not loaded_by(f"import {module}") & {"mlx", "mlx_lm", "numpy", "transformers", "torch"}


@pytest.mark.parametrize("module", ["moectl.server.openai", "moectl.server.contracts", "moectl.server.sockets"])
def test_what_is_pure_of_serving_loads_no_http_library(module: str) -> None:
    assert not loaded_by(f"import {module}") & {"starlette", "uvicorn", "prometheus_client", "asyncio"}
