"""Answers of two ranks that are held to a form: by the official clients, in each protocol."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest

from moectl.demo import demo_dir
from tests.support.schemas import make_schema
from tests.support.serving import serve

TALK: list[Any] = [{"role": "user", "content": "Tell me, as JSON."}]
NUMBERS = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "op": {"enum": ["add", "sub"]}},
    "required": ["a", "op"],
}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    with serve(demo_dir()) as url, openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def form(schema: Any) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}


def test_json_by_chat_and_responses(client: openai.OpenAI) -> None:
    for seed in range(3):
        schema = make_schema(random.Random(seed))
        more: Any = {"response_format": form(schema), "temperature": 1.2, "seed": seed}
        [choice] = client.chat.completions.create(model="", messages=TALK, **more).choices
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content or ""), schema)
    text: Any = {"format": {"type": "json_schema", "name": "answer", "schema": NUMBERS}}
    jsonschema.validate(json.loads(client.responses.create(model="", input=TALK, text=text).output_text), NUMBERS)
    impossible: Any = form({"type": "object", "properties": {"a": {"enum": []}}, "required": ["a"]})
    with pytest.raises(openai.BadRequestError, match="Unsatisfiable"):
        client.chat.completions.create(model="", messages=TALK, response_format=impossible)


def test_calls_that_have_to_come(client: openai.OpenAI) -> None:
    functions = [{"name": name, "parameters": NUMBERS} for name in ("first", "second")]
    tools: Any = [{"type": "function", "function": function} for function in functions]
    named: Any = {"type": "function", "function": {"name": "second"}}
    for choice in ("required", named):
        [answer] = client.chat.completions.create(
            model="", messages=TALK, tools=tools, tool_choice=choice, parallel_tool_calls=False, temperature=1.2, seed=1
        ).choices
        assert answer.finish_reason == "tool_calls"
        assert not answer.message.content
        call: Any = next(iter(answer.message.tool_calls or ()))
        assert call.type == "function"
        assert call.function.name in (["second"] if choice is named else ["first", "second"])
        jsonschema.validate(json.loads(call.function.arguments), NUMBERS)
