"""An answer's blocks: one after the other, whatever comes between."""

from __future__ import annotations

from moectl.engine.protocol import Done, Token
from moectl.engine.request import Stats
from moectl.server import messages, openai
from moectl.server.blocks import BEGIN, END, MORE, Blocks
from moectl.shards.chat.calls import CallPart
from tests.support.fake_cluster import MODEL

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


def test_a_call_without_an_end_is_not_whole_and_can_be_told() -> None:
    asked = openai.read_chat({"messages": [{"role": "user", "content": "hi"}]}, "tiny", MODEL)
    reply = messages.MessageReply(asked, reply_id="1", created=5, name="tiny", model=MODEL)
    calls = (part(0, '{"a": ', name="f"), part(1, '{"a": NaN}', name="g"), part(2, "{}", name="h", ended=True))
    for event in (*calls, Done(1, "tool_calls", STATS)):
        list(reply.take(0, event))
    content = reply.whole()["content"]
    assert [block["input"] for block in content] == [{"invalid_json": '{"a": '}, {"invalid_json": '{"a": NaN}'}, {}]
