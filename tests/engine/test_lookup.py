"""Prompt lookup beside a search through all tokens, and what it is for: text that repeats."""

from __future__ import annotations

from hypothesis import given, strategies as st

from moectl.engine.lookup import Lookup

# Few different tokens, or nothing would ever occur twice.
texts = st.lists(st.integers(0, 3), max_size=60) | st.lists(st.integers(0, 1), max_size=60)


def search(tokens: list[int], most: int) -> list[int]:
    """Return what followed the latest earlier occurrence of the last three tokens, or two, gone round at the end."""
    for n in (3, 2):
        for end in range(len(tokens) - 1, n - 1, -1):
            if tokens[end - n : end] == tokens[len(tokens) - n :]:
                beyond = list(tokens)
                for position in range(end, end + most):
                    beyond.append(beyond[position])
                return beyond[len(tokens) :]
    return []


@given(texts, st.integers(0, 12))
def test_it_proposes_what_a_search_finds(tokens: list[int], most: int) -> None:
    lookup = Lookup(tokens)
    assert lookup.propose(most) == search(tokens, most)
    assert lookup.tokens == tokens


@given(texts)
def test_it_counts_how_often_in_a_row_it_was_right(tokens: list[int]) -> None:
    lookup = Lookup([])
    streak = 0
    for i, token in enumerate(tokens):
        streak = streak + 1 if search(tokens[:i], 1) == [token] else 0
        lookup.add(token)
        assert lookup.streak == streak


def test_a_repeated_sentence_is_foretold_from_its_third_word() -> None:
    sentence = b"the quick brown fox jumps over lazy dogs"
    lookup = Lookup([*sentence, 0, *sentence[:3]])
    assert bytes(lookup.propose(len(sentence) - 3)) == sentence[3:]


def test_a_loop_is_foretold_beyond_its_end() -> None:
    assert Lookup([7, 7, 7]).propose(5) == [7] * 5
    assert Lookup([1, 2, 3, 1, 2, 3, 1, 2]).propose(7) == [3, 1, 2, 3, 1, 2, 3]


def test_nothing_is_proposed_where_all_is_new() -> None:
    assert Lookup([]).propose(4) == Lookup([1]).propose(4) == Lookup([1, 2, 3, 4]).propose(4) == []
