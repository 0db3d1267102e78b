# ruff: noqa: PTH100, PTH103, PTH104, PTH105, PTH108, PTH112, PTH113, PTH116, PTH118, PTH119, PTH120, PTH202
"""Moments to die at, and a disk that forgets: processes that count what they do to files and end at the n-th of it.

`arm` puts counting versions in the place of what Python calls to change files (os.pwrite, os.replace, open …) below
some directories. They keep a log, shared by all armed processes, by which `lose` does to those directories what a power
cut may do: bytes that were not fsynced are gone or zero, and so are names in a directory that was not. `Warm` forks
`moectl` from a process that has imported it, because a start costs more than all that is to be interrupted.

It counts what is done from Python, which is all that moectl does to files that it means to keep.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import fcntl
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
KILL, TERM, POWER = "kill", "term", "power"

_REAL = {name: getattr(os, name) for name in ("open", "write", "fsync", "kill", "link", "stat")}
_real_open = io.open


@dataclass(frozen=True, slots=True)
class Plan:
    """When to die: at the `at`-th change below `roots` (0: never), all armed processes counted together, and how."""

    roots: tuple[str, ...]
    log: str
    at: int = 0
    how: str = KILL
    tear: float = 1.0  # of a write that is the moment, so much still happens
    again: int = 0  # a second SIGTERM so many changes after the first, while that is being heard

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def count_changes(log: Path) -> int:
    """Return how many changes the log tells of."""
    return log.read_bytes().count(b"\n") if log.exists() else 0


def arm(plan: Plan) -> None:
    """Count and log this process's changes to files from now on, and die as planned."""
    if isinstance(getattr(os.replace, "__self__", None), _Armed):
        return  # a .pth file is read twice where a directory is named twice
    armed = _Armed(plan)
    for name in ("open", "write", "pwrite", "fsync", "ftruncate", "mkdir", "rmdir", "link", "symlink"):
        setattr(os, name, getattr(armed, name))
    for name in ("replace", "rename"):
        setattr(os, name, armed.rename)
    for name in ("unlink", "remove"):
        setattr(os, name, armed.unlink)
    for module in (io, builtins):
        vars(module)["open"] = armed.open_file


def arm_from(path: str) -> None:
    """Arm by a plan in a file, if there is one: for processes that somebody else starts."""
    with contextlib.suppress(FileNotFoundError), _real_open(path) as f:
        fields = json.load(f)
        arm(Plan(**{**fields, "roots": tuple(fields["roots"])}))


