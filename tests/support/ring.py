"""Environment for ranks of a test: on Linux the preload that keeps waiting ranks from eating the cores."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


def preload() -> str | None:
    """Build norspin.c once per test run and return its path; None where it does not apply or no compiler is there."""
    return build_preload("norspin")


@functools.cache
def build_preload(name: str) -> str | None:
    """Build one of the C files here as a library to preload, once per test run; return its path, None as `preload`."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if sys.platform != "linux" or compiler is None:
        return None
    directory = tempfile.mkdtemp(prefix=f"moectl-{name}-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    library = Path(directory) / f"{name}.so"
    source = Path(__file__).with_name(f"{name}.c")
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return str(library)


def rank_env(**more: str) -> dict[str, str]:
    """Return variables to add to a rank's environment."""
    library = preload()
    shim = {"LD_PRELOAD": library} if library else {}
    return {**shim, "OPENBLAS_NUM_THREADS": "1", **more}


def process_env(**more: str) -> dict[str, str]:
    """Return a whole environment for a moectl command whose local ranks inherit it."""
    return {**os.environ, **rank_env(**more)}
