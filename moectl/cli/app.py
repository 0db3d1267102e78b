"""The command line: all verbs put together. Exit codes are `__main__`'s."""

from __future__ import annotations

import click

from moectl import __version__
from moectl.cli.verb import Verbs
from moectl.cli.verbs import (
    bench,
    deploy,
    doctor,
    help,
    list as list_,
    logs,
    models,
    plan,
    run as run_,
    serve,
    setup,
    shard,
    status,
)
from moectl.cli.verbs.completion import completion, generate
from moectl.cli.verbs.hosts import hosts
from moectl.cli.verbs.serve import worker


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


for _verb in (
    setup.setup,
    models.models,
    plan.plan,
    shard.shard,
    shard.pull,
    deploy.deploy,
    run_.run,
    serve.serve,
    serve.stop,
    bench.bench,
    status.status,
    logs.logs,
    list_.list_,
    deploy.uninstall,
    serve.controller,
    doctor.doctor,
    help.help_,
    hosts,
    worker,
    completion,
    generate,
):
    cli.add_command(_verb)

cli.add_command(status.status, "ps")