class _Armed:
    """The counting versions; those that others replace are kept as they were."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._real = {name: getattr(os, name) for name in dir(os) if callable(getattr(os, name))}
        self._fds: dict[int, tuple[str, int]] = {}  # descriptor → path and inode of what it was opened for
        self._log = _REAL["open"](plan.log, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._lock = threading.RLock()

    # What is replaced.

    def open(self, path: Any, flags: int, mode: int = 0o777, **more: Any) -> int:
        name = self._tracked(path) if not more else None
        if name is None or (not flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR | os.O_DIRECTORY) and not _is_dir(name)):
            return int(self._real["open"](path, flags, mode, **more))
        with self._change_if_new(name, truncates=bool(flags & os.O_TRUNC)):
            fd = int(self._real["open"](path, flags, mode))
        self._fds[fd] = name, os.fstat(fd).st_ino
        return fd

    def open_file(self, file: Any, mode: str = "r", buffering: int = -1, *text: Any, **more: Any) -> Any:
        writes = set(mode) & set("wax+")
        name = self._held(file) if isinstance(file, int) else self._tracked(file)
        if not writes or name is None or more.get("opener"):
            return _real_open(file, mode, buffering, *text, **more)
        with self._change_if_new(name, truncates="w" in mode) if not isinstance(file, int) else self._lock:
            raw = _File(file, mode.replace("b", "").replace("t", ""), more.pop("closefd", True))
        raw.armed = self
        self._fds[raw.fileno()] = name, os.fstat(raw.fileno()).st_ino
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *text, **more)

    def write(self, fd: int, data: Any) -> int:
        return self.change_bytes(fd, data, None, lambda part: self._real["write"](fd, part))

    def pwrite(self, fd: int, data: Any, offset: int) -> int:
        return self.change_bytes(fd, data, offset, lambda part: self._real["pwrite"](fd, part, offset))

    def change_bytes(self, fd: int, data: Any, offset: int | None, write: Callable[[Any], int]) -> int:
        if self._held(fd) is None:
            return write(data)
        size = os.fstat(fd).st_size
        at = offset
        if at is None:
            appends = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND
            at = size if appends else os.lseek(fd, 0, os.SEEK_CUR)

        def tear() -> None:
            part = memoryview(data).cast("B")[: int(len(memoryview(data).cast("B")) * self._plan.tear)]
            if part:
                write(part)

        with self._change("write", ino=os.fstat(fd).st_ino, at=at, n=memoryview(data).nbytes, size=size, torn=tear):
            return write(data)

    def fsync(self, fd: int) -> None:
        if self._held(fd) is None:
            self._real["fsync"](fd)
            return
        status = os.fstat(fd)
        what = "syncdir" if _is_dir(self._fds[fd][0]) else "sync"
        with self._change(what, ino=status.st_ino, size=status.st_size, path=self._fds[fd][0]):
            self._real["fsync"](fd)

    def ftruncate(self, fd: int, size: int) -> None:
        if self._held(fd) is None:
            self._real["ftruncate"](fd, size)
            return
        with self._change("truncate", ino=os.fstat(fd).st_ino, size=size):
            self._real["ftruncate"](fd, size)

    def rename(self, source: Any, target: Any, **more: Any) -> None:
        old, new = self._tracked(source), self._tracked(target)
        if old is None or new is None:
            self._real["replace"](source, target, **more)
            return
        with self._change("rename", old=old, path=new, stash=self._stash(new)):
            self._real["replace"](source, target)

    def unlink(self, path: Any, **more: Any) -> None:
        name = self._tracked(path) if not more else None
        if name is None or not os.path.lexists(name):
            self._real["unlink"](path, **more)
            return
        with self._change("unlink", path=name, stash=self._stash(name)):
            self._real["unlink"](path)

    def mkdir(self, path: Any, mode: int = 0o777, **more: Any) -> None:
        self._make("mkdir", path, lambda: self._real["mkdir"](path, mode, **more))

    def rmdir(self, path: Any, **more: Any) -> None:
        name = self._tracked(path) if not more else None
        with self._change("rmdir", path=name) if name and _is_dir(name) else contextlib.nullcontext():
            self._real["rmdir"](path, **more)

    def link(self, source: Any, target: Any, **more: Any) -> None:
        self._make("link", target, lambda: self._real["link"](source, target, **more))

    def symlink(self, source: Any, target: Any, *more: Any, **named: Any) -> None:
        self._make("link", target, lambda: self._real["symlink"](source, target, *more, **named))

    # How it counts.

    def _make(self, what: str, path: Any, make: Callable[[], None]) -> None:
        name = self._tracked(path)
        with self._change(what, path=name) if name and not os.path.lexists(name) else contextlib.nullcontext():
            make()

    def _tracked(self, path: Any) -> str | None:
        if isinstance(path, int):
            return None
        name = os.path.join(
            os.path.realpath(os.path.dirname(os.path.abspath(path))), os.path.basename(os.fsdecode(path))
        )
        return name if any(name == root or name.startswith(root + "/") for root in self._plan.roots) else None

    def _held(self, fd: int) -> str | None:
        name, inode = self._fds.get(fd, (None, -1))
        with contextlib.suppress(OSError):
            return name if os.fstat(fd).st_ino == inode else None
        return None

    def _stash(self, path: str) -> str | None:
        """Keep what is about to lose its name, so that the name can come back."""
        if not os.path.isfile(path):
            return None
        with self._lock:
            kept = f"{self._plan.log}.{os.getpid()}-{os.urandom(6).hex()}"
            self._real["link"](path, kept, follow_symlinks=False)
        return kept

    @contextlib.contextmanager
    def _change_if_new(self, name: str, *, truncates: bool) -> Iterator[None]:
        if not os.path.lexists(name):
            with self._change("create", path=name):
                yield
        elif truncates and os.path.isfile(name) and os.path.getsize(name):
            with self._change("truncate", ino=os.stat(name).st_ino, size=0):
                yield
        else:
            yield

    @contextlib.contextmanager
    def _change(self, op: str, torn: Callable[[], None] = lambda: None, **what: Any) -> Iterator[None]:
        """Log one change and let it happen, or die: one at a time over all armed processes."""
        with self._lock:
            fcntl.flock(self._log, fcntl.LOCK_EX)
            try:
                number = count_changes(Path(self._plan.log)) + 1
                if number == self._plan.at and self._plan.how != TERM:
                    self._die(op, torn, what)
                _REAL["write"](self._log, json.dumps({"op": op, **what}).encode() + b"\n")
                if (
                    self._plan.how == TERM
                    and self._plan.at
                    and number in {self._plan.at, self._plan.at + self._plan.again}
                ):
                    _REAL["kill"](os.getpid(), signal.SIGTERM)
                yield
            finally:
                fcntl.flock(self._log, fcntl.LOCK_UN)

    def _die(self, op: str, torn: Callable[[], None], what: dict[str, Any]) -> None:
        if op == "write" and self._plan.tear < 1:
            torn()
            _REAL["write"](self._log, json.dumps({"op": op, **what}).encode() + b"\n")
        if self._plan.how == POWER:
            os.killpg(0, signal.SIGKILL)
        _REAL["kill"](os.getpid(), signal.SIGKILL)


class _File(io.FileIO):
    """What `open` gives below a root: its writes are counted, buffered ones when the buffer is written out."""

    armed: _Armed

    def write(self, data: Any) -> int:
        return self.armed.change_bytes(self.fileno(), data, None, super().write)


def _is_dir(path: str) -> bool:
    return os.path.isdir(path)


# The disk that forgets.


@dataclass(slots=True)
class _Unsynced:
    """A file's bytes that may be lost: where they are, and its size when it was last durable."""

    durable_size: int
    ranges: list[tuple[int, int]] = field(default_factory=list)


