"""Where moectl begins and ends: `moectl` and `python -m moectl`. Exceptions become one line of text and an exit code.

The only place that does so; what the verbs do is `cli`'s.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

import click

from moectl import errors
from moectl.cli import cli
from moectl.errors import MoectlError
from moectl.flags import Failed

INTERRUPTED, TERMINATED = 130, 143


class Terminated(BaseException):
    """SIGTERM arrived; unwinds like Ctrl-C does."""


def main() -> NoReturn:
    """Run the command line and end the process with its exit code."""
    if sys.argv[1:2] != ["worker"]:
        signal.signal(signal.SIGTERM, _on_sigterm)
    # A stream that was closed (`>&-`), or a terminal that lacks a letter, is no reason to stop.
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115 - for the rest of the process
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if "_MOECTL_COMPLETE" in os.environ:  # a shell asks, at Tab
        from moectl.completion import answer_tab

        answer_tab(cli)
        sys.exit(0)
    sys.exit(run())


def _on_sigterm(*_: object) -> None:
    raise Terminated


def run() -> int:
    """Run the command line in `sys.argv`; return its exit code."""
    try:
        from moectl.config import read_config

        result = cli.main(prog_name="moectl", standalone_mode=False, default_map=read_config(cli.parameter_names()))
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        if _json_in_words():
            return _print_error(errors.UsageError(error.format_message()), as_json=True)
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("Interrupted.", err=True)
        return INTERRUPTED
    except Terminated:
        click.echo("Terminated.", err=True)
        return TERMINATED
    except BrokenPipeError:
        # Whoever read stdout has left; keep the interpreter from saying so at exit.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except Exception as error:
        if os.environ.get("MOECTL_DEBUG") == "1":
            raise
        if isinstance(error, Failed):
            return _print_error(error.error, as_json=error.flags.json, color=error.flags.color)
        return _print_error(error, as_json=_json_in_words())


def _json_in_words() -> bool:
    # For errors before the flags have been read; after `--` come words, not flags.
    words = sys.argv[1:]
    return "--json" in words[: words.index("--") if "--" in words else None]


def _print_error(error: Exception, *, as_json: bool, color: str = "auto") -> int:
    from moectl.console import colour_wanted

    if isinstance(error, MoectlError):
        code, text, message, hint, host = error.exit_code, str(error), error.message, error.hint, error.host
    else:
        code, host, hint = 1, None, "run again with MOECTL_DEBUG=1 and report it"
        text = message = f"unexpected {type(error).__name__}: {error} (a bug in moectl)"
    if as_json:
        details = {"code": code, "kind": type(error).__name__, "host": host, "message": message, "hint": hint}
        click.echo(json.dumps({"error": details}), err=True)
        return code
    coloured = colour_wanted(color, sys.stderr)
    click.echo(f"{click.style('Error:', fg='red', bold=True)} {text}", err=True, color=coloured)
    if hint:
        click.echo(f"Hint: {hint}", err=True)
    return code


if __name__ == "__main__":
    main()
