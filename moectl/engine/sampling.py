"""Choose one request's tokens, on the leader only: penalties, filters, temperature and log-probabilities.

Nothing here waits for the device, except for the last token of an answer that a grammar holds to a form: all of it is
added to the graph of the step in flight. Randomness is a key per (seed,
number of tokens generated so far), so a seeded answer is the same alone, in any batch, and after a restart. The filters
act on the model's probabilities before temperature, as in mlx-lm and llama.cpp.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p, make_logits_processors

from moectl.engine.grammar import Matcher
from moectl.engine.request import Request

_WHOLE_ANSWER = 1 << 30  # tokens that mlx-lm's penalties look back: all of them


@dataclass(frozen=True, slots=True)
class Odds:
    """Natural log-probabilities by the model itself, as arrays that are not evaluated yet."""

    chosen: mx.array  # (1,)
    top_ids: mx.array  # (k,), most probable first
    top: mx.array  # (k,)


class Sampler:
    """One request's sampler; called once for every token, in order.

    Where `hook` is not None it has to be among the row's logits processors in mlx-lm's generator: it gets the model's
    own logits, and the tokens before. `matcher` holds the answer to its grammar.
    """

    def __init__(self, request: Request, *, prompt_tokens: int, matcher: Matcher | None = None) -> None:
        self._request = request
        self._matcher = matcher
        self._last: mx.array | None = None  # token, where there is a grammar
        self._prompt_tokens = prompt_tokens
        self._position = len(request.answered)
        seed = request.seed if request.seed is not None else int.from_bytes(os.urandom(8))
        self._seed = seed.to_bytes(8)
        self._odds: deque[Odds] = deque()
        self._raw: mx.array | None = None
        repetition = request.repetition_penalty
        self._over_all = make_logits_processors(None, None if repetition == 1 else repetition, _WHOLE_ANSWER)
        self._over_answer = make_logits_processors(
            {token: bias for token, bias in request.logit_bias},
            presence_penalty=request.presence_penalty,
            presence_context_size=_WHOLE_ANSWER,
            frequency_penalty=request.frequency_penalty,
            frequency_context_size=_WHOLE_ANSWER,
        )

    @property
    def hook(self) -> Callable[[mx.array, mx.array], mx.array] | None:
        needed = self._over_all or self._over_answer or self._request.logprobs is not None
        return self._adjust if needed else None

    @property
    def is_plain(self) -> bool:
        """Whether only the most probable token is wanted, without log-probabilities."""
        return self._request.is_greedy and self._request.logprobs is None and self._matcher is None

    def __call__(self, logprobs: mx.array) -> mx.array:
        """Return the token (1,) chosen from log-probabilities (1, V) that `hook` has been through."""
        logprobs = logprobs.astype(mx.float32)
        if self._matcher is not None:
            logprobs = self._keep_to_grammar(logprobs, self._matcher)
        token: mx.array = self._choose(logprobs)
        self._position += 1
        self._last = token
        if self._request.logprobs is None:
            return token
        odds = self._tell_odds(token)
        self._odds.append(odds)
        # Computed with the step, because the token depends on them.
        bound: mx.array = mx.depends([token], [odds.chosen, odds.top_ids, odds.top])[0]
        return bound

    def _keep_to_grammar(self, logprobs: mx.array, matcher: Matcher) -> mx.array:
        """Return the log-probabilities of the tokens that may come next, the others' as -inf."""
        # The device computes this step while the last token is read and the mask is made.
        mx.async_eval(logprobs)  # type: ignore[no-untyped-call]
        if self._last is not None:
            matcher.take(int(self._last.item()))  # type: ignore[arg-type]
        allowed = mx.where(matcher.find_allowed(logprobs.shape[-1]), logprobs, -mx.inf)
        return allowed - mx.logsumexp(allowed, axis=-1, keepdims=True)

    def take_odds(self) -> Odds | None:
        """Return the odds of the oldest token not taken yet; None where the request wants none."""
        return self._odds.popleft() if self._odds else None

    def _adjust(self, context: mx.array, logits: mx.array) -> mx.array:
        """Return the logits (1, V) with penalties; `context` holds prompt and answer so far, on the device."""
        self._raw = logits
        logits = mx.array(logits)  # mlx-lm's processors write into their argument
        for penalize in self._over_all:
            logits = penalize(context, logits)
        answer = context[self._prompt_tokens :]
        for penalize in self._over_answer:
            logits = penalize(answer, logits)
        adjusted: mx.array = logits
        return adjusted

    def _choose(self, logprobs: mx.array) -> mx.array:
        request = self._request
        if request.is_greedy:
            best: mx.array = mx.argmax(logprobs, axis=-1)
            return best
        if 0 < request.top_k < logprobs.shape[-1]:
            logprobs = apply_top_k(logprobs, request.top_k)
        if request.top_p < 1:
            logprobs = apply_top_p(logprobs, request.top_p)
        if request.min_p > 0:
            logprobs = apply_min_p(logprobs, request.min_p)
        return mx.random.categorical(logprobs / request.temperature, key=self._key())

    def _key(self) -> mx.array:
        digest = hashlib.blake2b(self._position.to_bytes(8), key=self._seed, digest_size=8).digest()
        return mx.random.key(int.from_bytes(digest))

    def _tell_odds(self, token: mx.array) -> Odds:
        assert self._raw is not None
        logits = self._raw[0].astype(mx.float32)
        self._raw = None
        logprobs = logits - mx.logsumexp(logits)
        count = min(self._request.logprobs or 0, logprobs.size)
        if count == 0:
            return Odds(logprobs[token], mx.array([], dtype=mx.uint32), mx.array([], dtype=mx.float32))
        ids = mx.argpartition(-logprobs, kth=count - 1)[:count]
        ids = ids[mx.argsort(-logprobs[ids])]
        return Odds(logprobs[token], ids, logprobs[ids])
