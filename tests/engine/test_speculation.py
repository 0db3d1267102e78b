"""Prompt lookup changes how many passes an answer takes, never its tokens: alone, joined, cancelled, ended, on ranks.

All in float32, where passes of different widths agree but for ties; no such tie is known among these answers.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st
from mlx_lm.models.cache import KVCache

from moectl.demo import demo_dir
from moectl.engine.network.load import load_rank
from moectl.engine.protocol import Check, Done, Generate, Load, Order, RunOptions, Start, Token, encode, read_messages
from moectl.engine.request import Request
from moectl.engine.sampling import Sampler
from moectl.engine.speculation import is_foreseeable
from moectl.errors import UsageError
from moectl.model.manifest import read_manifest
from moectl.session.session import Session
from moectl.shards.chat.tokenizer import open_tokenizer
from tests.engine.test_batch_ranks import keep_beating, run_load
from tests.engine.test_batching import PROMPTS, load_demo
from tests.engine.test_lockstep import cut_case, run_ranks
from tests.session.test_session import specs
from tests.support.alphabet import VOCAB_SIZE, write_tokenizer
from tests.support.batch_rank import make_requests
from tests.support.cutting import cut
from tests.support.driven import Driven
from tests.support.layouts import write_layout
from tests.support.ring import process_env
from tests.support.tiny import write_checkpoint

SAID = 60
Parts = tuple[Any, Any]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return load_demo(tmp_path_factory.mktemp("speculation") / "shards")


@pytest.fixture(scope="module")
def quoting(parts: Parts) -> tuple[int, ...]:
    """A prompt whose answer stands in it already."""
    question = tuple(parts[1].encode_chat([{"role": "user", "content": PROMPTS[1]}]))
    driven = Driven(parts)
    driven.ask(prompt_tokens=question, max_tokens=SAID, ignore_eos=True)
    driven.run()
    return (*question, *driven.tokens(1), *question)


@pytest.fixture(scope="module")
def plain(parts: Parts, quoting: tuple[int, ...]) -> Driven:
    """Its answer one by one."""
    driven = Driven(parts)
    driven.ask(prompt_tokens=quoting, max_tokens=SAID, ignore_eos=True)
    driven.run()
    return driven


def at_step(driven: Driven, step: int, act: Callable[[], object]) -> None:
    """Act once, before a step of the engine, in its generator or out of it."""
    steps = iter(range(1, 10**6))

    def count() -> None:
        if next(steps) == step:
            act()

    driven.on_step = count


# The same answer in fewer passes.


@pytest.mark.parametrize("most", [1, 4, 8])
def test_answers_are_the_same_and_take_fewer_passes(
    parts: Parts, quoting: tuple[int, ...], plain: Driven, most: int
) -> None:
    driven = Driven(parts, speculate=most)
    passes: list[None] = []
    driven.on_step = lambda: passes.append(None)
    number = driven.ask(prompt_tokens=quoting, max_tokens=SAID, ignore_eos=True)
    driven.run()
    stats = driven.stats(number)
    assert driven.tokens(number) == plain.tokens(1)
    assert driven.text(number) == plain.text(1)
    assert stats.completion_tokens == SAID
    assert stats.drafted_tokens >= stats.accepted_tokens > SAID / 3
    assert len(passes) <= SAID - stats.accepted_tokens + 5  # prefill and the way out


def test_nothing_is_proposed_unless_asked_for(plain: Driven) -> None:
    assert plain.stats(1).drafted_tokens == 0
    assert plain.steps >= SAID


def test_ordinary_questions_have_the_same_answers(parts: Parts) -> None:
    accepted = 0
    driven, reference = Driven(parts, speculate=6), Driven(parts)
    for prompt in PROMPTS:
        for one in (driven, reference):
            one.ask(prompt, 80, raw=False, ignore_eos=True)
            one.run()  # each alone
        accepted += driven.stats(driven._asked).accepted_tokens
        assert driven.tokens(driven._asked) == reference.tokens(driven._asked), prompt
    assert accepted > 0


@pytest.mark.parametrize(
    ("bits", "kv_n_heads"),
    [
        (16, 1),
        (4, 4),
        pytest.param(16, 4, marks=pytest.mark.long),
        pytest.param(4, 1, marks=pytest.mark.long),
    ],
)
def test_random_models_have_the_same_answers(bits: int, kv_n_heads: int, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", vocab_size=VOCAB_SIZE, n_heads=4, kv_n_heads=kv_n_heads)
    write_tokenizer(tmp_path / "source")
    shards = cut_case(tmp_path / "source", tmp_path / "shards", "hidden", (6,), bits)
    parts = load_rank(shards, read_manifest(shards), 0), open_tokenizer(shards)
    accepted = 0
    for prompt in ("ab" * 20, "the quick brown fox " * 4, "x"):
        tokens = []
        for most in (0, 5):
            driven = Driven(parts, speculate=most)
            driven.ask(prompt, 120)
            driven.run()
            tokens.append(driven.tokens(1))
            accepted += driven.stats(1).accepted_tokens
        assert tokens[0] == tokens[1]
        assert len(tokens[0]) == 120
    assert accepted > 0


# Who takes part.


requests = st.builds(
    lambda **more: Request(1, "x", 8, **more),
    temperature=st.sampled_from([0.0, 0.7]),
    top_k=st.sampled_from([0, 5]),
    top_p=st.sampled_from([0.5, 1.0]),
    min_p=st.sampled_from([0.0, 0.1]),
    seed=st.sampled_from([None, 3]),
    presence_penalty=st.sampled_from([0.0, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.2]),
    logit_bias=st.sampled_from([(), ((1, 5.0),)]),
    logprobs=st.sampled_from([None, 0, 2]),
)


@given(requests)
def test_who_is_foreseeable_needs_no_sampler(request_: Request) -> None:
    """Followers, who have none, come to the same as the leader would by looking at its own."""
    sampler = Sampler(request_, prompt_tokens=1)
    assert is_foreseeable(request_) == (sampler.is_plain and sampler.hook is None)


@pytest.mark.parametrize("more", [{"temperature": 0.8, "seed": 1}, {"logprobs": 1}, {"repetition_penalty": 1.1}])
def test_others_go_on_one_by_one(parts: Parts, quoting: tuple[int, ...], more: dict[str, Any]) -> None:
    driven = Driven(parts, speculate=8)
    driven.ask(prompt_tokens=quoting, max_tokens=20, ignore_eos=True, **more)
    driven.run()
    assert driven.stats(1).drafted_tokens == 0
    assert len(driven.tokens(1)) == 20


# Ends within a draft.


def test_max_tokens_may_end_a_draft_anywhere(parts: Parts, quoting: tuple[int, ...], plain: Driven) -> None:
    driven = Driven(parts, speculate=8)
    for count in range(1, 31):
        number = driven.ask(prompt_tokens=quoting, max_tokens=count, ignore_eos=True)
        driven.run()
        assert driven.tokens(number) == plain.tokens(1)[:count]
        assert driven.reason(number) == "length"
    assert driven.stats(30).accepted_tokens > 10


def test_the_context_and_the_memory_for_it_are_kept_to(
    parts: Parts, quoting: tuple[int, ...], plain: Driven, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = []
    update = KVCache.update_and_fetch

    def watch(layer: Any, keys: Any, values: Any) -> Any:
        longest.append(layer.offset + keys.shape[2])
        return update(layer, keys, values)

    monkeypatch.setattr(KVCache, "update_and_fetch", watch)
    for limit in ({"max_seq_len": len(quoting) + 25}, {"kv_tokens": len(quoting) + 25}):
        driven = Driven(parts, speculate=8, **limit)
        driven.ask(prompt_tokens=quoting, max_tokens=SAID, ignore_eos=True)
        driven.run()
        assert driven.reason(1) == "length"
        assert driven.tokens(1) == plain.tokens(1)[:25]
        assert driven.stats(1).accepted_tokens > 5
        assert max(longest) < len(quoting) + 25


def test_a_stop_token_may_end_a_draft_anywhere(parts: Parts, quoting: tuple[int, ...], plain: Driven) -> None:
    model, tokenizer = parts
    eos = tokenizer.eos_token_ids
    said = plain.tokens(1)
    try:
        for token in sorted(set(said[:40]))[::3]:
            tokenizer.eos_token_ids = {token}
            told = []
            for most in (0, 8):
                driven = Driven((model, tokenizer), speculate=most)
                driven.ask(prompt_tokens=quoting, max_tokens=SAID)
                driven.run()
                turn = (*quoting, *driven.tokens(1), token, 5, 6)
                driven.ask(prompt_tokens=turn, max_tokens=4)
                driven.run()
                assert driven.stats(2).cached_tokens >= len(turn) - 3
                told.append((driven.tokens(1), driven.text(1), driven.reason(1), driven.tokens(2)))
            assert told[0] == told[1]
            assert told[0][0] == said[: said.index(token)]
            assert told[0][2] == "stop"
    finally:
        tokenizer.eos_token_ids = eos


def test_a_stop_text_may_end_a_draft_anywhere(parts: Parts, quoting: tuple[int, ...], plain: Driven) -> None:
    text = plain.text(1)
    driven = Driven(parts, speculate=8)
    for start in range(2, len(text) - 8, 17):
        stop = text[start : start + 6]
        number = driven.ask(prompt_tokens=quoting, max_tokens=SAID, ignore_eos=True, stop=(stop,))
        driven.run()
        assert driven.text(number) == text[: text.index(stop)]
        assert driven.reason(number) == "stop"
        assert driven.tokens(number) == plain.tokens(1)[: driven.stats(number).completion_tokens]


# Others come and go.


def test_a_cancel_may_come_at_any_step(parts: Parts, quoting: tuple[int, ...], plain: Driven) -> None:
    driven = Driven(parts, speculate=3)  # so that SAID tokens take more than 15 steps
    for step in range(1, 15):
        number = driven.ask(prompt_tokens=quoting, max_tokens=SAID, ignore_eos=True)
        told: list[int] = []

        def wish(number: int = number, told: list[int] = told) -> None:
            driven.cancel(number)
            at_step(driven, 3, lambda: told.append(number))  # a step after three more would still be running

        at_step(driven, step, wish)
        driven.run()
        length = len(driven.tokens(number))
        assert driven.tokens(number) == plain.tokens(1)[:length]
        assert driven.reason(number) == "cancelled"
        assert told == []
        # What it leaves behind continues rightly.
        again = driven.ask(prompt_tokens=(*quoting, *plain.tokens(1)[:length]), max_tokens=5, ignore_eos=True)
        driven.on_step = lambda: None
        driven.run()
        assert driven.tokens(again) == plain.tokens(1)[length : length + 5]
        assert driven.stats(again).cached_tokens > 0
    assert length > 15  # some at a time by then


def test_another_request_may_join_at_any_step(parts: Parts, quoting: tuple[int, ...], plain: Driven) -> None:
    reference = Driven(parts)
    beside = reference.ask(PROMPTS[2], 12, ignore_eos=True)
    reference.run()
    resumed = 0
    for step in range(1, 14):
        driven = Driven(parts, speculate=4, prefill_step=32)
        first = driven.ask(prompt_tokens=quoting, max_tokens=SAID, ignore_eos=True)
        at_step(driven, step, partial(driven.ask, PROMPTS[2], 12, ignore_eos=True))
        driven.run()
        assert driven.tokens(first) == plain.tokens(1)
        assert driven.tokens(2) == reference.tokens(beside)
        ids = [e.id for e in driven.events if isinstance(e, Token)]
        after = len(ids) - ids[::-1].index(2)
        resumed += len(ids[after:]) > 4 and driven.stats(first).accepted_tokens > 0
    assert resumed > 3  # alone again, and several at a time again


def test_another_request_may_join_and_leave_at_once(parts: Parts, quoting: tuple[int, ...], plain: Driven) -> None:
    cancelled = 0
    for delay in range(6):
        driven = Driven(parts, speculate=4)
        driven.ask(prompt_tokens=quoting, max_tokens=SAID, ignore_eos=True)

        def join(driven: Driven = driven, delay: int = delay) -> None:
            driven.ask(prompt_tokens=quoting[9:], max_tokens=40, ignore_eos=True)  # foreseeable too
            at_step(driven, delay, partial(driven.cancel, 2)) if delay else driven.cancel(2)

        at_step(driven, 6, join)
        driven.run()
        assert driven.tokens(1) == plain.tokens(1)
        cancelled += driven.reason(2) == "cancelled"
    assert cancelled == 6


def test_a_prompt_that_joins_waits_for_no_cache_of_the_other(parts: Parts, quoting: tuple[int, ...]) -> None:
    """A request that is cancelled while it waits for its turn, and refused ones, leave the row as it is."""
    driven = Driven(parts, speculate=4)
    driven.ask(prompt_tokens=quoting, max_tokens=SAID, ignore_eos=True)

    def disturb() -> None:
        driven.ask("", 4)  # refused
        driven.ask(PROMPTS[0], 30)
        driven.cancel(3)

    at_step(driven, 8, disturb)
    driven.run()
    assert len(driven.tokens(1)) == SAID
    assert driven.reason(3) == "cancelled"
    assert "empty" in driven.refusal(2)


# What is kept.


def test_the_next_turn_is_the_same(parts: Parts, quoting: tuple[int, ...], plain: Driven) -> None:
    question = parts[1].encode(" And then?")
    told = []
    for most in (0, 8):
        driven = Driven(parts, speculate=most)
        driven.ask(prompt_tokens=quoting, max_tokens=SAID, ignore_eos=True)
        driven.run()
        turn = (*quoting, *driven.tokens(1), *question)
        second = driven.ask(prompt_tokens=turn, max_tokens=30, ignore_eos=True)
        driven.run()
        assert driven.stats(second).cached_tokens >= len(quoting) + SAID - 1
        told.append(driven.tokens(second))
    fresh = Driven(parts)
    fresh.ask(prompt_tokens=turn, max_tokens=30, ignore_eos=True, cache_prompt=False)
    fresh.run()
    assert told == [fresh.tokens(1)] * 2


def test_what_is_kept_has_no_room_to_grow(parts: Parts, quoting: tuple[int, ...]) -> None:
    driven = Driven(parts, speculate=8)
    before = driven.held_bytes()
    driven.ask(prompt_tokens=quoting, max_tokens=20, ignore_eos=True)
    driven.run()
    [entry] = driven.engine._cache._entries
    assert {layer.keys.shape[2] for layer in entry.layers} == {entry.tokens.size}
    assert {layer.offset for layer in entry.layers} == {entry.tokens.size}
    del entry
    assert driven.held_bytes() <= before + 65536  # the lookup's answer is gone too


# Real ranks.


def test_ranks_propose_alike(parts: Parts, quoting: tuple[int, ...], tmp_path: Path) -> None:
    """Every way of splitting, one prompt at a time."""
    write_checkpoint(tmp_path / "random", vocab_size=VOCAB_SIZE, n_layers=4, d_model=256, n_heads=4, kv_n_heads=4)
    write_tokenizer(tmp_path / "random")
    cases, expected = [], []
    for source, shares, prompt in (
        (demo_dir(), {"hidden": (1, 3), "experts": (5, 11), "layers": (2, 2)}, parts[1].decode(quoting)),
        (tmp_path / "random", {"hidden": (3, 3), "tensor": (3, 3), "layers": (1, 3)}, "ab" * 20),
    ):
        one = cut_case(source, tmp_path / f"{source.name}-one", "experts", (16,), 16)
        driven = Driven((load_rank(one, read_manifest(one), 0), open_tokenizer(one)))
        driven.ask(prompt, 64)
        driven.run()
        for split, share in shares.items():
            shards = cut_case(source, tmp_path / f"{source.name}-{split}", split, share, 16)
            case = {"shards": str(shards), "prompts": [prompt], "max_tokens": 64, "raw": True}
            cases.append(case | {"speculate": 6})
            expected.append((split, driven.tokens(1)))
    zero, other = run_ranks(2, cases, tmp_path)
    for a, b, (split, tokens) in zip(zero, other, expected, strict=True):
        leader = b if split == "layers" else a
        assert leader["tokens"] == [tokens], split
        assert leader["accepted"] > 0, split


@pytest.mark.parametrize("split", ["hidden", pytest.param("layers", marks=pytest.mark.long)])
@pytest.mark.long
def test_ranks_stay_together_while_requests_come_and_go(
    parts: Parts, quoting: tuple[int, ...], split: str, tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    cut(demo_dir(), shards, split=split, nodes=2)
    prompts = [parts[1].decode(quoting), PROMPTS[3]]
    load = {"requests": 60, "cancels": 25, "seed": 5, "prompts": prompts, "speculate": 4, "lone": 0.7}
    zero, one = run_load(load, shards, tmp_path)
    leader, follower = (one, zero) if split == "layers" else (zero, one)
    assert follower["tokens"] == follower["reasons"] == {}
    assert leader["kept"] == follower["kept"] != []
    assert leader["accepted"] > 0
    alone = Driven(parts, prefill_step=16)
    for request in make_requests(load):
        more = {name: getattr(request, name) for name in ("temperature", "seed", "frequency_penalty", "ignore_eos")}
        alone.ask(request.prompt, request.max_tokens, stop=request.stop, **more)
    alone.run()
    for number in range(1, 61):
        told = leader["tokens"].get(str(number), [])
        cancelled = leader["reasons"][str(number)] == "cancelled"
        assert told == (alone.tokens(number)[: len(told)] if cancelled else alone.tokens(number)), number


def test_a_worker_speculates_as_it_is_told(quoting: tuple[int, ...], plain: Driven, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    cut(demo_dir(), shards, split="hidden", nodes=1)
    request = Request(1, "", SAID, prompt_tokens=quoting, ignore_eos=True)
    orders: list[Order] = [
        Start(0, 1, str(shards), [], 10, run=RunOptions(speculate=4)),
        Load(),
        Check(),
        Generate(request),
    ]
    command = [sys.executable, "-m", "moectl", "worker"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=process_env()) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write(b"".join(encode(order) for order in orders))
        worker.stdin.flush()
        beats = threading.Event()
        threading.Thread(target=keep_beating, args=(worker.stdin, beats), daemon=True).start()
        [stats] = [next(e.stats for e in read_messages(worker.stdout) if isinstance(e, Done))]
        beats.set()
        worker.kill()
    assert stats.accepted_tokens > SAID / 3


def test_a_model_whose_caches_keep_more_than_tokens_is_refused_by_name(tmp_path: Path) -> None:
    write_layout(tmp_path / "source", "qwen3-next")
    write_tokenizer(tmp_path / "source")
    cut(tmp_path / "source", tmp_path / "shards", split="hidden", nodes=1)
    ranks = specs(tmp_path / "shards", count=1)
    with (
        pytest.raises(UsageError, match="what a qwen3_next model keeps of earlier tokens cannot be taken") as caught,
        Session(ranks, RunOptions(speculate=4)),
    ):
        pass
    assert caught.value.hint == "leave --speculate out"
    with Session(ranks) as session:
        told = list(session.generate(Request(1, "", 4, prompt_tokens=(5, 6, 7), ignore_eos=True)))
    assert isinstance(told[-1], Done)
