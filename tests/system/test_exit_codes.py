"""The process ends with the documented exit code: with threads in extension code, at an early signal, into a pipe."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from moectl import __main__
from moectl.cli import app as cli
from moectl.cli.verb import EXIT_CODES
from moectl.errors import StateError
from tests.support.ring import process_env
from tests.support.running import wait_for, workers
from tests.support.tiny import write_checkpoint, write_words

MOECTL = [sys.executable, "-m", "moectl"]
UGLY = ("FATAL", "Traceback", "Exception ignored", "a bug in moectl")


def check(words: Sequence[str], code: int) -> str:
    done = subprocess.run([*MOECTL, *words], capture_output=True, text=True, env=process_env())
    assert done.returncode == code, done.stderr
    assert not any(word in done.stderr for word in UGLY), done.stderr
    return done.stderr


def test_a_damaged_file_among_several_while_threads_read_the_others(tmp_path: Path) -> None:
    write_words(write_checkpoint(tmp_path / "model", files=6))
    first = sorted((tmp_path / "model").glob("*.safetensors"))[0]
    first.write_bytes(first.read_bytes()[: first.stat().st_size // 2])
    for _ in range(4):
        assert "is damaged" in check(["shard", str(tmp_path / "model"), "--nodes", "1", "--dry-run"], 7)


def test_a_thread_in_extension_code_at_the_end_of_any_verb() -> None:
    """It asks for the interpreter's lock, from C++, again and again while the interpreter ends."""
    program = """
import sys, threading
from moectl.__main__ import main
import mlx.core as mx
def compute():
    while True:
        mx.eval(mx.ones((64, 64)) @ mx.ones((64, 64)))
for _ in range(3):
    threading.Thread(target=compute, daemon=True).start()
sys.argv = ["moectl", *sys.argv[1:]]
main()
"""
    for words, code in ((["--version"], 0), (["rnu"], 2), (["deploy"], 4)):
        for _ in range(4):
            done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True)
            assert done.returncode == code, done.stderr
            assert not any(word in done.stderr for word in UGLY), done.stderr


# Signals.


