"""The longest common prefix, least recently used out first, the same decisions whatever a token weighs."""

from __future__ import annotations

import mlx.core as mx
import pytest
from hypothesis import given, settings, strategies as st
from mlx_lm.models.cache import CacheList, KVCache, RotatingKVCache

from moectl.engine.caches import forget
from moectl.engine.prompt_cache import MIN_PREFIX, Branch, PromptCache


def make_layers(tokens: list[int], layers: int = 2) -> list[KVCache]:
    """Make caches whose keys say which token they are of."""
    made = []
    for layer in range(layers):
        cache = KVCache()
        rows = mx.array(tokens, dtype=mx.float32)[None, None, :, None]
        cache.update_and_fetch(rows + layer, -rows)
        made.append(cache)
    return made


def keys_of(layers: list[KVCache]) -> list[int]:
    return [int(k) for k in layers[0].keys_and_values()[0].reshape(-1).tolist()]


def count(start: int, length: int) -> list[int]:
    return list(range(start, start + length))


def test_a_longer_prompt_finds_what_it_begins_with() -> None:
    cache = PromptCache()
    cache.keep(count(0, 30), make_layers(count(0, 30)), room=100)
    found, layers = cache.find([*count(0, 30), 7, 8])
    assert found == 30
    assert layers is not None
    assert keys_of(layers) == count(0, 30)


def test_a_branch_finds_the_common_part_and_leaves_the_other_whole() -> None:
    cache = PromptCache()
    kept = count(0, 30)
    cache.keep(kept, make_layers(kept), room=100)
    found, layers = cache.find([*count(0, 20), 99, 98])
    assert found == 20
    assert layers is not None
    assert keys_of(layers) == count(0, 20)
    assert cache.find([*kept, 1])[0] == 30


def test_the_last_token_is_always_left_to_compute() -> None:
    cache = PromptCache()
    cache.keep(count(0, 30), make_layers(count(0, 30)), room=100)
    assert cache.find(count(0, 30))[0] == 29


def test_what_is_used_least_goes_first() -> None:
    cache = PromptCache()
    for start in (100, 200, 300):
        cache.keep(count(start, 20), make_layers(count(start, 20)), room=60)
    assert cache.find(count(100, 21))[0] == 20  # which makes it the newest
    cache.keep(count(400, 20), make_layers(count(400, 20)), room=60)
    assert [prompt[0] for prompt in cache.prompts] == [300, 100, 400]
    cache.shrink(20)
    assert [prompt[0] for prompt in cache.prompts] == [400]
    cache.shrink(0)
    assert cache.tokens == 0


def test_a_prompt_too_long_for_the_room_drives_nobody_out() -> None:
    cache = PromptCache()
    cache.keep(count(0, 40), make_layers(count(0, 40)), room=50)
    cache.keep(count(100, 51), make_layers(count(100, 51)), room=50)
    assert [prompt[0] for prompt in cache.prompts] == [0]


def test_a_turn_that_tells_the_last_answer_otherwise_replaces_the_turn_before() -> None:
    """The first 20 tokens are a prompt, of which the last 2 begin the thinking that the next turn leaves out."""
    cache = PromptCache()
    other = [*count(0, 17), *count(900, 10)]  # of another conversation with the same system message
    for tokens in (other, count(0, 30), [*count(0, 18), *count(500, 9)]):
        cache.keep(tokens, make_layers(tokens), room=1000, firm=18)
    assert cache.prompts == [other, [*count(0, 18), *count(500, 9)]]


def test_what_is_used_in_part_goes_before_what_is_used_whole() -> None:
    cache = PromptCache()
    for start in (100, 200):
        cache.keep(count(start, 30), make_layers(count(start, 30)), room=100)
    assert cache.find([*count(100, 20), 1, 2])[0] == 20  # whose own entry will have these 20
    cache.shrink(30)
    assert [prompt[0] for prompt in cache.prompts] == [200]


def test_entries_before_an_answer_stay_until_their_like_replaces_them() -> None:
    cache = PromptCache(trimmable=False)
    told = [
        (20, Branch.SYSTEM),
        (30, Branch.QUESTION),
        (40, Branch.ANSWER),
        (50, Branch.RESULT),  # after the call that is the answer
        (60, Branch.ANSWER),
        (70, Branch.QUESTION),
    ]
    left = [[20], [20, 30], [20, 30, 40], [20, 30, 50], [20, 30, 50, 60], [20, 70]]
    for (length, kind), lengths in zip(told, left, strict=True):
        cache.keep(count(0, length), make_layers(count(0, length)), 1000, kind)
        assert [len(prompt) for prompt in cache.prompts] == lengths


