"""The names and texts of MLX, JACCL and mlx-lm that moectl relies on, although they promise none of them.

`NAMES` is the one list of environment variables and of parts of error messages: moectl may have no other, and each has
to be in the wheels that it is said to be in. What moectl imports is read from its own sources. How mlx-lm's parts
behave is in tests/shards/test_mlx_lm.py.
"""

from __future__ import annotations

import ast
import re
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.support.architecture import modules

LINUX, MAC, MAC_15 = "linux", "macosx_26_0_arm64", "macosx_15_0_arm64"  # wheels; the last has no JACCL
EVERYWHERE = (LINUX, MAC, MAC_15)
MACS = (MAC, MAC_15)
MACOS = ()  # texts of macOS itself: no wheel has them


@dataclass(frozen=True, slots=True)
class Name:
    """A variable or a part of a message, the wheels that have it, and what it is to moectl."""

    text: str
    wheels: tuple[str, ...]
    what: str


NAMES = (
    # Variables. JACCL looks for its own names before those of MLX.
    Name("MLX_RANK", EVERYWHERE, "the rank of this process"),
    Name("MLX_WORLD_SIZE", EVERYWHERE, "mlx.launch's, removed from a worker's environment"),
    Name("MLX_HOSTFILE", EVERYWHERE, "addresses for the ring"),
    Name("MLX_IBV_DEVICES", (MAC,), "devices for JACCL"),
    Name("MLX_JACCL_COORDINATOR", (MAC,), "the address of rank 0 for JACCL"),
    Name("MLX_JACCL_RING", (MAC,), "JACCL over neighbours only"),
    Name("JACCL_RANK", (MAC,), "wins over MLX_RANK"),
    Name("JACCL_IBV_DEVICES", (MAC,), "wins over MLX_IBV_DEVICES"),
    Name("JACCL_COORDINATOR", (MAC,), "wins over MLX_JACCL_COORDINATOR"),
    Name("JACCL_RING", (MAC,), "wins over MLX_JACCL_RING"),
    Name("MLX_METAL_FAST_SYNCH", MACS, "hangs a group where only one rank has it"),
    Name("MLX_METAL_RESIDENCY_REFRESH_INTERVAL_MS", MACS, "0 keeps idle weights wired"),
    Name("MLX_MAX_OPS_PER_BUFFER", MACS, "operations in a command buffer"),
    Name("MLX_MAX_MB_PER_BUFFER", MACS, "megabytes in a command buffer"),
    Name("MLX_DISABLE_COMPILE", EVERYWHERE, "for tests: no compiler for each function"),
    # How messages of a backend begin.
    Name("[ring]", EVERYWHERE, "an error of the ring"),
    Name("[jaccl]", (MAC,), "an error of JACCL"),
    Name("[METAL] Command buffer execution failed", MACS, "before what Metal says"),
    Name(
        "[metal::load_device] No Metal device available",
        MACS,
        "a Mac without a session on its display, or a virtual one",
    ),
    Name("[metal::malloc] Attempting to allocate ", MACS, "more than one buffer may have"),
    Name("[distributed] Couldn't initialize any backend", EVERYWHERE, "strict=True and no backend"),
    # JACCL's, in parts: numbers and names follow or stand between.
    Name("Cannot initialize jaccl distributed backend.", (LINUX, MAC_15), "a build without JACCL"),
    Name("Creating the queue pair failed with '", (MAC,), "queue pairs of an earlier run are still held"),
    Name("Register memory region failed", (MAC,), "too many memory regions on a device"),
    Name("No IPv4-mapped GID for this device", (MAC,), "a Thunderbolt port without an address"),
    Name("Changing queue pair to INIT failed with errno ", (MAC,), "errno 22: the port is in bridge0"),
    Name("Changing queue pair to RTR failed with errno ", (MAC,), "ready to receive: the other end does not answer"),
    Name("Changing queue pair to RTS failed with errno ", (MAC,), "ready to send"),
    Name("Could not find device ", (MAC,), "rdma= names a device that is not there"),
    Name("Couldn't connect (error: ", (MAC,), "JACCL's coordinator cannot be reached"),
    # macOS's own, which follow "[METAL] Command buffer execution failed: ".
    Name("kIOGPUCommandBufferCallbackErrorTimeout", MACOS, "a command buffer took more than about 5 s"),
    Name("Caused GPU Timeout Error", MACOS, "the same in words"),
    Name("Impacting Interactivity", MACOS, "the GPU was taken away for the display's sake"),
    Name("Insufficient Memory", MACOS, "no room for a command buffer's memory"),
)

_VARIABLE = re.compile(r"\b(?:MLX|JACCL)_[A-Z_]*[A-Z]\b")
_MARK = re.compile(r"\[(?:ring|jaccl|METAL|distributed|metal::\w+)\]")
_READ = (".so", ".dylib", ".py", ".pyi")  # not the kernels, which are large
_ROOTS = ("mlx", "mlx_lm")


def list_used() -> Iterator[tuple[str, str]]:
    """Yield (module, name) of every variable and mark in moectl's string constants, without its docstrings."""
    for module, tree in modules().items():
        for text in _constants(tree):
            yield from ((module, match[0]) for pattern in (_VARIABLE, _MARK) for match in pattern.finditer(text))


def find_missing(files: Iterable[bytes], texts: Iterable[str]) -> set[str]:
    """Return those texts that none of the files has."""
    left = {text: text.encode() for text in texts}
    for content in files:
        left = {text: raw for text, raw in left.items() if raw not in content}
    return set(left)


def read_directory(directory: Path) -> Iterator[bytes]:
    """Yield the files of an installed package."""
    return (path.read_bytes() for path in directory.rglob("*") if path.suffix in _READ)


def read_wheels(directory: Path) -> Iterator[bytes]:
    """Yield the files of all wheels in a directory."""
    for path in directory.glob("*.whl"):
        with zipfile.ZipFile(path) as wheel:
            yield from (wheel.read(name) for name in wheel.namelist() if name.endswith(_READ))


@cache
def list_symbols() -> frozenset[str]:
    """Return the dotted names of MLX and mlx-lm that moectl imports or takes from an imported module."""
    found: set[str] = set()
    for tree in modules().values():
        aliases: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                aliases |= {alias.asname: alias.name for alias in node.names if alias.asname and _is_theirs(alias.name)}
                found |= {alias.name for alias in node.names if _is_theirs(alias.name)}
            elif isinstance(node, ast.ImportFrom) and node.module and _is_theirs(node.module):
                names = {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
                aliases |= names
                found |= set(names.values())
        found |= {name for node in ast.walk(tree) if (name := _dotted(node, aliases))}
    return frozenset(found)


def _constants(tree: ast.Module) -> Iterator[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def _is_theirs(module: str) -> bool:
    return module.partition(".")[0] in _ROOTS


def _dotted(node: ast.AST, aliases: dict[str, str]) -> str | None:
    """Return "mlx.core.distributed.init" for `mx.distributed.init`; None for what is not theirs."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not parts or not isinstance(node, ast.Name) or node.id not in aliases:
        return None
    return ".".join([aliases[node.id], *reversed(parts)])
