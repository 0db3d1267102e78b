"""The verb help: the guides, and the verbs' own help."""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING

import click

from moectl.cli import suggest
from moectl.cli.options import Common, common
from moectl.cli.verb import Verbs, verb

if TYPE_CHECKING:
    from moectl.cli.guides import Guide

SCHEMA = "moectl.help/1"
_REFERENCE = "moectl help {}"
# Fonts only: rich's own colours take a dark background for granted.
_STYLES = {
    "markdown.h1": "bold underline",
    "markdown.h2": "bold underline",
    "markdown.code": "bold",
    "markdown.link_url": "underline",
    "markdown.table.header": "bold",
    "markdown.table.border": "dim",
}
_WIDEST = 100  # columns; longer lines are hard to read


@verb(name="help")
@click.argument("topic", required=False, shell_complete=suggest.topics)
@common
@click.pass_context
def help_(ctx: click.Context, common: Common, topic: str | None) -> None:
    """Show a guide, or the help of a verb.

    Without TOPIC it lists the guides. On a terminal a guide is shown in a pager; elsewhere it is Markdown.

    \b
    Examples:
      moectl help
      moectl help troubleshooting
      moectl help planning > planning.md
      moectl help run
    """
    from moectl.cli.guides import TOPICS, read_guide
    from moectl.text import did_you_mean

    verbs = ctx.find_root().command
    assert isinstance(verbs, Verbs)
    if topic is None:
        _list(common, [read_guide(name) for name in TOPICS])
    elif topic in TOPICS:
        _show(ctx, common, read_guide(topic))
    elif topic in verbs.commands:
        command = verbs.commands[topic]
        text = command.get_help(click.Context(command, info_name=topic, parent=ctx.find_root()))
        common.print(text, {"schema": SCHEMA, "topic": topic, "text": text}, text)
    else:
        shown = [name for section in verbs.by_section().values() for name in section]
        guess = did_you_mean(topic, [*TOPICS, *shown])
        raise click.UsageError(f"No such topic or verb {topic!r}.{guess} 'moectl help' lists the topics.")


def _list(common: Common, guides: list[Guide]) -> None:
    from moectl.text import columns

    formatter = click.HelpFormatter(width=min(columns(), _WIDEST))
    with formatter.section("Guides, shown by 'moectl help TOPIC'"):
        formatter.write_dl([(guide.topic, guide.summary) for guide in guides])
    formatter.write_paragraph()
    formatter.write_text("'moectl VERB --help' shows a verb, 'moectl --help' lists the verbs.")
    topics = [{"topic": guide.topic, "summary": guide.summary} for guide in guides]
    names = "\n".join(guide.topic for guide in guides)
    common.print(formatter.getvalue().rstrip("\n"), {"schema": SCHEMA, "topics": topics}, names)


def _show(ctx: click.Context, common: Common, guide: Guide) -> None:
    text = f"# {guide.title}\n\n{guide.text(_REFERENCE)}"
    if sys.stdout.isatty() and not common.json:
        rendered = _render(text, color=bool(ctx.color))
        if common.color == "auto" and ctx.color:
            ctx.color = None  # then click looks whether the pager shows bold letters or their escape sequences
        click.echo_via_pager(rendered)
    else:
        text = text.rstrip("\n")
        common.print(text, {"schema": SCHEMA, "topic": guide.topic, "text": text}, text)


def _render(text: str, *, color: bool) -> str:
    """Return Markdown as it is to be read on this terminal: paragraphs and tables wrap, what is typed does not."""
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.markdown import CodeBlock, Markdown
    from rich.text import Text
    from rich.theme import Theme

    from moectl.text import columns

    class Typed(CodeBlock):
        def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
            for line in str(self.text).rstrip().splitlines():
                yield Text(f"    {line}", no_wrap=True, overflow="ignore")

    class Guide(Markdown):
        elements = {**Markdown.elements, "fence": Typed}  # noqa: RUF012 - as in rich

    console = Console(
        file=io.StringIO(),
        width=min(columns(), _WIDEST),
        force_terminal=color,
        color_system="standard" if color else None,
        no_color=not color,
        theme=Theme(_STYLES),
    )
    with console.capture() as captured:
        console.print(Guide(text, hyperlinks=False), crop=False)
    return "\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n"
