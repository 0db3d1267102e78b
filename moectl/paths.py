"""Where moectl keeps things on the operator's machine: XDG directories, on macOS too. It creates nothing."""

from __future__ import annotations

import os
from pathlib import Path


def data_dir() -> Path:
    """Return where shard sets live: `$XDG_DATA_HOME/moectl`."""
    return _base("XDG_DATA_HOME", ".local/share")


def cache_dir() -> Path:
    """Return where shard sets live that `run` made by itself: `$XDG_CACHE_HOME/moectl`."""
    return _base("XDG_CACHE_HOME", ".cache")


def state_dir() -> Path:
    """Return where the current deployment is recorded: `$XDG_STATE_HOME/moectl`."""
    return _base("XDG_STATE_HOME", ".local/state")


def runtime_dir() -> Path:
    """Return where controllers listen: `$XDG_RUNTIME_DIR/moectl`, or a directory beside the state."""
    value = os.environ.get("XDG_RUNTIME_DIR")
    return Path(value) / "moectl" if value and Path(value).is_absolute() else state_dir() / "run"


def config_dir() -> Path:
    """Return where configuration is looked for: `$XDG_CONFIG_HOME/moectl`."""
    return _base("XDG_CONFIG_HOME", ".config")


def _base(variable: str, default: str) -> Path:
    value = os.environ.get(variable)
    # The XDG specification says to ignore relative values.
    base = Path(value) if value and Path(value).is_absolute() else Path.home() / default
    return base / "moectl"
