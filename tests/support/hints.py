"""Every hint that moectl's source can give, found in its syntax tree.

A hint is what is handed over as `hint=` or `fix=`, put into such a name, or given to a doctor's finding. Where it is a
name or a call, the texts behind it are looked up. What is filled in shows as {}.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import moectl

ROOT = Path(moectl.__file__).parent
_NAMES = {"hint", "fix"}
# Functions that take a hint without naming it: which argument it is.
_POSITIONS = {
    "warn": 2,
    "fail": 2,
    "fail_with": 2,
    "Meaning": 1,
    "Keyword": 4,
    "Left": 1,
    "_leave": 1,
    "_auth_error": 2,
}


class Source:
    """One module: its functions and what its names stand for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tree = ast.parse(path.read_text(encoding="utf-8"))
        self.functions = {node.name: node for node in self.tree.body if isinstance(node, ast.FunctionDef)}
        self.imported = {
            alias.asname or alias.name: node.module
            for node in ast.walk(self.tree)
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("moectl")
            for alias in node.names
        }

    def scopes(self) -> Iterator[tuple[ast.AST, ast.AST]]:
        """Yield each node with the innermost function around it, or the module."""

        def walk(node: ast.AST, scope: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
            for child in ast.iter_child_nodes(node):
                yield child, scope
                yield from walk(child, child if isinstance(child, ast.FunctionDef) else scope)

        yield from walk(self.tree, self.tree)


def collect_hints() -> dict[str, str]:
    """Return each hint's text and the first place that gives it. Raises ValueError for one that cannot be read."""
    sources = {_module(path): Source(path) for path in sorted(ROOT.rglob("*.py"))}
    found: dict[str, str] = {}
    for source in sources.values():
        for node, scope in source.scopes():
            for given in _given(node):
                where = f"{source.path.relative_to(ROOT)}:{given.lineno}"
                for text in _Reader(sources, where).texts(given, source, scope):
                    if text.strip("{} :;,.()|"):
                        found.setdefault(text, where)
    return found


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)


def _given(node: ast.AST) -> Iterator[ast.expr]:
    """Yield what a node gives as a hint."""
    match node:
        case ast.keyword(arg=name, value=value) if name in _NAMES:
            yield value
        case ast.Assign(targets=targets, value=value) if any(_is_hint(target) for target in targets):
            yield value
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=args) if name in _POSITIONS:
            yield from args[_POSITIONS[name] :][:1]


def _is_hint(target: ast.expr) -> bool:
    return (isinstance(target, ast.Name) and target.id in _NAMES) or (
        isinstance(target, ast.Attribute) and target.attr in _NAMES
    )


def _parts(node: ast.expr | None) -> list[ast.expr] | None:
    """Return the expressions of which one is the value; None where it is one by itself."""
    match node:
        case None | ast.Constant(value=None):
            return []
        case ast.IfExp(body=one, orelse=other):
            return [one, other]
        case ast.BoolOp(values=values):
            return values
    return None


class _Reader:
    def __init__(self, sources: dict[str, Source], where: str) -> None:
        self._sources = sources
        self._where = where
        self._seen: set[tuple[str, str]] = set()

    def texts(self, node: ast.expr | None, source: Source, scope: ast.AST) -> list[str]:
        """Return the texts that an expression can be; none where it hands on another's hint."""
        several = _parts(node)
        if several is not None:
            return [text for part in several for text in self.texts(part, source, scope)]
        match node:
            case ast.Constant(value=str(text)):
                return [text]
            case ast.JoinedStr(values=parts):
                return ["".join(str(p.value) if isinstance(p, ast.Constant) else "{}" for p in parts)]
            case ast.BinOp(op=ast.Add(), left=one, right=other):
                left, right = (self.texts(side, source, scope) or ["{}"] for side in (one, other))
                return [first + second for first in left for second in right]
            case ast.Name(id=name):
                return self._named(name, source, scope)
            case ast.Call(func=ast.Name(id="at_host"), args=[_, command]):
                return [f"ssh {{}} {text}" for text in self.texts(command, source, scope)]
            case ast.Call(func=ast.Name(id=name)) if name not in self._local(source, scope):
                return self._called(name, source)
            case ast.Attribute() | ast.Subscript() | ast.Call():
                return []  # of an error, of a message, of an object that was asked
        raise ValueError(f"{self._where}: this hint cannot be read: {node and ast.unparse(node)}")

    def _local(self, source: Source, scope: ast.AST) -> set[str]:
        return {arg.arg for arg in scope.args.args} if isinstance(scope, ast.FunctionDef) else set()

    def _named(self, name: str, source: Source, scope: ast.AST) -> list[str]:
        for place in (scope, source.tree):
            values = [
                node.value
                for node in ast.walk(place)
                if isinstance(node, ast.Assign | ast.AnnAssign)
                for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
                if isinstance(target, ast.Name) and target.id == name
            ]
            if values and (name, source.path.name) not in self._seen:
                self._seen.add((name, source.path.name))
                return [text for value in values for text in self.texts(value, source, place)]
        if (module := source.imported.get(name)) in self._sources:
            other = self._sources[str(module)]
            return self._named(name, other, other.tree)
        return []  # an argument

    def _called(self, name: str, source: Source) -> list[str]:
        if (module := source.imported.get(name)) in self._sources:
            source = self._sources[str(module)]
        function = source.functions.get(name)
        if function is None or (name, source.path.name) in self._seen:
            return []
        self._seen.add((name, source.path.name))
        returned = [node.value for node in ast.walk(function) if isinstance(node, ast.Return)]
        return [text for value in returned for text in self.texts(value, source, function)]
