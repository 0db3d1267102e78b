"""Draw moectl's packages and what each imports, from the imports themselves: `python -m tests.support.architecture`.

Writes the drawing into the design guide. A test compares the guide with the imports.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent.parent.parent / "moectl"
GUIDE = PACKAGE / "guide" / "design.md"
BEGIN, END = "<!-- architecture -->\n", "<!-- /architecture -->"

# Each package imports only from those after it.
# The root (errors, durable, paths, files, records, text) comes after all of them.
ORDER = ["cli", "cluster", "server", "session", "engine", "planner", "shards", "model", "hosts"]


@cache
def modules() -> dict[str, ast.Module]:
    """Return every module of moectl by its dotted name below moectl; a package's name stands for its __init__."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield the dotted names that a module imports when it runs, at its top or within a function."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            yield from imports(node)


@cache
def arrows() -> tuple[tuple[str, str], ...]:
    """Return (module, imported module) for all imports among moectl's modules."""
    return tuple(_find_arrows())


def _find_arrows() -> Iterator[tuple[str, str]]:
    names = modules()
    for name, tree in names.items():
        for imported in imports(tree):
            head, _, rest = imported.partition(".")
            if head == "moectl":
                target = rest if rest in names else rest.rpartition(".")[0]
                yield name, target if target in names else ""


def package(module: str) -> str:
    """Return the package of a module; empty for the root."""
    first = module.split(".")[0]
    return first if first in ORDER else ""


def draw() -> str:
    """Return the drawing: a package a line, in order, with its modules, what it is, and what it imports."""
    counts = Counter(package(name) for name in modules())
    uses: dict[str, set[str]] = {name: set() for name in ORDER}
    for module, target in arrows():
        if (here := package(module)) and (there := package(target)) and here != there:
            uses[here].add(there)
    lines = []
    for name in ORDER:
        said = ast.get_docstring(modules()[name]) or ""
        below = " ".join(other for other in ORDER if other in uses[name]) or "the root only"
        lines += [f"{name:8} {said.splitlines()[0]}", f"{'':8} {counts[name]} modules; imports {below}"]
    return "```text\n" + "\n".join(lines) + "\n```\n"


def main() -> None:
    """Write the drawing into the guide."""
    before, _, rest = GUIDE.read_text(encoding="utf-8").partition(BEGIN)
    GUIDE.write_text(before + BEGIN + draw() + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
