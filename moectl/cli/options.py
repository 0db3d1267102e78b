"""The flags that verbs share, and how a verb's result is printed under them. It knows no verb."""

from __future__ import annotations

import functools
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from moectl import errors
from moectl.cli import suggest
from moectl.cli.verb import flag

if TYPE_CHECKING:
    from moectl.hosts.hostfile import HostList

F = TypeVar("F", bound=Callable[..., Any])

DEFAULT_MODEL = "databricks/dbrx-instruct"
SPLIT = click.Choice(["auto", "experts", "hidden", "tensor", "layers"])
Q_BITS = click.Choice([2, 3, 4, 5, 6, 8, 16])
Q_MODE = click.Choice(["affine", "mxfp4", "mxfp8", "nvfp4"])
Q_RECIPE = click.Choice(["mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"])
FILE = click.Path(path_type=Path, dir_okay=False)


class Duration(click.ParamType[float]):
    """Seconds, written as 300, 30s, 5m or 1h; with `for_ever` also -1."""

    name = "duration"

    def __init__(self, *, for_ever: bool = False) -> None:
        self._written = "1h, 0 (at once) or -1 (for ever)" if for_ever else "1h or 0 (at once)"
        self._least = -math.inf if for_ever else 0.0

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        match = re.fullmatch(r"(-?\d+(?:\.\d+)?)(s|m|h|)", str(value).strip())
        seconds = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]] if match else math.nan
        if not seconds >= self._least:
            self.fail(f"{value!r} is no duration: write 30s, 5m, {self._written}", param, ctx)
        return seconds


@dataclass(frozen=True, slots=True)
class Common:
    """The values of the flags that every verb has."""

    hosts: str | None
    hostfile: str | None
    json: bool
    quiet: bool
    verbose: int
    color: str

    def host_list(self) -> HostList | None:
        """Return the hosts in force, or None."""
        from moectl.hosts.hostfile import find_hosts

        return find_hosts(self.hosts, self.hostfile)

    def require_hosts(self) -> HostList:
        """Return the hosts in force. Raises HostsError where there are none."""
        found = self.host_list()
        if found is None:
            raise errors.HostsError("no hosts are given", hint="write hosts.txt, or use --hosts a,b or --hostfile FILE")
        return found

    def print(self, text: str, document: dict[str, Any], quiet_text: str | None = None) -> None:
        """Print a verb's result on stdout; `quiet_text` is its shorter form for --quiet, where it has one."""
        shown = json.dumps(document) if self.json else text if not self.quiet or quiet_text is None else quiet_text
        if shown:
            click.echo(shown)

    def say(self, text: str) -> None:
        """Say something to a person, on stderr."""
        if not self.quiet:
            click.echo(text, err=True)


def unwritable(error: OSError | ValueError) -> errors.StateError:
    """Return the error of a standard output that cannot be written."""
    reason = getattr(error, "strerror", None) or error
    return errors.StateError(f"the result cannot be written: {reason}", hint="look at where standard output goes")


class Failed(Exception):
    """An error on its way out of a verb, with the flags that say how to print it."""

    def __init__(self, error: Exception, flags: Common) -> None:
        super().__init__(str(error))
        self.error = error
        self.flags = flags


