"""A model that thinks, on two ranks: at the command line, and asked by OpenAI's own client."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from moectl.server.client import find_running
from tests.support.ring import process_env
from tests.support.scripted import write_scripted

SHOWN = "Thinking...\nx\n...done thinking.\n\nyz\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scripted(tmp_path_factory.mktemp("model") / "scripted")


def run(model: Path, *words: str, check: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moectl", "run", "--local", "2", "--model", str(model)]
    command += ["--keep-alive", "1m", *words, "2+2?"]
    done = subprocess.run(
        command, capture_output=True, text=True, input="", env=process_env(), timeout=300, check=False
    )
    assert done.returncode == check, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def test_a_model_thinks_and_answers(model: Path) -> None:
    try:
        first = run(model, "-v")
        assert first.stdout == SHOWN
        assert "Sampling: temperature 0.7, top_k 1.\n" in first.stderr
        assert run(model, "--hide-thinking", "-t", "0").stdout == "yz\n"
        assert run(model, "--no-think").stdout == "yz\n"
        cut = run(model, "--max-tokens", "2")
        assert cut.stdout == "Thinking...\nx\n"
        assert "before the answer" in cut.stderr
        document = json.loads(run(model, "--json").stdout)
        assert (document["thinking"], document["text"], document["finish_reason"]) == ("x", "yz", "stop")
        assert run(model, "--raw", "--max-tokens", "1").returncode == 0
        [path] = find_running()
        _ask(path)
    finally:
        run(model, "--keep-alive", "0")


def _ask(path: Path) -> None:
    with (
        httpx2.Client(transport=httpx2.HTTPTransport(uds=str(path))) as http,
        openai.OpenAI(base_url="http://moectl/v1", api_key="none", http_client=http, max_retries=0) as client,
    ):

        def ask(**more: Any) -> Any:
            talk: Any = [
                {"role": "user", "content": "2+2?"},
                {"role": "assistant", "content": "yz", "reasoning_content": "x"},
                {"role": "user", "content": "Sure? <think>"},
            ]
            return client.chat.completions.create(model="", messages=talk, **more)

        whole = ask()
        assert (whole.choices[0].message.reasoning_content, whole.choices[0].message.content) == ("x", "yz")
        assert whole.usage.completion_tokens_details.reasoning_tokens == 3  # with the markers
        deltas = [chunk.choices[0].delta for chunk in ask(stream=True)]
        assert "".join(getattr(delta, "reasoning_content", "") for delta in deltas) == "x"
        assert "".join(delta.content or "" for delta in deltas) == "yz"
        for more in ({"chat_template_kwargs": {"enable_thinking": False}}, {"think": False}):
            plain = ask(extra_body=more).choices[0].message
            assert plain.content == "yz"
            assert not hasattr(plain, "reasoning_content")
        assert ask(reasoning_effort="none").choices[0].message.content == "yz"
        stopped = ask(stop=["x", "z"]).choices[0]
        assert (stopped.message.reasoning_content, stopped.message.content) == ("x", "y")
        assert stopped.finish_reason == "stop"
        cut = ask(max_tokens=2).choices[0]
        assert (cut.message.content, cut.message.reasoning_content, cut.finish_reason) == ("", "x", "length")
