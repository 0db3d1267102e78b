"""An answer's thinking is told apart from the answer, by tokens where the markers are tokens, however text is cut.

mlx-lm's own machine over the whole text is the other opinion, where no letters imitate a marker.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from mlx_lm.generate import TextStateMachine, make_text_state_machine
from mlx_lm.tokenizer_utils import TokenizerWrapper

from moectl.errors import BadField
from moectl.shards.chat.chat_template import _Bare
from moectl.shards.chat.tokenizer import Tokenizer, open_tokenizer
from tests.support.thinkers import ALWAYS, CHANNELS, HARMONY, NAMED, PLAIN, QWEN, THINK, XTML, make_thinker
from tests.support.tiny import write_words


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tokenizer]:
    def make(template: str, added: Sequence[str] = THINK, **config: Any) -> Tokenizer:
        return make_thinker(tmp_path_factory.mktemp("tokenizer"), template, added, **config)

    return make


def ask(tokenizer: Tokenizer, text: str = "hello", **more: Any) -> list[int]:
    return tokenizer.encode_chat([{"role": "user", "content": text}], **more)


def part(tokenizer: Tokenizer, tokens: Sequence[int], prompt: Sequence[int] | None) -> tuple[str, str]:
    """Return the thinking and the answer of these tokens."""
    stream = tokenizer.stream_answer(prompt)
    parts = [*map(stream.feed, tokens), stream.finish()]
    return "".join(p.thinking for p in parts), "".join(p.text for p in parts)


def spell(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the tokens of a text's letters: none of them is a marker."""
    return [token for letter in text for token in tokenizer._tokens.encode(letter, add_special_tokens=False).ids]


CASES = [
    (QWEN, THINK, "<think>\nI guess.\n</think>\n\nIt is 4.", ("I guess.", "It is 4.")),
    (QWEN, THINK, "It is 4.", ("", "It is 4.")),
    (QWEN, THINK, "  indented", ("", "  indented")),
    (QWEN, THINK, "<think>\n\n</think>\n\nIt is 4.", ("", "It is 4.")),
    (QWEN, THINK, "<think>never ends\n", ("never ends", "")),
    (QWEN, THINK, "a</think>b", ("", "a</think>b")),
    (QWEN, THINK, "<think>one</think>two<think>three</think>four", ("onethree", "twofour")),
    (QWEN, THINK, "<think>世界 😀</think>世界", ("世界 😀", "世界")),
    (ALWAYS, THINK, "I guess.\n</think>\n\nIt is 4.", ("I guess.", "It is 4.")),
    (ALWAYS, THINK, "<think>\nI guess.\n\nSo\n</think>4", ("I guess.\n\nSo", "4")),
    (ALWAYS, THINK, "cut in the middle", ("cut in the middle", "")),
    (ALWAYS, (), "as text</think>4", ("as text", "4")),
    (QWEN, (), "<think>as text</think>4 < 5 </thin", ("as text", "4 < 5 </thin")),
    (PLAIN, (), "<think>x</think>y", ("", "<think>x</think>y")),
    (PLAIN, ("[THINK]", "[/THINK]"), "[THINK]x[/THINK]y", ("x", "y")),
    (
        PLAIN,
        ("<|START_THINKING|>", "<|END_THINKING|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>"),
        "<|START_THINKING|>x<|END_THINKING|><|START_RESPONSE|>y<|END_RESPONSE|>",
        ("x", "y"),
    ),
    (
        PLAIN + "{# <seed:think></seed:think> #}",
        (*THINK, "<seed:think>", "</seed:think>"),
        "<seed:think>x</seed:think>y<think>",
        ("x", "y<think>"),
    ),
    (PLAIN, ("<longcat_think>", "</longcat_think>"), "<longcat_think>x</longcat_think>\ny", ("x", "y")),
    (PLAIN, ("<|channel>", "<channel|>"), "<|channel>thought\nx<channel|>y", ("x", "y")),
    (PLAIN, ("<|channel>", "<channel|>"), "<|channel>other\nx<channel|>y", ("", "<|channel>other\nx<channel|>y")),
    (
        PLAIN,
        XTML,
        "<|open|>think<|sep|>x<|close|>think<|sep|><|open|>response<|sep|>y<|close|>response<|sep|>",
        ("x", "y"),
    ),
    (
        HARMONY,
        CHANNELS,
        "<|channel|>analysis<|message|>x<|end|><|start|>assistant<|channel|>final<|message|>y",
        ("x", "y"),
    ),
    (HARMONY, CHANNELS, "<|channel|>final<|message|>y", ("", "y")),
    (HARMONY, CHANNELS, "<|channel|>analysis<|message|>x", ("x", "")),
    (HARMONY, CHANNELS, "no channels at all", ("", "no channels at all")),
    (
        HARMONY,
        CHANNELS,
        "<|channel|>analysis<|message|>x<|end|><|start|>assistant<|channel|>commentary to=f<|message|>{}",
        ("x", "<|channel|>commentary to=f<|message|>{}"),
    ),
]


