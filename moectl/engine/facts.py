"""Say what MLX can do in this environment: `python -m moectl.engine.facts` answers with one line of JSON.

It computes nothing. Names of this machine and its user come along so that they can be taken out of a report.
"""

from __future__ import annotations

import getpass
import platform
import socket
from pathlib import Path
from typing import Any

import mlx.core as mx

from moectl.engine.gpu_memory import working_set_bytes
from moectl.engine.group import own_versions, read_wheel
from moectl.hosts.onhost.prelude import tell

BACKENDS = ("ring", "jaccl")


def read_facts() -> dict[str, Any]:
    """Return versions, the wheel's tag, the backends and the GPU of this environment, and `private` names."""
    gpu = mx.metal.is_available() or mx.cuda.is_available()
    return {
        "versions": own_versions(),
        "machine": platform.machine(),
        "macos": platform.mac_ver()[0],  # as this python sees it: "16.0" where it was built for an older SDK
        "wheel": read_wheel(),
        "backends": [name for name in BACKENDS if mx.distributed.is_available(name)],
        "metal": mx.metal.is_available(),
        "gpu": gpu,
        "working_set_bytes": working_set_bytes(),
        "private": [socket.gethostname(), getpass.getuser(), str(Path.home())],
    }


if __name__ == "__main__":
    tell(read_facts())
