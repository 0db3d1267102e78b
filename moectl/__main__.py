"""Where moectl begins and ends: `moectl` and `python -m moectl`.

It is the only place that turns an exception into one line of text and an exit code; what the verbs do is in `cli`. The
exit code is the documented one at any signal, with any threads left, and when the reader of the output has gone.
"""

from __future__ import annotations

import os
import signal
import sys


def _leave_now(number: int, _: object) -> None:
    os.write(2, b"Interrupted.\n" if number == signal.SIGINT else b"Terminated.\n")
    os._exit(128 + number)


def _handle_signals(on_sigint: Callable[..., object], on_sigterm: Callable[..., object]) -> None:
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # a shell sets it for a command in the background
        signal.signal(signal.SIGINT, on_sigint)
    signal.signal(signal.SIGTERM, on_sigterm)


# Before the other imports: they take long enough to be interrupted, and nothing has begun yet that has to end in order.
# Not where a test imports this module.
if (__name__ == "__main__" or os.path.basename(sys.argv[0]) == "moectl") and sys.argv[1:2] != ["worker"]:  # noqa: PTH119
    _handle_signals(_leave_now, _leave_now)

import atexit
import contextlib
import io
import threading
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

INTERRUPTED, READER_LEFT, TERMINATED = 130, 141, 143


class Terminated(BaseException):
    """SIGTERM arrived; it ends the command as Ctrl-C does."""


def main() -> NoReturn:
    """Run the command line and end the process with its exit code."""
    if sys.argv[1:2] == ["worker"]:  # it ends when its stdin does
        sys.exit(run())
    # A closed stream (`>&-`), or a terminal that cannot show a letter, must not stop moectl.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115, PTH123 - for the rest of the process
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115, PTH123
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    end = _End()
    atexit.register(end.leave)  # it runs after all that is registered later
    if "_MOECTL_COMPLETE" in os.environ:  # a shell asks, at Tab
        from moectl.cli.app import cli
        from moectl.cli.completion import answer_tab

        answer_tab(cli)
        end.code = 0
    else:
        end.code = run(begin=lambda: _handle_signals(_on_sigint, _on_sigterm))
    _handle_signals(end.leave_now, end.leave_now)
    end.code = _flush(end.code)
    sys.exit(end.code)


class _End:
    """The end of the process, with its exit code."""

    def __init__(self) -> None:
        self.code = 1

    def leave(self) -> None:
        """End here if threads are left that nothing waits for.

        The interpreter would end each one when it asks for the lock. Within C++ or Rust (safetensors, mlx, tokenizers)
        that aborts the process ("FATAL: exception not rethrown"), and the exit code is lost.
        """
        # After an interrupt within an `exec`, as dataclasses use it, Python kills itself with SIGINT at its end.
        if threading.active_count() > 1 or self.code == INTERRUPTED:
            _flush(self.code)
            os._exit(self.code)

    def leave_now(self, number: int, _: object) -> None:
        """End at a signal while the interpreter shuts down, which is too late for an exception."""
        os._exit(self.code or 128 + number)


_arrived: list[int] = []  # the signals, for what turns them into another error


def _on_sigint(number: int, frame: FrameType | None) -> None:
    _arrived.append(number)
    if _is_loading(frame):
        _leave_now(number, frame)
    signal.default_int_handler(number, frame)


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    _arrived.append(number)
    if _is_loading(frame):
        _leave_now(number, frame)
    raise Terminated


def _is_loading(frame: FrameType | None) -> bool:
    """Return whether a library in C++ is being loaded: an exception there aborts the process, as with MLX's enums."""
    while frame is not None and not frame.f_code.co_qualname.startswith("ExtensionFileLoader."):
        frame = frame.f_back
    return frame is not None