@pytest.mark.parametrize(("template", "added", "answer", "wanted"), CASES)
def test_thinking_is_apart(
    make: Callable[..., Tokenizer], template: str, added: Sequence[str], answer: str, wanted: tuple[str, str]
) -> None:
    tokenizer = make(template, added)
    tokens = tokenizer._tokens.encode(answer, add_special_tokens=False).ids
    assert part(tokenizer, tokens, ask(tokenizer)) == wanted
    assert part(tokenizer, tokens, None) == ("", answer)  # a raw text's continuation has no parts


def test_messages_of_muse_spark(make: Callable[..., Tokenizer]) -> None:
    added = ("<|start|>", "<|message|>", "<|eom|>", "<|eot|>")
    tokenizer = make(PLAIN, added, chat_template_type="muse_spark")
    for answer, wanted in (
        ("to=self<|message|>x<|eom|><|start|>assistant to=user<|message|>y", ("x", "y")),
        ("to=user<|message|>y", ("", "y")),
        ("no header at all", ("", "no header at all")),
    ):
        tokens = tokenizer._tokens.encode(answer, add_special_tokens=False).ids
        assert part(tokenizer, tokens, ask(tokenizer)) == wanted


@pytest.mark.parametrize(
    ("template", "added", "opening", "closing"),
    [
        (QWEN, THINK, "<think>", "</think>"),
        (HARMONY, CHANNELS, "<|channel|>analysis<|message|>", "<|end|>"),
        (PLAIN, ("<|channel>", "<channel|>"), "<|channel>thought", "<channel|>"),
    ],
)
def test_letters_that_imitate_a_marker_are_text(
    make: Callable[..., Tokenizer], template: str, added: Sequence[str], opening: str, closing: str
) -> None:
    tokenizer = make(template, added)
    begin, end = (tokenizer._tokens.encode(text, add_special_tokens=False).ids for text in (opening, closing))
    tokens = [*begin, *spell(tokenizer, f"a{closing}b{opening}"), *end, *spell(tokenizer, f"c{opening}d{closing}")]
    assert part(tokenizer, tokens, ask(tokenizer)) == (f"a{closing}b{opening}", f"c{opening}d{closing}")


def test_a_marker_may_be_an_ordinary_token(tmp_path: Path) -> None:
    words = ("<think>", "</think>", "<", "think", ">", "x", "y")
    numbers = {word: number for number, word in enumerate(words, 10)}
    write_words(tmp_path, numbers)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }} <think>")
    tokenizer = open_tokenizer(tmp_path)
    prompt, said = (
        [numbers[word] for word in text.split()] for text in ("x <think>", "x < think > </think> y < think >")
    )
    assert tokenizer.stream_answer(prompt).is_thinking
    assert part(tokenizer, said, prompt) == ("x < think >", "y < think >")


@pytest.mark.parametrize("text", ["what is <think>", "<think>", "<think>\n", "</think>", "a<think>b</think><think>"])
def test_markers_in_a_question_change_nothing(make: Callable[..., Tokenizer], text: str) -> None:
    for template, wanted in ((QWEN, ("", "4")), (ALWAYS, ("4", ""))):
        tokenizer = make(template)
        assert part(tokenizer, tokenizer.encode("4"), ask(tokenizer, text)) == wanted


