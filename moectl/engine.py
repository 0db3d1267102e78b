"""Generate in lockstep: every rank runs this over the same requests and ends with the same tokens, bit for bit.

mlx-lm's BatchGenerator does prefill, caches and the step in flight. Each of its steps ends in one tiny exchange, of
which only the leader's part counts (the rank that has the head: rank 0, or the last of a pipeline): the sampled tokens
and a control word (admit requests up to k; cancel request c). So followers need no head, no sampler and no clock, and
every decision falls at the same step on every rank. A control word is obeyed once its step has been computed, one step
after it was spoken, because reading the newest would stall the step in flight.

An idle engine waits for a message, never inside a collective. This file knows no process, socket or file.
"""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, StopSequences
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from moectl.errors import UsageError
from moectl.leash import Cancel, Done, Event, Generate, Order, Prefilled, Profile, Refused, Token
from moectl.model.dbrx import Model
from moectl.profile import profile
from moectl.request import Request, Stats

PREFILL_STEP = 512
MAX_BATCH = 8
_CONTROL_WORDS = 2  # admit up to, cancel
_NOBODY = 0  # request ids start at 1


@dataclass(slots=True)
class _Answer:
    """A request in progress. Fields below `uid` matter on the leader only."""

    request: Request
    tokens: list[int]
    uid: int = -1
    sampler: Callable[[mx.array], mx.array] | None = None
    detokenizer: Any = None
    arrived_s: float = field(default_factory=time.perf_counter)
    admitted_s: float = 0.0
    first_s: float = 0.0
    count: int = 0


