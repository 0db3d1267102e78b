"""Take names, addresses and paths out of what hosts said, so that a report can be sent to others.

What is known to name a host, a user or a place is replaced, and so is whatever looks like an address or a path.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

_NAME, _ADDRESS, _PATH = "[name]", "[address]", "[path]"
_PATTERNS = (
    (re.compile(r"[\w.+-]+@[\w.\[\]:-]+"), _NAME),  # user@host
    (re.compile(r"\b\d{1,3}(?:\.\d{1,3}){3}\b(?::\d+)?"), _ADDRESS),
    (re.compile(r"(?<![\w:])(?:[0-9a-fA-F]{0,4}:){2,7}[0-9a-fA-F]{0,4}(?![\w:])"), _ADDRESS),  # IPv6, MAC
    (re.compile(r"\b[\w-]+(?:\.[\w-]+)*\.(?:local|lan|home|internal)\b", re.IGNORECASE), _NAME),
    (re.compile(r"(?<![\w/.])(?:~[\w.-]*)?/[^\s'\",;:()\[\]]+"), _PATH),
)


class Scrubber:
    """Replaces these names, whole words in any case, and all addresses and paths."""

    def __init__(self, names: Iterable[str]) -> None:
        known = sorted({name.strip() for name in names if name.strip()}, key=len, reverse=True)
        words = "|".join(re.escape(name) for name in known)
        # A "-" or "." is a part of a host's name, but neither of a word that only ends with it.
        self._names = re.compile(rf"(?<![A-Za-z0-9_])(?:{words})(?![A-Za-z0-9_])", re.IGNORECASE) if known else None

    def text(self, text: str) -> str:
        """Return a text without names."""
        if self._names:
            text = self._names.sub(_NAME, text)
        for pattern, instead in _PATTERNS:
            text = pattern.sub(instead, text)
        return text

    def data(self, value: Any) -> Any:
        """Return JSON of which every text is without names; its keys are ours."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {key: self.data(one) for key, one in value.items()}
        return [self.data(one) for one in value] if isinstance(value, list | tuple) else value


def spell_out(name: str) -> set[str]:
    """Return a host's name, and the name without its domain, as either may be shown."""
    return {name} if re.fullmatch(r"[\d.]+", name) else {name, name.partition(".")[0]}
