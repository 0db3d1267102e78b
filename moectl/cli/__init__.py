"""The command line: all verbs put together, and those that fit nowhere else. Exit codes are `__main__`'s.

Imports of the working modules are inside the commands, so that `--help` and Tab load click only.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from moectl import __version__, cli_check, cli_help, cli_observe, cli_prepare, cli_setup, cli_use
from moectl.flags import Common, common
from moectl.verb import Verbs, verb


def _print_versions(ctx: click.Context, param: click.Parameter, wanted: bool) -> None:
    if not wanted or ctx.resilient_parsing:
        return
    import platform
    from importlib import metadata

    click.echo(f"moectl {__version__}")
    for name in ("mlx", "mlx-lm"):
        try:
            click.echo(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            click.echo(f"{name} not installed")
    click.echo(f"Python {platform.python_version()}")
    ctx.exit()


@click.group(
    cls=Verbs,
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "MOECTL", "max_content_width": 100},
)
@click.option(
    "-V",
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_versions,
    help="Show the versions of moectl, mlx, mlx-lm and Python, and exit.",
)
def cli() -> None:
    """Run a mixture-of-experts model across a cluster of Macs.

    \b
    Examples:
      moectl run "What is expert parallelism?"
      moectl shard databricks/dbrx-instruct -n 4 && moectl deploy hosts.txt && moectl run
      moectl help troubleshooting
    """


@verb()
@click.option("--mlx", is_flag=True, help="Write an MLX JSON hostfile, for mlx.launch.")
@common
def hosts(common: Common, mlx: bool) -> None:
    """Print the host list in rank order.

    No host is asked and no name resolved, but for MLX: its hostfile has to have an address of every host.

    \b
    Examples:
      moectl hosts --json | jq -r '.hosts[].host'
      moectl hosts --mlx > hosts.json && mlx.launch --hostfile hosts.json script.py
    """
    found = common.host_list(required=True)
    assert found is not None
    if mlx:
        from moectl.hosts.hostfile import to_mlx_json

        if not found.backend and any(host.rdma for host in found.hosts):
            from moectl.session.backend import choose_backend

            # mlx.launch takes the TCP ring where the file does not say; hosts.txt says it by its rdma= only.
            found = replace(found, backend=choose_backend("auto", found.hosts))
        click.echo(to_mlx_json(found))
        return
    from moectl.report import hosts_json

    names = "\n".join(host.name for host in found.hosts)
    common.print(names, hosts_json(found), names)


@verb(hidden=True)
def worker() -> None:
    """Serve one rank on a leash (stdin and stdout); started by moectl itself."""
    from moectl.engine import worker as process

    process.main()


@verb()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@common
def completion(common: Common, shell: str) -> None:
    """Print a shell completion script.

    What it completes is asked of moectl at each Tab: hosts come from the hosts file in force, never from the network.
    A moectl that was installed from a wheel has brought the scripts already.

    \b
    Examples:
      eval "$(moectl completion bash)"
      moectl completion bash > ~/.local/share/bash-completion/completions/moectl
      moectl completion zsh > "${fpath[1]}/_moectl"
      moectl completion fish > ~/.config/fish/completions/moectl.fish
    """
    from moectl.completion import script

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
    from moectl.completion import FILES, script
    from moectl.manual import pages, write_files

    if man:
        verbs = ctx.find_root().command
        assert isinstance(verbs, Verbs)
        write_files(man, pages(verbs))
    if completions:
        write_files(completions, {name: script(shell) for shell, name in FILES.items()})


for _verb in (
    cli_setup.setup,
    cli_prepare.plan,
    cli_prepare.shard,
    cli_prepare.pull,
    cli_prepare.deploy,
    cli_use.run,
    cli_use.serve,
    cli_use.stop,
    cli_use.bench,
    cli_observe.status,
    cli_observe.logs,
    cli_observe.list_,
    cli_observe.uninstall,
    cli_use.controller,
    cli_check.doctor,
    cli_help.help_,
    hosts,
    worker,
    completion,
    generate,
):
    cli.add_command(_verb)
cli.add_command(cli_observe.status, "ps")
