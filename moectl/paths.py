"""The directories of moectl on the operator's machine: those of XDG, on macOS too. It makes none of them."""

from __future__ import annotations

import os
from pathlib import Path


def data_dir() -> Path:
    """Return the directory of shard sets: `$XDG_DATA_HOME/moectl`."""
    return _base("XDG_DATA_HOME") or Path.home() / ".local/share" / "moectl"


def cache_dir() -> Path:
    """Return the directory of shard sets that `run` made by itself: `$XDG_CACHE_HOME/moectl`."""
    return _base("XDG_CACHE_HOME") or Path.home() / ".cache" / "moectl"


def state_dir() -> Path:
    """Return the directory of the current deployment's record: `$XDG_STATE_HOME/moectl`."""
    return _base("XDG_STATE_HOME") or Path.home() / ".local/state" / "moectl"


def runtime_dir() -> Path:
    """Return the directory of the controllers' sockets: `$XDG_RUNTIME_DIR/moectl`, or one in `state_dir`."""
    return _base("XDG_RUNTIME_DIR") or state_dir() / "run"


def config_dir() -> Path:
    """Return the directory of the configuration: `$XDG_CONFIG_HOME/moectl`."""
    return _base("XDG_CONFIG_HOME") or Path.home() / ".config" / "moectl"


def _base(variable: str) -> Path | None:
    value = os.environ.get(variable)
    # The XDG specification says to ignore relative values.
    return Path(value) / "moectl" if value and Path(value).is_absolute() else None
