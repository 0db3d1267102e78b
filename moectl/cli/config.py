"""Defaults from TOML files, as click's default_map: ./moectl.toml over ~/.config/moectl/config.toml.

It knows which keys exist only from the table that it is given.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moectl.errors import UsageError
from moectl.paths import config_dir

if TYPE_CHECKING:
    from collections.abc import Mapping, Set


def read_config(commands: Mapping[str, Set[str]]) -> dict[str, Any]:
    """Return {command: {parameter: value}} from the configuration files.

    `commands` lists every command's parameters. A top-level key is a default of all commands that have it. Raises
    UsageError for an unknown key or malformed TOML, with file and nearest spelling.
    """
    merged: dict[str, dict[str, Any]] = {name: {} for name in commands}
    for path in (config_dir() / "config.toml", Path("moectl.toml")):
        for name, values in _read(path, commands).items():
            merged[name].update(values)
    return merged


def _read(path: Path, commands: Mapping[str, Set[str]]) -> dict[str, dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        import tomllib  # most have no such file: --help need not wait for it

        raw = tomllib.loads(text)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:  # UnicodeDecodeError and TOMLDecodeError are ValueErrors
        raise UsageError(f"{path}: {error}", hint="mend or remove that file") from None
    everywhere = set().union(*commands.values())
    result: dict[str, dict[str, Any]] = {name: {} for name in commands}
    for key, value in raw.items():
        if isinstance(value, dict):
            _check(path, key, set(commands))
            for inner in value:
                _check(path, f"{key}.{inner}", {f"{key}.{p}" for p in commands[key]})
            result[key].update(value)
        else:
            _check(path, key, everywhere)
            for name in (n for n, parameters in commands.items() if key in parameters):
                result[name].setdefault(key, value)
    return result


def _check(path: Path, key: str, known: set[str]) -> None:
    if key in known:
        return
    import difflib

    close = difflib.get_close_matches(key, known, n=1)
    raise UsageError(f"{path}: unknown key '{key}'." + (f" Did you mean '{close[0]}'?" if close else ""))