def lose(log: Path, roots: Sequence[Path], draw: random.Random) -> int:
    """Do to `roots` what a power cut may do after the changes in `log`; return how many changes were lost.

    Of each directory's names the last so many that were not made durable go back to what they were, of each file's
    bytes those that were not fsynced are cut off, zero, or there. Everything else is as it was: a disk that keeps its
    word. What was lost or kept is durable then: the log begins anew.
    """
    names: dict[str, list[dict[str, Any]]] = {}
    files: dict[int, _Unsynced] = {}
    order: list[dict[str, Any]] = []
    for line in log.read_text().splitlines() if log.exists() else []:
        change = json.loads(line)
        _note(change, names, files)
        order.append(change)
    undone = []
    for changes in names.values():
        undone += changes[draw.randint(0, len(changes)) :]
    ids = {id(change) for change in undone}
    for change in reversed([c for c in order if id(c) in ids]):
        _undo(change)
    lost = len(undone)
    for path in (p for root in roots for p in sorted(root.rglob("*"))):
        if path.is_file() and not path.is_symlink() and path.stat().st_ino in files:
            lost += _forget_bytes(path, files[path.stat().st_ino], draw)
    clear_log(log)
    return lost


def clear_log(log: Path) -> None:
    """Begin a log anew: what was done so far is durable."""
    for path in [*log.parent.glob(f"{log.name}.*"), log]:
        path.unlink(missing_ok=True)


def _note(change: dict[str, Any], names: dict[str, list[dict[str, Any]]], files: dict[int, _Unsynced]) -> None:
    match change["op"]:
        case "write":
            file = files.setdefault(change["ino"], _Unsynced(change["size"]))
            file.ranges.append((change["at"], change["at"] + change["n"]))
        case "sync":
            files.pop(change["ino"], None)
        case "truncate":
            files.setdefault(change["ino"], _Unsynced(change["size"])).durable_size = change["size"]
        case "syncdir":
            names.pop(change["path"], None)
        case _:
            names.setdefault(os.path.dirname(change["path"]), []).append(change)


def _undo(change: dict[str, Any]) -> None:
    path, stash = change["path"], change.get("stash")
    match change["op"]:
        case "create" | "link" if os.path.lexists(path):
            os.unlink(path)
        case "rename" if os.path.lexists(path):
            os.replace(path, change["old"])
        case "mkdir" if os.path.isdir(path):
            os.rename(path, f"{change['path']}.lost-{os.urandom(4).hex()}")
        case "rmdir":
            os.makedirs(path, exist_ok=True)
    if stash is not None and not os.path.lexists(path) and os.path.isdir(os.path.dirname(path)):
        os.link(stash, path, follow_symlinks=False)


def _forget_bytes(path: Path, file: _Unsynced, draw: random.Random) -> int:
    """Cut off, blank or keep a file's bytes that were not fsynced."""
    size = path.stat().st_size
    match draw.choice(["keep", "cut", "part", "blank"]):
        case "cut":
            os.truncate(path, min(size, file.durable_size))
        case "part":
            os.truncate(path, draw.randint(min(size, file.durable_size), size))
        case "blank":
            with _real_open(path, "r+b") as f:
                for start, stop in file.ranges:
                    f.seek(start)
                    f.write(bytes(max(0, min(stop, size) - start)))
        case _:
            return 0
    return 1


