"""Decode a single greedy row several tokens at a time: lookup proposes, one pass of the model verifies.

It is exact: a token counts only if the model itself chooses it. A pass over several tokens adds up in another order
than a pass over one, so in float32 the tokens are the same but for ties within some 1e-6 of a logit; in bfloat16 or
float16 a close tie may fall the other way, as in a batch.

Lookup proposes as many tokens as it was right in a row before, so a wrong proposal costs about as much as the right
ones before it gained. Every rank holds its own layers and comes to the same proposals and verdicts, from tokens that
all have agreed on; `agreement` exchanges them. It knows no other rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx_lm.generate import GenerationBatch

from moectl.engine.answer import Answer
from moectl.engine.caches import forget
from moectl.engine.lookup import Lookup
from moectl.engine.request import Request

# Right guesses in a row before a row is taken out of the generator: both ways copy its keys and values.
_ENTER_AFTER = 2
# Passes without a proposal before it goes back.
_PATIENCE = 8

_Response = GenerationBatch.Response


def is_foreseeable(request: Request) -> bool:
    """Return whether each token is the model's most probable one, and no log-probabilities are wanted."""
    return (
        request.is_greedy
        and not request.is_held
        and request.logprobs is None
        and request.presence_penalty == request.frequency_penalty == 0
        and request.repetition_penalty == 1
        and not request.logit_bias
    )


class Speculation:
    """The row that is out of mlx-lm's generator, if there is one; its layers hold all of its tokens but the last.

    `most` tokens are proposed at once (0: none). `agree(tokens, after)` returns the leader's tokens (n,) on every rank;
    `leads` says whether this rank is the leader. All methods have to be called on the generator's stream.
    """

    def __init__(
        self,
        model: Any,
        *,
        most: int,
        leads: bool,
        stop_tokens: frozenset[int],
        agree: Callable[[mx.array, mx.array], mx.array],
    ) -> None:
        self._model = model
        self._most = most
        self._leads = leads
        self._stop_tokens = stop_tokens
        self._agree = agree
        self._row: Answer | None = None
        self._layers: list[Any] = []
        self._without = 0  # passes in a row that had no proposal

    def watch(self, answer: Answer) -> None:
        """Look for repetitions in an answer that is about to begin."""
        if self._most and is_foreseeable(answer.request):
            answer.lookup = Lookup(answer.tokens)

    @property
    def has_row(self) -> bool:
        return self._row is not None

    @property
    def is_stuck(self) -> bool:
        """Whether the row should go on in the generator, whose steps overlap."""
        return self._without >= _PATIENCE

    def wants(self, answer: Answer) -> bool:
        """Return whether a row that is alone should be taken out of the generator."""
        return answer.lookup is not None and answer.lookup.streak >= _ENTER_AFTER

    def take(self, answer: Answer, layers: list[Any], token: int) -> list[Any]:
        """Take a row over, with layers that hold all its tokens, and `token`, which has been agreed on since."""
        self._row, self._layers, self._without = answer, layers, 0
        return self._accept([token])

    def verify(self) -> list[Any]:
        """Run one pass over the last token and the proposed ones; return the tokens agreed on, one or more."""
        row, lookup = self._held()
        # One token comes in any case, so a draft is shorter than the rest of the answer.
        draft = lookup.propose(min(self._most, lookup.streak, row.reach - len(lookup.tokens) - 1))
        self._without = 0 if draft else self._without + 1
        logits = self._model(mx.array([[lookup.tokens[-1], *draft]]), cache=self._layers)[0]
        if self._leads:
            # As in mlx-lm's step, so that two logits tie here where they tie there.
            logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            chosen = mx.argmax(logprobs, axis=-1).astype(mx.int32)
        else:
            chosen = mx.zeros((1 + len(draft),), dtype=mx.int32)
        agreed: list[int] = self._agree(chosen, logits).tolist()  # type: ignore[assignment]
        right = next((i for i, token in enumerate(draft) if token != agreed[i]), len(draft))
        forget(self._layers, len(draft) - right)
        responses = self._accept(agreed[: right + 1])
        row.drafted += len(draft)
        row.accepted += min(right, len(responses))
        return responses

    def give_back(self) -> tuple[Answer, list[int], list[Any]]:
        """Give up the row; return it with its tokens and the layers of all of them but the last."""
        (row, lookup), layers = self._held(), self._layers
        self._row, self._layers = None, []
        return row, list(lookup.tokens), layers

    def _held(self) -> tuple[Answer, Lookup]:
        assert self._row is not None
        assert self._row.lookup is not None
        return self._row, self._row.lookup

    def _accept(self, tokens: list[int]) -> list[Any]:
        """Return these tokens as mlx-lm's generator would, up to the one that ends the answer."""
        row, lookup = self._held()
        responses: list[Any] = []
        for count, token in enumerate(tokens, 1):
            reason = "length" if len(lookup.tokens) + count >= row.reach else None
            if token in self._stop_tokens and not row.request.ignore_eos:
                reason = "stop"
            responses.append(_Response(row.uid, token, None, reason, None, None))
            if reason is not None:
                forget(self._layers, len(tokens) - count)
                _, known, responses[-1].prompt_cache = self.give_back()
                responses[-1].all_tokens = [*known, *tokens[: count - 1]]
                break
        return responses