def handles_signals(process: subprocess.Popen[Any]) -> bool:
    """Return whether moectl's own code has begun: Python itself leaves SIGTERM alone."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = int(status.partition("SigCgt:")[2].split()[0], 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_that_became_an_import_error_is_still_a_signal(number: signal.Signals, code: int) -> None:
    program = f"""if True:
        import os, signal, sys
        from moectl import __main__
        from moectl.cluster import sets

        def fail():
            try:
                os.kill(os.getpid(), {int(number)})
                for _ in range(1000):
                    pass
            except BaseException:
                pass
            raise ImportError("PyCapsule_Import could not import module _socket")

        sets.make_listing = fail
        sys.argv = ["moectl", "list"]
        __main__.main()
    """
    done = subprocess.run([sys.executable, "-c", program], env=process_env(), stderr=-1, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert done.stderr.strip() == {130: "Interrupted.", 143: "Terminated."}[code]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="/proc tells when moectl's code begins")
@pytest.mark.parametrize("times", [8, pytest.param(50, marks=pytest.mark.long)])
@pytest.mark.parametrize("verb", ["run", "shard"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_the_first_half_second(
    number: signal.Signals, code: int, verb: str, times: int, tmp_path: Path
) -> None:
    write_words(write_checkpoint(tmp_path / "model", files=6))
    words = {
        "run": ["run", "--local", "1", "Hello"],
        "shard": ["shard", str(tmp_path / "model"), "--nodes", "1", "-o", str(tmp_path / "set")],
    }[verb]
    for time_ in range(times):
        with subprocess.Popen([*MOECTL, *words], stdout=-1, stderr=-1, text=True, env=process_env()) as process:
            wait_for(partial(handles_signals, process))
            time.sleep(0.4 * time_ / times)
            process.send_signal(number)
            _, stderr = process.communicate(timeout=60)
        assert process.returncode == code or (verb == "shard" and process.returncode == 0), stderr
        assert not any(word in stderr for word in UGLY), stderr
    wait_for(lambda: not workers())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_a_library_in_cpp_is_loaded(number: signal.Signals, code: int) -> None:
    """MLX makes its enums with Python's `enum` then, and an exception from there aborts the process."""
    program = f"""if True:
        import enum, os, sys
        from moectl import __main__
        from moectl.cluster import sets

        new = enum.EnumType.__call__

        def call(*args, **kwargs):
            if "mlx" in str(kwargs.get("module")):
                os.kill(os.getpid(), {number.value})
            return new(*args, **kwargs)

        def load(*args):
            enum.EnumType.__call__ = call
            import mlx.core

        sets.make_listing = load
        sys.argv = ["moectl", "list"]
        __main__.main()
    """
    done = subprocess.run([sys.executable, "-c", program], env=process_env(), stderr=-1, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert done.stderr.strip() == {130: "Interrupted.", 143: "Terminated."}[code]


def test_an_interrupt_that_a_library_made_an_import_error_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def import_it(*_: Any) -> None:
        try:
            raise KeyboardInterrupt
        except BaseException:
            raise ImportError("numpy.core.multiarray failed to import")  # noqa: B904

    monkeypatch.setattr(type(cli.cli), "invoke", import_it)
    monkeypatch.setattr(sys, "argv", ["moectl", "list"])
    assert __main__.run() == 130
    assert capsys.readouterr().err == "\nInterrupted.\n"


def test_an_interrupt_in_an_exec_is_no_signal_of_its_own(tmp_path: Path) -> None:
    """Python notes one that meets it there as unhandled, and `python -m` kills itself with SIGINT at its end."""
    (tmp_path / "program.py").write_text("""
import click, sys
from moectl.__main__ import main
click.Group.invoke = lambda *_: exec("raise KeyboardInterrupt")
sys.argv = ["moectl", "list"]
main()
""")
    command = [sys.executable, "-m", "program"]
    done = subprocess.run(command, cwd=tmp_path, env=process_env(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "\nInterrupted.\n")


# Pipes.

VERBS = [
    ["--help"],
    ["--version"],
    ["list"],
    ["list", "--json"],
    ["status"],
    ["stop"],
    ["hosts", "-H", "a,b"],
    ["completion", "bash"],
    ["plan", "databricks/dbrx-instruct", "--what-if", "4 x m2-ultra 192GB"],
    ["plan", "no/such-model"],
    ["doctor", "-H", "localhost"],
    ["run", "--help"],
    ["shard", "--help"],
]


def into_closed_pipe(words: Sequence[str], *, stderr_too: bool = False) -> tuple[int, str]:
    reader, writer = os.pipe()
    os.close(reader)
    stderr = subprocess.STDOUT if stderr_too else subprocess.PIPE
    done = subprocess.run([*MOECTL, *words], stdout=writer, stderr=stderr, text=True, env=process_env())
    os.close(writer)
    return done.returncode, done.stderr


@pytest.mark.parametrize("words", VERBS, ids=" ".join)
def test_the_reader_of_the_output_has_left(words: list[str]) -> None:
    code, stderr = into_closed_pipe(words)
    assert code in EXIT_CODES
    assert code != 1, stderr
    assert not any(word in stderr for word in UGLY), stderr
    if words[0] in ("list", "--help", "--version", "hosts", "completion") or words[-1] == "--help":
        assert (code, stderr) == (141, "")


def test_an_error_keeps_its_code_where_its_reader_has_left() -> None:
    assert into_closed_pipe(["rnu"], stderr_too=True)[0] == 2
    assert into_closed_pipe(["hosts"], stderr_too=True)[0] == 4


LONG = pytest.mark.long


@pytest.mark.parametrize(
    "flags", [pytest.param([], marks=LONG), ["--json"], pytest.param(["--stats"], marks=LONG)], ids=str
)
def test_a_stream_whose_reader_leaves(flags: list[str]) -> None:
    words = [*MOECTL, "run", "--local", "1", "What is expert parallelism?", *flags]
    with subprocess.Popen(words, stdout=-1, stderr=-1, env=process_env()) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        if not flags:
            assert process.stdout.read(5)
        process.stdout.close()
        stderr = process.stderr.read().decode()
    assert process.returncode in ((0, 141) if not flags else (141,)), stderr
    assert not any(word in stderr for word in UGLY), stderr
    wait_for(lambda: not workers())


def test_another_pipe_that_breaks_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def invoke(*_: Any) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(type(cli.cli), "invoke", invoke)
    monkeypatch.setattr(sys, "argv", ["moectl", "list"])
    assert __main__.run() == 1
    assert "BrokenPipeError" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is always full")
@pytest.mark.parametrize("words", [["list"], ["--help"], ["--version"], ["run", "--help"], ["run", "Hi"]], ids=" ".join)
@pytest.mark.parametrize("unbuffered", ["", pytest.param("1", marks=LONG)])
def test_a_full_disk_is_told_when_the_result_is_written(words: list[str], unbuffered: str) -> None:
    env = process_env() | {"PYTHONUNBUFFERED": unbuffered}
    if words[0] == "run" and words[-1] != "--help":
        words = [*words, "--demo", "--max-tokens", "2", "--quiet"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*MOECTL, *words], stdout=full, stderr=-1, text=True, env=env)
    assert done.returncode == StateError.exit_code
    assert done.stderr == (
        "Error: the result cannot be written: No space left on device\nHint: look at where standard output goes\n"
    )
