"""What every verb is to click: its section of `moectl --help`, its options in groups, its examples. It knows no verb.

Examples are at the end of a verb's docstring: a line of \\b, `Examples:`, and indented command lines. `--help` and the
man page show them below the options. `--help` leaves out what few people need; `--help-all` and the man page have it.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moectl.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

SECTIONS = ("Prepare", "Use", "Observe", "Other")
EXIT_CODES = {
    0: "done",
    1: "bug",
    2: "usage",
    3: "some hosts or checks failed",
    4: "hosts file or plan impossible",
    5: "host unreachable, key or login",
    6: "remote command or version",
    7: "damaged bytes",
    8: "not sharded, deployed or running",
    130: "interrupted",
    141: "the reader of the output left",
    143: "terminated",
}
_MANY = 4  # more verbs than this have the option: then the hint names none of them
_EXAMPLES = re.compile(r"\n*\x08\nExamples?:\n((?: +.*\n?)+)")


class Flag(click.Option):
    """An option with its group in the help; `--help` leaves out a `rare` one."""

    def __init__(self, *args: Any, group: str = "Options", rare: bool = False, **kw: Any) -> None:
        super().__init__(*args, **kw)
        self.group = group
        self.rare = rare


flag = functools.partial(click.option, cls=Flag)


def value_name(option: click.Option) -> str:
    """Return what stands for an option's value; click's own names differ between its versions."""
    if option.is_flag or option.count:
        return ""
    if option.metavar:
        return option.metavar
    if isinstance(option.type, click.Choice):
        return "|".join(map(str, option.type.choices))
    if isinstance(option.type, click.Path):
        return "FILE" if not option.type.dir_okay else "DIR" if not option.type.file_okay else "PATH"
    if isinstance(option.type, click.types.IntParamType | click.types.FloatParamType):
        return "N"
    if option.type.name == "numbers":
        return "N,…"
    return "TIME" if option.type.name == "duration" else (option.name or "").upper()


class _WithExamples(click.Command):
    """A command whose help ends with examples, and says where the rest is."""

    examples: tuple[str, ...]  # as typed at a prompt

    def __init__(self, *args: Any, **kw: Any) -> None:
        super().__init__(*args, **kw)
        text = inspect.cleandoc(self.help or "")
        found = _EXAMPLES.search(text)
        self.examples = tuple(line.strip() for line in found[1].splitlines()) if found else ()
        self.help = _EXAMPLES.sub("\n", text).strip()

    @property
    def summary(self) -> str:
        """The first sentence of the help."""
        return self.get_short_help_str(limit=1000)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples."""
        if self.examples:
            with formatter.section("Examples"):
                formatter.write("".join(f"{'':{formatter.current_indent}}{line}\n" for line in self.examples))


def _reads(ctx: click.Context, verb: click.Command, words: list[str]) -> bool:
    """Return whether these words are options of a verb, with their values, and nothing else."""
    try:
        return not verb.make_parser(ctx).parse_args(list(words))[1]
    except click.UsageError:
        return False


def _is_rare(option: click.Option) -> bool:
    return getattr(option, "rare", False)


def _help_row(option: click.Option) -> tuple[str, str]:
    """Return an option's names and its text; limits are told by the man page, and by the error."""
    short, long = (sorted(names, key=len) for names in (option.opts, option.secondary_opts))
    names, value = ", ".join(short) + (f" / {', '.join(long)}" if long else ""), value_name(option)
    shown = option.show_default and option.default is not None
    text = f"{option.help or ''}{f'  [default: {option.default}]' if shown else ''}"
    if isinstance(option.type, click.Choice) and len(value) > _LONG_VALUE:
        text, value = f"{text} ({value})", (option.name or "").upper()
    return f"{names} {value}".rstrip(), text


