"""The program that describes a host's python and system, for which it needs wheels. It changes nothing.

Its text is sent to the host's own python (`python -c`), so it uses the standard library only.

    python -c TEXT        {} on stdin; answers {"python", "implementation", "system", "machine", "mac", "libc",
                          "environment"}, a line of JSON behind `ANSWER`; "environment" is what markers ask for
"""

from __future__ import annotations

import os
import platform
import sys
from typing import Any

from moectl.hosts.onhost.prelude import tell


def describe() -> dict[str, Any]:
    """Return what decides on wheels: PEP 425's tags come from it, "environment" is that of PEP 508's markers."""
    version = platform.python_version()
    environment = {
        "implementation_name": sys.implementation.name,
        "implementation_version": version,
        "os_name": os.name,
        "platform_machine": platform.machine(),
        "platform_python_implementation": platform.python_implementation(),
        "platform_release": platform.release(),
        "platform_system": platform.system(),
        "platform_version": platform.version(),
        "python_full_version": version,
        "python_version": ".".join(platform.python_version_tuple()[:2]),
        "sys_platform": sys.platform,
    }
    return {
        "python": environment["python_version"],
        "implementation": sys.implementation.name,
        "system": sys.platform,
        "machine": platform.machine(),
        "mac": platform.mac_ver()[0],
        "libc": list(platform.libc_ver()),
        "environment": environment,
    }


if __name__ == "__main__":
    sys.stdin.readline()
    tell(describe())
