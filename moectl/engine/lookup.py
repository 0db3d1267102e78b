"""Propose the next tokens from earlier ones: the lookup of prompt-lookup decoding, without a model.

It proposes the tokens after the latest earlier occurrence of the last three tokens, or else of the last two, and counts
how often in a row it was right. It depends on the tokens alone, so every rank proposes the same; the model verifies.
"""

from __future__ import annotations

from collections.abc import Iterable

_LENGTHS = (3, 2)  # of the n-grams that are looked up, best first


class Lookup:
    """The tokens of a prompt and its answer so far, and where each n-gram of them occurred last.

    Time and memory per token are constant.
    """

    def __init__(self, tokens: Iterable[int]) -> None:
        self.tokens: list[int] = []
        self.streak = 0  # how many of the latest tokens it would have proposed
        # n-gram → where it ended last, without the one at the very end, which is looked up.
        self._ends: dict[tuple[int, ...], int] = {}
        self._start = 0  # of the tokens after the occurrence; 0: there is none
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        """Append the next token."""
        tokens, end = self.tokens, len(self.tokens)
        self.streak = self.streak + 1 if self._start and tokens[self._start] == token else 0
        for n in _LENGTHS:
            if end >= n:
                self._ends[tuple(tokens[-n:])] = end
        tokens.append(token)
        found = (self._ends.get(tuple(tokens[-n:]), 0) for n in _LENGTHS if end >= n)
        self._start = next((start for start in found if start), 0)

    def propose(self, most: int) -> list[int]:
        """Return `most` tokens that may come next; none where the last ones are new.

        At the end it goes on with its own proposal, so that a loop is proposed at any length.
        """
        if not self._start:
            return []
        proposed: list[int] = []
        for position in range(self._start, self._start + most):
            beyond = position - len(self.tokens)
            proposed.append(self.tokens[position] if beyond < 0 else proposed[beyond])
        return proposed
