"""What every verb is to click: its section of `moectl --help`, its examples, its exit status. It knows no verb.

Examples are at the end of a verb's docstring: a line of \\b, `Examples:`, and indented command lines. `--help` and the
man page show them below the options.
"""

from __future__ import annotations

import inspect
import re
import shlex
from typing import TYPE_CHECKING, Any

import click

from moectl.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

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


class _WithExamples(click.Command):
    """A command whose help ends with examples and the exit status."""

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
        """Write the examples and the exit status."""
        if self.examples:
            with formatter.section("Examples"):
                formatter.write("".join(f"{'':{formatter.current_indent}}{line}\n" for line in self.examples))
        with formatter.section("Exit status"):
            indent = " " * formatter.current_indent
            # A line must not end between a code and its meaning.
            codes = "   ".join(f"{code} {text}".replace(" ", "\N{NO-BREAK SPACE}") for code, text in EXIT_CODES.items())
            text = click.formatting.wrap_text(codes, formatter.width, indent, indent)
            formatter.write(text.replace("\N{NO-BREAK SPACE}", " ") + "\n")


def _reads(ctx: click.Context, verb: click.Command, words: list[str]) -> bool:
    """Return whether these words are options of a verb, with their values, and nothing else."""
    try:
        return not verb.make_parser(ctx).parse_args(list(words))[1]
    except click.UsageError:
        return False


class Verb(_WithExamples):
    """One verb, and the section of `moectl --help` in which it stands."""

    def __init__(self, *args: Any, section: str = "Other", **kw: Any) -> None:
        super().__init__(*args, **kw)
        assert section in SECTIONS
        self.section = section


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
    section: str = "Other", *, name: str | None = None, hidden: bool = False
) -> Callable[[Callable[..., Any]], Verb]:
    """Make a function a verb, by its own name or another, listed in a section of `moectl --help`."""
    return click.command(name, cls=Verb, section=section, hidden=hidden)
