"""Find the texts that end an answer in a stream of its pieces, wherever its tokens are cut. It knows no tokens."""

from __future__ import annotations

from collections.abc import Sequence


class StopText:
    """One answer's watch for its stop texts; the first to be complete wins, however the stream is cut into pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found = False

    def feed(self, piece: str) -> str:
        """Return what has become final: never a stop text, nor what may be the beginning of one, nor what follows."""
        if self.found:
            return ""
        text = self._held + piece
        # (end, start): of two that end together the longer one, so that no part of it is told.
        matches = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if matches:
            self.found = True
            self._held = ""
            return text[: min(matches)[1]]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """Return what was held back, once nothing follows any more."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