def _show_all(ctx: click.Context, param: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        ctx.meta[_ALL] = True
        click.echo(ctx.get_help(), color=ctx.color)
        ctx.exit()


_ALL = "moectl.help-all"
_COLUMN = 28  # of the options' names
_LONG_VALUE = 12
_HELP_ALL = click.Option(
    ["--help-all"], is_flag=True, is_eager=True, expose_value=False, callback=_show_all, help="Show all options."
)


class Verb(_WithExamples):
    """One verb, and the section of `moectl --help` in which it stands.

    `old` are letters that had another meaning in the last version: they still work, with a warning. `-m N` had it only
    before a number, which no model is called.
    """

    def __init__(self, *args: Any, section: str = "Other", old: Mapping[str, str] | None = None, **kw: Any) -> None:
        super().__init__(*args, **kw)
        assert section in SECTIONS
        self.section = section
        self._old = old or {}

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the line, with old letters as what they mean today."""
        end = args.index("--") if "--" in args else len(args)
        pairs = zip(args[:end], [*args[1:end], ""][:end], strict=True)
        return super().parse_args(ctx, [*filter(None, itertools.starmap(self._read_old, pairs)), *args[end:]])

    def _read_old(self, word: str, after: str) -> str:
        new = self._old.get(word[:2])
        value = word[2:].removeprefix("=") or after
        if new is None or (word[:2] == "-m" and (not value.isdecimal() or Path(value).exists())):
            return word
        click.echo(f"Warning: {word[:2]} will not mean this in the next version: write {new}", err=True)
        return f"{new}={word[2:].removeprefix('=')}" if word[2:] else new

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the parameters, --help-all among them where --help leaves something out."""
        found = super().get_params(ctx)
        return [*found, _HELP_ALL] if any(getattr(each, "rare", False) for each in found) else found

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options by group; without what is rare, unless --help-all asks for it."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for each in self.get_params(ctx):
            if isinstance(each, click.Option) and not each.hidden and (_ALL in ctx.meta or not _is_rare(each)):
                groups.setdefault(getattr(each, "group", "Options"), []).append(_help_row(each))
        column = min(_COLUMN, max(len(name) for rows in groups.values() for name, _ in rows))
        for group, rows in groups.items():
            with formatter.section(group):
                formatter.write_dl([(name.ljust(column), text) for name, text in rows], col_max=_COLUMN)


class Verbs(_WithExamples, click.Group):
    """All verbs, listed by section in the order in which they were added."""

    command_class = Verb

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read what comes before the verb. Raises UsageError that says where an option of a verb's goes."""
        words = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            raise self._misplaced(ctx, words, error.option_name) or error from None

    def _misplaced(self, ctx: click.Context, words: list[str], option: str) -> UsageError | None:
        """Return the error for a verb's option that stands before the verb; None where no verb knows it."""
        verbs = {name: verb for name, verb in self.commands.items() if not verb.hidden}
        at = next((i for i, word in enumerate(words) if word in verbs and _reads(ctx, verbs[word], words[:i])), None)
        know = [name for name, verb in verbs.items() if any(option in param.opts for param in verb.params)]
        if at is not None:
            rest = " …" if words[at + 1 :] else ""
            hint = f"put {option} after the verb: moectl {words[at]} {shlex.join(words[:at])}{rest}"
        elif know:
            which = "VERB" if len(know) > _MANY else know[0]
            hint = f"put {option} after its verb: moectl {which} {option} …"
        else:
            return None
        return UsageError(f"{option} stands before the verb, where only --help and --version may", hint=hint)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return all names in the order in which they were added."""
        return list(self.commands)

    def by_section(self) -> dict[str, dict[str, Verb]]:
        """Return the visible verbs by section and name, without aliases."""
        sections: dict[str, dict[str, Verb]] = {section: {} for section in SECTIONS}
        for name, verb in self.commands.items():
            if isinstance(verb, Verb) and not verb.hidden and verb.name == name:
                sections[verb.section][name] = verb
        return {section: verbs for section, verbs in sections.items() if verbs}

    def parameter_names(self) -> dict[str, set[str]]:
        """Return every verb's parameters, as `config` wants them."""
        return {name: {p.name for p in verb.params if p.name} for name, verb in self.commands.items()}

    def aliases(self, verb: Verb) -> list[str]:
        """Return the other names of a verb."""
        return [name for name, other in self.commands.items() if other is verb and name != verb.name]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one list per section."""
        sections = self.by_section()
        column = max(len(name) for verbs in sections.values() for name in verbs)
        for section, verbs in sections.items():
            with formatter.section(section):
                formatter.write_dl([(name.ljust(column), self._summary(verb)) for name, verb in verbs.items()])

    def _summary(self, verb: Verb) -> str:
        aliases = self.aliases(verb)
        return verb.summary + (f" (alias: {', '.join(aliases)})" if aliases else "")


def verb(
    section: str = "Other", *, name: str | None = None, hidden: bool = False, old: Mapping[str, str] | None = None
) -> Callable[[Callable[..., Any]], Verb]:
    """Make a function a verb, by its own name or another, listed in a section of `moectl --help`; `old`: see Verb."""
    return click.command(name, cls=Verb, section=section, hidden=hidden, old=old)
