"""Tools over two ranks, called by a model that is told of them as text: the official clients make the round trip."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from tests.support.scripted_caller import AFTER, WITHOUT, write_caller
from tests.support.serving import serve

TALK: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 3?"}]


def define(name: str) -> dict[str, Any]:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": name, "parameters": schema}}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    model = write_caller(tmp_path_factory.mktemp("model") / "caller")
    with serve(model) as url, openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, messages: list[Any] = TALK, max_tokens: int = 200, **more: Any) -> Any:
    return client.chat.completions.create(model="", messages=messages, max_tokens=max_tokens, **more)


def test_a_tool_round_trip(client: openai.OpenAI) -> None:
    assert client.models.list().data[0].model_extra["tools"] == "text"  # type: ignore[index]
    assert ask(client).choices[0].message.content == WITHOUT
    tools = [define("add")]
    first = ask(client, tools=tools).choices[0]
    assert first.finish_reason == "tool_calls"
    assert first.message.content is None
    [call] = first.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("add", {"a": 2, "b": 3})
    result = {"role": "tool", "tool_call_id": call.id, "content": "5"}
    last = ask(client, [*TALK, first.message, result], tools=tools).choices[0]
    assert (last.finish_reason, last.message.content) == ("stop", AFTER)
    for choice in ("required", {"type": "function", "function": {"name": "add"}}):
        assert ask(client, tools=tools, tool_choice=choice).choices[0].finish_reason == "tool_calls"
    assert ask(client, tools=tools, tool_choice="none").choices[0].message.content == WITHOUT


def test_the_second_turn_computes_only_what_is_new(client: openai.OpenAI) -> None:
    """By each protocol, after 8000 lines of history, which are as many tokens; another agent's turn is in between."""
    tools: Any = [define("add")]
    history = [{"role": "user", "content": "line\n" * 8000}, {"role": "assistant", "content": "Read."}, TALK[1]]
    talk: list[Any] = [TALK[0], *history]
    first = ask(client, talk, tools=tools)
    ask(client, [TALK[0], {"role": "user", "content": "another\n" * 8000}], tools=tools)
    [call] = first.choices[0].message.tool_calls
    after = [*talk, first.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "5"}]
    usage = ask(client, after, tools=tools).usage
    known = first.usage.prompt_tokens
    assert known > 8000
    assert known - 4 < usage.prompt_tokens_details.cached_tokens < usage.prompt_tokens
    flat: Any = [{"type": "function", "strict": False, **tools[0]["function"]}]
    told = client.responses.create(model="", input=talk, tools=flat).usage
    assert told is not None
    assert known - 4 < told.input_tokens_details.cached_tokens < told.input_tokens == known
    schema = tools[0]["function"]["parameters"]
    own: Any = [{"name": "add", "description": "add", "input_schema": schema}]
    with anthropic.Anthropic(base_url=str(client.base_url).removesuffix("/v1/"), api_key="none") as other:
        said = other.messages.create(model="", system="Be brief.", messages=history, tools=own, max_tokens=9).usage
    assert known - 4 < (said.cache_read_input_tokens or 0) < known
    assert said.input_tokens == known - (said.cache_read_input_tokens or 0)
    assert said.cache_creation_input_tokens == 0


def test_streamed_and_cut_calls(client: openai.OpenAI) -> None:
    tools: Any = [define("twice")]
    with client.chat.completions.stream(model="", messages=TALK, tools=tools) as stream:
        for _ in stream:
            pass
        whole = stream.get_final_completion().choices[0]
    calls = [(call.function.name, json.loads(call.function.arguments)) for call in whole.message.tool_calls or ()]
    assert (calls, whole.finish_reason) == ([("twice", {"n": 1}), ("twice", {"n": 2})], "tool_calls")
    one = ask(client, tools=tools, parallel_tool_calls=False).choices[0]
    assert [call.function.arguments for call in one.message.tool_calls] == ['{"n": 1}']
    stopped = ask(client, tools=tools, stop=["arguments", "twice"]).choices[0]  # they are in calls, not in text
    assert len(stopped.message.tool_calls) == 2
    cut = ask(client, max_tokens=3, tools=tools).choices[0]
    assert cut.finish_reason == "length"
    assert not [call for call in cut.message.tool_calls or () if call.function.arguments.endswith("}")]


def test_a_tool_round_trip_by_responses(client: openai.OpenAI) -> None:
    tools: Any = [{"type": "function", "strict": False, **define("add")["function"]}]
    assert client.responses.create(model="", input=TALK).output_text == WITHOUT
    with client.responses.stream(model="", input=TALK, tools=tools) as stream:
        for _ in stream:
            pass
        first = stream.get_final_response()
    [call] = [item for item in first.output if item.type == "function_call"]
    assert (call.name, json.loads(call.arguments)) == ("add", {"a": 2, "b": 3})
    past = [*TALK, *first.output, {"type": "function_call_output", "call_id": call.call_id, "output": "5"}]
    last = client.responses.create(model="", input=past, tools=tools)
    assert (last.status, last.output_text) == ("completed", AFTER)
    cut = client.responses.create(model="", input=TALK, max_output_tokens=1)
    assert cut.status == "incomplete"
    assert WITHOUT.startswith(cut.output_text)


def test_a_tool_round_trip_by_messages(client: openai.OpenAI) -> None:
    tools: Any = [{"name": "twice", "input_schema": {"type": "object", "properties": {"n": {"type": "integer"}}}}]
    past: list[Any] = TALK[1:]
    more: Any = {"model": "", "max_tokens": 200, "system": "Be brief."}
    with anthropic.Anthropic(base_url=str(client.base_url).removesuffix("/v1/"), api_key="none") as other:
        [text] = other.messages.create(messages=past, **more).content
        assert text.type == "text"
        assert text.text == WITHOUT
        with other.messages.stream(messages=past, tools=tools, **more) as stream:
            for _ in stream:
                pass
            first = stream.get_final_message()
        calls = [block for block in first.content if block.type == "tool_use"]
        assert [(call.name, call.input) for call in calls] == [("twice", {"n": 1}), ("twice", {"n": 2})]
        assert first.stop_reason == "tool_use"
        results = [{"type": "tool_result", "tool_use_id": call.id, "content": "4"} for call in calls]
        past = [*past, {"role": "assistant", "content": first.content}, {"role": "user", "content": results}]
        last = other.messages.create(messages=past, tools=tools, **more)
        assert (last.stop_reason, last.content[0].to_dict()["text"]) == ("end_turn", AFTER)
        usage = last.usage
        prompt = usage.input_tokens + (usage.cache_read_input_tokens or 0)
        counted = other.messages.count_tokens(model="", messages=past, tools=tools, system="Be brief.")
        assert counted.input_tokens == prompt