@given(
    pieces=st.lists(
        st.sampled_from(["<think>", "</think>", "<", "think>", " \n", "x", "é", "😀", "</", "thin", "k>"]),
        max_size=12,
    )
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_parts_are_those_of_the_whole_text(make: Callable[..., Tokenizer], pieces: list[str]) -> None:
    tokenizer = make_once(make, QWEN)
    tokens = [
        token
        for piece in pieces
        for token in (
            tokenizer._tokens.encode(piece, add_special_tokens=False).ids if piece in THINK else spell(tokenizer, piece)
        )
    ]
    # mlx-lm's machine over the same text, with other letters where no token is a marker.
    text = "".join(piece if piece in THINK else piece.replace("<", "\x01") for piece in pieces)
    wrapper = TokenizerWrapper(_Bare(tokenizer._tokens, QWEN, {}), lambda _: None)
    state, segments = TextStateMachine.split(make_text_state_machine(wrapper).make_state(), text)
    _, rest, last = TextStateMachine.flush(state)
    wanted = {"normal": "", "reasoning": ""}
    for kind, said in [*segments, (last, rest)]:
        wanted[kind] += said
    thinking, answer = part(tokenizer, tokens, ask(tokenizer))

    def bare(text: str) -> str:
        return "".join(text.split()).replace("\x01", "<")

    assert bare(answer) == bare(wanted["normal"])
    # The second beginning of the same thinking is a marker here, and text there.
    assert bare(thinking) == bare(wanted["reasoning"].replace("<think>", ""))


_made: dict[str, Tokenizer] = {}


def make_once(make: Callable[..., Tokenizer], template: str) -> Tokenizer:
    if template not in _made:
        _made[template] = make(template)
    return _made[template]


def test_a_stream_knows_whether_it_thinks(make: Callable[..., Tokenizer]) -> None:
    tokenizer = make(ALWAYS)
    stream = tokenizer.stream_answer(ask(tokenizer))
    assert stream.is_thinking
    for token in tokenizer.encode("x</think>"):
        stream.feed(token)
    assert not stream.is_thinking
    assert not tokenizer.stream_answer(None).is_thinking


@pytest.mark.parametrize(
    ("template", "added", "thinks"), [(QWEN, THINK, True), (HARMONY, CHANNELS, True), (PLAIN, (), False)]
)
def test_whether_a_model_thinks_at_all(
    make: Callable[..., Tokenizer], template: str, added: Sequence[str], thinks: bool
) -> None:
    assert make(template, added).thinks is thinks


# On and off.


@pytest.mark.parametrize(
    ("template", "added", "think", "options", "end"),
    [
        (QWEN, THINK, None, {}, "assistant\n"),
        (QWEN, THINK, True, {}, "assistant\n"),
        (QWEN, THINK, False, {}, "<think>\n\n</think>\n\n"),
        (QWEN, THINK, None, {"enable_thinking": False}, "<think>\n\n</think>\n\n"),
        (QWEN, THINK, True, {"enable_thinking": False}, "<think>\n\n</think>\n\n"),
        (QWEN, THINK, None, {"reasoning_effort": "none"}, "<think>\n\n</think>\n\n"),
        (QWEN, THINK, None, {"reasoning_effort": "low", "unknown": [1]}, "assistant\n"),
        (ALWAYS, THINK, None, {}, "<think>\n"),
        (ALWAYS, THINK, True, {"reasoning_effort": "none"}, "<think>\n"),
        (NAMED, THINK, None, {}, "</think>"),
        (NAMED, THINK, True, {}, "<think>"),
        (NAMED, THINK, False, {"enable_thinking": True}, "</think>"),
        (HARMONY, CHANNELS, True, {}, "<|start|>assistant"),
        (PLAIN, THINK, False, {}, "assistant"),
        (PLAIN, (), False, {}, "assistant"),
    ],
)
def test_thinking_is_turned_on_and_off(
    make: Callable[..., Tokenizer], template: str, added: Sequence[str], think: bool | None, options: Any, end: str
) -> None:
    tokenizer = make(template, added)
    assert tokenizer.decode(ask(tokenizer, think=think, options=options)).endswith(end)


def test_effort_reaches_a_template_that_knows_it(make: Callable[..., Tokenizer]) -> None:
    tokenizer = make(HARMONY, CHANNELS)
    assert "Reasoning: medium" in tokenizer.decode(ask(tokenizer))
    assert "Reasoning: high" in tokenizer.decode(ask(tokenizer, options={"reasoning_effort": "high"}))
    assert "Reasoning: none" in tokenizer.decode(ask(tokenizer, options={"reasoning_effort": "none"}))


@pytest.mark.parametrize(
    ("template", "added", "think", "reason", "hint"),
    [
        (PLAIN, (), True, "does not think", "leave it out"),
        (PLAIN, THINK, True, "does not think", "leave it out"),
        (ALWAYS, THINK, False, "cannot be turned off", "hide its thinking"),
        (HARMONY, CHANNELS, False, "cannot be turned off", "choose a low reasoning_effort"),
    ],
)
def test_a_switch_that_a_model_does_not_have(
    make: Callable[..., Tokenizer], template: str, added: Sequence[str], think: bool, reason: str, hint: str
) -> None:
    tokenizer = make(template, added)
    with pytest.raises(BadField, match=reason) as caught:
        ask(tokenizer, think=think)
    assert caught.value.param == "think"
    assert hint in (caught.value.hint or "")
    assert ask(tokenizer, options={"reasoning_effort": "low"})  # what the hint says


def test_a_program_of_mlx_lm_takes_the_same_options(make: Callable[..., Tokenizer]) -> None:
    tokenizer = make("", chat_template_type="deepseek_v32")
    assert tokenizer.decode(ask(tokenizer)).endswith("<think>")
    assert tokenizer.decode(ask(tokenizer, think=False)).endswith("</think>")
    assert tokenizer.decode(ask(tokenizer, options={"reasoning_effort": "none", "unknown": 1})).endswith("</think>")


def test_thinking_of_an_earlier_turn_is_the_templates_affair(make: Callable[..., Tokenizer]) -> None:
    talk = [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4", "reasoning_content": "I add."},
        {"role": "user", "content": "Sure?"},
    ]
    assert "I add." not in (tokenizer := make(QWEN)).decode(tokenizer.encode_chat(talk))
    kept = QWEN.replace(" and loop.last", "")
    assert "<think>I add.</think>4" in (tokenizer := make(kept)).decode(tokenizer.encode_chat(talk))
