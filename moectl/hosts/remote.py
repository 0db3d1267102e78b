"""The one seam to a host: run a command, put a file, start a process on a leash.

Here are the contract and this machine; `ssh` implements the contract over paramiko. It knows nothing of models, shards
or ranks.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import IO, Any, Protocol, cast

from moectl.errors import CommandFailed, IntegrityError, MoectlError, Unreachable
from moectl.hosts.onhost import files as node
from moectl.records import build
from moectl.text import format_gb

NOT_FOUND = 127
# What a program's text need not say again; `from __future__` may stand at the beginning only.
_IN_PRELUDE = re.compile(r"^from (__future__|moectl\.hosts\.onhost\.prelude) import .*\n", re.MULTILINE)
_VARIABLE = re.compile("[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, slots=True)
class Completed:
    """What a finished command left: exit code and its output as bytes."""

    code: int
    stdout: bytes
    stderr: bytes
    noise: bytes = b""  # what the login shell printed before the command began


@dataclass(frozen=True, slots=True)
class Failure:
    """What `node.describe_failure` tells; each kind of error fills its own fields."""

    error: str
    free: int = 0
    needed: int = 0
    step: int = 0
    code: int = 0
    said: str = ""
    sha256: str = ""
    kept: int = 0
    reason: str = ""
    path: str = ""
    full: bool = False  # whether a disk has no more room


class Process(Protocol):
    """A running child on a host. Closing `stdin` is the leash let go: the child has to exit by itself.

    The streams are buffered binary files: flush after writing, and drain `stdout` and `stderr` in a thread
    each, since a full one stops the child. Writing to a child that is gone raises OSError; reading gives
    what is left, then b"".
    """

    stdin: IO[bytes]
    stdout: IO[bytes]
    stderr: IO[bytes]

    def wait(self, timeout_s: float | None = None) -> int:
        """Return the exit code, negative when a signal ended it.

        Raises TimeoutError after `timeout_s` seconds.
        Raises Unreachable when the connection was lost, so that the exit code will never be known.
        """
        ...

    def kill(self) -> None:
        """End the child at once: locally with all its children, over SSH by dropping the connection."""
        ...

    def close(self) -> None:
        """Kill the child if it still runs and close the three streams; idempotent."""
        ...


class Remote(Protocol):
    """One host. Paths on it are POSIX strings; a leading `~/` is the login user's home, in argv[0] too."""

    name: str
    python: str  # the interpreter that receives and verifies files

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        timeout_s: float | None = 60.0,
        check: bool = True,
        leash: bool = False,
    ) -> Completed:
        """Run argv (no shell interpretation) to its end; raise CommandFailed on non-zero when `check`.

        After `timeout_s` CommandFailed is raised. A local command has been ended then, with its children. One over SSH
        is no longer heard of, and ends by itself only if it minds its stdin: with `leash`, stdin stays open after
        `stdin` was sent, and its end (time is up, Ctrl-C, a lost connection) tells the command to go.
        """
        ...

    def start(self, argv: Sequence[str], *, env: Mapping[str, str] | None = None) -> Process:
        """Start argv with pipes on all three streams and return at once."""
        ...

    def put(
        self, source: Path, destination: str, *, sha256: str, on_bytes: Callable[[int], None] | None = None
    ) -> None:
        """Copy a file: resume `destination.partial`, verify its SHA-256 on the host, give it its final name.

        `on_bytes(n)` is called as n more bytes are in place (kept ones included; n is negative when a resumed
        copy turned out wrong and starts over). Raises IntegrityError on a wrong hash, CommandFailed when the
        host refuses (disk full, no permission), Unreachable when the connection is lost.
        """
        ...

    def close(self) -> None:
        """Close the connection; idempotent."""
        ...


class LocalProcess:
    """A child of this process, in a session of its own so that Ctrl-C reaches it through its leash only."""

    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        self._child = child
        self.stdin = cast(IO[bytes], child.stdin)
        self.stdout = cast(IO[bytes], child.stdout)
        self.stderr = cast(IO[bytes], child.stderr)
        self.pid = child.pid

    def wait(self, timeout_s: float | None = None) -> int:
        try:
            return self._child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"still running after {timeout_s:g} s") from None

    def kill(self) -> None:
        _kill_group(self._child)
        self._child.wait()

    def close(self) -> None:
        self.kill()
        for stream in (self.stdin, self.stdout, self.stderr):
            with contextlib.suppress(OSError):
                stream.close()