def _flush(code: int) -> int:
    """Write what is buffered; return the exit code, changed from 0 where the output could not be written."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            code = code or READER_LEFT
            _forget(stream)
        except (OSError, ValueError) as error:
            _forget(stream)
            if code == 0 and stream is sys.stdout:
                from moectl.cli.options import unwritable

                code = _print_error(unwritable(error), as_json=_json_in_words())
    return code


def _forget(stream: object) -> None:
    # Otherwise the interpreter tries again at its end, and prints the failure.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # type: ignore[attr-defined]


def run(*, begin: Callable[[], None] = lambda: None) -> int:
    """Run the command line in `sys.argv`; return its exit code. `begin` is called when the words have been read."""
    import click

    from moectl.cli.app import cli
    from moectl.cli.config import read_config
    from moectl.errors import UsageError

    try:
        # Not click's own `main`: it ends the process when the reader of the output has gone.
        with cli.make_context("moectl", sys.argv[1:], default_map=read_config(cli.parameter_names())) as context:
            begin()
            result = cli.invoke(context)
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        if _json_in_words():
            return _print_error(UsageError(error.format_message()), as_json=True)
        with contextlib.suppress(OSError):
            error.show()
        return error.exit_code
    except (KeyboardInterrupt, EOFError, click.Abort):
        return _say("\nInterrupted.", INTERRUPTED)  # the new line ends that of the terminal's ^C
    except Terminated:
        return _say("Terminated.", TERMINATED)
    except Exception as error:
        return _print_unexpected(error)


def _print_unexpected(error: Exception) -> int:
    from moectl.cli.options import Failed

    if isinstance(error, BrokenPipeError) and _reader_has_left():
        return READER_LEFT
    # Libraries in C put an ImportError without a cause in the signal's place.
    by_signal = isinstance(error.error if isinstance(error, Failed) else error, ImportError) and _arrived
    if by_signal and _arrived[-1] == signal.SIGTERM:
        return _say("Terminated.", TERMINATED)
    if by_signal or _is_interrupt(error):
        return _say("\nInterrupted.", INTERRUPTED)
    if os.environ.get("MOECTL_DEBUG") == "1":
        raise error
    if isinstance(error, Failed):
        return _print_error(error.error, as_json=error.flags.json, color=error.flags.color)
    return _print_error(error, as_json=_json_in_words())


def _say(text: str, code: int) -> int:
    import click

    with contextlib.suppress(OSError):
        click.echo(text, err=True)
    return code


def _is_interrupt(error: BaseException | None) -> bool:
    """Return whether an error began as Ctrl-C: some libraries turn that into another error while they are imported."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _reader_has_left() -> bool:
    """Return whether stdout or stderr has lost its reader: the broken pipe may be another one."""
    import select

    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            poll.register(stream.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _came_from_echo(error: Exception) -> bool:
    """Return whether an error came from printing, such as a full disk at stdout, and from no other file."""
    import traceback

    import click

    frames = traceback.extract_tb(error.__traceback__)
    return any((frame.filename, frame.name) == (click.utils.__file__, "echo") for frame in frames)


def _json_in_words() -> bool:
    # For errors before click has read the flags; what follows `--` is not a flag.
    words = sys.argv[1:]
    return "--json" in words[: words.index("--") if "--" in words else None]


def _print_error(error: Exception, *, as_json: bool, color: str = "auto") -> int:
    import json

    import click

    from moectl.cli.options import unwritable
    from moectl.errors import MoectlError, to_json, unexpected
    from moectl.text import colour_wanted

    if isinstance(error, OSError) and _came_from_echo(error):
        error = unwritable(error)
    told = error if isinstance(error, MoectlError) else unexpected(error, "run again with MOECTL_DEBUG=1 and report it")
    code, hint = told.exit_code, told.hint
    if as_json:
        return _say(json.dumps({"error": {**to_json(told), "kind": type(error).__name__}}), code)
    coloured = colour_wanted(color, sys.stderr)
    with contextlib.suppress(OSError):  # stderr has lost its reader; the exit code is left
        click.echo(f"{click.style('Error:', fg='red', bold=True)} {told}", err=True, color=coloured)
        if hint:
            click.echo(f"Hint: {hint}", err=True)
    return code


if __name__ == "__main__":
    main()
