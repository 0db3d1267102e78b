"""The command line: all verbs put together. Exit codes are `__main__`'s."""

from __future__ import annotations

import click

from moectl import __version__
from moectl.cli.options import Common, common
from moectl.cli.verb import Verbs, verb
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
    service,
    setup,
    shard,
    show,
    status,
    upgrade,
)
from moectl.cli.verbs.completion import completion, generate
from moectl.cli.verbs.hosts import hosts
from moectl.cli.verbs.serve import worker


def _versions() -> dict[str, str | None]:
    import platform
    from importlib import metadata

    found: dict[str, str | None] = {"moectl": __version__}
    for name in ("mlx", "mlx-lm"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return {**found, "Python": platform.python_version()}


def _versions_text() -> str:
    return "\n".join(f"{name} {version or 'not installed'}" for name, version in _versions().items())


def _print_versions(ctx: click.Context, param: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        click.echo(_versions_text())
        ctx.exit()


@verb("Other")
@common
def version(common: Common) -> None:
    """Show the versions of moectl, mlx, mlx-lm and Python.

    \b
    Examples:
      moectl version
      moectl version --json
    """
    common.print(_versions_text(), {"schema": "moectl.version/1", "versions": _versions()})


@click.group(
    cls=Verbs,
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "MOECTL", "max_content_width": 100},
)
@click.option(
    "-V",
    "--version",
    "versions_wanted",
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
      moectl shard databricks/dbrx-instruct --nodes 4 && moectl deploy hosts.txt && moectl run
      moectl help troubleshooting
    """


for _verb in (
    setup.setup,
    models.models,
    plan.plan,
    shard.shard,
    shard.pull,
    deploy.deploy,
    upgrade.upgrade,
    run_.run,
    serve.serve,
    serve.stop,
    service.service,
    bench.bench,
    status.status,
    logs.logs,
    list_.list_,
    show.show,
    list_.rm,
    deploy.uninstall,
    serve.controller,
    doctor.doctor,
    help.help_,
    version,
    hosts,
    worker,
    completion,
    generate,
):
    cli.add_command(_verb)

cli.add_command(status.status, "ps")
cli.add_command(list_.list_, "ls")