class LocalRemote:
    """This machine, through plain subprocesses."""

    def __init__(self, name: str = "localhost", *, python: str | None = None) -> None:
        self.name = name
        self.python = python or sys.executable

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        timeout_s: float | None = 60.0,
        check: bool = True,
        leash: bool = False,
    ) -> Completed:
        try:
            child = self._spawn(argv, None)
        except FileNotFoundError as error:
            done = Completed(NOT_FOUND, b"", f"{argv[0]}: {error.strerror}".encode())
        except OSError as error:
            done = Completed(126, b"", f"{argv[0]}: {error.strerror}".encode())
        else:
            done = self._finish(child, argv, stdin, timeout_s, leash)
        return check_completed(done, argv, self.name) if check else done

    def start(self, argv: Sequence[str], *, env: Mapping[str, str] | None = None) -> LocalProcess:
        try:
            return LocalProcess(self._spawn(argv, env))
        except OSError as error:
            raise CommandFailed(f"cannot start {argv[0]}: {error.strerror}", host=self.name) from None

    def put(
        self, source: Path, destination: str, *, sha256: str, on_bytes: Callable[[int], None] | None = None
    ) -> None:
        target = str(Path(destination).expanduser())
        count = on_bytes or _ignore
        size = source_size(source)
        try:
            if not _link_file(source, target, sha256):
                _copy_file(source, target, size, sha256, count)
            else:
                count(size)
        except node.Mismatch as error:
            if error.args[1]:
                count(-size)
                return self.put(source, destination, sha256=sha256, on_bytes=on_bytes)
            raise put_error(node.describe_failure(error), source, destination, sha256, self.name) from None
        except (node.Busy, node.Cut, node.Full, OSError) as error:
            raise put_error(node.describe_failure(error), source, destination, sha256, self.name) from None

    def close(self) -> None:
        """There is no connection to close."""

    def _spawn(self, argv: Sequence[str], env: Mapping[str, str] | None) -> subprocess.Popen[bytes]:
        refuse_unfit(argv, env, self.name)
        command = [os.path.expanduser(argv[0]) if argv[0].startswith("~/") else argv[0], *argv[1:]]  # noqa: PTH111
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **env} if env else None,
            start_new_session=True,
        )

    def _finish(
        self, child: subprocess.Popen[bytes], argv: Sequence[str], stdin: bytes, timeout_s: float | None, leash: bool
    ) -> Completed:
        held = child.stdin if leash else None
        try:
            if held is not None:
                child.stdin = None  # communicate would close it
                threading.Thread(target=_feed, args=(held, stdin), daemon=True).start()
            stdout, stderr = child.communicate(None if leash else stdin, timeout_s)
        except subprocess.TimeoutExpired:
            raise timeout_error(argv, timeout_s, self.name) from None
        finally:
            if child.returncode is None:  # timed out or interrupted
                _kill_group(child)
                child.communicate()
            if held is not None:
                with contextlib.suppress(OSError):
                    held.close()
        return Completed(child.returncode, stdout, stderr)


def read_program(name: str) -> str:
    """Return one of the programs in `onhost` as text for `python -c`, behind what all of them begin with."""
    folder = resources.files("moectl.hosts.onhost")
    prelude, own = (folder.joinpath(f"{part}.py").read_text(encoding="utf-8") for part in ("prelude", name))
    return prelude + _IN_PRELUDE.sub("", own)


def describe_command(argv: Sequence[str]) -> str:
    """Return argv as one short line for messages; a script passed with -c is not repeated."""
    words = []
    for word in argv[:6]:
        first = word.split("\n", 1)[0]
        words.append(word if first == word and len(word) <= 60 else first[:40] + "…")
    return shlex.join(words) + (" …" if len(argv) > 6 else "")


def check_completed(done: Completed, argv: Sequence[str], host: str) -> Completed:
    """Return `done`, or raise CommandFailed with the last line that the command said."""
    if done.code == 0:
        return done
    said = (done.stderr.strip() or done.stdout.strip()).decode("utf-8", "replace").split("\n")[-1]
    how = f"exit code {done.code}" if done.code >= 0 else "ended by a signal"
    if done.code == NOT_FOUND:
        how = "not found"
    raise CommandFailed(f"{describe_command(argv)} failed: {how}{': ' if said else ''}{said[:300]}", host=host)


def timeout_error(argv: Sequence[str], timeout_s: float | None, host: str) -> CommandFailed:
    """Return the error for a command that had to be ended."""
    return CommandFailed(f"{describe_command(argv)} did not finish within {timeout_s or 0:g} s", host=host)


