"""The command line: all verbs put together, and those that fit nowhere else. Exit codes are `__main__`'s.

Imports of the working modules are inside the commands, so that `--help` and Tab load click only.
"""

from __future__ import annotations

from dataclasses import replace

import click

from moectl import __version__, cli_check, cli_prepare, cli_setup, cli_use
from moectl.flags import DEFAULT_MODEL, EXIT_STATUS, Common, common


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "MOECTL", "max_content_width": 100},
    epilog=f"Start: moectl shard {DEFAULT_MODEL} -n 4 && moectl deploy hosts.txt && moectl run PROMPT\n\n{EXIT_STATUS}",
)
@click.version_option(__version__, "-V", "--version", message="moectl %(version)s")
def cli() -> None:
    """Run a mixture-of-experts model across a cluster of Macs."""


for _verb in (
    cli_prepare.plan,
    cli_prepare.shard,
    cli_prepare.pull,
    cli_prepare.deploy,
    cli_use.run,
    cli_use.serve,
    cli_use.stop,
    cli_use.bench,
    cli_use.controller,
    cli_check.doctor,
    cli_setup.setup,
):
    cli.add_command(_verb)


@cli.command(epilog=EXIT_STATUS)
@click.option("--mlx", is_flag=True, help="Write an MLX JSON hostfile, for mlx.launch.")
@common
def hosts(common: Common, mlx: bool) -> None:
    """Print the host list in rank order.

    \b
    Example:
      moectl hosts --mlx > hosts.json && mlx.launch --hostfile hosts.json script.py
    """
    found = common.host_list(required=True)
    assert found is not None
    if mlx or common.json:
        from moectl.hosts import to_mlx_json

        if mlx and not found.backend and any(host.rdma for host in found.hosts):
            from moectl.backend import choose_backend

            # mlx.launch takes the TCP ring where the file does not say; hosts.txt says it by its rdma= only.
            found = replace(found, backend=choose_backend("auto", found.hosts))
        click.echo(to_mlx_json(found))
        return
    for host in found.hosts:
        click.echo(host.name)


@cli.command(hidden=True)
def worker() -> None:
    """Serve one rank on a leash (stdin and stdout); started by moectl itself."""
    from moectl import worker as process

    process.main()