class Engine:
    """One rank's side of the lockstep."""

    def __init__(
        self,
        model: Model,
        tokenizer: TokenizerWrapper,
        *,
        rank: int = 0,
        head_rank: int = 0,
        group: mx.distributed.Group | None = None,
        max_seq_len: int,
        prefill_step: int = PREFILL_STEP,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._rank = rank
        self._leads = rank == head_rank
        self._head_rank = head_rank
        self._group = group if group is not None and group.size() > 1 else None
        self._max_seq_len = max_seq_len
        self._prefill_step = prefill_step
        # One prompt at a time: rows then join in admission order, so that this file can name each row's request.
        self._generator = BatchGenerator(
            model,
            sampler=self._agree_on_tokens,
            prefill_batch_size=1,
            completion_batch_size=MAX_BATCH,
            prefill_step_size=prefill_step,
        )
        self._stop = StopSequences([[t] for t in sorted(tokenizer.eos_token_ids)])
        self._arrived: dict[int, _Answer] = {}  # by request id, not yet admitted
        self._profiles: dict[int, Profile] = {}  # by id, waiting for their turn and for idleness
        self._cancels: deque[int] = deque()  # wished, not yet spoken (leader)
        self._prefilling: deque[_Answer] = deque()
        self._decoding: list[_Answer] = []  # in the order of the batch's rows
        self._spoken: deque[mx.array] = deque()  # control words, oldest first, not yet obeyed
        self._sampled_rows = False  # whether this step's running rows have been sampled
        self._admitted = 0  # highest request id so far
        self._closing = False

    def serve(self, inbox: queue.SimpleQueue[Order | None]) -> Iterator[Event]:
        """Obey orders from `inbox`; yield what the leader has to tell (followers: nothing).

        Returns once None has arrived there and every request before it is answered.
        """
        while True:
            if not self._idle:
                while not inbox.empty():
                    self._note(inbox.get())
                yield from self._step(inbox)
            elif self._admitted + 1 in self._arrived:
                yield from self._admit(self._admitted + 1, inbox)
            elif self._admitted + 1 in self._profiles:
                self._admitted += 1
                yield from self._profile(self._profiles.pop(self._admitted))
            elif self._closing:
                return
            else:
                self._note(inbox.get())

    @property
    def _idle(self) -> bool:
        return not (self._prefilling or self._decoding)

    def _note(self, order: Order | None) -> None:
        match order:
            case None:
                self._closing = True
            case Generate(request=request):
                self._arrived[request.id] = _Answer(request, [])
            case Profile(id=profile_id):
                self._profiles[profile_id] = order
            case Cancel(id=request_id) if self._leads:
                self._cancels.append(request_id)
            case _:
                pass

    def _profile(self, order: Profile) -> Iterator[Event]:
        # No request is admitted past this order's id, so every rank is idle here, at the same place in the count.
        stream = self._generator.stream
        yield from profile(
            self._model, order, rank=self._rank, leads=self._leads, prefill_step=self._prefill_step, stream=stream
        )

    # Admission: the same on every rank, because tokenizing and its refusals depend on the request alone.

    def _admit(self, up_to: int, inbox: queue.SimpleQueue[Order | None]) -> Iterator[Event]:
        while self._admitted < up_to:
            while self._admitted + 1 not in self._arrived:  # the leader has it already; ours is on its way
                self._note(inbox.get())
            self._admitted += 1
            answer = self._arrived.pop(self._admitted)
            try:
                answer.tokens = self._tokenize(answer.request)
            except UsageError as refusal:
                if self._leads:
                    yield Refused(answer.request.id, refusal.message, refusal.hint)
                continue
            self._insert(answer)

    def _tokenize(self, request: Request) -> list[int]:
        if request.prompt_tokens is not None:
            tokens = list(request.prompt_tokens)
            vocab_size = self._model.placement.geometry.vocab_size
            if not all(0 <= token < vocab_size for token in tokens):
                raise UsageError(f"a prompt token is outside the model's vocabulary of {vocab_size}")
        elif request.raw:
            tokens = self._tokenizer.encode(request.prompt)
        else:
            if not self._tokenizer.has_chat_template:
                raise UsageError("this model has no chat template", hint="use --raw")
            messages = [{"role": "system", "content": request.system}] if request.system is not None else []
            messages.append({"role": "user", "content": request.prompt})
            try:
                tokens = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True)
            except Exception as error:  # the template is the model's own program
                reason = " ".join(str(error).split())
                raise UsageError(f"the model's chat template fails: {reason}", hint="use --raw") from None
        if not tokens:
            raise UsageError("the prompt is empty: this model adds no start token", hint="give some text")
        if len(tokens) >= self._max_seq_len:
            raise UsageError(
                f"the prompt has {len(tokens)} tokens, the model's context is {self._max_seq_len}",
                hint="shorten the prompt",
            )
        return list(tokens)

    def _insert(self, answer: _Answer) -> None:
        request = answer.request
        room = self._max_seq_len - len(answer.tokens)
        stop = StopSequences() if request.ignore_eos else self._stop
        [answer.uid] = self._generator.insert(
            [answer.tokens], max_tokens=[min(request.max_tokens, room)], stop_sequences=[stop]
        )
        answer.admitted_s = time.perf_counter()
        if self._leads:
            answer.sampler = make_sampler(request.temperature, 0.0 if request.top_p == 1 else request.top_p)
            answer.detokenizer = self._tokenizer.detokenizer
            if request.seed is not None:
                mx.random.seed(request.seed)
        self._prefilling.append(answer)

    # One step: compute, tell, obey.

    def _step(self, inbox: queue.SimpleQueue[Order | None]) -> Iterator[Event]:
        earlier = len(self._spoken)
        self._sampled_rows = not self._decoding
        rows = {answer.uid: answer for answer in self._decoding}
        prompts, responses = self._generator.next()
        if self._leads:
            yield from (Prefilled(self._prefilling[0].request.id, p.progress[0]) for p in prompts if self._prefilling)
        for response in responses:
            answer = rows[response.uid]
            if response.finish_reason is not None:
                self._decoding.remove(answer)
            if self._leads:
                yield from self._tell(answer, response.token, response.finish_reason)
        if len(self._spoken) == 0:  # only prefill so far: nothing was sampled, so speak by itself
            self._speak()
            earlier = 1
        while earlier:
            for _ in range(earlier):
                yield from self._obey(self._spoken.popleft(), inbox)
            if not self._idle:
                return
            # Idle means nothing in flight and nothing unheard, or the leader would wait for what it has already said.
            mx.synchronize(self._generator.stream)
            earlier = len(self._spoken)

    def _speak(self) -> None:
        with mx.stream(self._generator.stream):
            word = self._from_leader(mx.array([], dtype=mx.int32), mx.array(0))
            mx.eval(word)
        self._spoken.append(word)

    def _obey(self, word: mx.array, inbox: queue.SimpleQueue[Order | None]) -> Iterator[Event]:
        with mx.stream(self._generator.stream):
            admit, cancel = word.tolist()  # type: ignore[misc]
        yield from self._admit(int(admit), inbox)  # type: ignore[arg-type]
        for answer in [*self._prefilling, *self._decoding]:
            if answer.request.id == cancel:
                self._generator.remove([answer.uid])
                (self._prefilling if answer in self._prefilling else self._decoding).remove(answer)
                if self._leads:
                    yield self._done(answer, "cancelled")

    # Sampling and agreement; called by the generator while it builds a step's graph.

    def _agree_on_tokens(self, logprobs: mx.array) -> mx.array:
        """Return the tokens (B,) that the leader samples from its logprobs (B, V), on every rank."""
        if self._sampled_rows:  # the running rows are served first, then a prompt that just ended joins
            answers = [self._prefilling.popleft()]
            self._decoding.extend(answers)
        else:
            answers = self._decoding
            self._sampled_rows = True
        if self._leads:
            rows = [a.sampler(logprobs[i : i + 1]) for i, a in enumerate(answers) if a.sampler is not None]
            tokens = mx.concatenate(rows).astype(mx.int32)
        else:
            tokens = mx.zeros((len(answers),), dtype=mx.int32)
        agreed = self._from_leader(tokens, logprobs)
        self._spoken.append(agreed[-_CONTROL_WORDS:])
        return agreed[:-_CONTROL_WORDS].astype(mx.uint32)

    def _from_leader(self, tokens: mx.array, after: mx.array) -> mx.array:
        """Return the leader's [tokens…, admit, cancel] on every rank, exchanged after `after` was computed."""
        admit = self._admitted
        while admit + 1 in self._arrived:
            admit += 1
        # A wish to cancel what is not admitted yet waits until it is: followers could not know what is meant.
        cancel = next((c for c in self._cancels if c <= self._admitted), _NOBODY)
        if cancel != _NOBODY:
            self._cancels.remove(cancel)
        vector = mx.concatenate([tokens, mx.array([admit, cancel], dtype=mx.int32)])
        if self._group is None:
            return vector
        # Followers' vector must not overtake the last layer's sum, or ranks would add up different things.
        vector = mx.depends([vector], [after])[0]
        return mx.distributed.all_gather(vector[None], group=self._group)[self._head_rank]

    # What the leader tells.

    def _tell(self, answer: _Answer, token: int, finish_reason: str | None) -> Iterator[Event]:
        if not answer.first_s:
            answer.first_s = time.perf_counter()
        detokenizer = answer.detokenizer
        if finish_reason != "stop":  # a stop token is not text
            answer.count += 1
            detokenizer.add_token(token)
            yield Token(answer.request.id, token, detokenizer.last_segment)
        if finish_reason is not None:
            detokenizer.finalize()
            if rest := detokenizer.last_segment:
                yield Token(answer.request.id, -1, rest)
            yield self._done(answer, finish_reason)

    def _done(self, answer: _Answer, finish_reason: str) -> Done:
        now = time.perf_counter()
        first = answer.first_s or now
        stats = Stats(
            prompt_tokens=len(answer.tokens),
            completion_tokens=answer.count,
            prompt_s=first - answer.admitted_s,
            decode_s=now - first,
            ttft_s=first - answer.arrived_s,
            peak_memory_bytes=mx.get_peak_memory(),
        )
        return Done(answer.request.id, finish_reason, stats)
