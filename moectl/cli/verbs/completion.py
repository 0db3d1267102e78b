"""`moectl completion` and the hidden `generate`: the shells' scripts and the man pages, printed or written."""

from __future__ import annotations

from pathlib import Path

import click

from moectl.cli.options import Common, common
from moectl.cli.verb import Verbs, verb


@verb()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@common
def completion(common: Common, shell: str) -> None:
    """Print a shell completion script.

    At each Tab the script asks moectl: hosts come from the hosts file in force, never from the network. Where moectl
    was installed from a wheel, the scripts are installed already.

    \b
    Examples:
      eval "$(moectl completion bash)"
      moectl completion bash > ~/.local/share/bash-completion/completions/moectl
      moectl completion zsh > "${fpath[1]}/_moectl"
      moectl completion fish > ~/.config/fish/completions/moectl.fish
    """
    from moectl.cli.completion import script

    text = script(shell)
    common.print(text.rstrip("\n"), {"schema": "moectl.completion/1", "shell": shell, "script": text}, text)


@verb(hidden=True)
@click.option("--man", type=click.Path(path_type=Path, file_okay=False), metavar="DIR", help="Write the man pages.")
@click.option(
    "--completions", type=click.Path(path_type=Path, file_okay=False), metavar="DIR", help="Write the scripts."
)
@click.pass_context
def generate(ctx: click.Context, man: Path | None, completions: Path | None) -> None:
    """Write man/ and completions/, as they are in the source tree."""
    from moectl.cli.completion import FILES, script
    from moectl.cli.manual import pages, write_files

    if man:
        verbs = ctx.find_root().command
        assert isinstance(verbs, Verbs)
        write_files(man, pages(verbs))
    if completions:
        write_files(completions, {name: script(shell) for shell, name in FILES.items()})
