"""An answer's tokens as text, one by one: the same text that tokenizers decodes from all of them together.

It does not use the streams of mlx-lm and tokenizers: the first drops a leading blank and fails at a number without a
token, the second never returns the text that it holds back, and is wrong where one byte makes a run of bytes invalid.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_UNSURE = "\ufffd"  # the text of an incomplete character, and of an invalid one
_LONGEST = 32  # tokens that are decoded again with each new one
_TAIL = 4  # tokens that hold every incomplete character: it has four bytes at most


class TextStream:
    """One answer's text. Returned text never changes; text that later tokens may change is held back."""

    def __init__(self, tokens: Tokenizer, context: list[int], *, has_byte_runs: bool) -> None:
        self._tokens = tokens
        self._context = context
        self._has_byte_runs = has_byte_runs
        self._in_run = False
        self._window: list[int] = []
        self._told = 0  # characters of the window's text
        self._begin([])

    def feed(self, token: int) -> str:
        """Return the text that becomes final with one more token; a number without a token has none."""
        name = self._tokens.id_to_token(token)
        if name is None:
            return ""
        self._window.append(token)
        # Tokens of one byte each are decoded as a run: one invalid byte changes the text of all.
        self._in_run = self._has_byte_runs and _BYTE.fullmatch(name) is not None
        if self._in_run:
            return ""
        text = self._decode()
        if not text.endswith(_UNSURE):
            told = text[self._told :]
            self._begin([token])
            return told
        told = text[self._told : -1]
        self._told = max(self._told, len(text) - 1)
        if len(self._window) > _LONGEST:
            self._begin(self._window[-_TAIL:])
            self._told -= 1
        return told

    def finish(self) -> str:
        """Return the text that was held back, after the last token."""
        told = self._decode()[self._told :]
        self._told += len(told)
        return told

    def _begin(self, tokens: list[int]) -> None:
        """Continue after these tokens, whose text has been returned."""
        self._window = [*self._context, *tokens]
        self._told = len(self._decode())

    def _decode(self) -> str:
        return self._tokens.decode(self._window, skip_special_tokens=False)


def find_context(tokens: Tokenizer) -> list[int]:
    """Return a token to put before others, because some decoders drop the blank of the first one; [] if none fits."""
    for text in "a0A.":
        for token in tokens.encode(text, add_special_tokens=False).ids[-1:]:
            said = tokens.decode([token], skip_special_tokens=False)
            if said.strip() and not said.endswith(_UNSURE):
                return [token]
    return []


def has_byte_runs(tokens: Tokenizer) -> bool:
    """Return whether tokens such as <0x0A> stand for bytes."""
    return tokens.decoder is not None and "ByteFallback" in _types(json.loads(tokens.decoder.__getstate__()))


def _types(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        yield str(node.get("type"))
        for part in node.get("decoders") or ():
            yield from _types(part)
