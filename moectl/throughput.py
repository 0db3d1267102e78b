"""How many tokens have come, and how many per second of late. The time is told to it, in seconds of any one clock."""

from __future__ import annotations

from collections import deque

WINDOW_S = 10  # "of late"


class Throughput:
    """A counter of tokens; made at the time when counting begins."""

    def __init__(self, now_s: float) -> None:
        self.began_s = now_s
        self.tokens = 0
        self._recent: deque[tuple[int, int]] = deque()  # (second, tokens in it), none older than the window

    def add(self, now_s: float, tokens: int = 1) -> None:
        """Count tokens that came now."""
        self.tokens += tokens
        second = int(now_s)
        before = self._recent.pop()[1] if self._recent and self._recent[-1][0] == second else 0
        self._recent.append((second, before + tokens))
        self._forget(now_s)

    def rate(self, now_s: float) -> float:
        """Return tokens per second since the first one within the window; 0 when none came for so long."""
        self._forget(now_s)
        if not self._recent:
            return 0.0
        return sum(tokens for _, tokens in self._recent) / max(1.0, now_s - self._recent[0][0])

    def _forget(self, now_s: float) -> None:
        while self._recent and self._recent[0][0] <= now_s - WINDOW_S:
            self._recent.popleft()
