# ruff: noqa: PTH100,PTH106,PTH108,PTH110,PTH111,PTH112,PTH113,PTH114,PTH118,PTH119,PTH120,PTH123,PTH208
"""The program that removes what moectl put on a host, file by file. It leaves everything else, and names it.

Its text is sent to the host's own python (`python -c`), so it uses the standard library only and runs from Python 3.9
on. A file is moectl's when a manifest or a record of moectl's lists it, or when only moectl gives such a name. The
environment is moectl's when it says so, and a directory that dir= names is when moectl made it.

    python -c TEXT        {"root", "keep", "dry_run"} on stdin; answers {"root", "items": {name: bytes}, "left": [path],
                          "busy": why or null, "failed": [why]}, a line of JSON behind `ANSWER`
"""

from __future__ import annotations

import contextlib
import fcntl
import fnmatch
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from typing import Any

from moectl.hosts.onhost.files import MADE, RECORD, read_object
from moectl.hosts.onhost.prelude import end_with_stdin, tell

MANIFEST = "moectl.json"
STAMP = "moectl-env.json"
DEFAULT = "~/.moectl"
# What `python -m venv` and pip make at the top of an environment.
ENV_NAMES = {"bin", "include", "lib", "lib64", "share", "etc", "man", "pyvenv.cfg", ".gitignore", STAMP}
LOG = re.compile(r".+-rank-\d+\.log(\.\d+|\.lock)?")
OURS = re.compile(r"\.?moectl-(verified|env)\.json\.\d+\.tmp|\.moectl-verified\.json")
WHEELS = ("moectl-*.whl", "requirements.txt")
# Files of a set whose push was interrupted before anything listed them.
SET_FILES = (
    "common/*.safetensors",
    "rank-*/*.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "chat_template*",
    "vocab*",
    "merges.txt",
    "LICENSE*",
    "NOTICE*",
    MANIFEST,
)
HALF = (".partial", ".link")  # endings of a file that is not complete
LITTER = ".DS_Store"  # the Finder makes it in every directory that it shows


class Removals:
    """What to remove under a root: files and whole trees of moectl's; and what to leave."""

    def __init__(self, root: str, keep: list[str]) -> None:
        self.root = root
        self.files: list[str] = []
        self.trees: list[str] = []
        self.directories: list[str] = []  # to remove where they are empty, the inner ones first
        self.left: list[str] = []
        self.items: dict[str, int] = {}
        self.above: list[str] = []  # the same, above the root: moectl made them with it
        self._keep = {os.path.realpath(os.path.expanduser(path)) for path in keep}
        if os.path.isdir(root):
            self._visit()

    def _visit(self) -> None:
        for name in sorted(os.listdir(self.root)):
            path = os.path.join(self.root, name)
            if name == "env":
                self._visit_env(path)
            elif name == "shards" and os.path.isdir(path):
                self._visit_shards(path)
            elif name == "logs" and os.path.isdir(path):
                self._take_if(name, path, lambda inner: LOG.fullmatch(inner) is not None)
            elif name == "wheels" and os.path.isdir(path):
                self._visit_wheels(path)
            elif name == "env.lock" and os.path.isfile(path):
                self._take(name, path)
            elif name == MADE and os.path.isfile(path):
                self._visit_root(path)
            elif name != LITTER:
                self.left.append(path)
        if self.root == os.path.abspath(os.path.expanduser(DEFAULT)):
            self.directories.append(self.root)

    def _visit_root(self, note: str) -> None:
        """Take the root, and the directories between it and the one that was there before."""
        self.files.append(note)
        with contextlib.suppress(OSError), open(note, encoding="utf-8", errors="surrogateescape") as f:
            self._take_below(f.read())

    def _take_below(self, before: str) -> None:
        path = self.root
        while before.startswith("/") and path != before and path.startswith(before.rstrip("/") + "/"):
            self.above.append(path)
            path = os.path.dirname(path)

    def _visit_env(self, env: str) -> None:
        if os.path.islink(env) or not is_our_env(env):
            self.left.append(env)
            return
        self.directories.append(env)
        for name in sorted(os.listdir(env)):
            path = os.path.join(env, name)
            if name not in ENV_NAMES and not OURS.fullmatch(name) and name != LITTER:
                self.left.append(path)
            elif os.path.isdir(path) and not os.path.islink(path):
                self.trees.append(path)
                self.items["env"] = self.items.get("env", 0) + tree_size(path)
            elif name != LITTER:
                self._take("env", path)

    def _visit_wheels(self, directory: str) -> None:
        known = set(read_object(os.path.join(directory, RECORD)))
        self._take_if(
            "wheels", directory, lambda name: name in known or any(fnmatch.fnmatchcase(name, p) for p in WHEELS)
        )

    def _visit_shards(self, shards: str) -> None:
        for name in sorted(os.listdir(shards)):
            path = os.path.join(shards, name)
            if name == LITTER:
                continue
            if not os.path.isdir(path) or os.path.islink(path) or os.path.realpath(path) in self._keep:
                self.left.append(path)
            else:
                self._visit_set(f"shards/{name}", path)
        self.directories.append(shards)

    def _visit_set(self, item: str, directory: str) -> None:
        manifest = read_object(os.path.join(directory, MANIFEST))
        record = read_object(os.path.join(directory, RECORD))
        files = manifest.get("files")
        listed = {*(files if isinstance(files, dict) else ()), *record, RECORD}
        listed |= {MANIFEST} if str(manifest.get("schema", "")).startswith("moectl.") else set()
        begun = not manifest and is_begun(directory)  # then its files have to be guessed
        for place, names, inner in walk(directory):
            for name in inner:
                path = os.path.join(place, name)
                plain = without_ending(os.path.relpath(path, directory))
                guessed = begun and any(is_like(plain, pattern) for pattern in SET_FILES)
                self._sort(item, path, plain in listed or guessed or OURS.fullmatch(name) is not None)
            for name in names:
                if os.path.islink(os.path.join(place, name)):
                    self.left.append(os.path.join(place, name))
        self._add_directories(directory)

    def _take_if(self, item: str, directory: str, is_ours: Any) -> None:
        """Take the files in one directory whose name is moectl's."""
        for name in sorted(os.listdir(directory)):
            path = os.path.join(directory, name)
            ours = is_ours(without_ending(name)) or OURS.fullmatch(name) is not None
            self._sort(item, path, ours and (os.path.isfile(path) or os.path.islink(path)))
        self.directories.append(directory)

    def _sort(self, item: str, path: str, ours: bool) -> None:
        if ours:
            self._take(item, path)
        elif os.path.basename(path) != LITTER:
            self.left.append(path)

    def _take(self, item: str, path: str) -> None:
        self.files.append(path)
        self.items[item] = self.items.get(item, 0) + os.lstat(path).st_size

    def _add_directories(self, directory: str) -> None:
        inner = [os.path.join(place, name) for place, names, _ in walk(directory) for name in names]
        for path in sorted(inner, reverse=True):
            if not os.path.islink(path):
                self.directories.append(path)
        self.directories.append(directory)


