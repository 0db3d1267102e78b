"""Requests that join, leave, wait and remember: one rank, the demo model in float32."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import KVCache

from moectl.demo import demo_dir
from moectl.engine.engine import MAX_BATCH
from moectl.engine.network.load import load_rank
from moectl.engine.protocol import Done, Prefilled, Token
from moectl.model.manifest import read_manifest
from moectl.shards.chat.tokenizer import open_tokenizer
from tests.support.cutting import cut
from tests.support.driven import Driven

PROMPTS = (
    "What is expert parallelism?",
    "Tell me a long story about experts.",
    "Why?",
    "How does a router choose experts, and what happens if two nodes hold a copy of the same one?",
    "Hello.",
    "What is a mixture of experts?",
    "Who are you",
    "Explain the all-reduce in one sentence, please.",
)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    out = tmp_path_factory.mktemp("batching") / "shards"
    return load_demo(out)


def load_demo(out: Path) -> tuple[Any, Any]:
    cut(demo_dir(), out, split="hidden", nodes=1)
    return load_rank(out, read_manifest(out), 0), open_tokenizer(out)


def answer_alone(parts: tuple[Any, Any], prompt: str, max_tokens: int, **more: Any) -> list[int]:
    driven = Driven(parts)
    driven.ask(prompt, max_tokens, **more)
    driven.run()
    return driven.tokens(1)


# The same answer, whoever else asks.


def test_greedy_answers_are_the_same_alone_and_in_a_batch(parts: tuple[Any, Any]) -> None:
    together = Driven(parts, prefill_step=16)
    for prompt in PROMPTS:
        together.ask(prompt, 48, raw=False, ignore_eos=True)
    together.run()
    for number, prompt in enumerate(PROMPTS, 1):
        alone = answer_alone(parts, prompt, 48, raw=False, ignore_eos=True)
        assert together.tokens(number) == alone, prompt
        assert len(alone) == 48


def test_greedy_answers_are_the_same_beside_other_traffic(parts: tuple[Any, Any]) -> None:
    """Others come, sample, are penalised, stop and are cancelled at every step; the same prompt is asked again."""
    source = random.Random(1)
    driven = Driven(parts, prefill_step=16)
    mine = [driven.ask(PROMPTS[0], 40, ignore_eos=True)]

    def disturb() -> None:
        if driven.steps % 3 == 0 and driven.steps < 90:
            prompt = source.choice(PROMPTS)
            driven.ask(prompt, source.randint(1, 20), temperature=1.5, frequency_penalty=0.5, logprobs=2, stop=("e",))
        if driven.steps % 5 == 0:
            driven.cancel(source.choice([n for n in range(1, driven._asked + 1) if n not in mine] or [10**6]))
        if driven.steps == 25:
            mine.append(driven.ask(PROMPTS[0], 40, ignore_eos=True))

    driven.on_step = disturb
    driven.run()
    alone = answer_alone(parts, PROMPTS[0], 40, ignore_eos=True)
    assert [driven.tokens(number) for number in mine] == [alone, alone]


SAMPLED = {"temperature": 1.0, "top_p": 0.95, "top_k": 40, "min_p": 0.01, "seed": 7, "ignore_eos": True}
PENALISED = {"repetition_penalty": 1.2, "presence_penalty": 0.4, "frequency_penalty": 0.3, "logit_bias": ((5, 3.0),)}


@pytest.mark.parametrize("more", [SAMPLED, PENALISED, SAMPLED | PENALISED])
def test_seeds_and_penalties_give_the_same_alone_in_a_batch_and_resumed(
    parts: tuple[Any, Any], more: dict[str, Any]
) -> None:
    alone = answer_alone(parts, PROMPTS[1], 30, **more)
    driven = Driven(parts)
    for prompt in PROMPTS[2:6]:
        driven.ask(prompt, 25, temperature=2.0, logprobs=1)
    number = driven.ask(PROMPTS[1], 30, **more)
    driven.run()
    assert driven.tokens(number) == alone
    for told in (1, 13, 29):
        resumed = Driven(parts)
        resumed.ask(PROMPTS[1], 30, answered=tuple(alone[:told]), **more)
        resumed.run()
        assert alone[:told] + resumed.tokens(1) == alone
        assert resumed.stats(1).completion_tokens == len(alone)


def test_a_conversation_goes_through_the_template(parts: tuple[Any, Any]) -> None:
    driven = Driven(parts)
    one = driven.ask(PROMPTS[0], 8, raw=False, system="Be brief.")
    messages = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPTS[0]})
    two = driven.ask("", 8, messages=messages)
    three = driven.ask("", 8, messages=({"role": "nobody"},))
    driven.run()
    assert driven.tokens(one) == driven.tokens(two)
    assert driven.stats(one).prompt_tokens == driven.stats(two).prompt_tokens
    assert driven.stats(one).cached_tokens == 0
    assert "template" in driven.refusal(three) or driven.tokens(three)


def test_tokens_outside_the_vocabulary_are_refused(parts: tuple[Any, Any]) -> None:
    driven = Driven(parts)
    for more in ({"prompt_tokens": (1, 99999)}, {"logit_bias": ((99999, 1.0),)}, {"answered": (99999,)}):
        driven.ask("x", 4, **more)
    last = driven.ask("x", 4)
    driven.run()
    assert all("vocabulary" in driven.refusal(number) for number in (1, 2, 3))
    assert len(driven.tokens(last)) == 4


# Odds.


def test_logprobs_are_told_with_each_token(parts: tuple[Any, Any]) -> None:
    driven = Driven(parts)
    driven.ask(PROMPTS[0], 12, logprobs=3, ignore_eos=True)
    driven.ask(PROMPTS[1], 12, ignore_eos=True)
    driven.run()
    told = [e for e in driven.events if isinstance(e, Token)]
    for event in (e for e in told if e.id == 1):
        assert event.logprob is not None
        assert len(event.top) == 3
        assert event.top[0][0] == event.token  # greedy
        assert event.top[0][2] == event.logprob
        assert [p for _, _, p in event.top] == sorted((p for _, _, p in event.top), reverse=True)
        assert event.top[0][1] == driven.tokenizer.decode([event.token])
    assert all(e.logprob is None and e.top == [] for e in told if e.id == 2)
    assert driven.tokens(1) == answer_alone(parts, PROMPTS[0], 12, ignore_eos=True)


# Stop texts.


def test_stop_texts_are_found_across_tokens_and_never_told(parts: tuple[Any, Any]) -> None:
    plain = Driven(parts)
    plain.ask(PROMPTS[1], 60, ignore_eos=True)
    plain.run()
    text, tokens = plain.text(1), plain.tokens(1)
    for start in range(4, len(text) - 8, 38):
        stop = text[start : start + 6]
        driven = Driven(parts)
        number = driven.ask(PROMPTS[1], 60, ignore_eos=True, stop=("\0never", stop))
        beside = driven.ask(PROMPTS[2], 30, ignore_eos=True)
        driven.run()
        assert driven.text(number) == text[: text.index(stop)]
        assert driven.reason(number) == "stop"
        used = driven.stats(number).completion_tokens
        assert driven.tokens(number) == tokens[:used]
        assert len(driven.tokens(beside)) == 30
        shorter = Driven(parts)
        shorter.ask(PROMPTS[1], used - 1, ignore_eos=True, stop=(stop,)) if used > 1 else None
        shorter.run()
        assert used == 1 or shorter.reason(1) == "length"  # no token too late


def test_an_answer_that_ends_gives_what_was_held_back(parts: tuple[Any, Any]) -> None:
    plain = Driven(parts)
    plain.ask(PROMPTS[1], 10, ignore_eos=True)
    plain.run()
    driven = Driven(parts)
    driven.ask(PROMPTS[1], 10, ignore_eos=True, stop=(plain.text(1)[3:] + " and then some more",))
    driven.run()
    assert driven.reason(1) == "length"
    assert driven.text(1) == plain.text(1)
    held = [e.text for e in driven.events if isinstance(e, Token)]
    assert "" in held
    assert len(held) == 10


def test_a_stop_text_begun_before_a_restart_is_found_after_it(parts: tuple[Any, Any]) -> None:
    plain = Driven(parts)
    plain.ask(PROMPTS[1], 20, ignore_eos=True)
    plain.run()
    told = [e for e in plain.events if isinstance(e, Token)]
    before = "".join(e.text for e in told[:9])
    stop = before[-2:] + told[9].text + told[10].text
    driven = Driven(parts)
    driven.ask(PROMPTS[1], 20, ignore_eos=True, stop=(stop,), answered=tuple(plain.tokens(1)[:9]))
    driven.run()
    assert driven.reason(1) == "stop"
    assert driven.text(1) == ""


def test_a_stop_text_that_was_complete_before_a_restart_ends_the_answer_there(parts: tuple[Any, Any]) -> None:
    plain = Driven(parts)
    plain.ask(PROMPTS[1], 20, ignore_eos=True)
    plain.run()
    stop = plain.text(1)[:6]
    driven = Driven(parts, prefill_step=4)
    driven.ask(PROMPTS[1], 40, ignore_eos=True, stop=(stop,), answered=tuple(plain.tokens(1)[:9]))
    beside = driven.ask(PROMPTS[2], 10, ignore_eos=True)
    driven.run()
    assert [type(e) for e in driven.events if getattr(e, "id", 0) == 1] == [Done]
    assert (driven.reason(1), driven.stats(1).completion_tokens) == ("stop", 9)
    assert len(driven.tokens(beside)) == 10


def test_a_resumed_answer_with_nothing_left_that_was_cancelled_ends_once(parts: tuple[Any, Any]) -> None:
    driven = Driven(parts)
    driven.cancel(1)
    driven.ask(PROMPTS[1], 3, answered=(5, 6, 7))
    driven.run()
    assert driven.reason(1) == "cancelled"


@pytest.mark.parametrize("limit", [{"max_seq_len": 60}, {"kv_tokens": 60}])
def test_an_answer_that_was_as_long_as_may_be_before_a_restart_ends_as_undisturbed(
    parts: tuple[Any, Any], limit: dict[str, int]
) -> None:
    plain = Driven(parts, **limit)
    plain.ask(PROMPTS[1], 500, ignore_eos=True)
    plain.run()
    told = plain.tokens(1)
    assert plain.reason(1) == "length"
    for count in (len(told) - 1, len(told)):
        resumed = Driven(parts, **limit)
        resumed.ask(PROMPTS[1], 500, ignore_eos=True, answered=tuple(told[:count]))
        resumed.run()
        assert resumed.reason(1) == "length"
        assert told[:count] + resumed.tokens(1) == told
        assert resumed.stats(1).completion_tokens == len(told)


@pytest.mark.parametrize("limit", [{"max_seq_len": 60}, {"kv_tokens": 60}])
def test_a_prompt_alone_that_is_too_long_is_refused(parts: tuple[Any, Any], limit: dict[str, int]) -> None:
    driven = Driven(parts, **limit)
    for length in (59, 60):
        driven.ask("", 4, prompt_tokens=(5,) * length, ignore_eos=True)
    driven.run()
    assert len(driven.tokens(1)) == 1
    assert "the prompt has 60 tokens" in driven.refusal(2)


# Memory.


def test_no_more_runs_than_there_is_memory_for(parts: tuple[Any, Any]) -> None:
    driven = Driven(parts, kv_tokens=200)
    source = random.Random(5)
    for i in range(24):
        driven.ask(PROMPTS[i % 8], source.randint(1, 60), ignore_eos=True)
    never = driven.ask("x" * 220, 3)
    cut = driven.ask("x", 300, ignore_eos=True)
    last = driven.ask("x", 5, ignore_eos=True)
    most = [0, 0]

    def watch() -> None:
        reaches = [a.reach for a in driven.engine._running.values()]
        assert len(reaches) * max(reaches) + driven.engine._cache.tokens <= 200
        assert driven.engine._generator._generation_batch.prompt_cache == [] or len(reaches) <= MAX_BATCH
        most[0] = max(most[0], len(reaches))
        most[1] = max(most[1], driven.engine._cache.tokens)

    driven.on_step = watch
    driven.run()
    assert most[0] > 1
    assert most[1] > 0
    assert "memory for 200" in driven.refusal(never)
    assert len(driven.tokens(last)) == 5
    assert 100 < len(driven.tokens(cut)) < 200  # as far as memory goes, like the context
    assert driven.reason(cut) == "length"
    assert all(driven.reason(number) == "length" for number in range(1, 25))


def test_first_come_first_served(parts: tuple[Any, Any]) -> None:
    """A long one at the head is not passed by short ones that would fit."""
    driven = Driven(parts, kv_tokens=160)
    numbers = [driven.ask("a b c", n, ignore_eos=True) for n in (40, 140, 4, 4)]
    driven.run()
    first = [next(e.id for e in driven.events if isinstance(e, Token) and e.id == n) for n in numbers]
    assert first == numbers
    order = [e.id for e in driven.events if isinstance(e, Done)]
    assert order == numbers


def test_more_than_a_batch_waits(parts: tuple[Any, Any]) -> None:
    driven = Driven(parts)
    for i in range(20):
        driven.ask(PROMPTS[i % 8], 10, ignore_eos=True)
    rows = []
    driven.on_step = lambda: rows.append(len(driven.engine._running))
    driven.run()
    assert max(rows) == MAX_BATCH
    assert all(len(driven.tokens(n)) == 10 for n in range(1, 21))


def test_a_waiting_request_that_is_cancelled_ends_at_once(parts: tuple[Any, Any]) -> None:
    driven = Driven(parts, kv_tokens=100)
    running = driven.ask(PROMPTS[2], 80, ignore_eos=True)
    waiting = [driven.ask(PROMPTS[2], 80, ignore_eos=True) for _ in range(12)]
    told_at: dict[int, int] = {}

    def wish() -> None:
        if driven.steps == 10:
            for number in waiting[:-1]:
                driven.cancel(number)

    driven.on_step = wish
    driven.inbox.put(None)
    for event in driven.engine.serve(driven.inbox):
        driven.events.append(event)
        if isinstance(event, Done):
            told_at[event.id] = driven.steps
    assert [told_at[number] for number in waiting[:-1]] == [11] * 11  # noted when the eleventh begins
    assert all(driven.reason(number) == "cancelled" for number in waiting[:-1])
    assert driven.tokens(running) == driven.tokens(waiting[-1])
    assert len(driven.tokens(running)) == 80


# A long prompt.


def test_a_long_prompt_stalls_others_for_one_chunk_at_most(parts: tuple[Any, Any]) -> None:
    driven = Driven(parts, prefill_step=16, max_seq_len=1024)
    running = [driven.ask(prompt, 80, ignore_eos=True) for prompt in PROMPTS[:3]]
    long: list[int] = []

    def join() -> None:
        if driven.steps == 20:
            long.append(driven.ask("experts and routers " * 60, 4, ignore_eos=True))

    driven.on_step = join
    driven.run()
    places = [i for i, e in enumerate(driven.events) if isinstance(e, Prefilled) and e.id == long[0]]
    chunks = [driven.events[i].tokens for i in places]  # type: ignore[union-attr]
    assert len(chunks) > 10
    assert all(b - a <= 16 for a, b in pairwise(chunks))
    for a, b in pairwise(places):
        between = [e.id for e in driven.events[a:b] if isinstance(e, Token)]
        assert between == running  # each of them has its token between two chunks


# The prompt cache.


def turns(driven: Driven, max_tokens: int, first: str = PROMPTS[3], **more: Any) -> list[int]:
    """Talk for three turns; return the ids."""
    messages: list[dict[str, str]] = []
    numbers = []
    for said in (first, "And then?", "Why is that so?"):
        messages.append({"role": "user", "content": said})
        numbers.append(driven.ask("", max_tokens, messages=tuple(messages), **more))
        driven.run()
        messages.append({"role": "assistant", "content": driven.text(numbers[-1]).strip()})
    return numbers


def test_a_conversation_computes_only_what_is_new(parts: tuple[Any, Any]) -> None:
    cached, fresh = Driven(parts, prefill_step=32), Driven(parts, prefill_step=32)
    with_cache = turns(cached, 24)
    without = turns(fresh, 24, cache_prompt=False)
    for a, b in zip(with_cache, without, strict=True):
        assert cached.tokens(a) == fresh.tokens(b)
        assert fresh.stats(b).cached_tokens == 0
    first, second, third = (cached.stats(number) for number in with_cache)
    assert first.cached_tokens == 0
    assert second.cached_tokens >= first.prompt_tokens
    assert third.cached_tokens >= second.prompt_tokens
    assert third.cached_tokens < third.prompt_tokens
    # What is new fits one chunk here, whose end is told; the last token joins the batch.
    told = [(e.tokens, e.cached) for e in cached.events if isinstance(e, Prefilled) and e.id == with_cache[2]]
    assert third.prompt_tokens - third.cached_tokens < 32
    assert told == [(third.prompt_tokens - 1, third.cached_tokens)]


def test_a_cancelled_answer_is_remembered_too(parts: tuple[Any, Any]) -> None:
    for step in (1, 3, 8):  # while it is read, when it joins, while it answers
        driven = Driven(parts, prefill_step=16)
        number = driven.ask(PROMPTS[3] * 3, 60, ignore_eos=True)

        def wish(driven: Driven = driven, number: int = number, step: int = step) -> None:
            if driven.steps == step:
                driven.cancel(number)

        driven.on_step = wish
        driven.run()
        again = driven.ask(PROMPTS[3] * 3, 12, ignore_eos=True)
        driven.run()
        assert driven.reason(number) == "cancelled"
        assert driven.stats(again).cached_tokens > 0
        assert driven.tokens(again) == answer_alone(parts, PROMPTS[3] * 3, 12, ignore_eos=True)


@pytest.mark.parametrize("more", [PENALISED, SAMPLED | PENALISED])
def test_penalties_count_what_came_from_the_cache(parts: tuple[Any, Any], more: dict[str, Any]) -> None:
    driven = Driven(parts)
    for _ in range(2):
        driven.ask(PROMPTS[3], 30, **(more | {"ignore_eos": True}))
        driven.run()
    assert driven.stats(2).cached_tokens == driven.stats(2).prompt_tokens - 1
    assert driven.tokens(2) == driven.tokens(1)


def test_past_answers_make_way_for_running_ones(parts: tuple[Any, Any]) -> None:
    driven = Driven(parts, kv_tokens=120)
    driven.ask(PROMPTS[0], 60, ignore_eos=True)
    driven.run()
    assert driven.engine._cache.tokens > 60
    needy = driven.ask(PROMPTS[0], 110 - driven.stats(1).prompt_tokens, ignore_eos=True)
    driven.on_step = lambda: _check_room(driven, 120)
    driven.run()
    # The prefix was used although there was no room to keep it beside the answer.
    assert driven.stats(needy).cached_tokens == 0 or driven.stats(needy).cached_tokens >= 16
    assert driven.tokens(needy)[:60] == driven.tokens(1)


def _check_room(driven: Driven, kv_tokens: int) -> None:
    assert sum(a.reach for a in driven.engine._running.values()) + driven.engine._cache.tokens <= kv_tokens


def test_the_cache_has_its_own_bound(parts: tuple[Any, Any]) -> None:
    driven = Driven(parts, cache_tokens=64)
    for prompt in PROMPTS:
        driven.ask(prompt, 30, ignore_eos=True)
    driven.run()
    assert 0 < driven.engine._cache.tokens <= 64
    off = Driven(parts, cache_tokens=0)
    for _ in range(2):
        off.ask(PROMPTS[3] * 3, 4)
        off.run()
    assert off.stats(2).cached_tokens == 0


# Cancels.


def test_a_cancel_takes_three_steps_at_most(parts: tuple[Any, Any]) -> None:
    """Eight at once, each at another point of its answer; the wish is noted before a step, the row is gone after."""
    for step in range(1, 30, 4):
        driven = Driven(parts, prefill_step=16)
        numbers = [driven.ask(prompt, 60, ignore_eos=True) for prompt in PROMPTS]
        left_at: dict[int, int] = {}

        def watch(driven: Driven = driven, step: int = step, left_at: dict[int, int] = left_at) -> None:
            if driven.steps == step:
                for number in numbers:  # noqa: B023
                    driven.cancel(number)
            if driven.steps > step:
                for number in numbers:  # noqa: B023
                    if number not in driven.engine._running:
                        left_at.setdefault(number, driven.steps)

        driven.on_step = watch
        driven.run()
        assert all(driven.reason(number) == "cancelled" for number in numbers)
        assert driven.steps - step <= 3, step


def test_random_cancels_under_load_leak_nothing(parts: tuple[Any, Any]) -> None:
    driven = Driven(parts, prefill_step=16, kv_tokens=1200, cache_tokens=400)
    source = random.Random(11)

    def load(requests: int, cancels: int) -> None:
        wished: set[int] = set()
        first = driven._asked + 1

        def disturb() -> None:
            if driven._asked - first + 1 < requests and source.random() < 0.7:
                ask_anything(driven, source)
            if len(wished) < cancels and source.random() < 0.7:
                number = source.randint(max(first, driven._asked - 14), driven._asked + 1)
                wished.add(number)
                driven.cancel(number)

        driven.on_step = disturb
        ask_anything(driven, source)
        while driven._asked - first + 1 < requests:  # it may run dry before all have been asked
            ask_anything(driven, source)
            driven.run()
        ended = [e.id for e in driven.events if isinstance(e, Done)]
        assert sorted(ended) == list(range(1, driven._asked + 1))

    load(30, 10)
    before = driven.held_bytes()
    load(160, 100)
    cancelled = [e for e in driven.events if isinstance(e, Done) and e.finish_reason == "cancelled"]
    assert len(cancelled) > 50
    assert abs(driven.held_bytes() - before) <= 0.05 * before
    assert not driven.engine._withdrawn
    assert not driven.engine._arrived
    alone = answer_alone(parts, PROMPTS[0], 20, ignore_eos=True)
    last = driven.ask(PROMPTS[0], 20, ignore_eos=True)
    driven.on_step = lambda: None
    driven.run()
    assert driven.tokens(last) == alone


def ask_anything(driven: Driven, source: random.Random) -> None:
    more: dict[str, Any] = source.choice(
        [{}, {"temperature": 1.2, "seed": 3}, {"logprobs": 2}, {"stop": ("the", "e")}, {"frequency_penalty": 1.0}]
    )
    prompt = source.choice(PROMPTS) * source.choice([1, 1, 4])
    driven.ask(prompt, source.randint(1, 40), ignore_eos=source.random() < 0.8, **more)


# What all this relies on in mlx-lm's generator.


def test_a_finished_or_removed_row_gives_the_keys_of_its_tokens(parts: tuple[Any, Any]) -> None:
    """`all_tokens` are those whose keys are there: the prompt, the answer, and not the token in flight."""
    model, tokenizer = parts
    generator = BatchGenerator(model, prefill_batch_size=1, prefill_step_size=8)
    short, long = tokenizer.encode(PROMPTS[2]), tokenizer.encode(PROMPTS[3])
    one, two = generator.insert([short, long], max_tokens=[4, 50])
    told: dict[int, list[int]] = {one: [], two: []}
    finished = None
    while len(told[two]) < 3 or finished is None:
        for response in generator.next()[1]:
            told[response.uid].append(response.token)
            if response.finish_reason:
                finished = response
    assert finished.all_tokens == short + told[one]
    assert [layer.offset for layer in finished.prompt_cache] == [len(finished.all_tokens)] * len(model.layers)
    layers, tokens = generator.remove([two], return_prompt_caches=True)[two]
    assert tokens == long + told[two]
    assert all(isinstance(layer, KVCache) and layer.offset == len(tokens) for layer in layers)
    # Rows come out without the padding they had in the batch, and hold what a prompt of these tokens would.
    fresh = [KVCache() for _ in model.layers]
    mx.eval(model(mx.array([tokens]), cache=fresh))
    for kept, made in zip(layers, fresh, strict=True):
        assert mx.allclose(kept.keys_and_values()[0], made.keys_and_values()[0], atol=1e-4)
        assert mx.allclose(kept.keys_and_values()[1], made.keys_and_values()[1], atol=1e-4)


def test_a_given_cache_is_read_and_never_written(parts: tuple[Any, Any]) -> None:
    model, tokenizer = parts
    tokens = tokenizer.encode(PROMPTS[3])
    layers = [KVCache() for _ in model.layers]
    mx.eval(model(mx.array([tokens[:9]]), cache=layers))
    before = [mx.array(layer.keys) for layer in layers]
    mx.eval(before)
    generator = BatchGenerator(model, prefill_batch_size=1)
    generator.insert([tokens[9:]], max_tokens=[5], caches=[layers], all_tokens=[tokens[:9]])
    [uid] = generator.insert([tokens], max_tokens=[5])
    told: dict[int, list[int]] = {uid - 1: [], uid: []}
    last: dict[int, list[int]] = {}
    while len(last) < 2:
        for response in generator.next()[1]:
            told[response.uid].append(response.token)
            if response.finish_reason:
                last[response.uid] = response.all_tokens
    assert told[uid - 1] == told[uid]
    assert last[uid - 1] == last[uid]
    assert [layer.offset for layer in layers] == [9] * len(layers)
    assert all(mx.array_equal(layer.keys, was) for layer, was in zip(layers, before, strict=True))


def test_a_logits_processor_sees_the_prompt_and_every_token_before(parts: tuple[Any, Any]) -> None:
    model, tokenizer = parts
    tokens = tokenizer.encode(PROMPTS[3])
    seen: list[mx.array] = []

    def look(context: mx.array, logits: mx.array) -> mx.array:
        assert logits.shape == (1, model.args.vocab_size)
        seen.append(context)
        return logits

    generator = BatchGenerator(model, prefill_batch_size=1, prefill_step_size=8)
    generator.insert([tokenizer.encode(PROMPTS[2])], max_tokens=[9])
    [uid] = generator.insert([tokens], max_tokens=[4], logits_processors=[[look]])
    told: list[int] = []
    while len(told) < 4:
        told += [r.token for r in generator.next()[1] if r.uid == uid]
    assert [context.tolist() for context in seen] == [tokens + told[:i] for i in range(len(seen))]
    assert len(seen) == 5  # one step is in flight behind the last
