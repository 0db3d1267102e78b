"""Cut a model and bring it to the hosts at the same time: each file is pushed as soon as it is whole and hashed.

The cut works in the calling thread and the push in another; what each does is `prepare`'s and `cluster`'s. Either stops
cleanly when the other has failed, and the same command resumes both. The manifest goes last, as ever.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from moectl.cluster.deploy.deploy import DeployResult, Growing, deploy, manifest_entry
from moectl.cluster.deploy.fleet import Feed
from moectl.hosts.hostfile import Host
from moectl.model.manifest import NAME, FileEntry, read_manifest
from moectl.model.placement import Placement
from moectl.shards.prepare import Made


class _NoHostLeft(Exception):
    """Every host has failed: there is nobody to cut for."""


@dataclass(frozen=True, slots=True)
class Fed:
    """What came of both: the name of the set, the cut (None: given up, as every host had failed), the push."""

    name: str
    made: Made | None
    result: DeployResult


def shard_and_deploy(shard: Callable[..., Made], hosts: Sequence[Host], **options: Any) -> Fed:
    """Run `shard` (`prepare.shard` without its `on_files` and `on_file`) and push what it makes meanwhile.

    `options` are `cluster.deploy`'s. Hosts that fail are in the result, and do not keep the cut from the others. Raises
    what both raise; whichever raises first ends the other.
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
        self._thread: threading.Thread | None = None
        self._result: DeployResult | None = None
        self._error: BaseException | None = None

    def begin(self, name: str, directory: Path, placement: Placement, planned: Mapping[str, int]) -> None:
        """Start to push a set that is about to be made."""
        self.name = name
        growing = Growing(name, placement.world_size, planned, self.feed)
        work = partial(deploy, self._hosts, directory, growing, **self._options)
        self._thread = threading.Thread(target=self._work, args=(work,), name="push", daemon=True)
        self._thread.start()

    def add(self, name: str, entry: FileEntry) -> None:
        """Push a file that is whole. Raises what has ended the push, so that the cut stops."""
        if self._thread is not None and not self._thread.is_alive():
            if self._error is not None:
                raise self._error
            raise _NoHostLeft
        self.feed.add({name: entry})

    def finish(self, directory: Path) -> None:
        """Push what is left, the manifest last."""
        if not self._options.get("dry_run"):
            files = read_manifest(directory).files
            self.feed.add({**files, NAME: manifest_entry(directory)}, last=True)

    def wait(self) -> DeployResult:
        """Return what came of all hosts. Raises what `deploy` raises."""
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    def cancel(self) -> None:
        """End the push; what has arrived stays."""
        self.feed.cancel()
        if self._thread is not None:
            self._thread.join()

    def _work(self, work: Callable[[], DeployResult]) -> None:
        try:
            self._result = work()
        except BaseException as error:  # the calling thread raises it
            self._error = error
        finally:
            self.feed.pipe.close()  # nobody reads it any more, and who writes must not wait