def walk(directory: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield (place, directories, files) of a tree in order; links are not followed."""
    for place, names, files in os.walk(directory):
        names.sort()
        yield place, names, sorted(files)


def is_like(path: str, pattern: str) -> bool:
    """Whether a path fits a pattern whose `*` stands for no slash."""
    return path.count("/") == pattern.count("/") and fnmatch.fnmatchcase(path, pattern)


def is_begun(directory: str) -> bool:
    """Whether a push has begun to fill a directory without a manifest, which may hold models of other programs too."""
    if os.path.exists(os.path.join(directory, RECORD)):
        return True
    for place, _, files in walk(directory):
        inner = os.path.relpath(place, directory)
        if inner == "common" or re.fullmatch(r"rank-\d+", inner) or any(name.endswith(HALF) for name in files):
            return True
    return False


def without_ending(path: str) -> str:
    """Return the name that an incomplete file will have."""
    return re.sub(r"\.(partial|link)\Z", "", path)


def is_our_env(env: str) -> bool:
    """Whether moectl made this environment: its stamp is there, or its pyvenv.cfg names the command that moectl uses.

    An empty directory counts: an earlier removal left it because it held another file then.
    """
    if os.path.isfile(os.path.join(env, STAMP)) or (os.path.isdir(env) and not os.listdir(env)):
        return True
    try:
        with open(os.path.join(env, "pyvenv.cfg"), encoding="utf-8") as f:
            made = re.search(r"^command = .* -m venv (?:-.* )?--clear (?:--without-pip )?(.*)$", f.read(), re.MULTILINE)
    except OSError:
        return False
    return made is not None and os.path.realpath(made[1]) == os.path.realpath(env)


def tree_size(directory: str) -> int:
    """Return the bytes of all files in a tree."""
    total = 0
    for place, _, files in walk(directory):
        for name in files:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_size
    return total


def find_busy(plan: Removals, held: list[int]) -> str | None:
    """Return which deploy works here now: it locks the environment, or a file that it writes.

    The locks are kept in `held`, so that no deploy begins before this process ends.
    """
    for path in plan.files:
        if os.path.basename(path) == "env.lock" or path.endswith(".partial"):
            try:
                fd = os.open(path, os.O_RDWR)
            except OSError:
                continue
            held.append(fd)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return f"a deploy is at work: {path} is locked"
    return None


def remove(plan: Removals) -> list[str]:
    """Remove moectl's files; return what the disk refused."""
    failed: list[str] = []
    for path in plan.files:
        with noted(failed):
            os.unlink(path)
    for path in plan.trees:
        with noted(failed):
            shutil.rmtree(path)
    for path in (*plan.directories, *plan.above):
        if os.path.islink(path):  # its owner moved it to another disk
            continue
        with contextlib.suppress(OSError):  # it is not empty
            if os.listdir(path) == [LITTER]:
                os.unlink(os.path.join(path, LITTER))
            os.rmdir(path)
    return failed


@contextlib.contextmanager
def noted(failed: list[str]) -> Iterator[None]:
    """Note what the disk refuses, and continue."""
    try:
        yield
    except FileNotFoundError:
        pass
    except OSError as error:
        failed.append(f"{error.filename}: {error.strerror}")


def _main() -> None:
    request = json.loads(sys.stdin.buffer.readline())
    end_with_stdin(lambda: os._exit(1))
    root = os.path.abspath(os.path.expanduser(request["root"]))
    plan = Removals(root, request["keep"])
    held: list[int] = []
    busy = find_busy(plan, held)
    failed = [] if busy or request["dry_run"] else remove(plan)
    tell({"root": root, "items": plan.items, "left": plan.left, "busy": busy, "failed": failed})
    os._exit(0)  # python itself would wait for the thread that reads stdin


if __name__ == "__main__":
    _main()
