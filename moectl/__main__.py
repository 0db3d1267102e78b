"""Where moectl begins and ends: `moectl` and `python -m moectl`. Exceptions become one line of text and an exit code.

Exit codes are the documented ones also after a signal, with threads left, and where the reader of the output has left.
"""

from __future__ import annotations

import os
import signal
import sys


def _leave_now(number: int, _: object) -> None:
    os.write(2, b"Interrupted.\n" if number == signal.SIGINT else b"Terminated.\n")
    os._exit(128 + number)


def _handle_signals(on_sigint: Callable[..., object], on_sigterm: Callable[..., object]) -> None:
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as it is for what a shell runs in the background
        signal.signal(signal.SIGINT, on_sigint)
    signal.signal(signal.SIGTERM, on_sigterm)


# Before anything else is imported: that takes long enough to be interrupted, and nothing has begun that would have to
# be ended in order. Not where a test imports this.
if (__name__ == "__main__" or os.path.basename(sys.argv[0]) == "moectl") and sys.argv[1:2] != ["worker"]:  # noqa: PTH119
    _handle_signals(_leave_now, _leave_now)

import atexit
import contextlib
import io
import threading
from collections.abc import Callable
from typing import NoReturn

INTERRUPTED, READER_LEFT, TERMINATED = 130, 141, 143


class Terminated(BaseException):
    """SIGTERM arrived; unwinds like Ctrl-C does."""


def main() -> NoReturn:
    """Run the command line and end the process with its exit code."""
    if sys.argv[1:2] == ["worker"]:  # ends by itself, when its stdin ends
        sys.exit(run())
    # A stream that was closed (`>&-`), or a terminal that lacks a letter, is no reason to stop.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115, PTH123 - for the rest of the process
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115, PTH123
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    end = _End()
    atexit.register(end.leave)  # runs after all that is registered from now on
    if "_MOECTL_COMPLETE" in os.environ:  # a shell asks, at Tab
        from moectl.cli.app import cli
        from moectl.cli.completion import answer_tab

        answer_tab(cli)
        end.code = 0
    else:
        end.code = run(begin=lambda: _handle_signals(signal.default_int_handler, _on_sigterm))
    _handle_signals(end.leave_now, end.leave_now)
    end.code = _flush(end.code)
    sys.exit(end.code)


class _End:
    """The end of the process, with its exit code."""

    def __init__(self) -> None:
        self.code = 1

    def leave(self) -> None:
        """End here if threads are left that nothing waits for.

        The interpreter would end them where they ask for its lock. If that is in C++ or Rust, as safetensors, mlx and
        tokenizers are, the process aborts ("FATAL: exception not rethrown") and its exit code is lost.
        """
        # An interrupt that met Python in an `exec`, as dataclasses use, makes it kill itself with SIGINT at its end.
        if threading.active_count() > 1 or self.code == INTERRUPTED:
            _flush(self.code)
            os._exit(self.code)

    def leave_now(self, number: int, _: object) -> None:
        """End while the interpreter shuts down: a signal there is too late to be raised."""
        os._exit(self.code or 128 + number)


def _on_sigterm(*_: object) -> None:
    raise Terminated


def _flush(code: int) -> int:
    """Write out what is left; return the exit code, another one where that was 0 and not all could be written."""
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
    # Else the interpreter tries again at the end, and says so.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # type: ignore[attr-defined]


def run(*, begin: Callable[[], None] = lambda: None) -> int:
    """Run the command line in `sys.argv`; return its exit code. `begin` is called once it is understood."""
    import click

    from moectl.cli.app import cli
    from moectl.cli.config import read_config
    from moectl.errors import UsageError

    try:
        # Not `cli.main`, which ends the process by itself where the reader of the output has left.
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
        return _say("\nInterrupted.", INTERRUPTED)  # the line of the terminal's ^C ends
    except Terminated:
        return _say("Terminated.", TERMINATED)
    except Exception as error:
        return _print_unexpected(error)


def _print_unexpected(error: Exception) -> int:
    from moectl.cli.options import Failed

    if isinstance(error, BrokenPipeError) and _reader_has_left():
        return READER_LEFT
    if _is_interrupt(error):
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
    """Return whether an error was Ctrl-C before a library made another one of it, as some do in their imports."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _reader_has_left() -> bool:
    """Return whether the reader of standard output or error has closed it; other pipes may break as well."""
    import select

    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            poll.register(stream.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _came_from_echo(error: Exception) -> bool:
    """Return whether an error is the output's, such as a full disk's, and no other file's."""
    import traceback

    import click

    frames = traceback.extract_tb(error.__traceback__)
    return any((frame.filename, frame.name) == (click.utils.__file__, "echo") for frame in frames)


def _json_in_words() -> bool:
    # For errors before the flags have been read; after `--` come words, not flags.
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
    with contextlib.suppress(OSError):  # the reader has left; the exit code says the rest
        click.echo(f"{click.style('Error:', fg='red', bold=True)} {told}", err=True, color=coloured)
        if hint:
            click.echo(f"Hint: {hint}", err=True)
    return code


if __name__ == "__main__":
    main()
