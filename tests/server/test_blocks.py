"""An answer's blocks: one after the other, whatever comes between."""

from __future__ import annotations

from moectl.engine.protocol import Done, Token
from moectl.engine.request import Stats
from moectl.server.blocks import BEGIN, END, MORE, Blocks
from moectl.shards.chat.calls import CallPart

STATS = Stats(7, 2, 0.1, 0.2, 0.1, 1000)


def part(index: int, arguments: str = "", *, name: str = "", ended: bool = False) -> Token:
    return Token(1, 5, "", calls=[CallPart(index, f"c{index}" if name else "", name, arguments, ended)])


def follow(*events: Token | Done) -> list[tuple[str, int, str]]:
    blocks = Blocks()
    return [(what, block.index, piece) for event in events for what, block, piece in blocks.take(event)]


def test_one_block_ends_before_the_next_begins() -> None:
    told = follow(
        Token(1, 5, "b", thinking="a"),
        part(0, name="f"),
        part(0, "{}", ended=True),
        part(1, "{}", name="g", ended=True),
        Done(1, "stop", STATS, "c"),
    )
    assert [what for what, _, _ in told] == [BEGIN, MORE, END] * 5
    assert [index for _, index, _ in told] == [i for i in range(5) for _ in range(3)]
    assert [piece for what, _, piece in told if what == MORE] == ["a", "b", "{}", "{}", "c"]


def test_text_within_a_call_waits_for_its_end() -> None:
    told = follow(
        part(0, "{", name="f"), Token(1, 6, "x"), Token(1, 6, "y"), part(0, "}", ended=True), Done(1, "stop", STATS)
    )
    assert [piece for what, _, piece in told if what == MORE] == ["{", "}", "xy"]
    assert [index for what, index, _ in told if what == END] == [0, 1]


def test_what_is_cut_is_not_whole() -> None:
    blocks = Blocks()
    for event in (part(0, "{", name="f"), Token(1, 6, "x"), Done(1, "length", STATS)):
        list(blocks.take(event))
    assert [(block.kind, block.text, block.is_whole) for block in blocks.all] == [
        ("call", "{", False),
        ("text", "x", False),
    ]
