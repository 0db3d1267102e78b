"""Two deployments on the same hosts behind one server, real ranks over the ring: a request's model decides."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from moectl.demo import demo_dir
from moectl.hosts.hostfile import Host
from moectl.paths import state_dir
from moectl.session.deployment import DeployedRank, Deployment, write_deployment
from moectl.shards import prepare
from moectl.shards.prepare import Wanted
from tests.support.ring import process_env
from tests.support.running import wait_for, workers

FOUR, SIXTEEN = "moectl-demo:4bit", "moectl-demo:16bit"
QUESTION = "What is expert parallelism?"


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The demo for two ranks, at four bits and as it is."""
    root = tmp_path_factory.mktemp("sets")
    return [
        prepare.shard(str(demo_dir()), Wanted(nodes=2, bits=bits), directory=root / name).directory
        for name, bits in (("toy-q4", 4), ("toy-bf16", None))
    ]


@dataclass
class Server:
    """One that runs, and what it said."""

    url: str
    process: subprocess.Popen[str]
    said: list[str]

    def ask(self, model: str | None, **more: Any) -> dict[str, Any]:
        with httpx2.Client(timeout=120) as http:
            reply = http.post(f"{self.url}/chat/completions", json=_body(model, **more))
        assert reply.status_code == 200, reply.text
        told: dict[str, Any] = reply.json()
        return told

    def stream(self, model: str, **more: Any) -> Iterator[str]:
        with (
            httpx2.Client(timeout=120) as http,
            http.stream("POST", f"{self.url}/chat/completions", json=_body(model, stream=True, **more)) as reply,
        ):
            yield from filter(None, reply.iter_lines())

    def models(self) -> dict[str, dict[str, Any]]:
        with httpx2.Client(timeout=60) as http:
            return {one["id"]: one for one in http.get(f"{self.url}/models").json()["data"]}

    @property
    def loads(self) -> list[str]:
        return [line for line in self.said if line.startswith("Loading ")]


def _body(model: str | None, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": QUESTION}]
    return {"model": model, "messages": messages, "temperature": 0, "max_tokens": 24, **more}


def text_of(lines: list[str]) -> str:
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert not [chunk for chunk in chunks if "error" in chunk]
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)


@contextlib.contextmanager
def serve(sets: list[Path], *flags: str) -> Iterator[Server]:
    """Serve all sets as deployments on two hosts that are this machine; the last one is the current deployment."""
    for directory in sets:
        rank = DeployedRank(Host("localhost"), sys.executable, str(state_dir()), str(directory))
        write_deployment(Deployment(directory.name, str(directory), (rank, rank)))
    command = [sys.executable, "-m", "moectl", "serve", "--port", "0", "--json", *flags]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=process_env()
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stdout.readline()
        assert line, process.stderr.read()
        server = Server(json.loads(line)["url"], process, [])
        reading = threading.Thread(target=lambda: server.said.extend(process.stderr or ()))
        reading.start()
        try:
            yield server
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)
            reading.join(20)
    assert process.returncode == 130, server.said
    wait_for(lambda: not workers())


def test_a_requests_model_decides(sets: list[Path]) -> None:
    with serve(sets, "--alias", "claude-*", "--alias", f"four={FOUR}") as server:
        before = server.models()
        assert [(name, one["loaded"], one["demo"]) for name, one in before.items()] == [
            (SIXTEEN, True, True),
            (FOUR, False, True),
        ]
        assert (before[SIXTEEN]["aliases"], before[FOUR]["aliases"]) == (["claude-*"], ["four"])
        assert (before[SIXTEEN]["tools"], before[FOUR]["tools"]) == ("text", None)
        assert before[FOUR]["context_length"] == before[SIXTEEN]["max_model_len"] == 2048
        first = server.ask("claude-opus")
        assert first["model"] == server.ask(None)["model"] == SIXTEEN
        # Eight ask for the other one while an answer is on its way.
        running = server.stream(SIXTEEN, max_tokens=120, ignore_eos=True)
        begun = [next(running) for _ in range(4)]
        with ThreadPoolExecutor(8) as pool:
            others = [pool.submit(server.ask, "four") for _ in range(7)]
            streamed = pool.submit(lambda: list(server.stream(FOUR)))
            whole = begun + list(running)
            said = {each.result()["choices"][0]["message"]["content"] for each in others}
        assert whole[-1] == "data: [DONE]"
        assert sum('"delta":{"content"' in line for line in whole) > 60
        assert said == {text_of(streamed.result())}
        assert f": moectl: Loading {FOUR}." in streamed.result()
        assert [line.strip() for line in server.loads] == [f"Loading {SIXTEEN}", f"Loading {FOUR}."]
        now = server.models()
        assert [one["loaded"] for one in now.values()] == [False, True]
        assert now[FOUR]["tools"] == "text"
        assert server.ask("default")["model"] == FOUR
        again = server.ask("toy-bf16")  # the shard set's name
        assert again["choices"][0]["message"] == first["choices"][0]["message"]
        assert len(server.loads) == 3
        # `run` joins the server, and its question names its own model; the one that is loaded is looked at.
        command = [sys.executable, "-m", "moectl"]
        status = json.loads(subprocess.check_output([*command, "status", "--json"], env=process_env()))
        assert {(one["rank"], one["model"], one["state"]) for one in status["hosts"]} == {
            (rank, "toy-bf16", "running") for rank in range(2)
        }
        told = subprocess.check_output([*command, "run", QUESTION, "--max-tokens", "24"], env=process_env(), text=True)
        assert told.strip() == first["choices"][0]["message"]["content"].strip()
        assert len(server.loads) == 3


@pytest.mark.long  # over fakes in tests/server/test_models.py: test_a_load_that_fails_…
def test_a_worker_that_dies_while_it_loads_is_told_and_the_next_request_loads_again(sets: list[Path]) -> None:
    with serve(sets) as server:
        first = server.ask(SIXTEEN)
        old = set(workers())
        lines = server.stream(FOUR)
        told = [next(lines)]
        wait_for(lambda: bool(set(workers()) - old))
        for worker in set(workers()) - old:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
        told += lines
        error = json.loads(told[-2].removeprefix("data: "))["error"]
        assert f"{FOUR} cannot be loaded" in error["message"]
        again = server.ask(SIXTEEN)
        assert again["choices"][0]["message"] == first["choices"][0]["message"]
        assert server.ask(FOUR)["model"] == FOUR


@pytest.mark.long  # over fakes in tests/server/test_models.py: test_an_idle_model_… and test_a_pinned_model_stays
def test_an_idle_server_keeps_no_model_and_a_pin_keeps_one(sets: list[Path]) -> None:
    with serve(sets[:1], "--keep-alive", "0", "--any-model") as server:
        first = server.ask("gpt-4")
        assert first["model"] == "moectl-demo"
        wait_for(lambda: not workers())
        assert server.models()["moectl-demo"]["loaded"] is False
        assert server.ask("gpt-4")["choices"][0]["message"] == first["choices"][0]["message"]
    with serve(sets, "--pin", FOUR) as server, httpx2.Client(timeout=60) as http:
        refused = http.post(f"{server.url}/chat/completions", json=_body(SIXTEEN))
        assert refused.status_code == 503
        assert "start the server without --pin" in refused.json()["error"]["message"]
        assert server.ask(FOUR)["model"] == FOUR
