"""What all ranks agree on at each step: the leader's tokens and its control word, in one exchange.

Where ranks are compared, each rank's numbers of what it computed travel with them. What a control word says is
`admission`'s; the engine obeys it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx

from moectl.engine.network.exchange import run_alone
from moectl.engine.network.witness import WORDS, Witness, find_dissent
from moectl.errors import RanksDisagree

MAX_CANCELS = 8  # in one control word
CONTROL_WORDS = 1 + MAX_CANCELS  # admit up to, cancel
_NO_REQUEST = 0  # request ids start at 1
_DISAGREE = (
    "run it again; if it fails at once, the hosts round differently: --agree-routing; "
    "otherwise one host computes wrong results"
)


class Agreement:
    """One rank's side of the exchange that ends each step.

    `make_word` returns the leader's control word, None on a follower. `check_every` is after how many steps all ranks
    compare what they computed (0: never).
    """

    def __init__(
        self,
        model: Any,
        group: mx.distributed.Group | None,
        *,
        head_rank: int,
        check_every: int,
        make_word: Callable[[], tuple[int, list[int]]] | None,
    ) -> None:
        self._group = group if group is not None and group.size() > 1 else None
        self._head_rank = head_rank
        self._witness = Witness(model) if check_every and self._group is not None else None
        self._check_every = check_every
        self._make_word = make_word
        self._steps = 0
        self._words: deque[mx.array] = deque()  # oldest first, not yet read

    def begin_step(self) -> None:
        """Count a step, and watch it where it is one to compare."""
        self._steps += 1
        if self._witness is not None:
            self._witness.looks = self._steps % self._check_every == 0

    def settle(self) -> None:
        """Compute what was watched and not exchanged yet."""
        if self._witness is not None:
            self._witness.settle()

    @property
    def unread(self) -> int:
        """How many control words have not been read."""
        return len(self._words)

    def agree(self, tokens: mx.array, after: mx.array) -> mx.array:
        """Return the leader's tokens (n,) on every rank, and keep its control word to be read."""
        agreed = self._from_leader(tokens, after)
        self._words.append(agreed[tokens.size :])
        return agreed[: tokens.size].astype(mx.uint32)

    def meet(self, stream: mx.Stream) -> None:
        """Wait until all ranks have come so far, in an exchange on which no computation depends.

        A request, and its text turned into tokens, reaches ranks at different times; so does a chunk the stages of a
        pipeline.
        """
        if self._group is not None:
            with mx.stream(stream):
                run_alone(partial(mx.distributed.all_gather, group=self._group), mx.array([0]))

    def agree_on_word(self, stream: mx.Stream) -> None:
        """Exchange a control word alone, where a step has sampled no token."""
        with mx.stream(stream):
            word = self._from_leader(mx.array([], dtype=mx.int32), mx.array(0))
            mx.eval(word)
        self._words.append(word)

    def read_word(self, stream: mx.Stream) -> list[int]:
        """Return the oldest control word not read yet. Raises RanksDisagree where ranks computed different things."""
        with mx.stream(stream):
            said: list[int] = self._words.popleft().tolist()  # type: ignore[assignment]
        check_seen(said[CONTROL_WORDS:])
        return said[:CONTROL_WORDS]

    def _from_leader(self, tokens: mx.array, after: mx.array) -> mx.array:
        """Return the leader's [tokens…, admit, cancels…] on every rank, exchanged after `after` was computed.

        Where ranks are compared, what each of them saw follows.
        """
        admit, cancels = self._make_word() if self._make_word is not None else (_NO_REQUEST, [])
        word = [admit, *cancels, *[_NO_REQUEST] * (MAX_CANCELS - len(cancels))]
        vector = mx.concatenate([tokens, mx.array(word, dtype=mx.int32)])
        if self._group is None:
            return vector
        seen = 0
        if self._witness is not None:
            vector = mx.concatenate([vector, self._witness.take()])
            seen = WORDS
        # Followers' vector must not overtake the last layer's sum, or ranks would add up different things.
        vector = mx.depends([vector], [after])[0]
        rows = mx.distributed.all_gather(vector[None], group=self._group)
        if not seen:
            return rows[self._head_rank]
        return mx.concatenate([rows[self._head_rank, :-seen], rows[:, -seen:].reshape(-1)])


def check_seen(words: list[int]) -> None:
    """Raise RanksDisagree where what all ranks saw differs."""
    if (dissent := find_dissent(words)) is not None:
        said_of = f"the ranks {dissent.what}" if dissent.rank is None else dissent.what
        raise RanksDisagree(f"{said_of} than the others", hint=_DISAGREE, rank=dissent.rank)
