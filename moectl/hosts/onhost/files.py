# ruff: noqa: PTH100,PTH102,PTH103,PTH105,PTH108,PTH110,PTH111,PTH112,PTH114,PTH116,PTH118,PTH119,PTH120,PTH123,PTH208
"""What happens on a host before moectl is there: receive a file, list files, tell versions and space.

Its text is sent to the host's own python (`python -c`), so it uses the standard library only and runs from
Python 3.9 on. `remote` also imports it for this machine. It is not the worker: no model, no mlx, no network.

    python -c TEXT receive                      files on stdin, each behind a line {"path", "bytes", "sha256"};
                                                answers {"kept": n} and takes the rest, then {} or {"error": …}
    python -c TEXT survey                       what is there? request on stdin, a line of JSON
    python -c TEXT install                      run commands that mend an environment, one deploy at a time; likewise
    python -c TEXT record                       remember files that were verified; request on stdin, JSON

`survey` and `install` can take long: they end, with all that they started, when their stdin does.
Each answer is a line of JSON behind ANSWER, which tells it from what a login shell may print.
"""

# os.path, not pathlib: paths arrive as strings, and every import is paid on the host at each command.
from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import platform
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any

from moectl.hosts.onhost.prelude import end_with_stdin, tell

BLOCK_BYTES = 1 << 20
IDLE_S = 600.0
STALL_S = 120.0  # a sender that vanished without a word must not hold the lock for ever
RECORD = ".moectl-verified.json"
MADE = ".moectl-made"  # in a root that was not there before: the nearest directory that was


class Busy(Exception):
    """Another push is writing the same file, or another deploy is installing."""


class StepFailed(Exception):
    """A command of `install` failed; args are (its index, exit code, its last words)."""


class Cut(Exception):
    """The sender went away before the file was complete."""


class Full(Exception):
    """The disk has not enough room; args are (free, needed) in bytes."""


class Outside(Exception):
    """A name or a symbolic link leads out of the directory that was named; args are (path,)."""


class Mismatch(Exception):
    """The bytes are not those promised; args are (sha256 found, bytes that an earlier push had left)."""


def receive(
    read: Callable[[int], bytes],
    destination: str,
    size_bytes: int,
    sha256: str,
    on_kept: Callable[[int], None],
) -> None:
    """Complete `destination.partial` with bytes from `read`, check it, and give it its final name.

    `on_kept(n)` is called once, before the first read: `read` has to go on at byte n. A partial file with
    wrong bytes is removed; a file that is there and right is left alone. Raises Busy, Cut, Full, Mismatch, OSError.
    """
    if _check(destination, size_bytes, sha256, None, True):
        on_kept(size_bytes)
        return
    partial = destination + ".partial"
    _make_directory(os.path.dirname(destination) or ".")
    # A symbolic link there would be somebody else's file, and is refused.
    fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | getattr(os, "O_CLOEXEC", 0), 0o644)
    try:
        _lock(fd, partial)
        digest, kept = _hash_prefix(fd, size_bytes)
        _check_room(partial, size_bytes - kept)
        on_kept(kept)
        _append(fd, read, digest, size_bytes - kept, partial)
        if digest.hexdigest() != sha256:
            os.unlink(partial)
            raise Mismatch(digest.hexdigest(), kept)
        os.fsync(fd)
        os.replace(partial, destination)
        _sync_directory(os.path.dirname(destination) or ".")
    finally:
        os.close(fd)


def _lock(fd: int, partial: str) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        same = os.path.samestat(os.fstat(fd), os.stat(partial))
    except (BlockingIOError, FileNotFoundError):
        same = False
    if not same:  # the other push renamed it between our open and our lock
        raise Busy(partial)


def _hash_prefix(fd: int, size_bytes: int) -> tuple[Any, int]:
    """Hash what an earlier push left and stand behind it; a partial file that is too long starts over."""
    digest = hashlib.sha256()
    kept = os.fstat(fd).st_size
    if kept > size_bytes:
        os.ftruncate(fd, 0)
        kept = 0
    left = kept
    while left:
        block = os.read(fd, min(BLOCK_BYTES, left))
        digest.update(block)
        left -= len(block)
    return digest, kept


def _check_room(path: str, needed: int) -> None:
    free = shutil.disk_usage(os.path.dirname(path) or ".").free
    if free < needed:
        raise Full(free, needed)


