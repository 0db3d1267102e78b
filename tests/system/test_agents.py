"""Agents of others, unmodified, against two ranks: a text turn and a tool round trip each.

The model follows a script; all else is real: the agent, HTTP, template, parser and lockstep.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.support.agents import AGENTS, CALLS
from tests.support.scripted_caller import AFTER, WITHOUT, write_caller
from tests.support.serving import serve


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serve(write_caller(tmp_path_factory.mktemp("model") / "caller", CALLS)) as url:
        yield url


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
