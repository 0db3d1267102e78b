"""One rank's engine in this process: batches, cancels, streaming of text, and what it relies on in mlx-lm."""

from __future__ import annotations

import queue
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st

from moectl.engine import engine as engine_module
from moectl.engine.engine import Engine
from moectl.engine.network.load import load_rank
from moectl.engine.protocol import Cancel, Done, Generate, Prefilled, Refused, Token
from moectl.engine.request import Request
from moectl.model.manifest import read_manifest
from moectl.shards.chat.tokenizer import open_tokenizer
from tests.support.alphabet import VOCAB_SIZE, write_tokenizer
from tests.support.cutting import cut
from tests.support.tiny import write_checkpoint


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A loaded one-rank model and its tokenizer."""
    source = tmp_path_factory.mktemp("engine") / "model"
    write_checkpoint(source, vocab_size=VOCAB_SIZE, n_experts=4, top_k=2)
    write_tokenizer(source)
    out = source.parent / "shards"
    cut(source, out, split="hidden", nodes=1)
    return load_rank(out, read_manifest(out), 0), open_tokenizer(out)


def serve(parts: tuple[Any, Any], *orders: Generate | Cancel, prefill_step: int = 32) -> list[Any]:
    """Give all orders at once; return every event."""
    model, tokenizer = parts
    engine = Engine(model, tokenizer, vocab_size=VOCAB_SIZE, max_seq_len=512, prefill_step=prefill_step)
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for order in orders:
        inbox.put(order)
    inbox.put(None)
    return list(engine.serve(inbox))


def ask(number: int, prompt: str, max_tokens: int = 8, **more: Any) -> Generate:
    return Generate(Request(number, prompt, max_tokens, **more))


def tokens_of(events: list[Any], number: int) -> list[int]:
    return [e.token for e in events if isinstance(e, Token) and e.id == number]


def reason_of(events: list[Any], number: int) -> str:
    [reason] = [e.finish_reason for e in events if isinstance(e, Done) and e.id == number]
    return str(reason)


def test_a_batch_answers_like_one_by_one(parts: tuple[Any, Any]) -> None:
    prompts = [f"{'prompt ' * (3 * i)}{i}" for i in range(1, 13)]  # more than a batch holds, of many lengths
    lengths = [3 + 2 * (i % 5) for i in range(12)]
    together = serve(parts, *(ask(i + 1, p, n) for i, (p, n) in enumerate(zip(prompts, lengths, strict=True))))
    for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        alone = serve(parts, ask(1, prompt, length))
        assert tokens_of(together, i + 1) == tokens_of(alone, 1), prompt
        assert len(tokens_of(alone, 1)) == length


def test_refused_requests_do_not_stop_the_others(parts: tuple[Any, Any]) -> None:
    events = serve(parts, ask(1, "a"), ask(2, ""), ask(3, "b" * 600), ask(4, "c"))
    assert [e.id for e in events if isinstance(e, Refused)] == [2, 3]
    assert [len(tokens_of(events, i)) for i in (1, 4)] == [8, 8]


def test_a_cancel_during_prefill_frees_the_request(parts: tuple[Any, Any]) -> None:
    events = serve(parts, ask(1, "x" * 400), Cancel(1), ask(2, "y"))
    assert reason_of(events, 1) == "cancelled"
    assert tokens_of(events, 1) == []
    assert max(e.tokens for e in events if isinstance(e, Prefilled) and e.id == 1) < 399
    assert tokens_of(events, 2) == tokens_of(serve(parts, ask(1, "y")), 1)


def test_a_cancel_before_its_request_waits_for_it(parts: tuple[Any, Any]) -> None:
    events = serve(parts, ask(1, "a", 20), Cancel(2), ask(2, "b", 20))
    assert reason_of(events, 1) == "length"
    assert reason_of(events, 2) == "cancelled"


def test_cancels_of_finished_and_unknown_requests_are_ignored(parts: tuple[Any, Any]) -> None:
    events = serve(parts, ask(1, "a", 2), ask(2, "b", 30), Cancel(1), Cancel(99))
    assert len(tokens_of(events, 2)) == 30


def test_each_row_keeps_its_own_parameters(parts: tuple[Any, Any]) -> None:
    greedy = tokens_of(serve(parts, ask(1, "hello", 12)), 1)
    events = serve(parts, ask(1, "other", 12, temperature=2.0, seed=5), ask(2, "hello", 12))
    assert tokens_of(events, 2) == greedy


def test_prefill_tells_its_progress(parts: tuple[Any, Any]) -> None:
    events = serve(parts, ask(1, "z" * 100, 1), prefill_step=32)
    assert [e.tokens for e in events if isinstance(e, Prefilled)][:3] == [32, 64, 96]


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@example("héllo wörld")
@example("日本語 😀 family 👨‍👩‍👧 and back")
@example(" leading and trailing  ")
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), min_size=1, max_size=20))
def test_streamed_text_never_splits_a_character(parts: tuple[Any, Any], text: str) -> None:
    """Most characters outside ASCII are several tokens of this tokenizer, and arrive one token at a time."""
    tokenizer = parts[1]
    script = list(tokenizer.encode(text))
    waiting = iter([*script, 0, 0, 0])  # a step may be in flight behind the last one
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(engine_module, "sample_rows", lambda *_: mx.array([next(waiting)]))
        events = serve(parts, ask(1, "say it", len(script)))
    pieces = [e.text if isinstance(e, Token) else e.rest for e in events if isinstance(e, Token | Done)]
    assert tokens_of(events, 1) == script
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_what_the_engine_relies_on_in_mlx_lm(parts: tuple[Any, Any]) -> None:
    """The sampler is called once per step for the running rows, in admission order, then once for a row that joins."""
    sizes: list[int] = []
    model, tokenizer = parts
    engine = Engine(model, tokenizer, vocab_size=VOCAB_SIZE, max_seq_len=512)
    agree = engine._agree_on_tokens

    def spy(logprobs: mx.array) -> mx.array:
        sizes.append(logprobs.shape[0])
        return agree(logprobs)

    engine._generator.sampler = spy
    engine._generator._prompt_batch.fallback_sampler = spy
    engine._generator._generation_batch.fallback_sampler = spy
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for order in (ask(1, "a", 6), ask(2, "b", 6), None):
        inbox.put(order)
    list(engine.serve(inbox))
    assert sizes[0] == 1
    assert max(sizes) == 2
    assert set(sizes) == {1, 2}
