"""The words of a command line again, from what click has read: for a command that another program starts later.

A value that was given in a variable or in a configuration file becomes a word too, and a relative path an absolute one:
the other program has another environment and another directory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

_PATHS = {"hostfile"}  # of options whose type is text
_PATHS_OR_NAMES = {"shards", "model", "tokenizer"}  # a path where there is such a file


def list_words(ctx: click.Context, params: Sequence[click.Parameter]) -> list[str]:
    """Return the words that give these parameters the values of a context; defaults need none."""
    words: list[str] = []
    for param in params:
        source = ctx.get_parameter_source(param.name or "")
        if source is None or source.name in ("DEFAULT", "PROMPT") or param.name not in ctx.params:
            continue
        words += _words_of(param, ctx.params[param.name])
    return words


def _words_of(param: click.Parameter, value: Any) -> Iterator[str]:
    if value is None:
        return
    many = param.multiple or param.nargs == -1
    values = list(value) if many else [value]
    if isinstance(param, click.Argument):
        yield from (_text(param, one) for one in values)
        return
    assert isinstance(param, click.Option)
    name = _long(param.opts)
    if param.count:
        yield from [name] * int(value)
    elif param.is_flag:
        if value or param.secondary_opts:
            yield name if value else _long(param.secondary_opts)
    else:
        for one in values:
            yield from (name, _text(param, one))


def _long(names: Sequence[str]) -> str:
    """Return the first name of an option that says what it is."""
    return next((name for name in names if name.startswith("--")), names[0])


def _text(param: click.Parameter, value: Any) -> str:
    """Return a value as a word."""
    text = str(value)
    is_path = isinstance(param.type, click.Path) or param.name in _PATHS
    if (is_path and text != "-") or (param.name in _PATHS_OR_NAMES and Path(text).expanduser().exists()):
        return str(Path(text).expanduser().absolute())
    return text
