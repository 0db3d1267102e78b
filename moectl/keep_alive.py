"""How long a controller that nobody asks anything stays; it ends nothing by itself."""

from __future__ import annotations

import asyncio
import time

FIRST_S = 60.0  # for the first question to come


class KeepAlive:
    """How long an idle controller stays: seconds since the last answer, or for ever."""

    def __init__(self, seconds: float) -> None:
        self.changed = asyncio.Event()
        self._seconds = seconds
        # Whoever started it for one question has to come first.
        self._until_s = time.monotonic() + max(seconds, FIRST_S)

    def renew(self, seconds: float | None = None, *, asks: bool = False) -> None:
        """Begin the time again, with another length if wished; `asks`: somebody is about to ask."""
        self._seconds = self._seconds if seconds is None else seconds
        self._until_s = time.monotonic() + (max(self._seconds, FIRST_S) if asks else self._seconds)
        self.changed.set()

    def left_s(self) -> float | None:
        """Return the seconds that are left, None for ever."""
        return None if self._seconds < 0 else self._until_s - time.monotonic()
