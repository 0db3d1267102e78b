"""The rules of the house: which package imports which, who may use a library, how a module looks."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from moectl.hosts.hostfile import Host
from moectl.session.deployment import DeployedRank, Deployment, write_deployment
from tests.support.architecture import BEGIN, END, GUIDE, ORDER, PACKAGE, arrows, draw, imports, modules, package

# Who may import a library at all: packages, sub-packages or modules.
USERS = {
    "click": ["cli", "__main__"],
    "tqdm": ["cli.progress"],
    "prompt_toolkit": ["cli.chat"],
    "matplotlib": ["cli.plot"],
    "starlette": ["server"],
    "uvicorn": ["server"],
    "prometheus_client": ["server"],
    "packaging": ["cluster.deploy"],
    "pydantic": ["records"],
    "paramiko": ["hosts.ssh"],
    "huggingface_hub": ["shards.source.hub", "shards.source.hub_errors"],
    "safetensors": ["shards", "demo"],
    "mlx": ["engine", "shards", "demo"],
    "mlx_lm": ["engine", "shards", "demo"],
    "numpy": ["engine", "shards", "demo"],
    "llguidance": ["engine"],
    "transformers": ["shards", "demo"],
    "tokenizers": ["engine", "shards", "demo"],
}

# A module fits in one sitting and is worth opening. What is longer or shorter today, and why; the list only gets fewer.
MOST_LINES, LEAST_LINES = 400, 40
SIZES = {
    "engine.network.fingerprint": "what the canary and the witness both compute",
    "engine.random_prompts": "prompts for measurements, which the bench and the profile share",
    "shards.look.exceptions": "the one list of what holds for single model types",
    "paths": "the one place that knows where files of moectl are",
}


def is_below(module: str, place: str) -> bool:
    return module == place or module.startswith(f"{place}.")


def test_each_package_imports_only_from_those_after_it() -> None:
    wrong = []
    for module, target in arrows():
        here, there = package(module), package(target)
        if module == "__main__" or module.startswith("demo"):
            continue  # where everything begins, and a program of its own
        if there and (not here or ORDER.index(there) < ORDER.index(here)):
            wrong.append(f"{module} imports {target}")
    assert not wrong


def test_no_module_imports_itself_through_others() -> None:
    graph = defaultdict(set)
    for module, target in arrows():
        if target and target != module:
            graph[module].add(target)
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " → ".join((*path[path.index(module) :], module))
        if module not in done:
            for target in sorted(graph[module]):
                visit(target, (*path, module))
            done.add(module)

    for module in modules():
        visit(module, ())


def test_a_library_is_imported_only_by_its_users() -> None:
    wrong = [
        f"{module} imports {name}"
        for module, tree in modules().items()
        for name in imports(tree)
        if (users := USERS.get(name.split(".")[0])) and not any(is_below(module, user) for user in users)
    ]
    assert not wrong


def test_programs_sent_to_hosts_stand_alone() -> None:
    wrong = [
        f"{module} imports {name}"
        for module, tree in modules().items()
        if module.startswith("hosts.onhost.") or module == "durable"
        for name in imports(tree)
        if name.split(".")[0] not in sys.stdlib_module_names
        and not name.startswith("moectl.hosts.onhost.")
        and not name.startswith("moectl.durable.")
    ]
    assert not wrong


def test_the_design_guide_draws_the_packages_as_they_are() -> None:
    drawn = GUIDE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    assert drawn == draw(), "draw it again: python -m tests.support.architecture"


def test_every_module_says_what_it_is() -> None:
    for name, tree in modules().items():
        text = ast.get_docstring(tree)
        assert text, f"{name} has no docstring"
        assert text.split("\n\n")[0].endswith("."), f"{name} does not begin with a sentence"


def test_a_module_is_neither_long_nor_tiny() -> None:
    """A package's __init__ is no module of its own; the demo is a program beside moectl."""
    found = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in files().items()}
    odd = {name: lines for name, lines in found.items() if not LEAST_LINES <= lines <= MOST_LINES}
    assert {name: lines for name, lines in odd.items() if name not in SIZES} == {}, "divide it, or join it to another"
    sys.stdout.writelines(f"{name}: {lines} lines, {SIZES[name]}\n" for name, lines in sorted(odd.items()))  # with -rP
    assert SIZES.keys() - odd.keys() == set(), "these are of the right size now: take them from the list"


def files() -> dict[str, Path]:
    """Return the file of every module but packages' __init__ and the demo."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
        for path in PACKAGE.rglob("*.py")
        if path.name != "__init__.py" and "demo" not in path.parts
    }


def test_packages_export_nothing() -> None:
    for name, tree in modules().items():
        if name.split(".")[0] in ORDER and (PACKAGE / Path(*name.split("."))).is_dir():
            assert len(tree.body) == 1, f"{name}/__init__.py holds more than its docstring"


def test_class_names_are_unique() -> None:
    places = defaultdict(list)
    for module, tree in modules().items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(module)
    assert not {name: found for name, found in places.items() if len(found) > 1}


def loaded_by(words: list[str], **environment: str) -> set[str]:
    """Return the libraries that a run of moectl has loaded at its end, beyond those of the interpreter."""
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
    return loaded - sys.stdlib_module_names


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["--version"], ["completion", "zsh"]], ids=" ".join)
def test_help_and_version_load_no_library_but_click(words: list[str]) -> None:
    assert loaded_by(words) <= {"click", "moectl"}


@pytest.mark.parametrize(
    "line",
    [
        "moectl ",
        "moectl run --",
        "moectl deploy --only ",
        "moectl status --hosts ",
        "moectl run --model ",
        "moectl run --shards ",
    ],
)
def test_a_tab_press_loads_no_library_but_click(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hosts.txt").write_text("mac1\nmac2\n")
    write_deployment(Deployment("tiny", "shards", (DeployedRank(Host("mac1"), "/python", "/root", "/shards"),)))
    loaded = loaded_by([], _MOECTL_COMPLETE="zsh_complete", COMP_LINE=line)
    assert loaded <= {"click", "moectl"}


@pytest.mark.parametrize(
    ("module", "without"),
    [
        ("cli.chat.chat", "mlx numpy transformers paramiko huggingface_hub tqdm asyncio prompt_toolkit"),
        ("session.session", "mlx mlx_lm numpy transformers"),
        ("session.target", "mlx mlx_lm numpy transformers"),
        ("shards.prepare", "mlx mlx_lm numpy transformers"),
        ("server.openai", "starlette uvicorn prometheus_client asyncio"),
        ("server.contracts", "starlette uvicorn prometheus_client asyncio"),
        ("server.sockets", "starlette uvicorn prometheus_client asyncio"),
    ],
)
def test_the_operators_side_loads_only_what_it_needs(module: str, without: str) -> None:
    program = f"import sys, moectl.{module}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert not set(done.stdout.split()) & set(without.split())
