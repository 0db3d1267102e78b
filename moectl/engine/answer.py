"""One request and its answer: prompt to tokens on every rank, tokens to text and events on the leader.

It decides nothing about the batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import mlx.core as mx

from moectl.engine.grammar import Grammars, Matcher
from moectl.engine.isolation import isolated
from moectl.engine.lookup import Lookup
from moectl.engine.prompt_cache import Branch
from moectl.engine.protocol import Done, Event, Refused, Token
from moectl.engine.request import Request, Stats, too_long
from moectl.engine.sampling import Odds, Sampler
from moectl.engine.schema import close
from moectl.errors import BadField, MoectlError
from moectl.planner.memory import KV_STEP
from moectl.shards.chat.answer_grammar import HeldForm
from moectl.shards.chat.branches import count_system, count_tail
from moectl.shards.chat.thinking import NOTHING, AnswerText, Told
from moectl.shards.chat.tokenizer import Tokenizer

_WITHOUT_TEMPLATE = "send the text as it is: moectl run --raw, or /v1/completions"


@dataclass(slots=True)
class Answer:
    """A request and how far it is. Fields below `accepted` matter on the leader only."""

    request: Request
    prompt: list[int] = field(default_factory=list)  # as tokens
    refusal: MoectlError | None = None  # why it takes no row
    reach: int = 0  # the most tokens that prompt and answer may have
    cached: int = 0  # of the prompt: not computed again
    firm: int = 0  # of the prompt's tokens: the next turn of this conversation begins with them
    branches: dict[int, Branch] = field(default_factory=dict)  # number of tokens → what is kept after so many of them
    heard: int = 0  # tokens of the answer, on every rank
    uid: int = -1  # in mlx-lm's generator
    lookup: Lookup | None = None  # of prompt and answer so far, where tokens are proposed from them
    drafted: int = 0  # tokens proposed by it
    accepted: int = 0  # of those: right
    sampler: Sampler | None = None
    matcher: Matcher | None = None  # that holds it to a form
    hooks: list[Callable[[mx.array, mx.array], mx.array]] = field(default_factory=list)  # its row's logits processors
    failure: MoectlError | None = None  # an error of this answer alone, see `isolation`
    arrived_s: float = field(default_factory=time.perf_counter)
    admitted_s: float = 0.0
    first_s: float = 0.0
    count: int = 0  # tokens sent
    ended: bool = False  # Done or Refused has been sent; the row may live on for a step or two
    _tokenizer: Tokenizer | None = None
    _text: AnswerText | None = None
    _length: int = 0  # characters that its tokens have made so far
    _thought: int = 0  # tokens before the answer
    _calls: bool = False  # some have been told, or were before a restart
    _has_called: bool = False  # one of them whole
    _stop: StopText = field(default_factory=lambda: StopText(()))

    @property
    def tokens(self) -> list[int]:
        """What the model reads first: the prompt, and the answer so far where it is resumed."""
        return [*self.prompt, *self.request.answered]

    @property
    def held(self) -> int:
        """For how many tokens its row may hold memory now: room grows ahead of them, in steps."""
        known = len(self.prompt) + len(self.request.answered) + self.heard
        return min(self.reach, (known // KV_STEP + 2) * KV_STEP)

    def find_branches(self, tokenizer: Tokenizer, *, trimmable: bool) -> None:
        """Find where other prompts branch off from this one, and of them what is kept where caches are not trimmable.

        It has to be known whether anything of the prompt is cached. The same on every rank.
        """
        request = self.request
        if request.messages is None:
            self.firm = len(self.prompt)
            self.branches = {} if trimmable else {len(self.prompt) - 1: Branch.QUESTION}
            return
        asked = request.messages, request.think, request.template_options
        self.firm = len(self.prompt) - count_tail(tokenizer, *asked, request.must_call)
        if trimmable:
            return
        is_result = request.messages[-1]["role"] == "tool"
        self.branches = {self.firm: Branch.RESULT if is_result else Branch.QUESTION}
        if not self.cached and (system := count_system(tokenizer, self.prompt, *asked, request.tools)):
            self.branches[min(system, self.firm)] = Branch.SYSTEM

    def cut(self, tokens: list[int], computed: int) -> list[list[int]]:
        """Return the tokens behind the computed ones, cut at its branches."""
        ends = [computed, *sorted(end for end in self.branches if computed < end < len(tokens)), len(tokens)]
        return [tokens[start:end] for start, end in pairwise(ends)]

    def read(self, tokenizer: Tokenizer, *, vocab_size: int, max_seq_len: int, kv_tokens: int | None) -> None:
        """Find its prompt and its reach, or note why it takes no row.

        The same on every rank: all depends on the request and the engine's limits only. If one rank alone fails here,
        the ranks do not meet in the next exchange, and that ends the session.
        """
        with isolated(self.request.id, self.refuse_for):
            try:
                prompt = read_prompt(self.request, tokenizer, vocab_size=vocab_size, max_seq_len=max_seq_len)
                self.reach = measure_reach(self.request, len(prompt), max_seq_len=max_seq_len, kv_tokens=kv_tokens)
                self.prompt = prompt
            except BadField as refusal:
                self.refuse_for(refusal)

    def hold(self, grammars: Grammars, tokenizer: Tokenizer, then: Callable[[], None]) -> None:
        """Get its matcher in the thread of `grammars`, or note why there is none, and call `then` there."""

        def take(made: Matcher | MoectlError) -> None:
            if isinstance(made, MoectlError):
                self.fail(made)
            else:
                self.matcher = made
            then()

        with isolated(self.request.id, take):
            prompt = None if self.request.messages is None else self.prompt
            grammars.make(tokenizer.write_grammar(_form_of(self.request), prompt), self.request.answered, take)

    def begin(self, tokenizer: Tokenizer) -> None:
        """Get ready on the leader. An error fails this answer alone."""
        with isolated(self.request.id, self.fail):
            sampler = Sampler(self.request, prompt_tokens=len(self.prompt), matcher=self.matcher)
            self.lead(tokenizer, sampler)
            self.hooks = [] if sampler.hook is None else [self.adjust]

    def lead(self, tokenizer: Tokenizer, sampler: Sampler) -> None:
        """Get ready to sample and to send events."""
        self.sampler = sampler
        self.admitted_s = time.perf_counter()
        self._tokenizer = tokenizer
        prompt = None if self.request.messages is None else self.prompt
        self._text = tokenizer.stream_answer(prompt, self.request.tools, held=self.request.holds_calls)
        self._stop = StopText(self.request.stop)
        for token in self.request.answered:  # what they say was sent, or is held back again
            self._hold(self._feed(token))

    def fail(self, error: MoectlError) -> None:
        """Note an error of this answer alone; it takes the place of the next event."""
        self.failure = self.failure or error

    @property
    def is_plain(self) -> bool:
        """Whether its next token is the most probable one, and no log-probabilities are wanted."""
        return self.sampler is None or self.failure is not None or self.sampler.is_plain

    def sample(self, logprobs: mx.array, best: mx.array) -> mx.array:
        """Return the token (1,) chosen from log-probabilities (1, V): `best`, the most probable one, after an error."""
        assert self.sampler is not None
        with isolated(self.request.id, self.fail):
            return self.sampler(logprobs)
        return best

    def adjust(self, context: mx.array, logits: mx.array) -> mx.array:
        """Return what the sampler's hook makes of the logits (1, V): the same after an error."""
        if self.failure is None and self.sampler is not None and self.sampler.hook is not None:
            with isolated(self.request.id, self.fail):
                return self.sampler.hook(context, logits)
        return logits

    def tell(self, token: int, finish_reason: str | None) -> Iterator[Event]:
        """Yield one more token, and the end where there is one: `finish_reason`, or a complete stop text."""
        yield from self._tell_or_fail(self._tell(token, finish_reason))

    def _tell_or_fail(self, events: Iterator[Event]) -> Iterator[Event]:
        if self.failure is None:
            with isolated(self.request.id, self.fail):
                yield from events
        if self.failure is not None and not self.ended:
            yield self._refuse(self.failure)

    def _tell(self, token: int, finish_reason: str | None) -> Iterator[Event]:
        assert self.sampler is not None
        assert self._text is not None
        odds = self.sampler.take_odds()
        if self.ended:
            return
        if not self.first_s:
            self.first_s = time.perf_counter()
        if finish_reason != "stop":  # a stop token is not text
            self.count += 1
            offset, part = self._length, self._feed(token)
            told = self._hold(part)
            top = self._read(token, odds)
            yield Token(self.request.id, token, told.text, *top, offset, told.thinking, list(told.calls))
        last = self._text.finish(by_itself=finish_reason == "stop") if finish_reason is not None else NOTHING
        if self.has_stop or finish_reason is not None:
            yield self._done(finish_reason or "stop", last)

    def _feed(self, token: int) -> Told:
        assert self._text is not None
        thinks = self._text.is_thinking
        part = self._text.feed(token)
        self._thought += thinks or self._text.is_thinking  # with the markers
        self._length += len(part.text)
        return part

    def _hold(self, part: Told) -> Told:
        """Return what can be told of a part now: stop texts end the answer's text, and only that."""
        text = self._stop.feed(part.text)
        if not part.calls or self._stop.found:
            return Told(part.thinking, text)
        calls = tuple(call for call in part.calls if self.request.parallel_calls or call.index == 0)
        self._calls = self._calls or any(call.id for call in calls)
        self._has_called = self._has_called or any(call.ended for call in calls)
        return Told(part.thinking, text + self._stop.flush(), calls)

    @property
    def has_stop(self) -> bool:
        """Whether a stop text is complete, or the only call that was wished; on the leader."""
        return self._stop.found is not None or (not self.request.parallel_calls and self._has_called)

    def end(self, finish_reason: str) -> Iterator[Event]:
        """Yield the end of a resumed answer that has nothing left to generate, unless it has ended."""
        yield from self._tell_or_fail(self._end(finish_reason))

    def _end(self, finish_reason: str) -> Iterator[Event]:
        if not self.ended:
            assert self._text is not None
            yield self._done(finish_reason, self._text.finish())

    def cancel(self) -> Iterator[Event]:
        """Yield the end of a cancelled answer, unless it has ended."""
        yield from self._tell_or_fail(self._cancel())

    def _cancel(self) -> Iterator[Event]:
        if not self.ended:
            yield self._done("cancelled")

    def refuse_for(self, reason: MoectlError) -> None:
        """Note on every rank why it takes no row."""
        self.refusal = reason

    def refuse(self) -> Iterator[Event]:
        """Yield why it cannot be answered."""
        assert self.refusal is not None
        yield self._refuse(self.refusal)

    def _refuse(self, error: MoectlError) -> Refused:
        self.ended = True
        return Refused.make(self.request.id, error)

    def _read(self, token: int, odds: Odds | None) -> tuple[float | None, list[tuple[int, str, float]]]:
        """Return the token's log-probability, and those of the most probable ones with it among them."""
        if odds is None:
            return None, []
        ids: list[int] = odds.top_ids.tolist()  # type: ignore[assignment]
        top: list[float] = odds.top.tolist()  # type: ignore[assignment]
        chosen = float(odds.chosen.item())  # type: ignore[arg-type]
        assert self._tokenizer is not None
        known = list(zip(ids, top, strict=True))
        if token not in ids:
            known.append((token, chosen))
        return chosen, [(i, self._tokenizer.tell(i), logprob) for i, logprob in known]

    def _done(self, finish_reason: str, last: Told = NOTHING) -> Done:
        """Return the end, with the last piece: "stop" where a stop text is complete, "tool_calls" after calls."""
        self.ended = True
        rest = self._hold(last)
        reason = "stop" if self.has_stop else finish_reason
        if reason == "stop" and self._calls:
            reason = "tool_calls"
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
            thinking_tokens=self._thought,
        )
        text, calls, stop = rest.text + self._stop.flush(), list(rest.calls), self._stop.found
        return Done(self.request.id, reason, stats, text, rest.thinking, calls, stop)


