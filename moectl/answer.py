"""One answer in progress: the same few facts on every rank, and on the leader what it tells of it and when.

It turns tokens into text and text into events; it decides nothing about the batch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from moectl.errors import BadField
from moectl.leash import Done, Event, Refused, Token
from moectl.lookup import Lookup
from moectl.request import Request, Stats
from moectl.sampling import Odds, Sampler
from moectl.stop_text import StopText


@dataclass(slots=True)
class Answer:
    """A request and how far it is. Fields below `accepted` matter on the leader only."""

    request: Request
    prompt: list[int] = field(default_factory=list)  # as tokens
    refusal: BadField | None = None
    reach: int = 0  # up to how many tokens prompt and answer may get
    cached: int = 0  # of the prompt: not computed again
    uid: int = -1  # in mlx-lm's generator
    lookup: Lookup | None = None  # of prompt and answer so far, where that may foretell what comes
    drafted: int = 0  # tokens proposed by it
    accepted: int = 0  # of those: right
    sampler: Sampler | None = None
    arrived_s: float = field(default_factory=time.perf_counter)
    admitted_s: float = 0.0
    first_s: float = 0.0
    count: int = 0  # tokens told
    ended: bool = False  # Done or Refused has been told; the row may live on for a step or two
    _tokenizer: TokenizerWrapper = None
    _detokenizer: Any = None
    _stop: StopText = field(default_factory=lambda: StopText(()))

    @property
    def tokens(self) -> list[int]:
        """What the model reads before it goes on: the prompt, and the answer so far where it is resumed."""
        return [*self.prompt, *self.request.answered]

    def lead(self, tokenizer: TokenizerWrapper, sampler: Sampler) -> None:
        """Make ready to sample and to tell."""
        self.sampler = sampler
        self.admitted_s = time.perf_counter()
        self._tokenizer = tokenizer
        self._detokenizer = tokenizer.detokenizer
        self._stop = StopText(self.request.stop)
        for token in self.request.answered:  # their text has been told, or is held back again
            self._detokenizer.add_token(token)
            self._stop.feed(self._detokenizer.last_segment)

    def tell(self, token: int, finish_reason: str | None) -> Iterator[Event]:
        """Tell one more token, and the end where it is one: by `finish_reason` or because a stop text is complete."""
        assert self.sampler is not None
        odds = self.sampler.take_odds()
        if self.ended:
            return
        if not self.first_s:
            self.first_s = time.perf_counter()
        if finish_reason != "stop":  # a stop token is not text
            self.count += 1
            self._detokenizer.add_token(token)
            text = self._stop.feed(self._detokenizer.last_segment)
            yield Token(self.request.id, token, text, *self._read(token, odds))
        if finish_reason is not None:
            self._detokenizer.finalize()
            yield from self._tell_rest(self._stop.feed(self._detokenizer.last_segment))
        if self._stop.found:
            yield self._done("stop")
        elif finish_reason is not None:
            yield self._done(finish_reason)

    @property
    def has_stop(self) -> bool:
        """Whether a stop text is complete in what was told; on the leader."""
        return self._stop.found

    def end(self, finish_reason: str) -> Iterator[Event]:
        """Tell the end of an answer that is resumed with nothing left to generate, unless that has been told."""
        if self.ended:
            return
        self._detokenizer.finalize()
        yield from self._tell_rest(self._stop.feed(self._detokenizer.last_segment))
        yield self._done("stop" if self._stop.found else finish_reason)

    def cancel(self) -> Iterator[Event]:
        """Tell that it ends here, unless that has been told."""
        if not self.ended:
            yield from self._tell_rest("")
            yield self._done("stop" if self._stop.found else "cancelled")

    def refuse(self) -> Iterator[Event]:
        """Tell why it cannot be answered."""
        error = self.refusal
        assert error is not None
        self.ended = True
        yield Refused(self.request.id, error.message, error.hint, error.param, error.code)

    def _tell_rest(self, text: str) -> Iterator[Event]:
        if rest := text + self._stop.flush():
            yield Token(self.request.id, -1, rest)

    def _read(self, token: int, odds: Odds | None) -> tuple[float | None, list[tuple[int, str, float]]]:
        """Return the token's log-probability, and those of the most probable ones with it among them."""
        if odds is None:
            return None, []
        ids: list[int] = odds.top_ids.tolist()  # type: ignore[assignment]
        top: list[float] = odds.top.tolist()  # type: ignore[assignment]
        chosen = float(odds.chosen.item())  # type: ignore[arg-type]
        known = list(zip(ids, top, strict=True))
        if token not in ids:
            known.append((token, chosen))
        return chosen, [(i, self._tokenizer.decode([i]), logprob) for i, logprob in known]

    def _done(self, finish_reason: str) -> Done:
        self.ended = True
        now = time.perf_counter()
        first = self.first_s or now
        stats = Stats(
            prompt_tokens=len(self.prompt),
            completion_tokens=len(self.request.answered) + self.count,
            prompt_s=first - (self.admitted_s or now),
            decode_s=now - first,
            ttft_s=first - self.arrived_s,
            peak_memory_bytes=mx.get_peak_memory(),
            cached_tokens=min(self.cached, len(self.prompt)),
            drafted_tokens=self.drafted,
            accepted_tokens=self.accepted,
        )
        return Done(self.request.id, finish_reason, stats)
