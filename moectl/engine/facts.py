"""Say what MLX can do in this environment: `python -m moectl.engine.facts` answers with one line of JSON.

It computes nothing. Names of this machine and its user come along so that they can be taken out of a report.
"""

from __future__ import annotations

import getpass
import importlib.metadata
import platform
import socket
from pathlib import Path
from typing import Any

import mlx.core as mx

from moectl.engine.group import own_versions
from moectl.hosts.onhost.prelude import tell

BACKENDS = ("ring", "jaccl")


def read_facts() -> dict[str, Any]:
    """Return versions, the wheels' tags, the backends and the GPU of this environment, and `private` names."""
    gpu = mx.metal.is_available() or mx.cuda.is_available()
    return {
        "versions": own_versions(),
        "machine": platform.machine(),
        "macos": platform.mac_ver()[0],  # as this python sees it: "16.0" where it was built for an older SDK
        "wheels": {name: tag for name in ("mlx", "mlx-metal") if (tag := _find_tag(name))},
        "backends": [name for name in BACKENDS if mx.distributed.is_available(name)],
        "metal": mx.metal.is_available(),
        "gpu": gpu,
        "working_set_bytes": _working_set_bytes(),
        "private": [socket.gethostname(), getpass.getuser(), str(Path.home())],
    }


def _find_tag(package: str) -> str:
    """Return the tag of an installed wheel, such as "cp312-cp312-macosx_26_0_arm64"; "" where there is none."""
    try:
        text = importlib.metadata.distribution(package).read_text("WHEEL") or ""
    except importlib.metadata.PackageNotFoundError:
        return ""
    tags = [line.partition(":")[2].strip() for line in text.split("\n") if line.startswith("Tag:")]
    return " ".join(tags)


def _working_set_bytes() -> int | None:
    if not mx.metal.is_available():
        return None
    return int(mx.device_info()["max_recommended_working_set_size"])


if __name__ == "__main__":
    tell(read_facts())