def _append(fd: int, read: Callable[[int], bytes], digest: Any, left: int, path: str) -> None:
    while left:
        block = read(min(BLOCK_BYTES, left))
        if not block:
            raise Cut(left)
        digest.update(block)
        try:
            _write_all(fd, block)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise Full(shutil.disk_usage(os.path.dirname(path) or ".").free, left) from None
            raise
        left -= len(block)


def _write_all(fd: int, block: bytes) -> None:
    view = memoryview(block)
    while view:
        view = view[os.write(fd, view) :]


def hash_file(path: str) -> str:
    """Return a file's SHA-256 in lower-case hex."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as f:
        while block := f.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def survey(request: dict[str, Any]) -> dict[str, Any]:
    """Answer everything that `deploy` asks of a host, in one round trip.

    Request: root, stamp (path under root), packages, wheels {name: [bytes, sha256]}, and directory + files
    {path: [bytes, sha256]} + verify + remember (False in a dry run, which writes nothing and does not make the root).
    Files that are being made are `planned` {path: bytes}: `known` are the hashes that an earlier push recorded, `begun`
    the bytes that are there.
    """
    root = os.path.abspath(os.path.expanduser(request["root"]))
    directory = os.path.join(root, request["directory"])
    refuse_names_outside([request["directory"], request["stamp"], *request["files"], *request["wheels"]])
    refuse_links_outside(directory)
    missing, kept, corrupt = _look(directory, request["files"], request["verify"], request["remember"])
    wheels, _, _ = _look(os.path.join(root, "wheels"), request["wheels"], False, request["remember"])
    place = _nearest(root)
    if request["remember"] and place != root:
        _claim(root, place)
    return {
        "python": sys.executable,
        "version": platform.python_version(),
        "root": root,
        "directory": directory,
        "free": shutil.disk_usage(place).free,
        "device": os.stat(place).st_dev,
        "env": _is_env_of_this_python(os.path.join(root, "env")),
        "writable": os.access(place, os.W_OK | os.X_OK),
        "packages": _versions(request["packages"]),
        "code": _find_code(),
        "stamp": _read_text(os.path.join(root, request["stamp"])),
        "wheels": wheels,
        "missing": missing,
        "kept": kept,
        "corrupt": corrupt,
        "known": {} if request["verify"] else _recall(directory),
        "begun": {name: _begun(os.path.join(directory, name), size) for name, size in request["planned"].items()},
    }


def _claim(root: str, place: str) -> None:
    """Make the root and note that it was not there: what its owner made is not for `clear` to remove."""
    with contextlib.suppress(OSError):  # what is wrong with it, the first file will tell
        _make_directory(root)
        write(os.path.join(root, MADE), place.encode("utf-8", "surrogateescape"))


def _recall(directory: str) -> dict[str, str]:
    """Return the recorded hashes of files that have not changed since."""
    found = {}
    for name, state in read_record(directory).items():
        with contextlib.suppress(OSError, TypeError, ValueError, IndexError):
            status = os.stat(os.path.join(directory, name))
            if state == make_stamp(status, state[-1]):
                found[name] = str(state[-1])
    return found


def _begun(path: str, size: int) -> int:
    return min(size, max(_size_of(path), _size_of(path + ".partial")))


def refuse_names_outside(names: Iterable[str]) -> None:
    """Raise Outside for a relative path that does not stay below where it starts."""
    for name in names:
        if not name or name.startswith("/") or "\0" in name or ".." in name.split("/"):
            raise Outside(name)


def refuse_links_outside(directory: str) -> None:
    """Raise Outside when a symbolic link below a directory leads out of it, or nowhere."""
    base = os.path.realpath(directory)
    for place, directories, files in os.walk(base):
        for name in (*directories, *files):
            path = os.path.join(place, name)
            if os.path.islink(path) and not os.path.realpath(path).startswith(base + os.sep):
                raise Outside(path)


def _look(
    directory: str, files: dict[str, list[Any]], verify: bool, remember: bool
) -> tuple[dict[str, int], list[str], list[str]]:
    known = read_record(directory)
    found = compare(directory, files, known, verify)
    if remember and found[1] and known != read_record(directory):
        write_record(directory, known)
    return found


def _is_env_of_this_python(env: str) -> bool:
    """Tell whether the environment works and was made by the python that runs this."""
    python = os.path.join(env, "bin", "python")
    cfg = _read_text(os.path.join(env, "pyvenv.cfg"))
    minor = ".".join(platform.python_version_tuple()[:2])
    same = os.path.realpath(python) == os.path.realpath(sys.executable)
    return same and os.access(python, os.X_OK) and f"version = {minor}." in cfg


def _find_code() -> str:
    """Return the hash of the moectl that this python would import, "" when there is none."""
    from importlib import util

    spec = util.find_spec("moectl")
    return hash_package(os.path.dirname(spec.origin)) if spec and spec.origin else ""


def hash_package(directory: str) -> str:
    """Return one SHA-256 over the names and bytes of a package's files."""
    digest = hashlib.sha256()
    for path in list_package(directory):
        name = os.path.relpath(path, directory)
        digest.update(f"{name}\0{hash_file(path)}\n".encode())
    return digest.hexdigest()