def refuse_unfit(argv: Sequence[str], env: Mapping[str, str] | None, host: str) -> None:
    """Raise CommandFailed for words and variables that cannot reach a command as they are."""
    words = [*argv, *(env or {}).values()]
    if not argv or any("\0" in word for word in words):
        raise CommandFailed("a command is empty or holds a NUL character", host=host)
    try:
        "".join(words).encode()
    except UnicodeEncodeError:
        raise CommandFailed("a word of a command is not UTF-8 text", host=host) from None
    if argv[0].startswith("-"):  # an option, to what should start it
        raise CommandFailed(f"a command's name may not begin with a dash: {argv[0]!r}", host=host)
    for name in env or ():
        if not _VARIABLE.fullmatch(name):
            raise CommandFailed(f"{name!r} is no variable's name", host=host)


def source_size(source: Path) -> int:
    """Return the size in bytes of a file about to be sent; raise IntegrityError when it cannot be read."""
    try:
        return source.stat().st_size
    except OSError as error:
        raise IntegrityError(f"{source} cannot be read: {error.strerror}", hint="moectl shard --verify") from None


def put_error(answer: Mapping[str, Any], source: Path, destination: str, sha256: str, host: str) -> MoectlError:
    """Turn a failure told by `node.describe_failure` into one of ours."""
    failure = read_failure(answer, host)
    match failure.error:
        case "full":
            room = room_text(failure.free, failure.needed)
            return CommandFailed(
                f"{room} for {destination}", host=host, hint=f"free space on {host}, then run it again"
            )
        case "mismatch":
            return _mismatch_error(failure.sha256, source, destination, sha256, host)
        case "busy":
            return CommandFailed(
                f"another push is writing {destination}",
                host=host,
                hint="wait for the other deploy to end; two hosts on one machine need a dir= each",
            )
        case "cut":
            return Unreachable(f"the connection was lost while {destination} was sent", host=host)
        case "os":
            hint = f"free space (or inodes) on {host}, then run it again" if failure.full else None
            return CommandFailed(f"cannot write {failure.path or destination}: {failure.reason}", host=host, hint=hint)
        case "outside":
            return IntegrityError(
                f"{failure.path} leads out of the shard set's directory",
                host=host,
                hint="remove that symbolic link there; to keep shards on another disk, name it with dir=",
            )
    return CommandFailed(f"cannot write {destination}: {failure.error}", host=host)


def read_failure(answer: Mapping[str, Any], host: str) -> Failure:
    """Return what a host says that went wrong. Raises CommandFailed when it makes no sense."""
    try:
        return build(Failure, dict(answer))
    except ValueError as error:
        raise CommandFailed(f"its python gave an answer that makes no sense: {error}", host=host) from None


def _mismatch_error(found: str, source: Path, destination: str, sha256: str, host: str) -> IntegrityError:
    try:
        damaged = node.hash_file(str(source)) != sha256
    except OSError:
        damaged = True
    if damaged:
        return IntegrityError(f"{source} is not what its manifest promises", hint="moectl shard --verify")
    seen = f"sha256 {found[:8]}… expected {sha256[:8]}…"
    return IntegrityError(f"{destination} is corrupt: {seen}", host=host, hint="run the same command again")


def room_text(free: int, needed: int) -> str:
    """Return what is missing on a disk, in words."""
    return f"disk full: {format_gb(free)} free, {format_gb(needed)} needed"


def _feed(pipe: IO[bytes], data: bytes) -> None:
    with contextlib.suppress(OSError, ValueError):  # a command need not read its stdin
        pipe.write(data)
        pipe.flush()


def _ignore(_count: int) -> None:
    pass


def _kill_group(child: subprocess.Popen[bytes]) -> None:
    # A reaped leader's number may belong to another by now: signal the group only before reaping.
    if child.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)


def _link_file(source: Path, target: str, sha256: str) -> bool:
    """Make `target` another name of `source` and check it; False when the file system cannot."""
    destination = Path(target)
    linked, partial = Path(f"{target}.link"), Path(f"{target}.partial")
    destination.parent.mkdir(parents=True, exist_ok=True)
    if not (destination.exists() and destination.samefile(source)):
        linked.unlink(missing_ok=True)
        try:
            linked.hardlink_to(source)
        except OSError:
            return False
    found = node.hash_file(str(source))
    if found != sha256:
        linked.unlink(missing_ok=True)
        raise node.Mismatch(found, 0)
    if linked.exists():
        linked.replace(destination)
        partial.unlink(missing_ok=True)  # what an earlier push had left
    return True


def _copy_file(source: Path, target: str, size: int, sha256: str, count: Callable[[int], None]) -> None:
    with source.open("rb", buffering=0) as f:

        def resume(kept: int) -> None:
            f.seek(kept)
            count(kept)

        def read(limit: int) -> bytes:
            block = f.read(limit)
            count(len(block))
            return block

        node.receive(read, target, size, sha256, resume)
