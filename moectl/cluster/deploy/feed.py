"""Cut a model and deploy it at the same time: each file is pushed as soon as it is whole and hashed.

`prepare` cuts in the calling thread, `deploy` pushes in another. Each stops when the other has failed, and the same
command resumes both. The manifest goes last.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moectl.cluster.deploy.deploy import DeployResult, Growing, deploy, manifest_entry
from moectl.cluster.deploy.fleet import Feed
from moectl.hosts.hostfile import Host
from moectl.model.manifest import NAME, FileEntry, read_manifest
from moectl.model.placement import Placement
from moectl.shards.prepare import Made


class _NoHostLeft(Exception):
    """Every host has failed: the cut has no purpose any more."""


@dataclass(frozen=True, slots=True)
class Fed:
    """The name of the set, the result of the cut (None: stopped, as every host had failed), and that of the push."""

    name: str
    made: Made | None
    result: DeployResult


def shard_and_deploy(shard: Callable[..., Made], hosts: Sequence[Host], **options: Any) -> Fed:
    """Run `shard` (`prepare.shard` without its `on_files` and `on_file`) and push what it makes meanwhile.

    `options` are `deploy`'s. Hosts that fail are in the result; the others go on. Raises what both raise; the first
    error ends both.
    """
    push = _Push(hosts, options)
    made = None
    try:
        try:
            made = shard(on_files=push.begin, on_file=push.add)
            push.finish(made.directory)
        except _NoHostLeft:
            pass
        return Fed(push.name, made, push.wait())
    except BaseException:
        push.cancel()
        raise
    finally:
        push.feed.close()


class _Push:
    """The push, in a thread of its own from `begin` on."""

    def __init__(self, hosts: Sequence[Host], options: Mapping[str, Any]) -> None:
        self.name = ""
        self.feed = Feed()
        self._hosts = hosts
        self._options = options
        self._pushed: Future[DeployResult] | None = None

    def begin(self, name: str, directory: Path, placement: Placement, planned: Mapping[str, int]) -> None:
        """Start to push a set that is about to be made."""
        self.name = name
        growing = Growing(name, placement.world_size, planned, self.feed)
        self._pushed = Future()
        threading.Thread(target=self._work, args=(self._pushed, directory, growing), name="push", daemon=True).start()

    def add(self, name: str, entry: FileEntry) -> None:
        """Push a file that is whole. Raises what has ended the push, so that the cut stops."""
        if self._pushed is not None and self._pushed.done():
            self._pushed.result()
            raise _NoHostLeft
        self.feed.add({name: entry})

    def finish(self, directory: Path) -> None:
        """Push what is left, the manifest last."""
        if not self._options.get("dry_run"):
            files = read_manifest(directory).files
            self.feed.add({**files, NAME: manifest_entry(directory)}, last=True)

    def wait(self) -> DeployResult:
        """Return the results of all hosts. Raises what `deploy` raises."""
        assert self._pushed is not None
        return self._pushed.result()

    def cancel(self) -> None:
        """End the push; what has arrived stays."""
        self.feed.cancel()
        if self._pushed is not None:
            self._pushed.exception()  # waits for its end

    def _work(self, pushed: Future[DeployResult], directory: Path, growing: Growing) -> None:
        try:
            with contextlib.closing(self.feed.pipe):  # a write to it must not wait after the end
                result = deploy(self._hosts, directory, growing, **self._options)
        except BaseException as error:  # the calling thread raises it
            pushed.set_exception(error)
        else:
            pushed.set_result(result)
