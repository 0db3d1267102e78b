"""An answer's tool calls, in every format that moectl reads: told apart from text, whole, and only where they are."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import pytest
from mlx_lm import tool_parsers

from moectl.shards.chat.calls import CallPart, CallReader, open_format
from moectl.shards.chat.tokenizer import Tokenizer
from tests.shards.test_thinking import spell
from tests.support.callers import STYLES, TOOLED, Style, make_caller, make_tool
from tests.support.thinkers import PLAIN, make_thinker

STREAMED = ("json_tools", "json_tools in letters", "mistral", "kimi_k2", "gpt-oss")  # whose arguments are JSON
WANTED = [("f", {"p": "a<b", "n": 2}), ("f", {"p": "", "n": -1})]
TALK = [{"role": "user", "content": "hello"}]
TOOLS = [make_tool()]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tokenizer]:
    made: dict[Any, Tokenizer] = {}

    def make(name: str, template: str = TOOLED) -> Tokenizer:
        if (name, template) not in made:
            made[name, template] = make_caller(tmp_path_factory.mktemp("caller"), STYLES[name], template)
        return made[name, template]

    return make


def read(
    tokenizer: Tokenizer, tokens: Sequence[int], *, by_itself: bool = True, tools: Any = TOOLS
) -> tuple[str, str, list[tuple[str, Any]]]:
    """Return thinking, text and calls of an answer; what a call is that was cut is told as its text."""
    stream = tokenizer.stream_answer(tokenizer.encode_chat(TALK, tools=tools), tools)
    parts = [*map(stream.feed, tokens), stream.finish(by_itself=by_itself)]
    calls = gather([part for told in parts for part in told.calls])
    return "".join(p.thinking for p in parts), "".join(p.text for p in parts), calls


def gather(parts: Sequence[CallPart]) -> list[tuple[str, Any]]:
    calls: list[list[CallPart]] = []
    for part in parts:
        if part.index == len(calls):
            assert part.id
            calls.append([])
        assert part.index == len(calls) - 1
        calls[part.index].append(part)
    assert not any(part.ended for each in calls for part in each[:-1])
    told = [(each[0].name, "".join(part.arguments for part in each), each[-1].ended) for each in calls]
    return [(name, json.loads(arguments) if ended else arguments) for name, arguments, ended in told]


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer._tokens.encode(text, add_special_tokens=False).ids


def test_the_formats_are_all_that_there_are() -> None:
    assert {style.name for style in STYLES.values()} == {None, *(m.name for m in iter_modules(tool_parsers.__path__))}


@pytest.mark.parametrize("name", STYLES)
def test_calls_are_told_apart(make: Callable[..., Tokenizer], name: str) -> None:
    style, tokenizer = STYLES[name], make(name)
    assert tokenizer.tells_tools == "template"
    thinking, text, calls = read(tokenizer, encode(tokenizer, style.written))
    assert calls == WANTED
    assert (thinking, text.strip()) == ("hm" if name == "gpt-oss" else "", "")
    if name not in ("mistral", "gpt-oss"):  # after whose calls nothing comes
        _, text, calls = read(tokenizer, encode(tokenizer, f"<think>hm</think>Sure: {style.written}Done <"))
        assert (text.split(), calls) == (["Sure:", "Done", "<"], WANTED)


@pytest.mark.parametrize("name", STYLES)
def test_a_cut_call_is_text(make: Callable[..., Tokenizer], name: str) -> None:
    """Wherever max_tokens cuts: a call without its end is never read, since some parsers would read a wrong one."""
    style, tokenizer = STYLES[name], make(name)
    tokens = encode(tokenizer, style.written)
    for length in range(0, len(tokens), 3):
        _, text, calls = read(tokenizer, tokens[:length], by_itself=False)
        whole = [call for call in calls if isinstance(call[1], dict)]
        assert whole == WANTED[: len(whole)]
        if name not in STREAMED:
            assert calls == whole
            assert whole == [] or not style.after
        for _, arguments in calls[len(whole) :]:
            assert arguments in style.written
            assert arguments.count("{") > arguments.count("}") or arguments == ""
        assert "".join(text.split()) in "".join(style.written.split())


@pytest.mark.parametrize("name", STREAMED)
def test_arguments_come_as_they_are_written(make: Callable[..., Tokenizer], name: str) -> None:
    style, tokenizer = STYLES[name], make(name)
    tokens = encode(tokenizer, style.written)
    stream = tokenizer.stream_answer(tokenizer.encode_chat(TALK, tools=TOOLS), TOOLS)
    told = [stream.feed(token).calls for token in tokens]
    assert gather([part for parts in told for part in parts]) == WANTED
    assert sum(bool(parts) for parts in told) > 12
    assert all(len(parts) <= 1 for parts in told)


@pytest.mark.parametrize("name", STYLES)
def test_without_tools_their_markers_are_text(make: Callable[..., Tokenizer], name: str) -> None:
    style, tokenizer = STYLES[name], make(name)
    _, text, calls = read(tokenizer, encode(tokenizer, style.calls[0]), tools=[])
    assert calls == []
    assert "f" in text


@pytest.mark.parametrize(
    "body", ["", "x", "[]", "{}", '{"name": 5, "arguments": {}}', '{"name": "f"}', '{"name": "f", "argu']
)
def test_what_is_no_call_is_text(make: Callable[..., Tokenizer], body: str) -> None:
    tokenizer = make("json_tools")
    written = f"<tool_call>{body}</tool_call>"
    assert read(tokenizer, encode(tokenizer, f"a {written} b")) == ("", f"a {written}b", [])
    good = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    assert read(tokenizer, encode(tokenizer, written + good)) == ("", written, [("f", {})])


def take(body: str) -> tuple[list[tuple[str, Any]], str]:
    """Return calls and text of what stands between two markers."""
    reader = CallReader(open_format("json_tools"), TOOLS)
    parts = reader.feed(body)
    more, text = reader.close()
    return gather([*parts, *more]), text


@pytest.mark.parametrize(
    "arguments",
    ['{"n": NaN}', '{"n": 1e999}', '{"p": "\\ud800"}', '{"p": ' * 5000 + "1" + "}" * 5000, '{"p": rm}', "{]"],
    ids=lambda arguments: arguments[:20],
)
def test_hostile_arguments_are_a_call_without_end(arguments: str) -> None:
    assert take(f'{{"name": "f", "arguments": {arguments}}}') == ([("f", arguments)], "")


@pytest.mark.parametrize(
    "body",
    [
        '{"name": "f", "arguments": "rm -rf /"}',
        '{"name": "", "arguments": {}}',
        '{"name": "\\ud800", "arguments": {}}',
        '{"arguments": {"n": NaN}, "name": "f"}',
        '{"name": "' + "f" * 2000 + '", "arguments": {"n": [}}',
    ],
    ids=lambda body: body[:40],
)
def test_hostile_calls_are_text(body: str) -> None:
    assert take(body) == ([], f"<tool_call>{body}</tool_call>")


def test_what_follows_a_call_is_text() -> None:
    two = '{"name": "f", "arguments": {"n": 1}} {"name": "g", "arguments": {}}'
    assert take(two) == ([("f", {"n": 1})], '} {"name": "g", "arguments": {}}</tool_call>')
    assert take('{"arguments": {"n": 1}, "name": "f"}') == ([("f", {"n": 1})], "")  # it is read once it is whole
    assert take('{"name": "f", "arguments": {"n": 1}, "id": 5}') == ([("f", {"n": 1})], ', "id": 5}</tool_call>')


def test_hostile_texts_are_values() -> None:
    value = "</tool_call> <|im_end|> \"'\\ \u2028 \x00 {{ 7*7 }} $(reboot) }]}"
    assert take(json.dumps({"name": "f", "arguments": {"p": value}})) == ([("f", {"p": value})], "")
    body = json.dumps({"name": 'a"b', "arguments": {"p": [{"q": value}, value]}}, ensure_ascii=False)
    assert take(body) == ([('a"b', {"p": [{"q": value}, value]})], "")


@pytest.mark.parametrize("name", [name for name in STYLES if name != "gpt-oss"])
def test_a_parser_that_fails_gives_text(name: str) -> None:
    form = open_format(STYLES[name].name or "")
    for body in ("(" * 4000, "[" * 100_000, "f[ARGS]{", "call:f{p:", "<invoke", "<" * 9999, "\x00", "f(p=" * 999):
        reader = CallReader(form, TOOLS)
        begun = reader.feed(body)
        calls, text = reader.close()
        assert bool(begun or calls) != bool(text)
        for call in calls:
            assert isinstance(json.loads(call.arguments), dict)


def test_letters_are_no_markers_where_these_are_tokens(make: Callable[..., Tokenizer]) -> None:
    tokenizer = make("json_tools")
    written = STYLES["json_tools"].calls[0].strip()
    assert read(tokenizer, spell(tokenizer, written)) == ("", written, [])
    lettered = make("json_tools in letters")
    assert read(lettered, spell(lettered, written))[2] == WANTED[:1]


def test_a_call_that_its_model_does_not_close(make: Callable[..., Tokenizer]) -> None:
    """JSON is whole or none: it is read at the end of an answer that is not cut."""
    tokenizer = make("json_tools")
    open_call = STYLES["json_tools"].calls[0].partition("</tool_call>")[0]
    assert read(tokenizer, encode(tokenizer, open_call))[2] == WANTED[:1]
    other = '<tool_call>{"arguments": {"p": "x"}, "name": "f"}'
    assert read(tokenizer, encode(tokenizer, other))[2] == [("f", {"p": "x"})]
    assert read(tokenizer, encode(tokenizer, other), by_itself=False)[1:] == (other, [])
    glm = make("glm47")
    assert read(glm, encode(glm, STYLES["glm47"].calls[0].removesuffix("</tool_call>")))[2] == []


def test_a_format_without_a_parser(tmp_path: Path) -> None:
    tokenizer = make_caller(tmp_path, Style("../x", (), "", [], ""))
    assert tokenizer.tells_tools == "text"
    assert read(tokenizer, encode(tokenizer, STYLES["json_tools"].written))[2] == WANTED


def test_a_template_may_show_the_format(tmp_path: Path) -> None:
    template = TOOLED + "{# <tool_call> {{ tool_call.name }} #}"
    tokenizer = make_thinker(tmp_path, template)
    assert tokenizer.tells_tools == "template"
    assert read(tokenizer, encode(tokenizer, STYLES["json_tools"].written))[2] == WANTED


def test_models_without_a_template_for_tools(make: Callable[..., Tokenizer]) -> None:
    tokenizer = make("glm47", PLAIN)
    assert tokenizer.tells_tools == "text"
    assert read(tokenizer, encode(tokenizer, STYLES["json_tools"].written))[2] == WANTED
