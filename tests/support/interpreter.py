"""An interpreter of its own directory that imports this source tree, for hosts of the tests.

The tree under test need not be the one that is installed.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

TREE = Path(__file__).parent.parent.parent


def make_interpreter(directory: Path, *, version: str | None = None) -> str:
    """Make a virtual environment over this interpreter's packages; return its python, with another `version`."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(directory)], check=True)
    [site] = directory.glob("lib/python*/site-packages")
    (site / "tree.pth").write_text(f"{TREE}\n{sysconfig.get_path('purelib')}\n")
    if version is not None:
        info = site / f"moectl-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: moectl\nVersion: {version}\n")
    return str(directory / "bin" / "python")
