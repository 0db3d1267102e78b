"""Deploy to one host by itself: no other host takes files from it, and nobody listens."""

from __future__ import annotations

from moectl.cluster.deploy.provision import deployed_host
from moectl.cluster.deploy.push import Push
from moectl.cluster.deploy.task import HostResult, HostTask


class _Nobody:
    def tell(self, message: object) -> None:
        pass

    def connect(self, push: Push) -> None:
        pass


def deploy_host(task: HostTask) -> HostResult:
    """Return what came of a deployment."""
    with deployed_host(task, lambda event: None, _Nobody()) as result:
        return result
