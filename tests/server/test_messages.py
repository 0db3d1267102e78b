"""Anthropic's Messages: what is read of a body, what Anthropic's own client makes of the replies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from moectl.engine.request import Request
from moectl.errors import BadField
from moectl.server import messages
from tests.server.test_http import KEY, Site, expected, run_site
from tests.support.fake_cluster import ENDS_AFTER, MODEL, THOUGHTS
from tests.support.recorded import read_recorded

HELLO = {"max_tokens": 5, "messages": [{"role": "user", "content": "hello"}]}


def say(content: Any, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": content}


def read(**fields: Any) -> Request:
    [request] = messages.read_messages({**HELLO, **fields}, "tiny", MODEL).requests
    return request


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    yield from run_site(tmp_path_factory.mktemp("site") / "run" / "s", KEY)


@pytest.fixture
def client(site: Site) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=site.url, api_key=KEY, max_retries=0) as made:
        yield made


def ask(client: anthropic.Anthropic, text: str, **more: Any) -> Any:
    told = [{"role": "user", "content": text}]
    return client.messages.create(**{"model": "tiny", "max_tokens": 5, "messages": told, **more})


def test_every_field_reaches_the_request() -> None:
    blocks = [{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Be kind."}]
    request = read(system=blocks, stop_sequences=["a"], temperature=0.5, top_p=0.9, top_k=40)
    assert request.messages is not None
    assert request.messages[0] == {"role": "system", "content": "Be brief.\nBe kind."}
    assert (request.max_tokens, request.stop, request.temperature) == (5, ("a",), 0.5)
    assert (request.top_p, request.top_k) == (0.9, 40)
    assert read(max_tokens=128_000).max_tokens == MODEL.max_seq_len
    assert read(output_config={"effort": "high"}).template_options == {"reasoning_effort": "high"}


@pytest.mark.parametrize(("kind", "on"), [("enabled", True), ("disabled", False)])
def test_thinking_is_an_option_of_the_template(kind: str, on: bool) -> None:
    assert read(thinking={"type": kind}).template_options == {"enable_thinking": on, "thinking": on}
    assert read(thinking={"type": kind}).think is None
    assert read(thinking={"type": "adaptive"}) == read()


def test_a_recorded_request_of_claude_code() -> None:
    [request] = messages.read_messages(
        {**read_recorded("claude-code-2.1.332"), "model": "tiny"}, "tiny", MODEL
    ).requests
    told = request.messages
    assert told is not None
    assert [message["role"] for message in told] == ["system", "user", "system", "assistant", "tool"]
    assert told[0]["content"].startswith("You are a Claude agent")  # without what differs between sessions
    assert told[1]["content"].endswith("\nRun it")
    [call] = told[3]["tool_calls"]
    assert call["function"] == {"name": "Bash", "arguments": {"command": "echo one-two", "description": "Bash"}}
    assert told[4] == {"role": "tool", "tool_call_id": call["id"], "content": "one-two", "name": "Bash"}
    assert request.tool_names == ("Bash",)
    assert request.must_call == ()
    assert request.max_tokens == MODEL.max_seq_len  # it asked for 32,000


TOOL: Any = {"name": "add", "description": "Add", "input_schema": {"type": "object", "properties": {"a": {}}}}


@pytest.mark.parametrize(
    ("choice", "must_call", "parallel"),
    [
        ({"type": "auto"}, (), True),
        ({"type": "any"}, ("add", "sub"), True),
        ({"type": "tool", "name": "sub"}, ("sub",), True),
        ({"type": "auto", "disable_parallel_tool_use": True}, (), False),
    ],
)
def test_tools_and_the_choice_among_them(choice: Any, must_call: tuple[str, ...], parallel: bool) -> None:
    given = [TOOL, {**TOOL, "name": "sub", "type": "custom"}, {"type": "web_search_20250305", "name": "web_search"}]
    request = read(tools=given, tool_choice=choice)
    assert request.tool_names == ("add", "sub")
    assert request.tools[0]["function"]["parameters"] == TOOL["input_schema"]
    assert (request.must_call, request.parallel_calls) == (must_call, parallel)
    assert read(tools=given, tool_choice={"type": "none"}).tools == ()


def test_what_came_before_is_told_in_its_order() -> None:
    past: Any = [
        say("2+3?"),
        say(
            [
                {"type": "thinking", "thinking": "I add.", "signature": "x"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "Let me see."},
                {"type": "tool_use", "id": "t1", "name": "add", "input": {"a": 2}},
                {"type": "tool_use", "id": "t2", "name": "add", "input": {}},
            ],
            "assistant",
        ),
        say(
            [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "5"}]},
                {"type": "tool_result", "tool_use_id": "t2", "is_error": True, "content": "no"},
                {"type": "text", "text": "Go on."},
            ]
        ),
    ]
    told = read(messages=past).messages
    assert told is not None
    assert [message["role"] for message in told] == ["user", "assistant", "tool", "tool", "user"]
    assert (told[1]["reasoning_content"], told[1]["content"]) == ("I add.", "Let me see.")
    assert [call["id"] for call in told[1]["tool_calls"]] == ["t1", "t2"]
    assert [message["content"] for message in told[2:]] == ["5", "The tool failed:\nno", "Go on."]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"max_tokens": 0}, "max_tokens should be 1 or more"),
        ({"stop_sequences": 5}, "stop_sequences should be a string or a list"),
        ({"messages": 5}, "messages should be a list, it is a number"),
        ({"messages": [5]}, "messages[0] should be an object"),
        ({"messages": [say("x", "tool")]}, "messages[0].role should be user, assistant or system"),
        ({"messages": [say(5)]}, "messages[0].content should be a list"),
        ({"messages": [say([{"type": "image"}])]}, 'messages[0].content[0].type should be "text"'),
        ({"messages": [say([{"type": "x"}], "assistant")]}, "messages[0].content[0].type should be one of"),
        ({"system": [{"type": "text", "text": 5}]}, "system[0].text should be a string"),
        ({"thinking": {"type": "hard"}}, "thinking.type should be one of enabled, disabled, adaptive"),
        ({"output_config": {"effort": "huge"}}, "output_config.effort should be one of"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type should be one of json_schema"),
        ({"tool_choice": {"type": "some"}}, "tool_choice.type should be one of auto, any, none, tool"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema should be an object"),
        (
            {"messages": [say([{"type": "tool_result", "tool_use_id": "x", "content": "y"}])]},
            "messages[0].content[0].tool_use_id should name a call before it",
        ),
        ({"messages": [say([{"type": "tool_use", "id": "", "name": "f", "input": {}}], "assistant")]},
         "messages[0].content[0].id should be a text"),
        ({"messages": [say([{"type": "tool_use", "id": "x", "name": "f", "input": 5}], "assistant")]},
         "messages[0].content[0].input should be an object"),
        ({"messages": [say([{"type": "tool_result", "is_error": 5}])]},
         "messages[0].content[0].is_error should be true or false"),
        ({"tools": [{"type": "bash_20250124"}, {**TOOL, "input_schema": {"type": "array"}}]},
         'tools[1].input_schema.type should be "object"'),
        ({"mcp_servers": [{}]}, "mcp_servers is not supported"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_anthropics_words(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(BadField) as raised:
        read(**fields)
    assert str(raised.value).startswith(said)
    assert raised.value.param == said.split()[0]


def test_a_message(client: anthropic.Anthropic) -> None:
    done = ask(client, "hello")
    assert [block.model_dump(exclude_none=True) for block in done.content] == [{"type": "text", "text": expected(5)}]
    assert (done.model, done.role, done.stop_reason, done.stop_sequence) == ("tiny", "assistant", "max_tokens", None)
    usage = done.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (4, 3, 5)
    assert ask(client, "hello", max_tokens=100).stop_reason == "end_turn"


def test_a_streamed_message_is_the_whole_one(client: anthropic.Anthropic) -> None:
    whole = ask(client, "ponder", max_tokens=100)
    told: Any = [{"role": "user", "content": "ponder"}]
    with client.messages.stream(model="tiny", max_tokens=100, messages=told) as stream:
        kinds = [event.type for event in stream]
        streamed = stream.get_final_message()
    blocks = [block.model_dump(exclude={"parsed_output"}) for block in streamed.content]
    assert blocks == [block.model_dump() for block in whole.content]
    assert streamed.stop_reason == whole.stop_reason
    assert streamed.usage == whole.usage
    assert [block.type for block in whole.content] == ["thinking", "text"]
    assert whole.content[0].thinking == expected(THOUGHTS)
    assert expected(THOUGHTS) + whole.content[1].text == expected(ENDS_AFTER)
    assert (kinds[0], kinds[-2:], kinds.count("content_block_stop")) == (
        "message_start",
        ["message_delta", "message_stop"],
        2,
    )


def test_a_tool_is_called_and_answers(client: anthropic.Anthropic) -> None:
    past: list[Any] = [{"role": "user", "content": "hello"}]
    more: Any = {"model": "tiny", "max_tokens": 100, "tools": [TOOL, {**TOOL, "name": "sub"}]}
    whole = client.messages.create(messages=past, **more)
    with client.messages.stream(messages=past, **more) as stream:
        for _ in stream:
            pass
        streamed = stream.get_final_message()
    calls: list[Any] = []
    for done in (whole, streamed):
        assert done.stop_reason == "tool_use"
        assert [block.type for block in done.content] == ["text", "tool_use", "tool_use"]
        calls = [block for block in done.content if block.type == "tool_use"]
        assert [(call.id, call.name, call.input) for call in calls] == [
            ("call_0", "add", {"a": 2}),
            ("call_1", "sub", {"a": 2}),
        ]
    results = [{"type": "tool_result", "tool_use_id": call.id, "content": "4"} for call in calls]
    past += [{"role": "assistant", "content": whole.content}, {"role": "user", "content": results}]
    assert client.messages.create(messages=past, **more).stop_reason == "end_turn"


def test_a_stop_sequence_is_told(client: anthropic.Anthropic) -> None:
    done = ask(client, "hello", max_tokens=100, stop_sequences=["END"])
    assert (done.stop_reason, done.stop_sequence) == ("stop_sequence", "END")


def test_tokens_are_counted_without_an_answer(client: anthropic.Anthropic, site: Site) -> None:
    told: Any = [{"role": "user", "content": "hello"}]
    assert client.messages.count_tokens(model="tiny", messages=told).input_tokens == 7
    assert site.cluster.requests[-1].max_tokens == 0
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        client.messages.count_tokens(model="tiny", messages=[{"role": "user", "content": "refuse"}])


def test_a_key_comes_either_way(site: Site) -> None:
    for keys in ({"api_key": KEY}, {"auth_token": KEY}):
        with anthropic.Anthropic(base_url=site.url, max_retries=0, **keys) as client:  # type: ignore[arg-type]
            assert ask(client, "hello").content
    with anthropic.Anthropic(base_url=site.url, api_key="wrong", max_retries=0) as client:
        with pytest.raises(anthropic.AuthenticationError) as raised:
            ask(client, "hello")
        assert raised.value.body["error"]["type"] == "authentication_error"  # type: ignore[index]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("text", "error", "kind"),
    [
        ("refuse", anthropic.BadRequestError, "invalid_request_error"),
        ("full", anthropic.RateLimitError, "rate_limit_error"),
        ("stopping", anthropic.InternalServerError, "api_error"),
        ("lose", anthropic.APIStatusError, "api_error"),
        ("bug", anthropic.APIStatusError, "api_error"),
        ("unfinished", anthropic.APIStatusError, "api_error"),
    ],
)
def test_a_broken_off_message_is_an_error(
    client: anthropic.Anthropic, text: str, error: type[Exception], kind: str, stream: bool
) -> None:
    with pytest.raises(error) as raised:
        for _ in ask(client, text, max_tokens=100, stream=stream):
            pass
    body = raised.value.body  # type: ignore[attr-defined]
    assert (body["type"], body["error"]["type"]) == ("error", kind)
    assert "secret" not in str(raised.value)


def test_an_unknown_model_is_an_error(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="not served here"):
        ask(client, "hello", model="claude-other")


def test_silence_is_filled_with_comments(site: Site, client: anthropic.Anthropic) -> None:
    body = {**HELLO, "messages": [{"role": "user", "content": "slow"}], "max_tokens": 2, "stream": True}
    with site.http() as http:
        lines = http.post(messages.PATH, json=body).text.splitlines()
    assert ": still working" in lines
    names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    assert names[0] == "message_start"
    assert names[-1] == "message_stop"
    kinds = [event.type for event in ask(client, "slow", max_tokens=2, stream=True)]
    assert kinds == names


def test_a_schema_is_named_by_its_place_here() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert read(output_config={"format": {"type": "json_schema", "schema": schema}}).schema == schema
    with pytest.raises(BadField, match=r"output_config.format.schema.properties.a.not cannot be enforced"):
        read(output_config={"format": {"type": "json_schema", "schema": {"properties": {"a": {"not": {}}}}}})
