"""An engine over models of many families: together as alone, resumed as anew, cancelled, on ranks; each kind of cache.

A dozen in every run; `--long` takes all that mlx-lm has.
"""

from __future__ import annotations

import queue
import random
import sys
from functools import cache
from typing import Any

import pytest
from mlx_lm.models.cache import make_prompt_cache

from moectl.engine.engine import Engine
from moectl.engine.protocol import Generate, Token
from moectl.engine.request import Request
from moectl.shards.chat.tokenizer import Tokenizer, open_tokenizer
from moectl.shards.look.caches import can_batch, can_trim
from tests.engine.test_families import CANNOT_RUN, DOZEN, OTHERS, WAYS, seen
from tests.support.alphabet import write_tokenizer
from tests.support.driven import Driven
from tests.support.fake_group import _stream, run_ranks
from tests.support.families import make_rank, make_whole

# Chunks, states, lists of caches; two that take one row at a time.
KINDS = ("llama4", "mamba2", "deepseek_v32", "baichuan_m1", "gpt_bigcode", "afm7")
FEW = (*DOZEN, *KINDS)
ALL = [*FEW, *(pytest.param(family, marks=pytest.mark.long) for family in OTHERS if family not in KINDS)]
# A window of 8 or 16 and chunks of 16 are less than these.
LENGTHS = (5, 41, 23)
SAID = 8


pytestmark = pytest.mark.usefixtures("uncompiled")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return open_tokenizer(directory)


@cache
def whole(family: str) -> Any:
    return make_whole(family)


def traits(family: str) -> dict[str, Any]:
    caches, takes_rows = make_prompt_cache(whole(family)), can_batch(seen(family)[0])
    return {"vocab_size": 512, "trimmable": can_trim(caches), "batchable": takes_rows, "prefill_step": 16}


def make_prompt(length: int) -> tuple[int, ...]:
    source = random.Random(length)
    return tuple(source.randrange(90) for _ in range(length))


def drive(family: str, tokenizer: Tokenizer, **options: Any) -> Driven:
    return Driven((whole(family), tokenizer), **traits(family), **options)


def answer(driven: Driven, prompt: tuple[int, ...], count: int = SAID, **more: Any) -> list[int]:
    number = driven.ask(prompt_tokens=prompt, max_tokens=count, ignore_eos=True, **more)
    driven.run()
    return driven.tokens(number)


@cache
def alone(family: str, tokenizer: Tokenizer, prompt: tuple[int, ...], count: int = SAID) -> list[int]:
    return answer(drive(family, tokenizer), prompt, count)


@pytest.mark.parametrize("family", ALL)
def test_answers_in_a_batch_are_as_alone(family: str, tokenizer: Tokenizer) -> None:
    driven = drive(family, tokenizer)
    prompts = [make_prompt(length) for length in LENGTHS]
    numbers = [driven.ask(prompt_tokens=prompt, max_tokens=SAID, ignore_eos=True) for prompt in prompts]
    driven.run()
    for number, prompt in zip(numbers, prompts, strict=True):
        assert driven.tokens(number) == alone(family, tokenizer, prompt)
        assert len(driven.tokens(number)) == SAID


@pytest.mark.parametrize("family", ALL)
def test_a_conversation_goes_on_as_if_computed_anew(family: str, tokenizer: Tokenizer) -> None:
    driven, first = drive(family, tokenizer), make_prompt(41)
    said = answer(driven, first)
    assert said == alone(family, tokenizer, first)
    again = driven.ask(prompt_tokens=first, max_tokens=SAID, ignore_eos=True)
    second = (*first, *said, *make_prompt(7))
    after = driven.ask(prompt_tokens=second, max_tokens=SAID, ignore_eos=True)
    driven.run()
    assert driven.tokens(again) == said
    assert driven.stats(again).cached_tokens == len(first) - 1
    assert driven.tokens(after) == alone(family, tokenizer, second)
    assert driven.stats(after).cached_tokens >= len(first) + SAID - 1
    other = (*first[:30], *make_prompt(9))  # it branches off in the middle
    assert answer(driven, other) == alone(family, tokenizer, other)
    [stats] = [driven.stats(number) for number in (driven._asked,)]
    assert stats.cached_tokens == (30 if traits(family)["trimmable"] else 0)
    assert answer(driven, second) == alone(family, tokenizer, second)  # nothing has written to what is kept