class StopText:
    """Finds an answer's stop texts; the first complete one counts, however the text is cut into pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found: str | None = None  # the first complete one

    def feed(self, piece: str) -> str:
        """Return the text that is final: no stop text, no possible beginning of one, and nothing after one."""
        if self.found is not None:
            return ""
        text = self._held + piece
        # (end, start): of two that end together the longer one, so that no part of it is sent.
        matches = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if matches:
            _, start, self.found = min(matches)
            self._held = ""
            return text[:start]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """Return the text that was held back, at the end."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def read_prompt(request: Request, tokenizer: Tokenizer, *, vocab_size: int, max_seq_len: int) -> list[int]:
    """Return a request's prompt as tokens, without those of its answer so far.

    Raises BadField where there are none or too many, or where a token is none of the model's.
    """
    tokens = _tokenize(request, tokenizer)
    if not tokens:
        raise BadField(
            "the prompt is empty, and this model adds no start token", hint="give some text", param=request.source
        )
    for what, param, ids in (
        ("a prompt token", request.source, tokens),
        ("a token of the answer", None, request.answered),
        ("a token of the logit bias", "logit_bias", [token for token, _ in request.logit_bias]),
    ):
        if not all(0 <= token < vocab_size for token in ids):
            raise BadField(f"{what} should be in the model's vocabulary of {vocab_size}, it is outside", param=param)
    if len(tokens) >= max_seq_len:  # an answer that is resumed may fill the context: it ends there, as any other does
        raise too_long(f"the prompt has {len(tokens)} tokens, the model's context is {max_seq_len}", request.source)
    return tokens