def list_package(directory: str) -> list[str]:
    """Return the files of a package, sorted, without what python and the Finder leave there."""
    found = []
    for place, _, names in os.walk(directory):
        if os.path.basename(place) != "__pycache__":
            found += [os.path.join(place, name) for name in names if name != ".DS_Store"]
    return sorted(found)


def _nearest(path: str) -> str:
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return path


def _versions(packages: list[str]) -> dict[str, str]:
    from importlib import metadata

    found = {}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _read_text(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as f:
            return f.read()
    except (OSError, UnicodeDecodeError):
        return ""


def compare(
    directory: str, files: dict[str, list[Any]], record: dict[str, Any], verify: bool
) -> tuple[dict[str, int], list[str], list[str]]:
    """Compare files {path: [bytes, sha256]} with what is there, hashing what `record` does not vouch for.

    Returns (missing or wrong file → bytes of its `.partial`, files that are right, files that are there and wrong), and
    brings `record` up to date.
    """
    missing: dict[str, int] = {}
    kept, corrupt = [], []
    for name, (size, sha256) in files.items():
        path = os.path.join(directory, name)
        state = _check(path, size, sha256, record.get(name), verify)
        if state is None:
            missing[name] = min(size, _size_of(path + ".partial"))
            record.pop(name, None)
            if os.path.exists(path):
                corrupt.append(name)
        else:
            kept.append(name)
            record[name] = state
    return missing, kept, corrupt


def _check(path: str, size: int, sha256: str, known: Any, verify: bool) -> list[Any] | None:
    """Return a right file's record, None for a wrong one; hash only what `known` does not vouch for."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    state = make_stamp(status, sha256)
    if status.st_size != size:
        return None
    if not verify and known == state:
        return state
    try:
        return state if hash_file(path) == sha256 else None
    except OSError:
        return None


def make_stamp(status: os.stat_result, sha256: str) -> list[Any]:
    """Return what a record says of a file that was hashed: whatever writes to it or replaces it changes that.

    Times are only ever compared for equality with this host's own, so its clock may be wrong.
    """
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, sha256]


def _size_of(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def record(request: dict[str, Any]) -> dict[str, Any]:
    """Remember files that `receive` has just verified: {directory, files {path: sha256}}."""
    refuse_names_outside(request["files"])
    known = read_record(request["directory"])
    for name, sha256 in request["files"].items():
        known[name] = make_stamp(os.stat(os.path.join(request["directory"], name)), sha256)
    write_record(request["directory"], known)
    return {}


def read_record(directory: str) -> dict[str, Any]:
    """Return what is remembered of a directory's files: path → `make_stamp`."""
    try:
        known = json.loads(_read_text(os.path.join(directory, RECORD)) or "{}")
    except (ValueError, RecursionError):
        known = {}
    return known if isinstance(known, dict) else {}


def write_record(directory: str, known: dict[str, Any]) -> None:
    """Remember the stamps of a directory's files."""
    # A record that cannot be written costs a re-hash next time, nothing else.
    with contextlib.suppress(OSError):
        write(os.path.join(directory, RECORD), json.dumps(known, sort_keys=True).encode())


def install(request: dict[str, Any]) -> dict[str, Any]:
    """Run `steps` (argv each), then write `stamp` (its path and content); the stamp is away in between.

    Holds `lock` meanwhile. Raises Busy, StepFailed, OSError.
    """
    path, content = request["stamp"]
    os.makedirs(os.path.dirname(request["lock"]), exist_ok=True)
    with open(request["lock"], "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(request["lock"]) from None
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        for index, argv in enumerate(request["steps"]):
            # In our own process group, which ends with stdin. Debian's venv gives its reason on stdout.
            done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            if done.returncode:
                said = done.stdout.decode("utf-8", "replace").strip()
                raise StepFailed(index, done.returncode, said[-4000:])
        write(path, content.encode())
    return {}


def write(path: str, content: bytes) -> None:
    """Write a small file atomically."""
    path = os.path.expanduser(path)
    _make_directory(os.path.dirname(path) or ".")
    _drop_stale(path)
    temporary = f"{path}.{os.getpid()}.tmp"
    with open(temporary, "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)
    _sync_directory(os.path.dirname(path) or ".")


def _drop_stale(path: str) -> None:
    """Delete what processes that were killed while they wrote this file have left beside it."""
    directory, name = os.path.split(path)
    for found in os.listdir(directory or "."):
        pid = found[len(name) + 1 : -len(".tmp")] if found.startswith(f"{name}.") and found.endswith(".tmp") else ""
        if pid.isdecimal() and not _is_alive(int(pid)):
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(directory, found))


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass
    return True


def _make_directory(directory: str) -> None:
    """Make a directory, with those above it, whose names are durable."""
    if not os.path.isdir(directory):
        above = os.path.dirname(directory) or "."
        _make_directory(above)
        try:
            os.mkdir(directory)
        except FileExistsError:
            if not os.path.isdir(directory):  # else somebody else has just made it
                raise
        _sync_directory(above)


def _sync_directory(directory: str) -> None:
    """Make a file's new name durable: else a power cut may leave a manifest that promises files without names."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def describe_failure(error: Exception) -> dict[str, Any]:
    """Return what went wrong as plain data, for the other end of the connection."""
    if isinstance(error, Full):
        return {"error": "full", "free": error.args[0], "needed": error.args[1]}
    if isinstance(error, StepFailed):
        return {"error": "step", "step": error.args[0], "code": error.args[1], "said": error.args[2]}
    if isinstance(error, Outside):
        return {"error": "outside", "path": error.args[0]}
    if isinstance(error, Mismatch):
        return {"error": "mismatch", "sha256": error.args[0], "kept": error.args[1]}
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason, path = error.strerror or str(error), str(error.filename or "")
        return {"error": "os", "reason": reason, "path": path, "full": full}
    return {"error": type(error).__name__.lower()}


def _receive_next() -> bool:
    """Receive one file; False when there are no more, or when what comes next on stdin is not known any more."""
    line = b""
    while not line.endswith(b"\n"):  # the sender waits for our answer: no byte of the file follows yet
        block = _read_stdin(1 << 16, IDLE_S)
        if not block:
            return False
        line += block
    header = json.loads(line)
    path = os.path.expanduser(header["path"])
    _hold_directory(os.path.dirname(path) or ".")
    try:
        receive(_read_stdin, path, header["bytes"], header["sha256"], lambda kept: tell({"kept": kept}))
    except Mismatch as error:
        tell(describe_failure(error))
    else:
        tell({})
    return True


_held: dict[str, int] = {}  # directory → descriptor that keeps it locked until this process ends


def _hold_directory(directory: str) -> None:
    """Keep others from receiving into a directory until all our files are there. Raises Busy, OSError."""
    if directory not in _held:
        _make_directory(directory)
        fd = os.open(directory, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise Busy(directory) from None
        except OSError:
            pass  # a file system without such locks: the one on each file has to do
        _held[directory] = fd


def _read_stdin(count: int, timeout_s: float = STALL_S) -> bytes:
    ready, _, _ = select.select([0], [], [], timeout_s)
    return os.read(0, count) if ready else b""


def _main(command: str) -> None:
    os.umask(0o077)  # what is here is its user's
    try:
        if command == "receive":
            with contextlib.suppress(AttributeError, OSError):  # Linux only: fewer, larger reads
                fcntl.fcntl(0, fcntl.F_SETPIPE_SZ, BLOCK_BYTES)
            while _receive_next():
                pass
        elif command == "record":
            tell(record(json.loads(sys.stdin.buffer.read())))
        else:
            request = json.loads(sys.stdin.buffer.readline())
            end_with_stdin(lambda: os.killpg(0, signal.SIGKILL))  # pip and its children included
            tell(survey(request) if command == "survey" else install(request))
    except Exception as error:
        tell(describe_failure(error))


if __name__ == "__main__":
    _main(sys.argv[1])