@pytest.mark.parametrize("family", ALL)
def test_a_cancelled_row_leaves_the_others_as_they_are(family: str, tokenizer: Tokenizer) -> None:
    driven = drive(family, tokenizer)
    prompts = [make_prompt(length) for length in LENGTHS]
    numbers = [driven.ask(prompt_tokens=prompt, max_tokens=2 * SAID, ignore_eos=True) for prompt in prompts]
    driven.on_step = lambda: driven.cancel(numbers[1]) if driven.steps == 6 else None
    driven.run()
    for number, prompt in ((n, p) for n, p in zip(numbers, prompts, strict=True) if n != numbers[1]):
        assert driven.tokens(number) == alone(family, tokenizer, prompt, 2 * SAID)
    told = driven.tokens(numbers[1])
    assert driven.reason(numbers[1]) == "cancelled"
    assert len(told) < 2 * SAID
    longer = (*prompts[1], *told, 5)
    assert answer(driven, longer) == alone(family, tokenizer, longer)


def serve_on_ranks(
    family: str, tokenizer: Tokenizer, split: str, prompts: list[tuple[int, ...]]
) -> tuple[dict[int, list[int]], list[list[list[int]]]]:
    """Return the answers' tokens, and what each rank keeps of prompts."""
    options = traits(family)
    leader = 1 if split == "layers" else 0

    def run(rank: int, group: Any) -> tuple[list[Any], list[list[int]]]:
        model, _ = make_rank(family, seen(family), split, [2, 1], rank, group)
        engine = Engine(model, tokenizer, rank=rank, head_rank=leader, group=group, max_seq_len=512, **options)
        inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for number, prompt in enumerate(prompts, 1):
            inbox.put(Generate(Request(number, "", SAID, prompt_tokens=prompt, ignore_eos=True)))
        inbox.put(None)
        return list(engine.serve(inbox)), engine._cache.prompts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["mlx_lm.generate"], "generation_stream", _stream())
        found = run_ranks(2, run)
    tokens: dict[int, list[int]] = {}
    for event in (event for event in found[leader][0] if isinstance(event, Token)):
        tokens.setdefault(event.id, []).append(event.token)
    return tokens, [kept for _, kept in found]


RANKS = [(family, "hidden") for family in FEW if "hidden" not in WAYS[family]]
OTHER_SPLITS = [("nemotron_h", "layers"), ("qwen3_next", "layers"), ("llama4", "layers"), ("gpt_oss", "experts")]


@pytest.mark.parametrize(("family", "split"), RANKS + OTHER_SPLITS)
def test_ranks_answer_as_one_machine(family: str, split: str, tokenizer: Tokenizer) -> None:
    prompts = [make_prompt(41), make_prompt(5), make_prompt(41)]
    tokens, kept = serve_on_ranks(family, tokenizer, split, prompts)
    for number, prompt in enumerate(prompts, 1):
        assert tokens[number] == alone(family, tokenizer, prompt)
    assert kept[0] == kept[1] != []


@pytest.mark.parametrize("family", FEW)
def test_only_few_models_take_one_row_at_a_time(family: str) -> None:
    assert traits(family)["batchable"] == (family not in ("llama4", "gpt_bigcode", "afm7"))


def test_proposed_tokens_need_caches_that_can_be_trimmed(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="cannot be trimmed"):
        drive("qwen3_next", tokenizer, speculate=4)


@pytest.mark.parametrize("family", ["deepseek_v32", "llama", "glm4_moe"])
def test_repeated_text_is_answered_the_same_in_fewer_passes(family: str, tokenizer: Tokenizer) -> None:
    prompt = make_prompt(23)
    text = (*prompt, *alone(family, tokenizer, prompt, 40), *prompt)
    driven = drive(family, tokenizer, speculate=6)
    assert answer(driven, text, 40) == alone(family, tokenizer, text, 40)
    assert driven.stats(driven._asked).accepted_tokens > 0


def test_the_families_that_cannot_run_are_left_out() -> None:
    assert not set(CANNOT_RUN) & set(FEW)
