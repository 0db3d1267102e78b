# ruff: noqa: PTH100,PTH103,PTH108,PTH110,PTH111,PTH112,PTH116,PTH118,PTH119,PTH120,PTH123,PTH207
"""The program with which `deploy` asks what is on a host, and installs moectl's environment there.

Its text is sent to the host's own python (`python -c`), so it uses the standard library only and runs from Python 3.9
on.

    python -c TEXT survey       what is there? the request on stdin is a line of JSON
    python -c TEXT install      run the commands that make the environment, one deploy at a time; likewise

Both can take long. They end, with all that they started, when their stdin does. The answer is a line of JSON behind
`ANSWER`.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import sysconfig
from typing import Any

from moectl.durable import make_directory
from moectl.hosts.onhost.files import (
    MADE,
    Busy,
    Refusal,
    compare,
    describe_failure,
    hash_file,
    make_stamp,
    read_record,
    read_text,
    refuse_links_outside,
    refuse_names_outside,
    size_of,
    write,
    write_record,
)
from moectl.hosts.onhost.prelude import end_with_stdin, tell


class StepFailed(Refusal):
    """A command of `install` failed; args are its index, its exit code, and the end of its output."""

    fields = ("step", "code", "said")


def survey(request: dict[str, Any]) -> dict[str, Any]:
    """Answer everything that `deploy` asks of a host, in one round trip.

    Request: root, stamp (path under root), packages, wheels {name: [bytes, sha256]}, directory, files {path: [bytes,
    sha256]}, verify, and remember: False in a dry run, which writes nothing. `planned` {path: bytes} are files that do
    not exist yet anywhere: of these, `known` are the hashes that an earlier push recorded, `begun` the bytes on disk.
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
        "macos": platform.mac_ver()[0],
        "glibc": platform.libc_ver()[1] if platform.libc_ver()[0] == "glibc" else "",
        "wheel": _find_wheel(os.path.join(root, "env")),
        "executable": _find_executable(),
        "code": _find_code(),
        "stamp": read_text(os.path.join(root, request["stamp"])),
        "wheels": wheels,
        "missing": missing,
        "kept": kept,
        "corrupt": corrupt,
        "known": {} if request["verify"] else _recall(directory),
        "begun": {name: _begun_bytes(os.path.join(directory, name), size) for name, size in request["planned"].items()},
    }


def _claim(root: str, place: str) -> None:
    """Make the root, with a note that moectl made it: `clear` removes no directory that its owner made."""
    with contextlib.suppress(OSError):  # the first file will show what is wrong
        make_directory(root)
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


def _begun_bytes(path: str, size: int) -> int:
    return min(size, max(size_of(path), size_of(path + ".partial")))


def _look(
    directory: str, files: dict[str, list[Any]], verify: bool, remember: bool
) -> tuple[dict[str, int], list[str], list[str]]:
    known = read_record(directory)
    found = compare(directory, files, known, verify)
    if remember and found[1] and known != read_record(directory):
        write_record(directory, known)
    return found


def _is_env_of_this_python(env: str) -> bool:
    """Return whether the environment works and was made by the python that runs this."""
    python = os.path.join(env, "bin", "python")
    cfg = read_text(os.path.join(env, "pyvenv.cfg"))
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
    """Return the files of a package, sorted, without those that python and the Finder make."""
    places = [(place, names) for place, _, names in os.walk(directory) if os.path.basename(place) != "__pycache__"]
    return sorted(os.path.join(place, name) for place, names in places for name in names if name != ".DS_Store")


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


def _find_wheel(env: str) -> str:
    """Return the platform tag of mlx's wheel in this python, else in the environment; empty where there is none."""
    from importlib import metadata

    places = [*sys.path, *glob.glob(os.path.join(env, "lib", "python3*", "site-packages"))]
    for name in ("mlx-metal", "mlx"):  # on a Mac, the libraries are in the first
        for found in metadata.distributions(name=name, path=places):
            tags = [line for line in (found.read_text("WHEEL") or "").split("\n") if line.startswith("Tag: ")]
            return tags[0].rpartition("-")[2] if tags else ""
    return ""


def _find_executable() -> str:
    """Return the program that really runs, which a firewall sees: a framework's python starts another one."""
    if sysconfig.get_config_var("PYTHONFRAMEWORK"):
        inner = os.path.join(sys.base_prefix, "Resources", "Python.app", "Contents", "MacOS", "Python")
        if os.path.exists(inner):
            return inner
    return os.path.realpath(sys.executable)


def install(request: dict[str, Any]) -> dict[str, Any]:
    """Run `steps` (argv each), then write `stamp` (its path and content); until then there is no stamp.

    The file `lock` is locked for that time. Raises Busy, StepFailed, OSError.
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
            # In our own process group, which ends with stdin. Debian's venv prints its reason on stdout.
            done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            if done.returncode:
                said = done.stdout.decode("utf-8", "replace").strip()
                raise StepFailed(index, done.returncode, said[-4000:])
        write(path, content.encode())
    return {}


def _main(command: str) -> None:
    os.umask(0o077)  # only its user may read what is here
    try:
        request = json.loads(sys.stdin.buffer.readline())
        end_with_stdin(lambda: os.killpg(0, signal.SIGKILL))  # pip and its children included
        tell(survey(request) if command == "survey" else install(request))
    except Exception as error:
        tell(describe_failure(error))


if __name__ == "__main__":
    _main(sys.argv[1])
