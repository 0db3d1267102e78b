"""Numbers as people write them on a command line: 32k tokens, several lengths at once."""

from __future__ import annotations

import re
from typing import Any

import click


class Tokens(click.ParamType[int]):
    """A number of tokens, 1 or more, written as 32768 or 32k (1024 each)."""

    name = "tokens"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"([0-9]+)(k?)", str(value).strip().lower())
        tokens = int(match[1]) * (1024 if match[2] else 1) if match else 0
        if tokens < 1:
            self.fail(f"{value!r} is no number of tokens: write 32768 or 32k", param, ctx)
        return tokens


class Numbers(click.ParamType[tuple[int, ...]]):
    """One number or several, written as 512 or 32,64."""

    name = "numbers"

    def __init__(self, least: int) -> None:
        self._least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        parts = str(value).split(",")
        if not all(re.fullmatch(r" *[0-9]{1,9} *", part) for part in parts):
            self.fail(f"{value!r} is no list of numbers: write 512 or 32,64", param, ctx)
        numbers = tuple(map(int, parts))
        if min(numbers) < self._least:
            self.fail(f"{min(numbers)} is not in the range x>={self._least}", param, ctx)
        return numbers
