"""`moectl hosts`: the host list that is in force, also as MLX's hostfile."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import click

from moectl.cli.options import Common, common
from moectl.cli.verb import verb

if TYPE_CHECKING:
    from moectl.hosts.hostfile import HostList


@verb()
@click.option("--mlx", is_flag=True, help="Write an MLX JSON hostfile, for mlx.launch.")
@common
def hosts(common: Common, mlx: bool) -> None:
    """Print the host list in rank order.

    No host is asked. No name is resolved, except for --mlx: MLX's hostfile needs an address of every host.

    \b
    Examples:
      moectl hosts --json | jq -r '.hosts[].host'
      moectl hosts --mlx > hosts.json && mlx.launch --hostfile hosts.json script.py
    """
    found = common.require_hosts()
    if mlx:
        from moectl.hosts.mlx_hostfile import to_mlx_json

        if not found.backend and any(host.rdma for host in found.hosts):
            from moectl.session.backend import choose_backend

            # mlx.launch takes the TCP ring where the file does not say; hosts.txt says it by its rdma= only.
            found = replace(found, backend=choose_backend("auto", found.hosts))
        click.echo(to_mlx_json(found))
        return

    names = "\n".join(host.name for host in found.hosts)
    common.print(names, hosts_json(found), names)


def hosts_json(found: HostList) -> dict[str, Any]:
    """Return the document of `hosts --json`: what the list says, nothing resolved."""
    hosts = [{"rank": rank, "host": host.address, **asdict(host)} for rank, host in enumerate(found.hosts)]
    rest = {"source": found.source, "backend": found.backend, "envs": list(found.envs)}
    return {"schema": "moectl.hosts/1", **rest, "hosts": hosts}
