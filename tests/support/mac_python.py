# ruff: noqa: PTH100, PTH103, PTH110, PTH115, PTH118, PTH120, PTH123, PTH211
"""The python of a fake Mac: this machine's CPython that takes itself for another version, on macOS.

    python -S -E mac_python.py ROOT NAME WORDS…     NAME is how it was called, WORDS are what the real one would get

It runs programs truly, with `-c` and `-m`, but two: `-m venv` makes an environment of the same python, and `-m pip
install` writes down how it was called and which wheel of MLX it would take; from then on the environment has all that
this machine's python has.
"""

from __future__ import annotations

import errno
import json
import os
import runpy
import sys
import types
from typing import Any

MLX_WHEELS = (26, 15, 14)  # the versions of macOS that MLX has wheels for, all of them for arm64
PRIVATE = ("Desktop", "Documents", "Downloads")  # what macOS keeps from programs that sshd starts
INSTALLED = "lib/installed.json"


def become(told: dict[str, Any], called: str, root: str) -> None:
    """Answer as that python would: its version, its system, and no /proc."""
    import fcntl
    import platform
    import posixpath
    import sysconfig

    sysconfig.get_config_vars()["PYTHONFRAMEWORK"] = "Python" if told["framework"] else ""  # while this is still Linux
    if told["framework"]:
        sys.base_prefix = f"{root}{told['framework']}"
    version = tuple(map(int, told["version"].split(".")))
    fields = dict(zip(("major", "minor", "micro"), version, strict=True))
    sys.version_info = _VersionInfo((*version, "final", 0), fields)  # type: ignore[assignment]
    sys.version = f"{told['version']} (main, Oct 14 2025, 13:52:31) [Clang 17.0.0 (clang-1700.3.19.1)]"
    sys.executable, sys.platform = called, "darwin"
    release = told["darwin"]
    kernel = f"Darwin Kernel Version {release}: root:xnu-12377.61.12~1/RELEASE_ARM64"
    uname = os.uname_result(("Darwin", "mac.local", release, kernel, told["machine"]))
    os.uname = lambda: uname
    platform.mac_ver = lambda *a, **k: (seen_version(told), ("", "", ""), told["machine"])
    platform.libc_ver = lambda *a, **k: ("", "")
    is_directory = posixpath.isdir
    posixpath.isdir = lambda path: not str(path).startswith("/proc") and is_directory(path)  # type: ignore[assignment]
    sys.addaudithook(lambda event, words: _guard(event, words, f"{root}/Users/ada"))
    control = fcntl.fcntl

    def full_sync(fd: Any, command: int, *rest: Any) -> Any:
        if command != 51:
            return control(fd, command, *rest)
        with open(f"{root}/full-sync.log", "a") as log:
            log.write(os.readlink(f"/dev/fd/{fd if isinstance(fd, int) else fd.fileno()}") + "\n")
        return 0

    fcntl.F_FULLFSYNC, fcntl.fcntl = 51, full_sync  # type: ignore[attr-defined]


class _VersionInfo(tuple[Any, ...]):
    """sys.version_info, whose own class makes no others."""

    def __new__(cls, values: tuple[Any, ...], fields: dict[str, int]) -> _VersionInfo:
        made = super().__new__(cls, values)
        made.__dict__ |= {**fields, "releaselevel": "final", "serial": 0}
        return made


def seen_version(told: dict[str, Any]) -> str:
    """Return macOS's version as this python sees it."""
    major, minor = told["macos"].split(".")
    if told["old_sdk"] and int(major) >= 26 and os.environ.get("SYSTEM_VERSION_COMPAT") != "0":
        return f"{int(major) - 10}.{minor}"
    return f"{major}.{minor}"


def _guard(event: str, words: tuple[Any, ...], home: str) -> None:
    if event in ("open", "os.listdir", "os.mkdir", "os.rename", "os.remove", "os.scandir") and isinstance(
        words[0], str
    ):
        path = os.path.abspath(words[0])
        if any(path.startswith(f"{home}/{name}/") for name in PRIVATE):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), words[0])


def make_env(told: dict[str, Any], base: str, words: list[str]) -> None:
    """Do what `python -m venv --clear DIRECTORY` does, without pip's own files."""
    import shutil

    env = words[-1]
    if "--clear" in words:
        shutil.rmtree(env, ignore_errors=True)
    for name in ("bin", "lib"):
        os.makedirs(os.path.join(env, name))
    for name in ("python", "python3"):
        os.symlink(os.path.realpath(base), os.path.join(env, "bin", name))
    with open(os.path.join(env, "pyvenv.cfg"), "w") as f:
        f.write(f"home = {os.path.dirname(base)}\nversion = {told['version']}\n")
        f.write(f"executable = {os.path.realpath(base)}\ncommand = {base} -m venv {' '.join(words)}\n")


def install(told: dict[str, Any], called: str, root: str, words: list[str]) -> None:
    """Do what pip would say: it takes a wheel of MLX for this macOS, or finds none."""
    major = int(seen_version(told).split(".")[0])
    wheel = next((f"macosx_{own}_0_arm64" for own in MLX_WHEELS if own <= major), None)
    wheel = wheel if told["machine"] == "arm64" else None
    row = {"words": words, "compat": os.environ.get("SYSTEM_VERSION_COMPAT"), "wheel": wheel}
    with open(f"{root}/pip.log", "a") as log:
        log.write(json.dumps(row) + "\n")
    wants = next((word for word in words if word.startswith("mlx==")), None)
    if wants and wheel is None:
        sys.stderr.write(
            f"ERROR: Could not find a version that satisfies the requirement {wants} (from versions: none)\n"
            f"ERROR: No matching distribution found for {wants}\n"
        )
        sys.exit(1)
    if wants:
        env = os.path.dirname(os.path.dirname(called))
        packages = f"{env}/lib/python{told['version'].rpartition('.')[0]}/site-packages"
        info = f"{packages}/mlx_metal-{wants.partition('==')[2]}.dist-info"
        os.makedirs(info)
        with open(f"{info}/METADATA", "w") as f:
            f.write(f"Metadata-Version: 2.1\nName: mlx-metal\nVersion: {wants.partition('==')[2]}\n")
        with open(f"{info}/WHEEL", "w") as f:
            f.write(f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: py3-none-{wheel}\n")
        with open(os.path.join(env, INSTALLED), "w") as f:
            json.dump([packages, *told["paths"]], f)


def run(words: list[str]) -> None:
    """Run a program as `python WORDS` does."""
    match words:
        case ["-c", text, *rest]:
            sys.argv = ["-c", *rest]
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(text, "<string>", "exec"), main.__dict__)
        case ["-m", module, *rest]:
            sys.argv = [module, *rest]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case _:
            sys.exit(f"a fake Mac's python does not run {words}")


def main() -> None:
    root, called, *words = sys.argv[1:]
    with open(f"{root}/pythons.json") as f:
        told = json.load(f)[os.path.realpath(called)]
    with_packages = os.path.join(os.path.dirname(os.path.dirname(called)), INSTALLED)
    sys.path.pop(0)  # this file's directory
    if os.path.exists(with_packages):
        with open(with_packages) as f:
            sys.path += json.load(f)
    become(told, called, root)
    if words[:2] == ["-m", "venv"]:
        make_env(told, called, words[2:])
    elif words[:2] == ["-m", "pip"]:
        install(told, called, root, words[2:])
    else:
        run(words)


if __name__ == "__main__":
    main()
