"""What a request's parameters do to its tokens, against NumPy and by their definitions."""

from __future__ import annotations

from collections import Counter
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from moectl.engine.request import Request
from moectl.engine.sampling import Sampler

VOCAB = 50


def ask(**more: Any) -> Request:
    return Request(1, "", 8, **more)


def step(sampler: Sampler, logits: np.ndarray[Any, Any], context: list[int]) -> int:
    """Take one step as mlx-lm's generator does: hook, normalise, sample."""
    row = mx.array(logits[None].astype(np.float32))
    if sampler.hook is not None:
        row = sampler.hook(mx.array(context, dtype=mx.int32), row)
    token = sampler(row - mx.logsumexp(row, axis=-1, keepdims=True))
    assert token.shape == (1,)
    return int(token.item())  # type: ignore[arg-type]


def odds_of(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.asarray(logits - np.log(np.exp(logits).sum()))


@pytest.fixture
def logits() -> np.ndarray[Any, Any]:
    return np.random.default_rng(3).standard_normal(VOCAB) * 2


def frequencies(logits: np.ndarray[Any, Any], draws: int = 1000, **more: Any) -> dict[int, float]:
    sampler = Sampler(ask(seed=1, **more), prompt_tokens=0)
    counted = Counter(step(sampler, logits, []) for _ in range(draws))
    return {token: n / draws for token, n in counted.items()}


def test_temperature_gives_the_softmax(logits: np.ndarray[Any, Any]) -> None:
    expected = np.exp(odds_of(logits / 0.7))
    found = frequencies(logits, temperature=0.7)
    assert sum(abs(found.get(i, 0) - p) for i, p in enumerate(expected)) / 2 < 0.1


def test_filters_leave_only_what_they_should(logits: np.ndarray[Any, Any]) -> None:
    order = np.argsort(-logits)
    odds = np.exp(odds_of(logits))
    assert set(frequencies(logits, temperature=2.0, top_k=3)) == set(order[:3].tolist())
    kept = int((np.cumsum(odds[order]) < 0.5).sum()) + 1
    assert set(frequencies(logits, temperature=2.0, top_p=0.5)) == set(order[:kept].tolist())
    probable = {i for i, p in enumerate(odds) if p >= 0.3 * odds.max()}
    assert set(frequencies(logits, temperature=2.0, min_p=0.3)) == probable


@pytest.mark.parametrize("top_k", [VOCAB, VOCAB + 1, 2**31 - 1])
def test_a_top_k_of_everything_is_no_filter(logits: np.ndarray[Any, Any], top_k: int) -> None:
    assert frequencies(logits, 50, temperature=1.0, top_k=top_k) == frequencies(logits, 50, temperature=1.0)


@pytest.mark.parametrize("top_p", [0, 1e-300, 1e-45, 1e-9])
def test_a_top_p_of_nothing_leaves_the_likeliest_token(logits: np.ndarray[Any, Any], top_p: float) -> None:
    assert set(frequencies(logits, 50, temperature=2.0, top_p=top_p)) == {int(np.argmax(logits))}


def test_a_seed_depends_on_the_position_only(logits: np.ndarray[Any, Any]) -> None:
    request = ask(temperature=2.0, seed=9)
    whole = Sampler(request, prompt_tokens=4)
    tokens = [step(whole, logits, []) for _ in range(12)]
    mx.random.seed(77)  # nothing global has a say
    resumed = Sampler(ask(temperature=2.0, seed=9, answered=tuple(tokens[:5])), prompt_tokens=4)
    assert [step(resumed, logits, []) for _ in range(7)] == tokens[5:]
    other = Sampler(ask(temperature=2.0, seed=10), prompt_tokens=4)
    assert [step(other, logits, []) for _ in range(12)] != tokens
    unseeded = [Sampler(ask(temperature=2.0), prompt_tokens=4) for _ in range(2)]
    assert len({tuple(step(s, logits, []) for _ in range(12)) for s in unseeded}) == 2


def penalized(logits: np.ndarray[Any, Any], **more: Any) -> np.ndarray[Any, Any]:
    """Return the logits as the hook leaves them: prompt 1 1 2, answer 3 3 3 4."""
    sampler = Sampler(ask(**more), prompt_tokens=3)
    assert sampler.hook is not None
    context = mx.array([1, 1, 2, 3, 3, 3, 4], dtype=mx.int32)
    found: np.ndarray[Any, Any] = np.array(sampler.hook(context, mx.array(logits[None].astype(np.float32))))
    return found.reshape(-1)


def test_penalties_by_their_definitions(logits: np.ndarray[Any, Any]) -> None:
    presence, frequency, repetition, bias = (logits.copy() for _ in range(4))
    presence[[3, 4]] -= 0.5
    frequency[3] -= 3 * 0.5
    frequency[4] -= 0.5
    for token in (1, 2, 3, 4):
        repetition[token] = repetition[token] / 1.5 if repetition[token] > 0 else repetition[token] * 1.5
    bias[7] += 2
    bias[1] -= 100
    for found, expected in (
        (penalized(logits, presence_penalty=0.5), presence),
        (penalized(logits, frequency_penalty=0.5), frequency),
        (penalized(logits, repetition_penalty=1.5), repetition),
        (penalized(logits, logit_bias=((7, 2.0), (1, -100.0))), bias),
    ):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_without_wishes_there_is_no_hook() -> None:
    assert Sampler(ask(), prompt_tokens=1).hook is None
    assert Sampler(ask(temperature=1.0, top_p=0.5), prompt_tokens=1).hook is None


@pytest.mark.parametrize("count", [0, 1, 5, 20])
def test_odds_are_the_models_own(logits: np.ndarray[Any, Any], count: int) -> None:
    """Before bias and temperature, which here make an improbable token the one that is chosen."""
    chosen = int(np.argmin(logits))
    sampler = Sampler(ask(logprobs=count, logit_bias=[(chosen, 100.0)], temperature=0.5), prompt_tokens=1)
    assert step(sampler, logits, [1]) == chosen
    odds = sampler.take_odds()
    assert odds is not None
    assert sampler.take_odds() is None
    expected = odds_of(logits)
    assert float(odds.chosen.item()) == pytest.approx(expected[chosen], abs=1e-4)  # type: ignore[arg-type]
    order = np.argsort(-expected)[:count]
    assert odds.top_ids.tolist() == order.tolist()
    np.testing.assert_allclose(np.array(odds.top), expected[order], atol=1e-4)


def test_odds_are_computed_with_the_token(logits: np.ndarray[Any, Any]) -> None:
    """Reading them allocates nothing, so nothing is computed then."""
    sampler = Sampler(ask(logprobs=2), prompt_tokens=0)
    assert sampler.hook is not None
    row = mx.array(logits[None].astype(np.float32))
    token = sampler(sampler.hook(mx.array([], dtype=mx.int32), row))
    mx.eval(token)
    held = mx.get_active_memory()
    odds = sampler.take_odds()
    assert odds is not None
    assert odds.top_ids.tolist() != []
    assert odds.top_ids[0].item() == token.item()
    assert mx.get_active_memory() == held