def _together(*options: Callable[[Any], Any]) -> Callable[[F], F]:
    """Return one decorator for several options, in the order in which --help lists them."""

    def decorate(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_common_options = _together(
    flag(
        "-H",
        "--hosts",
        metavar="LIST",
        shell_complete=suggest.host_list,
        help="Hosts in rank order: a,b,c.",
        group="Hosts and output",
    ),
    flag(
        "--hostfile",
        metavar="FILE",
        envvar="MOECTL_HOSTFILE",
        shell_complete=suggest.files,
        help="Hosts file, moectl-hosts(5); - is standard input.",
        group="Hosts and output",
    ),
    flag("--json", is_flag=True, help="Print one JSON document.", group="Hosts and output"),
    flag("-q", "--quiet", is_flag=True, help="Print results only.", group="Hosts and output"),
    flag("-v", "--verbose", count=True, help="Show what happens, and the workers' logs.", group="Hosts and output"),
    flag(
        "--color",
        type=click.Choice(["auto", "always", "never"]),
        default="auto",
        show_default=True,
        help="Use colours; auto: only on a terminal.",
        group="Hosts and output",
        rare=True,
    ),
)


def common(command: F) -> F:
    """Give a verb the flags that all verbs have, and pass them as one `common` argument."""

    @click.pass_context
    @functools.wraps(command)
    def wrapped(ctx: click.Context, /, *args: Any, **kw: Any) -> Any:
        from moectl.text import colour_wanted

        values = {field.name: kw.pop(field.name) for field in fields(Common)}
        values["hostfile"] = kw.pop("hostfile_", None) or values["hostfile"]  # [HOSTFILE], of some verbs
        flags = Common(**values)
        ctx.color = colour_wanted(flags.color, sys.stdout)
        try:
            return ctx.invoke(command, *args, common=flags, **kw)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except Exception as error:
            raise Failed(error, flags) from error

    return _common_options(wrapped)  # type: ignore[return-value]


def at_terminal() -> bool:
    """Return whether standard input is a terminal, where a person can be asked."""
    return sys.stdin is not None and sys.stdin.isatty()


def confirm(question: str, *, yes: bool) -> None:
    """Ask; exit 1 on "no". Raises UsageError where there is no terminal to ask at."""
    if yes:
        return
    if not at_terminal():
        raise errors.UsageError(f"{question} There is no terminal to ask at.", hint="use --yes to skip confirmation")
    if not click.confirm(question, err=True):
        click.echo("Nothing was deleted.", err=True)
        raise click.exceptions.Exit(1)


def refuse_both(these: dict[str, Any], those: dict[str, Any]) -> None:
    """Raise UsageError when a flag of each is given: one of them would be ignored."""
    for one in (name for name, value in these.items() if value):
        for other in (name for name, value in those.items() if value):
            raise errors.UsageError(f"{one} and {other} exclude each other")


def was_given(name: str) -> bool:
    """Return whether the user set a parameter: on the command line, in a variable or in a file."""
    source = click.get_current_context().get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


restart_options = _together(
    flag("--no-restart", is_flag=True, help="When a worker fails, do not restart it: end with its error.", rare=True),
    flag(
        "--max-restarts",
        type=click.IntRange(0),
        default=5,
        show_default=True,
        metavar="N",
        help="Restart failed workers at most N times in ten minutes, and go on with the answers.",
        rare=True,
    ),
)


def count_restarts(options: dict[str, Any]) -> int:
    """Return how often a failed cluster may be started again, as `restart_options` say."""
    most: int = options["max_restarts"]
    return 0 if options["no_restart"] else most


MAX_START_S = 86400.0

# Which model to run, where and how; cli.target reads them.
target_options = _together(
    flag("--demo", is_flag=True, help="Use the bundled demo model: a toy.", group="Model"),
    flag("--local", type=click.IntRange(1), metavar="N", help="Run N ranks on this machine.", group="Model"),
    flag(
        "--shards",
        metavar="DIR",
        shell_complete=suggest.shard_sets,
        help="Use this shard set on this machine.",
        group="Model",
    ),
    flag(
        "-m",
        "--model",
        metavar="DIR|REPO",
        shell_complete=suggest.models,
        help="Use this model here; cut it first where needed.",
        group="Model",
    ),
    flag(
        "--split", type=SPLIT, help="For --model: how ranks share the work (default: auto).", group="Model", rare=True
    ),
    flag(
        "--shares", metavar="A,B,…", help="For --model: uneven parts, a number for each rank.", group="Model", rare=True
    ),
    flag(
        "--replicas", type=click.IntRange(1), help="For --model: copies of each whole expert.", group="Model", rare=True
    ),
    flag(
        "--q-bits",
        type=Q_BITS,
        help="For --model: bits per weight (default: what fits).",
        group="Model",
        rare=True,
    ),
    flag("--force", is_flag=True, help="Try it although there is too little memory.", group="Model", rare=True),
    flag(
        "--no-canary",
        is_flag=True,
        help="Do not check at the start that every rank computes right results.",
        group="Model",
        rare=True,
    ),
    flag(
        "--agree-routing",
        is_flag=True,
        help="Rank 0 chooses the experts for all ranks; for hosts with different chips.",
        group="Model",
        rare=True,
    ),
    flag(
        "--paranoia",
        is_flag=True,
        help="Let all ranks compare their results again and again.",
        group="Model",
        rare=True,
    ),
    flag(
        "--backend",
        type=click.Choice(["auto", "ring", "jaccl", "jaccl-ring"]),
        default="auto",
        show_default=True,
        help="How ranks exchange numbers: ring uses TCP, jaccl uses RDMA; --split layers uses ring only.",
        group="Model",
        rare=True,
    ),
    flag(
        "--start-timeout",
        type=click.FloatRange(1, MAX_START_S),
        default=30.0,
        show_default=True,
        metavar="SECONDS",
        help="Time for all ranks to join and load the model.",
        group="Model",
        rare=True,
    ),
    flag(
        "--prefill-step",
        type=click.IntRange(1),
        metavar="TOKENS",
        help="Tokens of a prompt to read in one step; other answers wait for one step at most "
        "(default: 512; fewer with --split layers on slower Macs).",
        group="Model",
        rare=True,
    ),
    flag(
        "--speculate",
        type=click.IntRange(0, 64),
        default=0,
        show_default=True,
        metavar="TOKENS",
        help="Guess up to TOKENS from the text so far, and check them in one pass.",
        group="Model",
        rare=True,
    ),
    flag(
        "--dtype",
        type=click.Choice(["float32", "bfloat16", "float16"]),
        help="Numbers to compute with (default: the device's).",
        group="Model",
        rare=True,
    ),
)

# How to place a model on ranks and to quantise it; cli.target.read_wanted reads them.
WANTED = ("split", "shares", "replicas", "q_bits", "q_group_size", "q_mode", "q_recipe", "routing_stats")
wanted_options = _together(
    flag(
        "--split",
        type=SPLIT,
        default="auto",
        show_default=True,
        help="How ranks share the work; auto: the fastest.",
    ),
    flag(
        "--shares",
        metavar="A,B,…",
        help="Uneven parts, a number for each rank: 2,1,1.",
    ),
    flag(
        "--replicas",
        type=click.IntRange(1),
        default=1,
        show_default=True,
        help="Copies of each whole expert.",
        rare=True,
    ),
    flag("--q-bits", type=Q_BITS, help="Bits per weight; 16: not quantised (default: the most that fit)."),
    flag("--q-group-size", type=click.IntRange(1), help="Weights per scale (default: MLX's).", rare=True),
    flag("--q-mode", type=Q_MODE, default="affine", show_default=True, help="MLX's mode of quantisation.", rare=True),
    flag(
        "--q-recipe",
        type=Q_RECIPE,
        help="One of mlx-lm's mixtures: more bits for the layers that need them.",
        rare=True,
    ),
    flag(
        "--routing-stats",
        type=FILE,
        metavar="FILE",
        help="Place whole experts by what 'moectl bench' counted.",
        rare=True,
    ),
)

# How to cut a model.
cut_options = _together(
    flag("-o", "--output", type=click.Path(path_type=Path, file_okay=False), help="Directory of the shard set."),
    wanted_options,
    flag("--revision", help="Branch, tag or commit on the Hub.", rare=True),
    flag(
        "--tokenizer",
        metavar="REPO|DIR",
        help="Take the tokenizer from here (default: the model's own, or DBRX's).",
        rare=True,
    ),
    flag("--keep-source", is_flag=True, help="Keep downloaded files in the Hugging Face cache.", rare=True),
    flag(
        "--no-canary",
        is_flag=True,
        help="Do not compute the canary, with which later starts compare results.",
        rare=True,
    ),
)
