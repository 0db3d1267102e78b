"""Ask hosts over SSH what they are made of. Parsing what they say is `hardware`'s; nothing is predicted here."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from moectl.errors import CommandFailed
from moectl.hardware import MARK, Hardware, parse_probe
from moectl.remote import Remote

HARDWARE_S = 20.0

# Both systems' own tools, in one run; whatever is missing leaves its section empty.
SCRIPT = f"""
export LC_ALL=C PATH="$PATH:/usr/bin:/bin:/usr/sbin:/sbin"
say() {{ printf '\\n{MARK}%s\\n' "$1"; }}
say system; uname -s
if [ "$(uname -s)" = Darwin ]; then
  say sysctl; sysctl hw.memsize hw.ncpu machdep.cpu.brand_string iogpu.wired_limit_mb
  say vm_stat; vm_stat
  say sw_vers; sw_vers
  say system_profiler; system_profiler -json SPHardwareDataType SPDisplaysDataType SPThunderboltDataType
else
  say meminfo; cat /proc/meminfo
  say cpuinfo; cat /proc/cpuinfo
  say os-release; cat /etc/os-release
  say nvidia-smi; timeout 5 nvidia-smi --query-gpu=name,memory.total,memory.used --format=csv,noheader,nounits
fi
exit 0
"""

_T = TypeVar("_T")
_R = TypeVar("_R")


def read_hardware(remote: Remote) -> Hardware:
    """Return what a host is made of, in one command; needs no python there. Raises HostError, CommandFailed."""
    done = remote.run(["sh", "-c", SCRIPT], timeout_s=HARDWARE_S)
    try:
        return parse_probe(done.stdout.decode("utf-8", "replace"))
    except CommandFailed as error:
        raise CommandFailed(error.message, host=remote.name) from None


def read_all_hardware(remotes: Sequence[Remote]) -> tuple[Hardware, ...]:
    """Return the hardware of all hosts, asked at once. Raises the first host's error."""
    return tuple(_at_once(read_hardware, remotes))


def _at_once(work: Callable[[_T], _R], items: Sequence[_T]) -> list[_R]:
    """Return work(item) of every item, each in a thread of its own; raise the first error in their order."""
    results: list[_R | None] = [None] * len(items)
    errors: list[BaseException | None] = [None] * len(items)

    def run(index: int) -> None:
        try:
            results[index] = work(items[index])
        except BaseException as error:
            errors[index] = error

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(items))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        if error is not None:
            raise error
    return results  # type: ignore[return-value]