def test_spaces_find_nothing_of_each_other() -> None:
    cache = PromptCache()
    cache.keep(count(0, 30), make_layers(count(0, 30)), 100, space=1)
    assert cache.find([*count(0, 30), 7]) == (0, None)
    assert cache.find([*count(0, 30), 7], 2) == (0, None)
    assert cache.keep(count(0, 30), make_layers(count(0, 30)), 100, space=2)
    assert [cache.find([*count(0, 30), 7], space)[0] for space in (0, 1, 2)] == [0, 30, 30]
    assert cache.tokens == 60


def test_a_cache_that_does_not_forget_is_no_silence() -> None:
    kept = CacheList(KVCache(), *make_layers(count(0, 10)))
    forget([kept], 3)
    assert keys_of([kept[1]]) == count(0, 7)
    full = RotatingKVCache(max_size=4)
    for _ in range(6):
        full.update_and_fetch(mx.zeros((1, 1, 1, 4)), mx.zeros((1, 1, 1, 4)))
    full._idx = full.offset = 2
    with pytest.raises(RuntimeError, match="a RotatingKVCache cannot forget 3 tokens"):
        forget([full], 3)


def test_a_turn_replaces_the_turn_it_continues() -> None:
    cache = PromptCache()
    cache.keep(count(0, 20), make_layers(count(0, 20)), room=100)
    cache.keep(count(0, 30), make_layers(count(0, 30)), room=100)
    cache.keep(count(0, 25), make_layers(count(0, 25)), room=100)
    assert cache.prompts == [count(0, 30)]


def test_an_entry_that_cannot_be_trimmed_begins_texts_with_all_of_it() -> None:
    cache = PromptCache(trimmable=False)
    for length, kind in ((20, Branch.QUESTION), (30, Branch.ANSWER)):
        assert cache.keep(count(0, length), make_layers(count(0, length)), 100, kind)
    assert cache.prompts == [count(0, 20), count(0, 30)]
    assert cache.find(count(0, 29))[0] == 20
    assert cache.find(count(0, 20))[0] == 0
    assert cache.find([*count(0, 25), 99, 98])[0] == 20
    found, layers = cache.find(count(0, 31))
    assert found == 30
    assert layers is not None
    assert keys_of(layers) == count(0, 30)
    assert not cache.keep(count(0, 20), make_layers(count(0, 20)), room=100)


def test_what_is_found_can_be_written_to() -> None:
    cache = PromptCache(trimmable=False)
    cache.keep(count(0, 20), make_layers(count(0, 20)), room=100)
    _, layers = cache.find(count(0, 22))
    assert layers is not None
    layers[0].update_and_fetch(mx.zeros((1, 1, 1, 1)), mx.zeros((1, 1, 1, 1)))
    layers[0].keys[:] = 7
    _, again = cache.find(count(0, 22))
    assert again is not None
    assert keys_of(again) == count(0, 20)


def test_what_an_entry_takes_besides_its_tokens_counts() -> None:
    cache = PromptCache(trimmable=False, row_tokens=50)
    assert not cache.keep(count(0, 20), make_layers(count(0, 20)), room=69)
    for start in (0, 100, 200):
        assert cache.keep(count(start, 20), make_layers(count(start, 20)), room=140)
    assert [prompt[0] for prompt in cache.prompts] == [100, 200]
    assert cache.tokens == 140


CALLS = ("find", "keep", "shrink")
words = st.integers(0, 1)
sentences = st.lists(words, min_size=1, max_size=4 * MIN_PREFIX)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.sampled_from(["find", "keep", "shrink"]), sentences, st.integers(0, 160)), max_size=12),
    st.booleans(),
)
def test_ranks_with_other_layers_decide_alike(calls: list[tuple[str, list[int], int]], trimmable: bool) -> None:
    one, two = PromptCache(trimmable=trimmable), PromptCache(trimmable=trimmable)
    for call, tokens, room in calls:
        if call == "find":
            prompts = one.prompts
            found, layers = one.find(tokens)
            assert found == two.find(tokens)[0]
            common = [(len(_prefix(p, tokens[:-1])), len(p)) for p in prompts]
            best = max((n for n, whole in common if trimmable or n == whole), default=0)
            assert found == (best if best >= MIN_PREFIX else 0)
            assert (layers is None) == (found == 0)
        elif call == "keep":
            assert one.keep(tokens, make_layers(tokens, 1), room) == two.keep(tokens, make_layers(tokens, 3), room)
            assert one.tokens <= room
        else:
            one.shrink(room)
            two.shrink(room)
            assert one.tokens <= room
        assert one.prompts == two.prompts


def _prefix(a: list[int], b: list[int]) -> list[int]:
    out = []
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        out.append(x)
    return out
