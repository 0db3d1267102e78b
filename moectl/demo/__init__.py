"""The bundled demo model: where it lies on disk, and nothing else.

It is a genuine DBRX-architecture checkpoint in the original fused layout, small enough for a wheel, trained
by `moectl.demo.train` on the questions and answers of `corpus.txt`. It is not DBRX and knows only that text.
"""

from __future__ import annotations

from pathlib import Path


def demo_dir() -> Path:
    """Return the directory of the bundled checkpoint."""
    return Path(__file__).parent / "moectl-demo"
