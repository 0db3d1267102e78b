"""The flags that every command has, and how a command's result is printed under them. It knows no command."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from moectl import errors, suggest

if TYPE_CHECKING:
    from moectl.hosts.hostfile import HostList

F = TypeVar("F", bound=Callable[..., Any])

DEFAULT_MODEL = "databricks/dbrx-instruct"
SPLIT = click.Choice(["auto", "experts", "hidden", "tensor", "layers"])
Q_BITS = click.Choice(["2", "3", "4", "6", "8", "16"])
Q_MODE = click.Choice(["affine", "mxfp4", "mxfp8", "nvfp4"])
FILE = click.Path(path_type=Path, dir_okay=False)


class Duration(click.ParamType[float]):
    """Seconds, written 300, 30s, 5m or 1h; -1 is for ever."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, int | float):
            return float(value)
        match = re.fullmatch(r"(-?\d+(?:\.\d+)?)(s|m|h|)", str(value).strip())
        if match is None:
            self.fail(f"{value!r} is no duration: write 30s, 5m, 1h, 0 (at once) or -1 (for ever)", param, ctx)
        return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


class Common:
    """The values of the flags that every command has."""

    def __init__(
        self, *, hosts: str | None, hostfile: str | None, json: bool, quiet: bool, verbose: int, color: str
    ) -> None:
        self.hosts = hosts
        self.hostfile = hostfile
        self.json = json
        self.quiet = quiet
        self.verbose = verbose
        self.color = color

    def host_list(self, *, required: bool = False) -> HostList | None:
        """Return the hosts in force, or None."""
        from moectl.hosts.hostfile import find_hosts

        found = find_hosts(self.hosts, self.hostfile)
        if found is None and required:
            raise errors.HostsError("no hosts are given", hint="write hosts.txt, or use --hosts a,b or --hostfile FILE")
        return found

    def print(self, text: str, document: dict[str, Any], quiet_text: str | None = None) -> None:
        """Print a command's result on stdout in the form that was asked for. Raises StateError for a full disk.

        `quiet_text` is its shorter form for --quiet, where it has one.
        """
        shown = json.dumps(document) if self.json else text if not self.quiet or quiet_text is None else quiet_text
        if not shown:
            return
        try:
            click.echo(shown)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise errors.StateError(
                f"the result cannot be written: {error.strerror}", hint="look at where standard output goes"
            ) from None

    def say(self, text: str) -> None:
        """Say something to a person, on stderr."""
        if not self.quiet:
            click.echo(text, err=True)


class Failed(Exception):
    """An error on its way out of a command, with the flags that say how to print it."""

    def __init__(self, error: Exception, flags: Common) -> None:
        super().__init__(str(error))
        self.error = error
        self.flags = flags


def common(command: F) -> F:
    """Give a command the flags that all commands have, and pass them as one `common` argument."""

    @click.pass_context
    def wrapped(ctx: click.Context, /, *args: Any, **kw: Any) -> Any:
        from moectl.text import colour_wanted

        flags = Common(**{k: kw.pop(k) for k in ("hosts", "hostfile", "json", "quiet", "verbose", "color")})
        ctx.color = colour_wanted(flags.color, sys.stdout)
        try:
            return ctx.invoke(command, *args, common=flags, **kw)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except Exception as error:
            raise Failed(error, flags) from error

    wrapped.__doc__ = command.__doc__
    wrapped.__name__ = command.__name__
    options = (
        click.option(
            "-H", "--hosts", metavar="LIST", shell_complete=suggest.host_list, help="Hosts in rank order: a,b,c."
        ),
        click.option(
            "--hostfile",
            metavar="FILE",
            envvar="MOECTL_HOSTFILE",
            shell_complete=suggest.files,
            help="hosts.txt or MLX's JSON; - is stdin.",
        ),
        click.option("--json", is_flag=True, help="Print one JSON document."),
        click.option("-q", "--quiet", is_flag=True, help="Print results only."),
        click.option("-v", "--verbose", count=True, help="Show what happens, and the workers' logs."),
        click.option(
            "--color",
            type=click.Choice(["auto", "always", "never"]),
            default="auto",
            show_default=True,
            help="Colours; auto: at a terminal.",
        ),
    )
    for option in reversed(options):
        wrapped = option(wrapped)
    return wrapped  # type: ignore[return-value]
