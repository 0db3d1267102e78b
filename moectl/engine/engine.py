"""Generate in lockstep: every rank runs this over the same requests and ends with the same tokens, bit for bit.

mlx-lm's BatchGenerator does prefill, caches and the step in flight. Each of its steps ends in one small exchange
(`agreement`), in which only the leader's part counts (the rank that has the head: rank 0, or the last of a pipeline):
the sampled tokens and a control word (admit requests up to k; cancel requests c…). So followers need no head, no
sampler and no clock, and every decision falls at the same step on every rank. A control word is obeyed one step after
it was sent, when its step has been computed: reading the newest would stall the step in flight.

`admission` makes the control word, `sampling` chooses tokens, `answer` turns them into events. What is kept of past
answers follows from the control words, so every rank keeps the same.
A row's answer does not depend on the other rows but for rounding: attention over padding and, on a CPU, grouped experts
add up in another order. Tokens are the same except where two logits tie in float32's (or bfloat16's) last places.

A single greedy row that repeats earlier text may go on outside the generator, several tokens at a time (`speculation`).
There the newest control word is obeyed, because the engine waits for the tokens anyway. An idle engine waits for a
message, never inside an exchange.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, StopSequences
from mlx_lm.models.cache import make_prompt_cache

from moectl.engine.admission import Admission
from moectl.engine.agreement import MAX_CANCELS, Agreement
from moectl.engine.answer import Answer, sample_rows
from moectl.engine.caches import make_one_row, pack
from moectl.engine.grammar import Grammars
from moectl.engine.profile import profile
from moectl.engine.prompt_cache import Branch, PromptCache
from moectl.engine.protocol import PREFILL_STEP, Cancel, Event, Generate, Order, Prefilled, Profile
from moectl.engine.speculation import Speculation
from moectl.model.placement import Placement
from moectl.shards.chat.tokenizer import Tokenizer

MAX_BATCH = MAX_CANCELS  # so that one control word can cancel all


class Engine:
    """One rank's side of the lockstep.

    `kv_tokens` is for how many tokens' keys and values there is memory (None: not known), `cache_tokens` how many
    of those past answers may hold (None: what the running ones leave, or one context), `speculate` how many tokens may
    be proposed at once (0: none), `check_every` after how many steps all ranks compare what they computed (0: never).
    `trimmable`: all caches of the whole model can forget their last tokens; `batchable`: they take several rows;
    `row_tokens`: what a row's caches take whatever its length, counted in tokens. Equal on all ranks, like
    `max_seq_len` and `prefill_step`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        *,
        vocab_size: int,
        rank: int = 0,
        head_rank: int = 0,
        placement: Placement | None = None,  # which a profile needs
        group: mx.distributed.Group | None = None,
        max_seq_len: int,
        prefill_step: int = PREFILL_STEP,
        kv_tokens: int | None = None,
        cache_tokens: int | None = None,
        speculate: int = 0,
        check_every: int = 0,
        trimmable: bool = True,
        batchable: bool = True,
        row_tokens: int = 0,
    ) -> None:
        if speculate and not trimmable:
            raise ValueError("a model whose caches cannot be trimmed cannot take proposed tokens back")
        self._model = model
        self._placement = placement
        self._trimmable = trimmable
        self._batchable = batchable
        self._tokenizer = tokenizer
        self._read = partial(
            Answer.read, tokenizer=tokenizer, vocab_size=vocab_size, max_seq_len=max_seq_len, kv_tokens=kv_tokens
        )
        self._rank = rank
        self._leads = rank == head_rank
        self._prefill_step = prefill_step
        max_rows = MAX_BATCH if batchable else 1
        # One prompt at a time: rows then join in admission order, so that this file can name each row's request.
        self._generator = BatchGenerator(
            model,
            sampler=self._agree_on_tokens,
            prefill_batch_size=1,
            completion_batch_size=max_rows,
            prefill_step_size=prefill_step,
        )
        self._admission = Admission(  # on the leader
            max_rows=max_rows, kv_tokens=kv_tokens, max_cancels=MAX_CANCELS, row_tokens=row_tokens
        )
        make_word = self._admission.make_word if self._leads else None
        self._agreement = Agreement(model, group, head_rank=head_rank, check_every=check_every, make_word=make_word)
        self._stop = StopSequences([[t] for t in sorted(tokenizer.eos_token_ids)])
        self._speculation = Speculation(
            model,
            most=speculate,
            leads=self._leads,
            stop_tokens=frozenset(tokenizer.eos_token_ids),
            agree=self._agreement.agree,
        )
        if cache_tokens is None:
            cache_tokens = max_seq_len if kv_tokens is None else kv_tokens
        self._cache = PromptCache(cache_tokens, kv_tokens, trimmable=trimmable, row_tokens=row_tokens)
        self._grammars = Grammars(tokenizer, vocab_size)
        self._in_making: dict[int, Answer] = {}  # by request id; on the leader, until their grammars are there
        self._arrived: dict[int, Answer] = {}  # by request id, not yet admitted
        self._withdrawn: set[int] = set()  # cancelled while they waited: passed by when the count gets there
        self._profiles: dict[int, Profile] = {}  # by id, waiting for their turn and for idleness
        self._running: dict[int, Answer] = {}  # by request id, in the generator
        self._prefilling: deque[Answer] = deque()
        self._decoding: list[Answer] = []  # in the order of the batch's rows
        self._in_flight: tuple[list[Answer], mx.array] = ([], mx.array([]))  # rows, and their tokens last sampled
        self._sampled_rows = False  # whether this step's running rows have been sampled
        self._admitted = 0  # highest request id so far
        self._closing = False

    def serve(self, inbox: queue.SimpleQueue[Order | None]) -> Iterator[Event]:
        """Obey orders from `inbox` until None has come, and all before it is answered; yield the leader's events."""
        self._put = inbox.put
        while True:
            if self._running:
                while not inbox.empty():
                    yield from self._note(inbox.get())
                yield from self._step(inbox)
            elif self._admitted + 1 in self._arrived:
                yield from self._admit(self._admitted + 1, inbox)
            elif self._admitted + 1 in self._profiles:
                yield from self._profile(self._profiles.pop(self._admitted + 1))
            elif self._closing and not self._in_making:
                return
            else:
                yield from self._note(inbox.get())

    # Orders: the leader reads requests as they come, the others when they are admitted.

    def _note(self, order: Order | None) -> Iterator[Event]:
        match order:
            case None:
                self._closing = True
            case Generate() if self._leads:
                yield from self._line_up(order)
            case Generate(request=request):
                self._arrived[request.id] = Answer(request)
            case Profile(id=profile_id):
                self._profiles[profile_id] = order
            case Cancel(id=request_id) if self._leads:
                if self._admission.cancel(request_id):
                    yield from self._arrived[request_id].cancel()

    def fail(self, request_id: int) -> None:
        """End an answer whose event could not be sent; on the leader, between two events."""
        answer = self._running.get(request_id)
        if answer is not None and not answer.ended:
            answer.ended = True
            self._admission.cancel(request_id)

    def _line_up(self, order: Generate) -> Iterator[Event]:
        """Take a request; one that is held to a form comes again once its grammar is there."""
        answer = self._in_making.pop(order.request.id, None)
        if answer is None:
            self._read(answer := Answer(order.request))
            if answer.request.is_held and answer.refusal is None:
                self._in_making[answer.request.id] = answer
                answer.hold(self._grammars, self._tokenizer, partial(self._put, order))
                return
        self._arrived[answer.request.id] = answer
        if answer.refusal is not None:
            yield from answer.refuse()
        ends = self._admission.arrive(answer.request.id, answer.reach)
        # The other ranks have a request without a grammar too: they skip it like one that is cancelled.
        if ends or (answer.failure is not None and self._admission.cancel(answer.request.id)):
            yield from answer.cancel()

    def _profile(self, order: Profile) -> Iterator[Event]:
        # No request is admitted past this order's id, so every rank is idle here, at the same place in the count.
        self._admitted = order.id
        if self._leads:
            self._admission.admit(order.id)
        assert self._placement is not None
        yield from profile(
            self._model,
            order,
            placement=self._placement,
            rank=self._rank,
            leads=self._leads,
            prefill_step=self._prefill_step,
            stream=self._generator.stream,
        )

    # Joining and leaving: at the same step and in the same order on every rank.

    def _admit(self, up_to: int, inbox: queue.SimpleQueue[Order | None]) -> Iterator[Event]:
        while self._admitted < up_to:
            while self._admitted + 1 not in self._arrived:  # the leader has it already, this rank not yet
                yield from self._note(inbox.get())
            self._admitted += 1
            answer = self._arrived.pop(self._admitted)
            if self._leads:
                self._admission.admit(self._admitted)
            if self._admitted in self._withdrawn:
                self._withdrawn.remove(self._admitted)
                continue
            if not self._leads:
                self._read(answer)
            if answer.refusal is None and len(answer.tokens) >= answer.reach:
                yield from self._end_resumed(answer)
            elif answer.refusal is None:
                self._insert(answer)
                # Its text is complete, or it cannot be sent: only the leader knows, so its row lives until all know.
                if answer.has_stop or answer.failure is not None:
                    self._admission.cancel(answer.request.id)
                    yield from answer.end("stop")

    def _end_resumed(self, answer: Answer) -> Iterator[Event]:
        # A restart came between its last token and its end.
        if self._leads:
            answer.begin(self._tokenizer)
            self._admission.end(answer.request.id)
            yield from answer.end("length")

    def _insert(self, answer: Answer) -> None:
        layers = None
        if answer.request.cache_prompt:
            answer.cached, layers = self._cache.find(answer.tokens, answer.request.space)
            answer.find_branches(self._tokenizer, trimmable=self._trimmable)
        self._running[answer.request.id] = answer
        self._cache.shrink(self._cache_room())
        self._speculation.watch(answer)
        if self._leads:
            answer.begin(self._tokenizer)
        self._line_up_row(answer, answer.tokens, answer.cached, layers)
        self._agreement.meet(self._generator.stream)

    def _line_up_row(self, answer: Answer, tokens: list[int], computed: int, layers: list[Any] | None) -> None:
        """Give the generator a row, the first `computed` of whose tokens are in `layers`."""
        if not self._batchable:
            layers = make_one_row(layers or make_prompt_cache(self._model))
        [answer.uid] = self._generator.insert_segments(
            [answer.cut(tokens, computed)],
            max_tokens=[max(1, answer.reach - len(tokens))],
            caches=[layers],
            all_tokens=[tokens[:computed]],
            logits_processors=[answer.hooks],
            stop_sequences=[StopSequences() if answer.request.ignore_eos else self._stop],
        )
        self._prefilling.append(answer)

    def _leave(self, answer: Answer, tokens: list[int], layers: list[Any] | None) -> None:
        """Take an answer out of the count, and keep what it has computed: `layers` of these tokens."""
        del self._running[answer.request.id]
        if self._leads:
            self._admission.end(answer.request.id)
        if answer.request.cache_prompt and layers is not None:
            self._keep(answer, tokens, layers, Branch.ANSWER)

    def _keep(self, answer: Answer, tokens: list[int], layers: list[Any], kind: Branch) -> None:
        if self._cache.keep(tokens, layers, self._cache_room(), kind, answer.firm, answer.request.space):
            pack(layers)

    def _keep_prompt(self, part: Any) -> None:
        """Keep what was computed of a prompt where others branch off: a longer text's caches do not have it."""
        answer = next(answer for answer in self._prefilling if answer.uid == part.uid)
        if (computed := answer.cached + part.progress[0]) in answer.branches:
            with mx.stream(self._generator.stream):
                layers, tokens = self._generator.extract_cache([answer.uid])[answer.uid]
                self._keep(answer, tokens, layers, answer.branches[computed])

    def _cache_room(self) -> int:
        return self._cache.find_room([answer.held for answer in self._running.values()])

    # One step: compute, tell, obey.

    def _step(self, inbox: queue.SimpleQueue[Order | None]) -> Iterator[Event]:
        self._agreement.begin_step()
        self._cache.shrink(self._cache_room())  # running rows grow
        if self._speculation.has_row or self._foresees():
            yield from self._speculate(inbox)
        else:
            yield from self._generate(inbox)

    def _generate(self, inbox: queue.SimpleQueue[Order | None]) -> Iterator[Event]:
        earlier = self._agreement.unread
        self._sampled_rows = not self._decoding
        rows = {answer.uid: answer for answer in self._decoding}
        prompts, responses = self._generator.next()
        self._agreement.settle()
        if prompts:
            self._agreement.meet(self._generator.stream)
        for part in (part for part in prompts if part.end_of_segment and not part.end_of_prompt):
            self._keep_prompt(part)
        if self._leads:
            # Without the one that has just joined, and without those that have ended.
            reading = {answer.uid: answer for answer in self._prefilling if not answer.ended}
            for part in (p for p in prompts if p.uid in reading):
                answer = reading[part.uid]
                yield Prefilled(answer.request.id, answer.cached + part.progress[0], answer.cached)
        for response in responses:
            yield from self._hear(rows[response.uid], response)
        if self._agreement.unread == 0:  # only prefill so far: no token was sampled
            self._agreement.agree_on_word(self._generator.stream)
            earlier = 1
        while earlier:
            for _ in range(earlier):
                yield from self._obey(self._agreement.read_word(self._generator.stream), inbox)
            if self._running:
                return
            # Idle: no step in flight and no word unread, or the leader would wait for a word that it has sent.
            mx.synchronize(self._generator.stream)
            earlier = self._agreement.unread

    def _hear(self, answer: Answer, response: Any) -> Iterator[Event]:
        """Take one more token of a row."""
        answer.heard += 1
        if answer.lookup is not None:
            answer.lookup.add(response.token)
        if response.finish_reason is not None:
            self._decoding.remove(answer)
            with mx.stream(self._generator.stream):
                self._leave(answer, response.all_tokens, response.prompt_cache)
        if self._leads:
            yield from answer.tell(response.token, response.finish_reason)
            if answer.ended and response.finish_reason is None:  # by a stop text or an error: only the leader knows
                self._admission.cancel(answer.request.id)

    def _foresees(self) -> bool:
        rows, _ = self._in_flight
        alone = len(self._running) == len(self._decoding) == 1 and rows == self._decoding  # and it has a step in flight
        return alone and self._speculation.wants(rows[0])

    def _speculate(self, inbox: queue.SimpleQueue[Order | None]) -> Iterator[Event]:
        """Take one step of the only row outside the generator, and obey the control words."""
        [answer] = self._decoding
        with mx.stream(self._generator.stream):
            responses = self._speculation.verify() if self._speculation.has_row else self._take_out(answer)
        for response in responses:
            yield from self._hear(answer, response)
        words = [self._agreement.read_word(self._generator.stream) for _ in range(self._agreement.unread)]
        if self._speculation.has_row and (self._speculation.is_stuck or any(map(self._is_news, words))):
            self._put_back()
        for word in words:
            yield from self._obey(word, inbox)
        if not self._running:
            mx.synchronize(self._generator.stream)

    def _take_out(self, answer: Answer) -> list[Any]:
        agreed: list[int] = self._in_flight[1].tolist()  # type: ignore[assignment]
        layers, _ = self._generator.remove([answer.uid], return_prompt_caches=True)[answer.uid]
        return self._speculation.take(answer, layers, agreed[0])

    def _put_back(self) -> None:
        answer, tokens, layers = self._speculation.give_back()
        self._decoding.remove(answer)
        self._line_up_row(answer, tokens, len(tokens) - 1, layers)

    def _is_news(self, word: list[int]) -> bool:
        return word[0] > self._admitted or any(word[1:])

    def _obey(self, word: list[int], inbox: queue.SimpleQueue[Order | None]) -> Iterator[Event]:
        admit, *cancels = word
        for request_id in cancels:
            if request_id > self._admitted:
                self._withdrawn.add(request_id)
            elif request_id in self._running:  # or it has ended in the meantime
                yield from self._cancel(self._running[request_id])
        yield from self._admit(admit, inbox)

    def _cancel(self, answer: Answer) -> Iterator[Event]:
        with mx.stream(self._generator.stream):
            removed = self._generator.remove([answer.uid], return_prompt_caches=True)
            layers, tokens = removed[answer.uid]
            computed = answer in self._decoding or len(tokens) > answer.cached
            (self._decoding if answer in self._decoding else self._prefilling).remove(answer)
            self._leave(answer, tokens, layers if computed else None)
        if self._leads:
            yield from answer.cancel()

    # Sampling; called by the generator while it builds a step's graph.

    def _agree_on_tokens(self, logprobs: mx.array) -> mx.array:
        """Return the tokens (B,) that the leader samples from its logprobs (B, V), on every rank."""
        if self._sampled_rows:  # the running rows are served first, then a prompt that just ended joins
            answers = [self._prefilling.popleft()]
            self._decoding.extend(answers)
        else:
            answers = self._decoding
            self._sampled_rows = True
        tokens = sample_rows(answers, logprobs) if self._leads else mx.zeros((len(answers),))
        self._in_flight = list(answers), self._agreement.agree(tokens.astype(mx.int32), logprobs)
        return self._in_flight[1]
