"""OpenAI's JSON without HTTP: what is read, what is refused and why, what is written."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, strategies as st

from moectl import errors
from moectl.engine.protocol import Done, Generate as GenerateOrder, Token, decode, encode
from moectl.engine.request import MAX_BIASES, Request, Stats
from moectl.errors import BadField, MoectlError, PeerLost, QueueFull, UsageError
from moectl.server import openai, replies
from tests.support.fake_cluster import MODEL

SAY_HELLO = {"messages": [{"role": "user", "content": "hello"}]}


def read_chat(**fields: Any) -> openai.ApiRequest:
    return openai.read_chat({**SAY_HELLO, **fields}, "tiny", MODEL)


def read_completion(**fields: Any) -> openai.ApiRequest:
    return openai.read_completion({"prompt": "hello", **fields}, "tiny", MODEL)


def ask_form(schema: Any) -> dict[str, Any]:
    """Return a response_format of this schema."""
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}


def test_defaults_are_openais_and_greedy() -> None:
    asked = read_chat()
    assert asked == openai.ApiRequest(True, asked.requests, 1, False, False, None)
    messages = ({"role": "user", "content": "hello"},)
    assert asked.requests == (Request(0, "", MODEL.max_seq_len, temperature=0.0, messages=messages),)
    assert read_completion().requests == (Request(0, "hello", 16, temperature=0.0),)


def test_every_field_reaches_the_request() -> None:
    shared = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "presence_penalty": 1,
        "frequency_penalty": -2,
        "repetition_penalty": 1.1,
        "seed": -2,
        "stop": ["a", "b"],
        "ignore_eos": True,
        "logit_bias": {"7": -100, "8": 3.5},
    }
    expected = {
        **shared,
        "seed": 2**64 - 2,
        "stop": ("a", "b"),
        "logit_bias": ((7, -100.0), (8, 3.5)),
    }
    for asked in (read_chat(max_tokens=5, **shared), read_completion(max_tokens=5, **shared)):
        [request] = asked.requests
        assert {name: getattr(request, name) for name in expected} == expected
        assert request.max_tokens == 5


def test_forms_of_an_answer() -> None:
    person = {"type": "object", "properties": {"name": {"type": "string"}}}
    for form, schema in (
        (ask_form(person), person),
        (ask_form({"x-guidance": {"lenient": True}, **person}), person),
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_object", "schema": person}, person),
        ({"type": "text"}, None),
    ):
        assert read_chat(response_format=form).requests[0].schema == schema
        assert read_completion(response_format=form).requests[0].schema == schema


def test_strict_tools_are_checked_and_others_passed_over() -> None:
    def tool(strict: bool) -> dict[str, Any]:
        parameters = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
        return {"type": "function", "function": {"name": "f", "parameters": parameters, "strict": strict}}

    assert not read_chat(tools=[tool(False)]).requests[0].is_held
    assert read_chat(tools=[tool(False)], tool_choice="required").requests[0].is_held
    with pytest.raises(BadField, match=r"tools\[0\].function.parameters.properties.a.uniqueItems cannot be enforced"):
        read_chat(tools=[tool(True)])
    with pytest.raises(BadField, match="ignore_eos"):
        read_chat(response_format={"type": "json_object"}, ignore_eos=True)


def test_a_models_defaults_hold_where_nothing_is_said() -> None:
    model = replace(MODEL, sampling={"temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05})
    for read, body in ((openai.read_chat, SAY_HELLO), (openai.read_completion, {"prompt": "hello"})):
        [request] = read(body, "tiny", model).requests
        assert {name: getattr(request, name) for name in model.sampling} == model.sampling
        given = {"temperature": 0, "top_k": -1, "top_p": 1, "repeat_penalty": 1, "min_p": 0.1}
        [request] = read({**body, **given}, "tiny", model).requests
        assert (request.temperature, request.top_k, request.top_p, request.repetition_penalty) == (0, 0, 1, 1)
        assert request.min_p == 0.1
        [request] = read({**body, "temperature": None, "top_p": 0.5}, "tiny", model).requests
        assert (request.temperature, request.top_p) == (0.6, 0.5)


def test_options_of_the_chat_template() -> None:
    assert read_chat().requests[0].template_options == {}
    asked = read_chat(think=True, reasoning_effort="high", chat_template_kwargs={"enable_thinking": False, "date": []})
    [request] = asked.requests
    assert request.think
    assert request.template_options == {"reasoning_effort": "high", "enable_thinking": False, "date": []}
    assert decode(encode(GenerateOrder(request))) == GenerateOrder(request)
    own = {"reasoning_effort": "low"}
    assert read_chat(reasoning_effort="high", chat_template_kwargs=own).requests[0].template_options == own
    assert read_completion(think=True, reasoning_effort="low", chat_template_kwargs=own) == read_completion()


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_what_an_assistant_thought_is_kept_for_the_template(name: str) -> None:
    talk = [{"role": "assistant", "content": "4", name: "I add."}, {"role": "user", "content": "Sure?", name: "x"}]
    kept = {"role": "assistant", "content": "4", "reasoning_content": "I add."}
    assert read_chat(messages=talk).requests[0].messages == (kept, {"role": "user", "content": "Sure?"})


def test_small_print_of_fields() -> None:
    assert read_chat(max_completion_tokens=3, max_tokens=9).requests[0].max_tokens == 3
    assert read_chat(max_tokens=10**30).requests[0].max_tokens == MODEL.max_seq_len
    assert read_chat(max_tokens=4.0).requests[0].max_tokens == 4
    assert read_chat(top_k=-1).requests[0].top_k == 0
    assert read_chat(temperature=1e-30).requests[0].temperature == 0
    assert read_chat(stop="x").requests[0].stop == ("x",)
    assert read_chat(logprobs=True).requests[0].logprobs == 0
    assert read_chat(logprobs=True, top_logprobs=5).requests[0].logprobs == 5
    assert read_chat(logprobs=False).requests[0].logprobs is None
    assert read_chat(stream=True, stream_options={"include_usage": True}).include_usage
    assert read_chat(n=3, seed=2**64 - 1).requests[1].seed == 0
    assert [r.seed for r in read_chat(n=2).requests] == [None, None]
    assert read_chat(unknown={"any": ["thing"]}, user=3).n == 1
    assert read_chat(tools=[{}], tool_choice="none").n == 1
    assert read_chat(response_format={"type": "text"}, modalities=["text"], model="tiny").n == 1
    assert read_completion(echo=False, suffix="", best_of=1).n == 1


@given(st.sampled_from(["temperature", "stop", "seed", "n", "logit_bias", "max_tokens", "stream", "logprobs", "model"]))
def test_null_is_the_same_as_absent(name: str) -> None:
    assert read_chat(**{name: None}) == read_chat()
    assert read_completion(**{name: None}) == read_completion()


# What other servers take beside OpenAI's own, and clients that were written for those send.
NOTHING_SAID: dict[str, Any] = {
    "temperature": None,
    "top_p": None,
    "top_k": -1,
    "min_p": 0,
    "seed": -1,
    "stop": [""],
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1,
    "repeat_penalty": 1.0,
    "logit_bias": {},
    "n": None,
    "best_of": None,
    "logprobs": False,
    "top_logprobs": 0,
    "stream": None,
    "stream_options": None,
    "model": "",
    "user": "ada",
    "store": True,
    "metadata": {"a": "b"},
    "service_tier": "auto",
    "verbosity": "medium",
    "parallel_tool_calls": True,
    "prompt_cache_key": "x",
    "safety_identifier": "x",
    "prediction": None,
    "tools": [],
    "tool_choice": "auto",
    "functions": None,
    "function_call": "none",
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "audio": None,
    "echo": False,
    "suffix": None,
    "min_tokens": 0,
    "mirostat": 0,
    "typical_p": 1,
    "tfs_z": 1.0,
    "top_a": 0,
    "dry_multiplier": 0,
    "xtc_probability": 0.0,
    "length_penalty": 1.0,
    "use_beam_search": False,
    "stop_token_ids": [],
    "guided_json": None,
    "grammar": "",
    "cache_prompt": True,
    "keep_alive": "5m",
}


@pytest.mark.parametrize("name", NOTHING_SAID)
def test_values_that_say_nothing_are_the_same_as_none(name: str) -> None:
    for value in (NOTHING_SAID[name], None):
        assert read_chat(**{name: value}) == read_chat()
        assert read_completion(**{name: value}) == read_completion()


@pytest.mark.parametrize("name", ["logit_bias", "stream_options", "response_format"])
def test_an_empty_list_is_an_empty_object_of_php(name: str) -> None:
    assert read_chat(**{name: []}) == read_chat()
    assert read_completion(**{name: []}) == read_completion()


@pytest.mark.parametrize("stop", ["", [""], ["", ""], [], None, [None], ["", None]])
def test_empty_stop_texts_are_none(stop: Any) -> None:
    assert read_chat(stop=stop).requests[0].stop == ()
    assert read_chat(stop=["", "a", "a"]).requests[0].stop == ("a",)


def test_as_many_stop_texts_as_editors_send() -> None:
    texts = [f"<|{i}|>" for i in range(64)]
    assert read_chat(stop=texts).requests[0].stop == tuple(texts)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "n_predict"])
def test_minus_one_is_no_limit_of_tokens(name: str) -> None:
    for value in (-1, -1.0, -2, 128_000):
        assert read_chat(**{name: value}).requests[0].max_tokens == MODEL.max_seq_len
        assert read_completion(**{name: value}).requests[0].max_tokens == MODEL.max_seq_len
    assert read_completion(**{name: 5}).requests[0].max_tokens == 5
    assert read_chat(max_completion_tokens=None, max_tokens=5).requests[0].max_tokens == 5


def test_names_and_numbers_of_other_servers() -> None:
    assert read_chat(repeat_penalty=1.3).requests[0].repetition_penalty == 1.3
    assert read_chat(repetition_penalty=1.2, repeat_penalty=1.3).requests[0].repetition_penalty == 1.2
    assert read_chat(top_p=0).requests[0].is_greedy
    assert read_chat(top_k=10**12).requests[0].top_k == 2**31 - 1
    assert read_chat(logprobs=0).requests[0].logprobs is None
    assert read_completion(logprobs=0).requests[0].logprobs == 0


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant"])
def test_a_message_without_content_is_an_empty_one(role: str) -> None:
    for message in ({"role": role, "content": None}, {"role": role}, {"role": role, "content": []}):
        said = read_chat(messages=[{"role": "user", "content": "hi"}, message]).requests[0].messages
        assert said is not None
        assert said[1]["content"] == ""
    called: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": [], "refusal": None, "name": None}
    assert read_chat(messages=[{"role": "user", "content": "hi"}, called]).requests[0].messages == (
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": ""},
    )


def test_texts_under_other_types() -> None:
    parts = ["a", {"text": "b"}, {"type": "input_text", "text": "c"}, {"type": "output_text", "text": "d"}]
    parts.append({"type": "refusal", "refusal": "e"})
    assert read_chat(messages=[{"role": "user", "content": parts}]).requests[0].messages == (
        {"role": "user", "content": "abcde"},
    )


def test_messages_and_their_parts() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts, "name": "ada"}]
    [request] = read_chat(messages=messages).requests
    assert request.messages == ({"role": "system", "content": "be brief"}, {"role": "user", "content": "one two"})


def test_kinds_of_prompts() -> None:
    assert [r.prompt for r in read_completion(prompt=["a", "b"], n=2).requests] == ["a", "a", "b", "b"]
    assert [r.prompt_tokens for r in read_completion(prompt=[1, 2]).requests] == [(1, 2)]
    assert [r.prompt_tokens for r in read_completion(prompt=[[1, 2], [3]]).requests] == [(1, 2), (3,)]


CHAT_REFUSALS: list[tuple[str, Any, str]] = [
    ("messages", None, "list of at least one"),
    ("messages", [], "list of at least one"),
    ("messages", "hello", "should be a list, it is a string"),
    ("messages", ["hello"], "should be an object"),
    ("messages", [{"role": "user", "content": ""}], "every content is empty"),
    ("messages", [{"role": "user"}], "every content is empty"),
    ("messages", [{"role": "user", "content": 5}], "it is a number"),
    ("messages", [{"role": "function", "content": "x"}], "should be one of system, user, assistant, tool, developer"),
    ("messages", [{"role": "tool", "content": "x"}], "tool_call_id should be a text"),
    ("messages", [{"role": ["user"], "content": "x"}], "should be one of"),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "reads text only"),
    ("messages", [{"role": "user", "content": [{"type": "text"}]}], "should be a string"),
    ("messages", [{"role": "user", "content": [5]}], "should be an object"),
    ("tools", [{"type": "function"}], "with a function"),
    ("response_format", {"type": "xml"}, "should be one of text, json_object, json_schema"),
    ("response_format", {"type": "json_schema"}, "json_schema.schema should be an object, it is null"),
    ("response_format", ask_form({"properties": {"a": {"not": {}}}}), "schema.properties.a.not cannot be enforced"),
    ("response_format", ask_form({"type": "object", "properties": {"a": {"type": "x"}}}), "properties.a cannot be"),
    ("response_format", ask_form({"type": "integer", "minimum": 2, "maximum": 1}), "Unsatisfiable"),
    ("response_format", ask_form({"anyOf": [{"$ref": "#"}]}), "needs itself within itself"),
    ("modalities", ["audio"], "not supported"),
    ("logprobs", 5, "true or false"),
    ("top_logprobs", 5, "needs logprobs"),
    ("tool_choice", "required", "needs tools"),
    ("tool_choice", {"type": "function", "function": {"name": "f"}}, "needs tools"),
    ("think", "yes", "should be a boolean"),
    ("reasoning_effort", "huge", "one of none, minimal, low"),
    ("reasoning_effort", 3, "one of none, minimal, low"),
    ("reasoning_effort", ["low"], "one of none, minimal, low"),
    ("chat_template_kwargs", "x", "should be an object"),
    ("chat_template_kwargs", {"add_generation_prompt": False}, "none of a chat template's options"),
    ("chat_template_kwargs", {"a b": 1}, "none of a chat template's options"),
    ("chat_template_kwargs", {"a": "\ud800"}, "not UTF-8"),
    ("chat_template_kwargs", {"a": "x" * 2**16}, "at most 65536 bytes"),
    ("chat_template_kwargs", {"a": json.loads("[" * 40 + "]" * 40)}, "at most 32 objects"),
    ("messages", [{"role": "assistant", "content": "x", "reasoning_content": 5}], "should be a string"),
]
SHARED_REFUSALS: list[tuple[str, Any, str]] = [
    ("model", "gpt-5", "'tiny' is"),
    ("model", 5, "should be a string"),
    ("temperature", "hot", "should be a number, it is a string"),
    ("temperature", True, "should be a number, it is a boolean"),
    ("temperature", 2.1, "between 0 and 2"),
    ("temperature", 10**400, "too large"),
    ("temperature", math.inf, "too large"),
    ("top_p", -0.1, "0 or more"),
    ("top_p", 1.1, "at most 1"),
    ("top_k", 1.5, "whole number, it is 1.5"),
    ("top_k", -2, "-1 or more"),
    ("min_p", -0.1, "between 0 and 1"),
    ("presence_penalty", 2.1, "between -2 and 2"),
    ("frequency_penalty", -2.1, "between -2 and 2"),
    ("repetition_penalty", 0, "between 0.01"),
    ("max_tokens", 0, "1 or more"),
    ("max_tokens", -3, "-2 or more"),
    ("max_completion_tokens", 0, "1 or more"),
    ("n_predict", 0, "1 or more"),
    ("max_tokens", "5", "whole number, it is a string"),
    ("n", 0, "between 1 and"),
    ("n", 65, "between 1 and"),
    ("n", 10**300, "between 1 and"),
    ("seed", 2**64, "between"),
    ("seed", 1.5, "whole number"),
    ("stop", [str(i) for i in range(65)], "at most 64 texts"),
    ("stop", ["x" * 1025], "1 to 1024 bytes"),
    ("stop", "\ud800", "not UTF-8"),
    ("stop", [1], "list of strings, one of them is a number"),
    ("stop", [False], "list of strings, one of them is a boolean"),
    ("stop", {}, "it is an object"),
    ("stream", 1, "true or false"),
    ("stream_options", [1], "should be an object"),
    ("stream_options", {"include_usage": 1}, "true or false"),
    ("ignore_eos", "yes", "true or false"),
    ("logit_bias", [[1, 5]], "should be an object"),
    ("logit_bias", {"x": 1}, "should name tokens"),
    ("logit_bias", {"1000": 1}, "from 0 to 999"),
    ("logit_bias", {"-1": 1}, "should name tokens"),
    ("logit_bias", {"²": 1}, "should name tokens"),
    ("logit_bias", {"1": 101}, "between -100 and 100"),
    ("logit_bias", {"1": "x"}, "should be a number"),
    ("functions", [{"name": "f"}], "older form"),
    ("function_call", {"name": "f"}, "older form"),
    *[
        (name, value, "not supported")
        for name, value in {
            "echo": True,
            "suffix": "x",
            "audio": {"voice": "x"},
            "web_search_options": {"a": 1},
            "grammar": "root ::= x",
            "json_schema": {"type": "object"},
            "structured_outputs": {"json": {}},
            "guided_json": {"type": "object"},
            "guided_choice": ["a"],
            "stop_token_ids": [5],
            "bad_words": ["x"],
            "min_tokens": 5,
            "use_beam_search": True,
            "length_penalty": 1.5,
            "mirostat": 2,
            "typical_p": 0.5,
            "xtc_probability": 0.1,
            "dry_multiplier": 0.8,
            "top_n_sigma": 1,
            "prompt_logprobs": 1,
            "include_stop_str_in_output": True,
            "truncate_prompt_tokens": 5,
            "continue_final_message": True,
            "add_generation_prompt": False,
            "chat_template": "{{ messages }}",
        }.items()
    ],
]
COMPLETION_REFUSALS: list[tuple[str, Any, str]] = [
    ("prompt", None, "should be a string"),
    ("prompt", "", "empty"),
    ("prompt", [], "empty"),
    ("prompt", [[]], "not be empty"),
    ("prompt", ["a", ""], "not be empty"),
    ("prompt", {"a": 1}, "it is an object"),
    ("prompt", [1, "a"], "tokens"),
    ("prompt", ["a", 1], "one kind"),
    ("prompt", [1000], "from 0 to 999"),
    ("prompt", [-1], "tokens"),
    ("prompt", [True], "tokens"),
    ("prompt", [1.0], "tokens"),
    ("prompt", [1] * MODEL.max_seq_len, "context is 256"),
    ("prompt", ["a"] * 65, "64 prompts"),
    ("prompt", "\ud800", "not UTF-8"),
    ("prompt", "x" * (4 * 2**20 + 1), "no context holds it"),
    ("best_of", 2, "not supported"),
    ("logprobs", 21, "between 0 and 20"),
    ("logprobs", True, "whole number"),
]


@pytest.mark.parametrize(("name", "value", "reason"), [*CHAT_REFUSALS, *SHARED_REFUSALS])
def test_chat_refusals(name: str, value: Any, reason: str) -> None:
    with pytest.raises(BadField, match=reason) as caught:
        read_chat(**{name: value})
    check_form(caught.value, name)


@pytest.mark.parametrize(("name", "value", "reason"), [*COMPLETION_REFUSALS, *SHARED_REFUSALS])
def test_completion_refusals(name: str, value: Any, reason: str) -> None:
    with pytest.raises(BadField, match=reason) as caught:
        read_completion(**{name: value})
    check_form(caught.value, name)


def check_form(error: BadField, name: str) -> None:
    """Check that an error has its form: the field by its name, and what would be right."""
    status, body = replies.describe_error(error)
    told = body["error"]
    assert (status, told["type"]) == (404 if told["code"] == "model_not_found" else 400, "invalid_request_error")
    assert re.split(r"[.\[]", str(told["param"]))[0] == name
    assert told["hint"] or "should" in told["message"] or "needs" in told["message"]
    assert not told["hint"] or told["message"].endswith(f" (hint: {told['hint']})")


def test_prompts_times_n_is_bounded() -> None:
    assert len(read_completion(prompt=["a"] * 8, n=8).requests) == 64
    with pytest.raises(UsageError, match="at most 64"):
        read_completion(prompt=["a"] * 9, n=8)
    with pytest.raises(UsageError, match=f"{MAX_BIASES} tokens"):
        Request(0, "a", 1, logit_bias=tuple((i, 0.0) for i in range(MAX_BIASES + 1)))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe\xff", "not valid JSON"),
        (b"[1]", "object, it is a list"),
        (b"null", "object, it is null"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_bodies_that_are_no_json(body: bytes, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        openai.parse_body(body)


def test_a_request_travels_to_the_workers_whole() -> None:
    asked = read_chat(logit_bias={"7": 1}, stop=["x"], logprobs=True, n=2, seed=4)
    for request in asked.requests:
        assert decode(encode(GenerateOrder(request))) == GenerateOrder(request)


# Writing.

STATS = Stats(7, 2, 0.1, 0.2, 0.1, 1000, cached_tokens=3)


def make_reply(asked: openai.ApiRequest) -> replies.Reply:
    return replies.Reply(asked, reply_id="1", created=5, name="tiny", model=MODEL)


def test_a_stream_and_a_whole_say_the_same() -> None:
    asked = read_chat(n=2, stream=True, stream_options={"include_usage": True})
    reply = make_reply(asked)
    chunks = list(reply.start())
    for index, event in [(0, Token(1, 5, "a")), (1, Token(2, 6, "")), (1, Token(2, 7, "é"))]:
        chunks += reply.take(index, event)
    chunks += [
        *reply.take(1, Done(2, "stop", STATS)),
        *reply.take(0, Done(1, "length", STATS, "b")),
        *filter(None, reply.end()),
    ]
    texts = ["", ""]
    for chunk in chunks[:-1]:
        assert chunk["usage"] is None
        [choice] = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
    whole = reply.whole()
    assert [c["message"]["content"] for c in whole["choices"]] == texts == ["ab", "é"]
    assert [c["finish_reason"] for c in whole["choices"]] == ["length", "stop"]
    assert chunks[-1]["usage"] == whole["usage"]
    assert whole["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 4,
        "total_tokens": 11,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


def test_logprobs_in_both_shapes() -> None:
    tokens = [Token(1, 5, "", -0.25, [(5, "a", -0.25), (6, "\ufffd", -math.inf)]), Token(1, 6, "ab", math.nan)]
    chat = make_reply(read_chat(logprobs=True, top_logprobs=2))
    legacy = make_reply(read_completion(logprobs=1))
    for reply in (chat, legacy):
        for token in tokens:
            list(reply.take(0, token))
        list(reply.take(0, Done(1, "stop", STATS)))
    a = {"token": "a", "logprob": -0.25, "bytes": [97]}
    broken = {"token": "\ufffd", "logprob": -9999.0, "bytes": None}
    assert chat.whole()["choices"][0]["logprobs"]["content"] == [
        {**a, "top_logprobs": [a, broken]},
        {"token": "ab", "logprob": -9999.0, "bytes": [97, 98], "top_logprobs": []},
    ]
    assert legacy.whole()["choices"][0]["logprobs"] == {
        "tokens": ["a", "ab"],
        "token_logprobs": [-0.25, -9999.0],
        "top_logprobs": [{"a": -0.25}, {}],
        "text_offset": [0, 0],
    }
    json.loads(replies.encode_json(chat.whole()))


def test_events_are_ascii_lines() -> None:
    event = replies.encode_event({"text": "é\u2028\n\ud800"})
    assert event.startswith(b"data: ")
    assert event.count(b"\n") == 2
    assert event.isascii()
    assert replies.encode_event(None) == b"data: [DONE]\n\n"


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (UsageError("x"), 400, "invalid_request_error"),
        (BadField("x", param="n", code="model_not_found"), 404, "invalid_request_error"),
        (QueueFull("x"), 429, "rate_limit_error"),
        (errors.StateError("x"), 503, "server_error"),
        (PeerLost("x", host="mac2", hint="moectl doctor"), 503, "server_error"),
        (errors.Unreachable("x"), 503, "server_error"),
        (errors.IntegrityError("x"), 500, "server_error"),
        (MoectlError("x"), 500, "server_error"),
    ],
)
def test_errors_have_openais_shape(error: MoectlError, status: int, kind: str) -> None:
    found, body = replies.describe_error(error)
    assert (found, body["error"]["type"], body["error"]["kind"]) == (status, kind, type(error).__name__)
    assert set(body["error"]) == {"message", "type", "param", "code", "kind", "hint", "host"}
