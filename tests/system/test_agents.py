"""Agents of others, unmodified, against two ranks: a text turn and a tool round trip each.

The model follows a script; all else is real: the agent, HTTP, template, parser and lockstep.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.support.agents import AGENTS, CALLS, install
from tests.support.scripted_caller import ADD, AFTER, WITHOUT, write_caller
from tests.support.serving import serve


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serve(write_caller(tmp_path_factory.mktemp("model") / "caller", {**CALLS, **ADD})) as url:
        yield url


SDKS = ("openai@7.59.0", "@anthropic-ai/sdk@1.14.0")
SCRIPT = """
import OpenAI from "openai";
import Anthropic from "@anthropic-ai/sdk";
const [base, model] = process.argv.slice(2);
const schema = {type: "object", properties: {a: {type: "integer"}, b: {type: "integer"}}};
const question = [{role: "user", content: "2 + 3?"}];
const add = ({a, b}) => String(a + b);
const said = [];

const openai = new OpenAI({baseURL: base + "/v1", apiKey: "none", maxRetries: 0});
const hello = [{role: "user", content: "Say hello"}];
said.push((await openai.chat.completions.create({model, messages: hello})).choices[0].message.content);
const functions = [{type: "function", function: {name: "add", parse: JSON.parse, parameters: schema, function: add}}];
const runner = openai.chat.completions.runTools({model, stream: true, messages: question, tools: functions});
said.push(await runner.finalContent());

let tools = [{type: "function", name: "add", parameters: schema, strict: false}];
const first = await openai.responses.stream({model, input: question, tools}).finalResponse();
const call = first.output.find(item => item.type === "function_call");
const result = {type: "function_call_output", call_id: call.call_id, output: add(JSON.parse(call.arguments))};
said.push((await openai.responses.create({model, tools, input: [...question, ...first.output, result]})).output_text);

const anthropic = new Anthropic({baseURL: base, apiKey: "none", maxRetries: 0});
tools = [{name: "add", input_schema: schema}];
const turn = await anthropic.messages.stream({model, max_tokens: 200, messages: question, tools}).finalMessage();
const use = turn.content.find(block => block.type === "tool_use");
const results = [{type: "tool_result", tool_use_id: use.id, content: add(use.input)}];
const past = [...question, {role: "assistant", content: turn.content}, {role: "user", content: results}];
said.push((await anthropic.messages.create({model, max_tokens: 200, messages: past, tools})).content[0].text);
console.log(JSON.stringify(said));
"""


@pytest.mark.long
def test_the_official_clients_of_node(url: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    place = install(SDKS, tmp_path_factory.getbasetemp())
    (tmp_path / "node_modules").symlink_to(place / "node_modules")
    (tmp_path / "ask.mjs").write_text(SCRIPT)
    with openai.OpenAI(base_url=url, api_key="none") as client:
        model = client.models.list().data[0].id
    done = subprocess.run(
        ["node", str(tmp_path / "ask.mjs"), url.removesuffix("/v1"), model],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [WITHOUT, AFTER, AFTER, AFTER]


@pytest.mark.long
@pytest.mark.parametrize("name", AGENTS)
def test_an_agent_answers_and_uses_its_shell(
    name: str, url: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    agent = AGENTS[name]
    program = agent.install(tmp_path_factory.getbasetemp())
    with openai.OpenAI(base_url=url, api_key="none") as client:
        model = client.models.list().data[0].id
    base = url.removesuffix("/v1") if name == "claude" else url
    assert WITHOUT in agent.ask(program, tmp_path / "text", base, model, "Say hello")
    assert AFTER in agent.ask(program, tmp_path / "tool", base, model, "Run it")
    assert (tmp_path / "tool" / "made.txt").read_text() == "one-two\n"
