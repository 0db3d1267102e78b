"""Stop texts are found wherever the stream is cut, and nothing of them is ever told."""

from __future__ import annotations

from hypothesis import given, strategies as st

from moectl.engine.answer import StopText

texts = st.text("ab\n", max_size=24)
stops = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3)


def cut_whole(text: str, stops: list[str]) -> tuple[str, bool]:
    """Say what should come out, by trying every end in turn."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


@given(st.lists(texts, max_size=6), stops)
def test_pieces_give_what_the_whole_gives(pieces: list[str], stops: list[str]) -> None:
    watch = StopText(stops)
    told = "".join(watch.feed(piece) for piece in pieces) + watch.flush()
    assert (told, watch.found is not None) == cut_whole("".join(pieces), stops)


@given(st.lists(texts, max_size=6), stops)
def test_only_beginnings_of_stops_are_held_back(pieces: list[str], stops: list[str]) -> None:
    watch = StopText(stops)
    told = ""
    for i, piece in enumerate(pieces):
        told += watch.feed(piece)
        if not watch.found:
            held = "".join(pieces[: i + 1]).removeprefix(told)
            assert held == "" or any(stop.startswith(held) for stop in stops)
    if watch.found:
        assert watch.feed("more") == ""
        assert watch.flush() == ""
