"""The contract of a host: run a command, put a file, start a process; and this machine as one.

`ssh` implements the contract over paramiko. It knows nothing of models, shards or ranks.
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
from typing import IO, Protocol, cast

from moectl.errors import CommandFailed
from moectl.hosts.onhost import files as node
from moectl.hosts.refusals import put_error, source_size
from moectl.text import last_line

NOT_FOUND = 127
_FUTURE = "from __future__ import annotations\n"  # only allowed at the beginning of a text
_SHARED = re.compile(r"^from moectl\.(durable|hosts\.onhost\.\w+) import (?:\([^)]*\)|.*)\n", re.MULTILINE)
_PROGRAM = '\nif __name__ == "__main__":'
_VARIABLE = re.compile("[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, slots=True)
class Completed:
    """What a finished command left: exit code and its output as bytes."""

    code: int
    stdout: bytes
    stderr: bytes
    noise: bytes = b""  # what the login shell printed before the command began


class Process(Protocol):
    """A running child on a host. When `stdin` is closed, the child has to exit by itself.

    The streams are buffered binary files: flush after writing, and read `stdout` and `stderr` in a thread each, because
    a full one stops the child. Writing to a child that is gone raises OSError; reading gives what is left, then b"".
    """

    stdin: IO[bytes]
    stdout: IO[bytes]
    stderr: IO[bytes]

    def wait(self, timeout_s: float | None = None) -> int:
        """Return the exit code, negative when a signal ended it.

        Raises TimeoutError after `timeout_s` seconds.
        Raises Unreachable when the connection was lost: then the exit code is not known.
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
        hold_stdin: bool = False,
    ) -> Completed:
        """Run argv (no shell interpretation) to its end; raise CommandFailed on non-zero when `check`.

        After `timeout_s` it raises CommandFailed. A local command has been ended then, with its children. A command
        over SSH ends only by itself: with `hold_stdin`, its stdin stays open after `stdin` was sent, and the end of
        its stdin (at the timeout, Ctrl-C, a lost connection) tells the command to end.
        """
        ...

    def start(self, argv: Sequence[str], *, env: Mapping[str, str] | None = None) -> Process:
        """Start argv with pipes on all three streams and return at once."""
        ...

    def put(
        self, source: Path, destination: str, *, sha256: str, on_bytes: Callable[[int], None] | None = None
    ) -> None:
        """Copy a file: resume `destination.partial`, verify its SHA-256 on the host, give it its final name.

        `on_bytes(n)` is called when n more bytes are there, kept ones included; n is negative when a resumed copy was
        wrong and starts over. Raises IntegrityError on a wrong hash, CommandFailed when the host refuses (disk full, no
        permission), Unreachable when the connection is lost.
        """
        ...

    def close(self) -> None:
        """Close the connection; idempotent."""
        ...


class LocalProcess:
    """A child of this process, in its own session: Ctrl-C reaches it only through the end of its stdin."""

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
        hold_stdin: bool = False,
    ) -> Completed:
        try:
            child = self._spawn(argv, None)
        except OSError as error:
            code = NOT_FOUND if isinstance(error, FileNotFoundError) else 126
            done = Completed(code, b"", f"{argv[0]}: {error.strerror}".encode())
        else:
            done = self._finish(child, argv, stdin, timeout_s, hold_stdin)
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
        self,
        child: subprocess.Popen[bytes],
        argv: Sequence[str],
        stdin: bytes,
        timeout_s: float | None,
        hold_stdin: bool,
    ) -> Completed:
        held = child.stdin if hold_stdin else None
        try:
            if held is not None:
                child.stdin = None  # communicate would close it
                threading.Thread(target=_feed, args=(held, stdin), daemon=True).start()
            stdout, stderr = child.communicate(None if hold_stdin else stdin, timeout_s)
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
    """Return one of the programs in `onhost` as text for `python -c`, behind the text of those that it imports from."""
    texts: dict[str, str] = {}

    def add(part: str) -> None:
        text = resources.files("moectl").joinpath(f"{part.replace('.', '/')}.py").read_text(encoding="utf-8")
        for shared in _SHARED.findall(text):
            if shared not in texts:
                add(shared)
        texts[part] = _SHARED.sub("", text.replace(_FUTURE, ""))

    add(f"hosts.onhost.{name}")
    *libraries, own = texts.values()
    return "\n".join([_FUTURE, *(text.partition(_PROGRAM)[0] for text in libraries), own])


def describe_command(argv: Sequence[str]) -> str:
    """Return argv as one short line for messages, without the text of a script."""
    words = []
    for word in argv[:6]:
        first = word.split("\n", 1)[0]
        words.append(word if first == word and len(word) <= 60 else first[:40] + "…")
    return shlex.join(words) + (" …" if len(argv) > 6 else "")


def check_completed(done: Completed, argv: Sequence[str], host: str) -> Completed:
    """Return `done`, or raise CommandFailed with the last line that the command printed."""
    if done.code == 0:
        return done
    said = last_line(done.stderr) or last_line(done.stdout)
    how = f"exit code {done.code}" if done.code >= 0 else "ended by a signal"
    if done.code == NOT_FOUND:
        how = "not found"
    raise CommandFailed(f"{describe_command(argv)} failed: {how}{': ' if said else ''}{said[:300]}", host=host)


def timeout_error(argv: Sequence[str], timeout_s: float | None, host: str) -> CommandFailed:
    """Return the error for a command that had to be ended."""
    return CommandFailed(f"{describe_command(argv)} did not finish within {timeout_s or 0:g} s", host=host)


def refuse_unfit(argv: Sequence[str], env: Mapping[str, str] | None, host: str) -> None:
    """Raise CommandFailed for words and variables that cannot be passed to a command unchanged."""
    words = [*argv, *(env or {}).values()]
    if not argv or any("\0" in word for word in words):
        raise CommandFailed("a command is empty or holds a NUL character", host=host)
    try:
        "".join(words).encode()
    except UnicodeEncodeError:
        raise CommandFailed("a word of a command is not UTF-8 text", host=host) from None
    if argv[0].startswith("-"):  # it would be read as an option
        raise CommandFailed(f"a command's name may not begin with a dash: {argv[0]!r}", host=host)
    for name in env or ():
        if not _VARIABLE.fullmatch(name):
            raise CommandFailed(f"{name!r} is not the name of a variable", host=host)


def _feed(pipe: IO[bytes], data: bytes) -> None:
    with contextlib.suppress(OSError, ValueError):  # a command may leave its stdin unread
        pipe.write(data)
        pipe.flush()


def _ignore(_count: int) -> None:
    pass


def _kill_group(child: subprocess.Popen[bytes]) -> None:
    # After the leader has been waited for, its number may belong to another process: signal the group only before.
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
        partial.unlink(missing_ok=True)  # from an earlier push
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