# The warm process.


@dataclass(frozen=True, slots=True)
class Ended:
    """How a moectl ended: exit code, negative for a signal, and what it said."""

    code: int
    said: str


class Warm:
    """A process that has imported moectl and forks one for each command; `imports` names modules beside."""

    def __init__(self, imports: Sequence[str], env: Mapping[str, str]) -> None:
        # Not mlx: it has threads, which a fork would lose.
        program = f"import sys; from tests.support.crash import serve; serve({[*imports]!r})"
        self._process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"

    def run(
        self,
        argv: Sequence[str],
        said: Path,
        plan: Plan,
        *,
        env: Mapping[str, str] | None = None,
        kill_after_s: float | None = None,
        timeout_s: float = 120,
    ) -> Ended:
        """Run `moectl argv`; with `kill_after_s` it gets the plan's signal then, whatever it is doing."""
        xdg = {name: value for name, value in os.environ.items() if name.startswith(("XDG_", "MOECTL_"))}
        request = {"argv": list(argv), "env": {**xdg, **(env or {})}, "plan": plan.to_json(), "said": str(said)}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        pid = self._read(timeout_s, self._process.pid)
        moment = threading.Timer(kill_after_s or 0.0, _signal, (pid, plan.how))
        if kill_after_s is not None:
            moment.start()
        code = self._read(timeout_s, pid)
        moment.cancel()  # its number may soon be another's
        return Ended(code, said.read_text(errors="replace"))

    def close(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        self._process.wait(20)

    def _read(self, timeout_s: float, suspect: int) -> int:
        """Return the next number; one that is too long in coming is a hang, whose process is ended."""
        assert self._process.stdout is not None
        hung = threading.Event()

        def end() -> None:
            hung.set()
            _signal(suspect, KILL)

        watch = threading.Timer(timeout_s, end)
        watch.start()
        line = self._process.stdout.readline()
        watch.cancel()
        assert not hung.is_set(), f"process {suspect} hung"
        assert line, "the warm process has ended"
        return int(line)


def _signal(pid: int, how: str) -> None:
    with contextlib.suppress(ProcessLookupError):
        if how == POWER:
            os.killpg(pid, signal.SIGKILL)
        else:
            os.kill(pid, signal.SIGTERM if how == TERM else signal.SIGKILL)


def serve(imports: Sequence[str]) -> None:
    """Fork a moectl for each request on stdin; answer its process id, then its exit code."""
    import importlib

    for name in (
        "moectl.__main__",
        "moectl.shards.prepare",
        "moectl.shards.build",
        "moectl.text",
        "moectl.cli.verbs.plan",
        *imports,
    ):
        importlib.import_module(name)
    if "moectl.cluster.deploy.deploy" in imports:
        _pack_once()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _be_moectl(json.loads(line))
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()
        status = os.waitpid(pid, 0)[1]
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


def _pack_once() -> None:
    """Let every deploy offer the same wheel: packing it is half of what one costs, and no host here needs it."""
    from moectl.cluster.deploy import deploy, wheel

    packed = wheel.pack_wheel(Path(tempfile.mkdtemp(prefix="moectl-wheel-")))
    atexit.register(shutil.rmtree, packed.parent)
    vars(deploy)["pack_wheel"] = lambda directory: packed


def _be_moectl(request: dict[str, Any]) -> None:
    os.setpgid(0, 0)
    os.environ.update(request["env"])
    said = os.open(request["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for fd, wanted in ((nothing, 0), (said, 1), (said, 2)):
        os.dup2(fd, wanted)
    sys.stdin = _real_open(0, closefd=False)
    sys.argv = ["moectl", *request["argv"]]
    if "huggingface_hub" in sys.modules and "HF_HUB_CACHE" in os.environ:  # it has read its environment
        from huggingface_hub import constants

        constants.HF_HUB_CACHE, constants.DOWNLOAD_CHUNK_SIZE = os.environ["HF_HUB_CACHE"], 16 << 10
    fields = json.loads(request["plan"])
    arm(Plan(**{**fields, "roots": tuple(fields["roots"])}))
    from moectl.__main__ import main

    code = 1
    try:
        main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
