"""Tools over two ranks, called by a model that is told of them as text: OpenAI's own client makes the round trip."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.support.ring import process_env
from tests.support.scripted_caller import AFTER, WITHOUT, write_caller

TALK: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 3?"}]


def define(name: str) -> dict[str, Any]:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": name, "parameters": schema}}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    model = write_caller(tmp_path_factory.mktemp("model") / "caller")
    command = [sys.executable, "-m", "moectl", "serve", "--local", "2", "--model", str(model), "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=process_env()) as one:
        assert one.stdout is not None
        try:
            line = one.stdout.readline()
            assert line, one.communicate()[1]
            with openai.OpenAI(base_url=json.loads(line)["url"], api_key="none", max_retries=0) as client:
                yield client
        finally:
            one.send_signal(signal.SIGINT)
            one.communicate(timeout=30)


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
