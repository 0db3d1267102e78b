"""The Responses API: what is read of a body, what OpenAI's own client makes of the replies."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from moectl.engine.request import MAX_MESSAGES, Request
from moectl.errors import BadField
from moectl.server import responses
from tests.server.test_http import KEY, Site, expected, run_site
from tests.support.fake_cluster import ENDS_AFTER, MODEL, THOUGHTS
from tests.support.recorded import read_recorded

TOOL: Any = {"type": "function", "name": "add", "description": "Add", "parameters": {"type": "object"}, "strict": False}


CALL: Any = {"type": "function_call", "call_id": "c1", "name": "add", "arguments": "{}"}


def read(given: Any = "hello", **fields: Any) -> Request:
    [request] = responses.read_responses({"input": given, **fields}, "tiny", MODEL).requests
    return request


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    yield from run_site(tmp_path_factory.mktemp("site") / "run" / "s", KEY)


@pytest.fixture
def client(site: Site) -> Iterator[openai.OpenAI]:
    with site.client() as made:
        yield made


def test_every_field_reaches_the_request() -> None:
    request = read(
        instructions="Be brief.", max_output_tokens=9, temperature=0.5, top_p=0.9, reasoning={"effort": "high"}
    )
    assert request.messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello"},
    )
    assert (request.max_tokens, request.temperature, request.top_p) == (9, 0.5, 0.9)
    assert request.template_options == {"reasoning_effort": "high"}
    assert read().max_tokens == read(max_output_tokens=10**9).max_tokens == MODEL.max_seq_len


def test_a_recorded_request_of_codex() -> None:
    [request] = responses.read_responses({**read_recorded("codex-0.171.0"), "model": "tiny"}, "tiny", MODEL).requests
    told = request.messages
    assert told is not None
    assert [message["role"] for message in told] == ["system", "system", "user", "user", "assistant", "tool"]
    [call] = told[4]["tool_calls"]
    assert call["function"] == {"name": "exec_command", "arguments": {"cmd": "echo one-two"}}
    assert told[5]["tool_call_id"] == call["id"]
    assert request.tool_names == ("exec_command",)  # neither the namespace nor the search of OpenAI's servers


def test_items_of_one_turn_become_one_message() -> None:
    def call(number: int) -> dict[str, Any]:
        return {"type": "function_call", "call_id": f"c{number}", "name": "add", "arguments": '{"a": 2}'}

    told = read(
        [
            {"role": "user", "content": "2+3?"},
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "I add."}]},
            {"role": "assistant", "content": [{"type": "output_text", "text": "Let me see."}]},
            call(1),
            call(2),
            {"type": "function_call_output", "call_id": "c1", "output": "5"},
            {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "6"}]},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Sure."}], "encrypted_content": "x"},
            {"type": "reasoning", "summary": [], "encrypted_content": "only OpenAI can read it"},
            {"role": "assistant", "content": "5 and 6"},
            {"role": "assistant", "content": "Done."},
        ]
    ).messages
    assert told is not None
    assert [message["role"] for message in told] == ["user", "assistant", "tool", "tool", "assistant", "assistant"]
    assert (told[1]["reasoning_content"], told[1]["content"]) == ("I add.", "Let me see.")
    assert [each["id"] for each in told[1]["tool_calls"]] == ["c1", "c2"]
    assert [message["content"] for message in told[2:]] == ["5", "6", "5 and 6", "Done."]
    assert told[4]["reasoning_content"] == "Sure."


@pytest.mark.parametrize(
    ("choice", "names", "must_call"),
    [
        ("auto", ("add", "sub"), ()),
        ("none", (), ()),
        ("required", ("add", "sub"), ("add", "sub")),
        ({"type": "function", "name": "sub"}, ("add", "sub"), ("sub",)),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "sub"}]},
            ("sub",),
            ("sub",),
        ),
    ],
)
def test_tools_and_the_choice_among_them(choice: Any, names: tuple[str, ...], must_call: tuple[str, ...]) -> None:
    request = read(tools=[TOOL, {**TOOL, "name": "sub"}, {"type": "web_search"}], tool_choice=choice)
    assert (request.tool_names, request.must_call) == (names, must_call)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id is not supported: moectl stores no responses"),
        ({"conversation": "conv_1"}, "conversation is not supported"),
        ({"prompt": {"id": "p"}}, "prompt is not supported"),
        ({"background": True}, "background is not supported"),
        ({"top_logprobs": 99}, "top_logprobs should be between 0 and 20"),
        ({"include": "x"}, "include should be a list"),
        ({"input": [{"role": "user", "content": "x"}] * (MAX_MESSAGES + 1)}, "input should be shorter"),
        ({"input": [{"type": "function_call_output", "output": "5"}]}, "input[0].call_id should be a text"),
        ({"input": [CALL, {**CALL, "name": ""}]}, "input[1].name should be a text"),
        ({"input": [{**CALL, "arguments": 5}]}, "input[0].arguments should be a JSON object"),
        ({"tools": [{"type": "web_search"}, {**TOOL, "parameters": 5}]}, "tools[1].parameters should be an object"),
        ({"max_output_tokens": 0}, "max_output_tokens should be 1 or more"),
        ({"input": 5}, "input should be a list, it is a number"),
        ({"input": [5]}, "input[0] should be an object"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type is item_reference"),
        ({"input": [{"type": "web_search_call"}]}, "input[0].type should be one of message, reasoning"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type should be"),
        ({"instructions": "x", "input": [{"role": "robot", "content": "x"}]}, "input[0].role should be one of"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort should be one of"),
        ({"tool_choice": {"type": "web_search"}, "tools": [TOOL]}, "tool_choice should name a function"),
        ({"instructions": 5}, "instructions should be a string"),
    ],
)
def test_what_is_wrong_is_said_in_the_apis_words(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(BadField) as raised:
        read(**{"given": "hello", **{{"input": "given"}.get(name, name): value for name, value in fields.items()}})
    assert str(raised.value).startswith(said)
    assert raised.value.param == said.split()[0]


def test_what_the_hints_say_is_answered(client: openai.OpenAI) -> None:
    past: list[Any] = [{"role": "user", "content": "hello"}]
    first = client.responses.create(model="tiny", input=past)
    more: Any = [{"role": "user", "content": "again"}]
    with pytest.raises(openai.BadRequestError, match="send the whole conversation as input"):
        client.responses.create(model="tiny", previous_response_id=first.id, input=more)
    assert client.responses.create(model="tiny", input=past + first.output + more).output_text
    named: list[Any] = [{"type": "item_reference", "id": first.output[0].id}]
    with pytest.raises(openai.BadRequestError, match="send the item itself"):
        client.responses.create(model="tiny", input=named)


def test_a_response(client: openai.OpenAI) -> None:
    done = client.responses.create(model="tiny", input="hello", metadata={"a": "b"})
    assert (done.status, done.output_text, done.error) == ("completed", expected(ENDS_AFTER), None)
    assert done.usage is not None
    assert done.usage.model_dump(exclude_none=True) == {
        "input_tokens": 7,
        "input_tokens_details": {"cached_tokens": 3},
        "output_tokens": ENDS_AFTER,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 7 + ENDS_AFTER,
    }
    assert (done.metadata, done.tools, done.previous_response_id) == ({"a": "b"}, [], None)


def test_a_cut_response_says_so(client: openai.OpenAI) -> None:
    done = client.responses.create(model="tiny", input="hello", max_output_tokens=3)
    assert done.incomplete_details is not None
    assert (done.status, done.incomplete_details.reason, done.output_text) == (
        "incomplete",
        "max_output_tokens",
        expected(3),
    )
    [*_, last] = client.responses.create(model="tiny", input="hello", max_output_tokens=3, stream=True)
    assert last.type == "response.incomplete"


def test_a_streamed_response_is_the_whole_one(client: openai.OpenAI) -> None:
    whole = client.responses.create(model="tiny", input="ponder")
    with client.responses.stream(model="tiny", input="ponder") as stream:
        events = list(stream)
        streamed = stream.get_final_response()
    thinking, message = whole.output
    assert thinking.type == "reasoning"
    assert thinking.content is not None
    assert thinking.content[0].text == expected(THOUGHTS)
    assert expected(THOUGHTS) + whole.output_text == expected(ENDS_AFTER)
    assert streamed.output_text == whole.output_text
    assert [item.type for item in streamed.output] == ["reasoning", "message"] == [thinking.type, message.type]
    assert streamed.usage == whole.usage
    assert [event.sequence_number for event in events if hasattr(event, "sequence_number")] == list(range(len(events)))
    done = [event.item.status for event in events if event.type == "response.output_item.done"]  # type: ignore[union-attr]
    assert done == ["completed", "completed"]


def test_log_probabilities(client: openai.OpenAI) -> None:
    done: Any = client.responses.create(model="tiny", input="hello", top_logprobs=2, max_output_tokens=2)
    first, second = done.output[0].content[0].logprobs
    assert (first.token, first.logprob, bytes(first.bytes)) == ("0:0 ", -0.5, b"0:0 ")
    assert [(top.token, top.logprob) for top in second.top_logprobs] == [("0:1 ", -0.5), ("0:2 ", -1.5)]
    more: Any = {"input": "ponder", "include": ["message.output_text.logprobs"], "stream": True}
    events: list[Any] = list(client.responses.create(model="tiny", **more))
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert [[odds.token for odds in delta.logprobs] for delta in deltas] == [[delta.delta] for delta in deltas]
    assert len(events[-1].response.output[1].content[0].logprobs) == ENDS_AFTER - THOUGHTS
    plain: Any = client.responses.create(model="tiny", input="hello")
    assert plain.output[0].content[0].logprobs == []


def test_a_tool_is_called_and_answers(client: openai.OpenAI) -> None:
    past: list[Any] = [{"role": "user", "content": "hello"}]
    whole = client.responses.create(model="tiny", input=past, tools=[TOOL])
    with client.responses.stream(model="tiny", input=past, tools=[TOOL]) as stream:
        kinds = [event.type for event in stream]
        streamed = stream.get_final_response()
    assert "response.function_call_arguments.delta" in kinds
    for done in (whole, streamed):
        assert done.status == "completed"
        assert [item.type for item in done.output] == ["message", "function_call"]
        call: Any = done.output[1]
        assert (call.call_id, call.name, json.loads(call.arguments)) == ("call_0", "add", {"a": 2})
    past += [*whole.output, {"type": "function_call_output", "call_id": "call_0", "output": "5"}]
    assert client.responses.create(model="tiny", input=past, tools=[TOOL]).output_text == expected(ENDS_AFTER)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("refuse", openai.BadRequestError),
        ("full", openai.RateLimitError),
        ("lose", openai.InternalServerError),
        ("bug", openai.InternalServerError),
    ],
)
def test_an_error_has_its_status(client: openai.OpenAI, text: str, error: type[Exception]) -> None:
    with pytest.raises(error) as raised:
        client.responses.create(model="tiny", input=text)
    assert raised.value.param == ("input" if text == "refuse" else None)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("text", "said"), [("lose", "rank 1 was lost"), ("bug", "a bug in moectl")])
def test_a_broken_off_response_has_failed(client: openai.OpenAI, text: str, said: str) -> None:
    [*_, last] = client.responses.create(model="tiny", input=text, stream=True)
    assert last.type == "response.failed"
    assert last.response.status == "failed"
    assert last.response.error is not None
    assert last.response.error.code == "server_error"
    assert said in last.response.error.message
    assert "secret" not in last.response.error.message
    [item] = last.response.output
    assert item.status == "incomplete"  # type: ignore[union-attr]


def test_silence_is_filled_with_comments(site: Site, client: openai.OpenAI) -> None:
    with site.http() as http:
        body = {"input": "slow", "max_output_tokens": 2, "stream": True}
        lines = http.post(responses.PATH, json=body).text.splitlines()
    assert ": still working" in lines
    names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    heard = client.responses.create(model="tiny", input="slow", max_output_tokens=2, stream=True)
    assert [event.type for event in heard] == names


def test_a_schema_is_named_by_its_place_here() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "name": "answer", "strict": True, "schema": schema}
    assert read(text={"format": form}).schema == schema
    with pytest.raises(BadField, match=r"text.format.schema.properties.a.not cannot be enforced"):
        read(text={"format": {**form, "schema": {"properties": {"a": {"not": {}}}}}})