def measure_reach(request: Request, prompt_tokens: int, *, max_seq_len: int, kv_tokens: int | None) -> int:
    """Return the most tokens that prompt and answer may have: as requested, within context and memory.

    Raises BadField when there is no memory for the prompt and one more token.
    """
    if kv_tokens is not None and prompt_tokens >= kv_tokens:
        raise too_long(f"the prompt has {prompt_tokens} tokens, and there is memory for {kv_tokens}", request.source)
    return min(prompt_tokens + request.max_tokens, max_seq_len, kv_tokens or max_seq_len)


def _tokenize(request: Request, tokenizer: Tokenizer) -> list[int]:
    if request.prompt_tokens is not None:
        return list(request.prompt_tokens)
    if request.messages is None:
        return tokenizer.encode(request.prompt)
    if not tokenizer.has_chat_template:
        raise BadField("this model has no chat template", hint=_WITHOUT_TEMPLATE, param=request.source)
    try:
        return tokenizer.encode_chat(
            request.messages,
            request.think,
            request.template_options,
            request.tools,
            request.must_call,
            held=request.holds_calls,
        )
    except BadField:
        raise
    except Exception as error:  # the template is the model's own program
        reason = " ".join(str(error).split())
        raise BadField(
            f"the model's chat template fails: {reason}", hint=_WITHOUT_TEMPLATE, param=request.source
        ) from None


def _form_of(request: Request) -> HeldForm:
    """Return the form that a request holds its answer to, its schemas closed."""
    functions = [tool["function"] for tool in request.tools]
    callable_ = [f for f in functions if not request.must_call or f["name"] in request.must_call]
    return HeldForm(
        None if request.schema is None else close(request.schema),
        tuple({"function": {**f, "parameters": close(f["parameters"])}} for f in callable_),
        must_call=bool(request.must_call),
        parallel_calls=request.parallel_calls,
    )


def sample_rows(answers: list[Answer], logprobs: mx.array) -> mx.array:
    """Return each row's token (B,) from log-probabilities (B, V)."""
    best = mx.argmax(logprobs, axis=-1)
    if all(answer.is_plain for answer in answers):
        return best
    rows = [(answer, slice(i, i + 1)) for i, answer in enumerate(answers)]
    return mx.concatenate([best[row] if a.is_plain else a.sample(logprobs[row], best[row]) for a, row in rows])
