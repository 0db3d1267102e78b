"""Tools over two ranks, called by a model that is told of them as text: the official clients make the round trip."""

from __future__ import annotations

import concurrent.futures
import json
import os
import random
import signal
import string
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import openai
import pytest

from moectl.server import messages, responses
from moectl.server.http import CHAT
from tests.support.running import wait_for, workers
from tests.support.scripted_caller import ADD, AFTER, WITHOUT, write_caller
from tests.support.serving import serve

TALK: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 3?"}]


LONG = "".join(random.Random(1).choices(string.ascii_letters, k=6000))  # arguments that take a while


def define(name: str) -> dict[str, Any]:
    numbers = {"a": {"type": "integer"}, "b": {"type": "integer"}}
    schema = {"type": "object", "properties": numbers, "additionalProperties": False}
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


def test_llm_calls_a_function(client: openai.OpenAI, tmp_path: Path) -> None:
    model = {"model_id": "m", "model_name": client.models.list().data[0].id, "api_base": str(client.base_url)}
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([{**model, "supports_tools": True}]))  # JSON is YAML
    (tmp_path / "tools.py").write_text('def add(a: int, b: int) -> int:\n    "Add"\n    return a + b\n')
    done = subprocess.run(
        [sys.executable, "-m", "llm", "-m", "m", "--functions", str(tmp_path / "tools.py"), "--td", "2 + 3?"],
        env={**os.environ, "LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.strip().endswith(AFTER)
    assert "add({'a': 2, 'b': 3})" in done.stderr


# A rank that dies within a call.


def ask_long(url: str, path: str, begin: Callable[[str], None]) -> str:
    """Return the whole stream of an answer with a long call; `begin` is called once the arguments come."""
    schema = {"type": "object", "properties": {"text": {"type": "string"}}}
    tools: dict[str, Any] = {
        CHAT: {"type": "function", "function": {"name": "long", "parameters": schema}},
        responses.PATH: {"type": "function", "name": "long", "parameters": schema},
        messages.PATH: {"name": "long", "input_schema": schema},
    }
    talk = {"input" if path == responses.PATH else "messages": TALK[1:], "max_tokens": 4000}
    said = ""
    with httpx2.stream(
        "POST", f"{url}{path}", json={**talk, "tools": [tools[path]], "stream": True}, timeout=120
    ) as reply:
        for piece in reply.iter_text():
            said += piece
            if said.count("data: ") > 20:
                begin(path)
    return said


def replay(path: str, said: str) -> Any:
    """Return the arguments of the call that the protocol's own client reads from a stream; raise its error."""

    def answer(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=said.encode())

    http = httpx2.Client(transport=httpx2.MockTransport(answer))
    if path == messages.PATH:
        with anthropic.Anthropic(base_url="http://x", api_key="none", http_client=http, max_retries=0) as client:
            with client.messages.stream(model="", max_tokens=9, messages=TALK[1:]) as stream:
                [block] = stream.get_final_message().content
            return block.input  # type: ignore[union-attr]
    with openai.OpenAI(base_url="http://x", api_key="none", http_client=http, max_retries=0) as other:
        if path == CHAT:
            with other.chat.completions.stream(model="", messages=TALK) as chunks:
                message = chunks.get_final_completion().choices[0].message
            return json.loads(message.tool_calls[0].function.arguments)  # type: ignore[index]
        last: Any
        *_, last = other.responses.create(model="", input=TALK, stream=True)
        if last.type != "response.completed":
            raise openai.APIError(last.type, httpx2.Request("POST", "http://x"), body=None)
        return json.loads(last.response.output[0].arguments)


@pytest.mark.long
def test_a_lost_rank_is_a_comment_and_then_an_error_of_each_protocol(tmp_path: Path) -> None:
    model = write_caller(tmp_path / "caller", {**ADD, "long": [("long", {"text": LONG})]})
    paths = (CHAT, responses.PATH, messages.PATH)
    others = set(workers())  # of another server

    def lose_a_rank(pool: concurrent.futures.Executor, url: str) -> dict[str, str]:
        """Return what each protocol's stream says of an answer during which a rank dies."""
        begun: set[str] = set()
        asked = {path: pool.submit(ask_long, url, path, begun.add) for path in paths}
        wait_for(lambda: len(begun) == len(paths), 60)
        os.kill(max(set(workers()) - others), signal.SIGKILL)
        return {path: future.result(120) for path, future in asked.items()}

    with serve(model, "--max-restarts", "1") as url, concurrent.futures.ThreadPoolExecutor(len(paths)) as pool:
        base = url.removesuffix("/v1")
        for path, said in lose_a_rank(pool, base).items():
            assert ": moectl: " in said
            assert replay(path, said) == {"text": LONG}
        for path, said in lose_a_rank(pool, base).items():
            with pytest.raises((openai.APIError, anthropic.APIStatusError), match=r"response\.failed|lost|killed"):
                replay(path, said)
